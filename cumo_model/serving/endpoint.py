"""Answers of a server with an OpenAI-compatible interface, such as that of `python -m cumo_model serve`."""

import base64
import io
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from PIL import Image

from cumo_model.processing.pictures import load_image
from cumo_model.serving.messages import Message, check_conversation, picture_in, pictures_of
from cumo_model.serving.replies import CONTEXT, LENGTH, STOP, Reply, Stream
from cumo_model.serving.sampling import GREEDY, Sampling

Item, Result = TypeVar("Item"), TypeVar("Result")
TIMEOUT = 600.0  # seconds without a byte of an answer
WAIT = 0.2  # seconds after which a reader who waits for an answer can leave
KEY = "OPENAI_API_KEY"
END = object()
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
        options = {"api_key": os.environ.get(KEY) or "none", "timeout": TIMEOUT, "max_retries": 2}
        self._client = self._call(lambda: openai.OpenAI(base_url=url, **options))
        names = self._call(lambda: [found.id for found in self._client.models.list().data])
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
        read = lambda number: self.stream(talks[number], sampling).read()
        found = dict(at_once(read, range(len(talks)), self.at_once))
        return [found[number] for number in range(len(talks))]

    def _pieces(self, messages: Sequence[Message], sampling: Sampling):
        request = {"model": self.name, "messages": [_as_sent(m) for m in messages], **sampling.for_endpoint()}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        ask = lambda: self._client.chat.completions.create(**request, **options)
        longest = LENGTH
        try:
            chunks = self._call(ask)
        except RefusedError as refused:
            # a length that the context has no room for; without one the server takes what there is
            if re.search("context|max_tokens.*large", str(refused)):
                del request["max_tokens"]
                longest = CONTEXT
            elif "max_completion_tokens" in str(refused):  # the newer name
                request["max_completion_tokens"] = request.pop("max_tokens")
            else:
                raise
            chunks = self._call(ask)
        finish, usage = None, None
        try:
            for chunk in self._waiting(chunks):
                if chunk is None:
                    yield ""  # so that a stream can be stopped while the server is silent
                    continue
                usage = getattr(chunk, "usage", None) or usage
                for choice in (getattr(chunk, "choices", None) or [])[:1]:
                    if reason := choice.finish_reason:
                        finish = {"stop": STOP, "length": longest}.get(reason, reason)
                    if text := getattr(getattr(choice, "delta", None), "content", None):
                        yield text
        finally:  # a reader who leaves closes the connection, which ends the generation
            chunks.close()
        if finish is None:
            raise ValueError(f"endpoint {self._url} has not sent a complete answer")
        return finish, getattr(usage, "completion_tokens", None), getattr(usage, "prompt_tokens", None)

    def _waiting(self, chunks) -> Iterator[Any]:
        """The chunks of an answer as a thread receives them; None for each WAIT without one."""
        found: queue.SimpleQueue = queue.SimpleQueue()

        def receive():
            try:
                rest = iter(chunks)
                while (chunk := self._call(lambda: next(rest, None))) is not None:
                    found.put(chunk)
                found.put(END)
            except ValueError as error:
                found.put(error)

        threading.Thread(target=receive, name="cumo-receive", daemon=True).start()
        while True:
            try:
                chunk = found.get(timeout=WAIT)
            except queue.Empty:
                yield None
                continue
            if chunk is END:
                return
            if isinstance(chunk, ValueError):
                raise chunk
            yield chunk

    def _call(self, ask) -> Any:
        try:
            return ask()
        except self._openai.APIStatusError as error:
            kind = RefusedError if error.status_code in OF_CONVERSATION else ValueError
            where = "" if error.status_code != 404 else " (addresses of this interface often end with /v1)"
            told = f"refuses it ({error.status_code}): {told_by(error)}{where}"
            raise kind(f"endpoint {self._url} {told}") from None
        except self._openai.APIError as error:
            raise ValueError(f"endpoint {self._url} cannot be asked: {told_by(error)}") from None
        except (
            Exception
        ) as error:  # what a server sends that has another interface, or an address that is none
            told = f"{type(error).__name__}: {told_by(error)}"
            raise ValueError(f"endpoint {self._url} does not have OpenAI's interface: {told}") from None


def at_once(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator:
    """Pairs (item, result) of a function that waits for a server, in the order in which the results come.

    The threads do not keep the process from ending, so Ctrl-C does not wait for a server that is silent.
    """
    waiting, found, is_left = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for item in (items := list(items)):
        waiting.put(item)

    def work():
        while not is_left.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found.put((item, function(item), None))
            except BaseException as error:
                found.put((item, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, name="cumo-ask", daemon=True).start()
    try:
        for _ in items:
            item, result, error = found.get()
            if error is not None:
                raise error
            yield item, result
    finally:
        is_left.set()


def told_by(error: Exception) -> str:
    """What an error of openai says, in one line, with its cause."""
    body = getattr(error, "body", None)
    told = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    cause = error.__cause__ if str(error).startswith("Connection error") else None
    return " ".join(str(told or (f"{error} {cause}" if cause else error)).split())


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
