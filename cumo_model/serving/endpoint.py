"""Answers of a server with an OpenAI-compatible interface, such as that of `python -m cumo_model serve`."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from cumo_model.processing.pictures import load_image
from cumo_model.serving.messages import Message, check_conversation, picture_in, pictures_of
from cumo_model.serving.replies import CONTEXT, LENGTH, STOP, Reply, Stream
from cumo_model.serving.sampling import GREEDY, Sampling

TIMEOUT = 600.0  # seconds without a byte of an answer
KEY = "OPENAI_API_KEY"
OF_CONVERSATION = (400, 413, 422)  # codes of HTTP that concern the conversation, not the server


class RefusedError(ValueError):
    """The server refuses a conversation, and may answer others."""


class Endpoint:
    """A running server.

    Args:
        url: address of its interface, such as http://127.0.0.1:8000/v1.
        model: name of the model; by default the first that the server lists.
        at_once: number of requests of `answers` at the same time.

    Raises:
        ValueError: the package openai is missing, or the server cannot be reached or has no such model.
    """

    template = None  # the server's own

    def __init__(self, url: str, model: str | None = None, at_once: int = 16):
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"endpoint must be an address such as http://127.0.0.1:8000/v1, got {url!r}")
        try:
            import openai
        except ImportError:
            raise ValueError("an endpoint needs the package openai: pip install 'cumo[endpoint]'") from None
        self._openai, self._url, self.at_once = openai, url, at_once
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get(KEY) or "none", timeout=TIMEOUT, max_retries=2
        )
        names = [found.id for found in self._call(lambda: self._client.models.list()).data]
        if model is None and not names:
            raise ValueError(f"endpoint {url} must list a model, got none")
        if model is not None and model not in names:
            raise ValueError(f"model must be one of endpoint {url}, {', '.join(names)}, got {model!r}")
        self.name = model or names[0]

    def check(self, messages: Sequence[Message]) -> None:
        """
        Raises:
            ValueError: as `check_conversation`; the length of a conversation is known to the server only.
        """
        check_conversation(messages)

    def stream(self, messages: Sequence[Message], sampling: Sampling = GREEDY) -> Stream:
        """Ask for the answer to a conversation; arguments as in `Local.stream`.

        Raises:
            ValueError: the conversation is not one, or the server refuses it; the latter also while the
                stream is read.
        """
        check_conversation(messages)
        return Stream(self._pieces(messages, sampling))

    def answers(self, talks: Sequence[Sequence[Message]], sampling: Sampling = GREEDY) -> list[Reply]:
        """The answers to several conversations, asked for at the same time."""
        for number, messages in enumerate(talks, 1):
            try:
                check_conversation(messages)
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from None
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda messages: self.stream(messages, sampling).read(), talks))

    def _pieces(self, messages: Sequence[Message], sampling: Sampling):
        request = {"model": self.name, "messages": [_as_sent(m) for m in messages], **sampling.for_endpoint()}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        ask = lambda: self._client.chat.completions.create(**request, **options)
        longest = LENGTH
        try:
            chunks = self._call(ask)
        except RefusedError:
            # servers may refuse a length that the context has no room for; without it they take what there is
            del request["max_tokens"]
            longest = CONTEXT
            chunks = self._call(ask)
        finish, usage = STOP, None
        with chunks:  # a reader who leaves closes the connection, which ends the generation
            rest = iter(chunks)
            while (chunk := self._call(lambda: next(rest, None))) is not None:
                usage = chunk.usage or usage
                for choice in chunk.choices[:1]:
                    if choice.finish_reason:
                        finish = longest if choice.finish_reason == "length" else STOP
                    if choice.delta.content:
                        yield choice.delta.content
        return finish, usage and usage.completion_tokens, usage and usage.prompt_tokens

    def _call(self, ask) -> Any:
        try:
            return ask()
        except self._openai.APIStatusError as error:
            kind = RefusedError if error.status_code in OF_CONVERSATION else ValueError
            raise kind(f"endpoint {self._url} refuses it ({error.status_code}): {_told(error)}") from None
        except self._openai.APIError as error:
            raise ValueError(f"endpoint {self._url} cannot be asked: {_told(error)}") from None


def _told(error: Exception) -> str:
    body = getattr(error, "body", None)
    told = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(told or error).split())


def _as_sent(message: Message) -> Message:
    """A message as in OpenAI's interface, with its pictures as data URLs."""
    if isinstance(message["content"], str) or not pictures_of(message):
        return message
    return {**message, "content": [_part(part) for part in message["content"]]}


def _part(part: dict) -> dict:
    if part["type"] == "text":
        return part
    return {"type": "image_url", "image_url": {"url": data_url(load_image(picture_in(part)))}}


def data_url(picture: Image.Image) -> str:
    """A picture as PNG in a data URL, without loss."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
