"""A judge: a language model behind an OpenAI-compatible interface, whose answers are kept in a file.

The file has JSON lines; each names its request by a digest of model, texts and options, so that nothing is
asked twice, whichever run asks. It is written as answers come: a run that is killed loses none of them.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cumo_model.serving.answer_file import claimed
from cumo_model.serving.endpoint import at_once, told_by

KEY = "CUMO_JUDGE_KEY"  # not OPENAI_API_KEY: that one goes to the endpoint which answers the questions
OPENAI = "https://api.openai.com/v1"
TIMEOUT = 300.0  # seconds without a byte
AGAIN = 5  # times a request is sent again, by openai's client with a growing pause of at most 8 s
EMPTY = 3  # times an answer may be empty


class Judge:
    """A judge; close it, or use it in a `with` block.

    Args:
        model: name of the model, such as gpt-4-0613.
        cache: the file of its answers; it is created where there is none.
        url: address of the interface.
        at_once: number of requests at the same time.
        again: times a request is sent again after a failure of the server or of the connection.
        progress: whether `all` may show a progress bar.

    Attributes:
        model: as given.
        asked: number of answers that came from the server, not from the file.

    Raises:
        ValueError: there is no key in the environment, the package openai is missing, or the file cannot be
            used.
    """

    def __init__(
        self,
        model: str,
        cache: str | os.PathLike,
        url: str = OPENAI,
        at_once: int = 8,
        again: int = AGAIN,
        progress: bool = True,
    ):
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"judge must be an address such as {OPENAI}, got {url!r}")
        if at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {at_once}")
        if not (key := os.environ.get(KEY)):
            raise ValueError(
                f"a judge needs a key in the environment variable {KEY} (any text, if the server wants none)"
            )
        try:
            import openai
        except ImportError:
            raise ValueError("a judge needs the package openai: pip install 'cumo[eval]'") from None
        self.model, self.asked = model, 0
        self._openai, self._url, self._at_once, self._progress = openai, url, at_once, progress
        try:
            self._client = openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT, max_retries=again)
        except Exception as error:  # an address that is none
            raise ValueError(f"judge {url!r} cannot be asked: {told_by(error)}") from None
        self._lock = threading.Lock()
        self._answers: dict[str, str] = {}
        self._open(Path(cache))

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and the connections."""
        self._client.close()
        with self._lock:
            self._file.close()

    def __call__(
        self, prompt: str, system: str | None = None, temperature: float = 0.0, max_tokens: int = 1024
    ) -> str:
        """The judge's answer to one prompt; arguments and errors as in `all`."""
        return self.all([prompt], system, temperature, max_tokens)[0]

    def all(
        self,
        prompts: Sequence[str],
        system: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        is_usable: Callable[[str], bool] = bool,
    ) -> list[str]:
        """The judge's answers to several prompts, asked for at the same time.

        Args:
            prompts: the texts. A lone surrogate in them is sent as "?".
            system: a text for the system's place.
            temperature: of its sampling.
            max_tokens: the longest answer.
            is_usable: whether an answer is one. Others are asked for again, EMPTY times in all, and the last
                one is given but not kept, so that a later run asks once more.

        Raises:
            ValueError: the server cannot be reached, or refuses the key or a prompt, or answers with nothing
                several times. What others were answered until then is in the file.
        """
        options = {"temperature": temperature, "max_tokens": max_tokens}
        requests = [self._request(prompt, system, options) for prompt in prompts]
        keys = [_digest({"url": self._url, **request}) for request in requests]
        new = {key: r for key, r in zip(keys, requests, strict=True) if key not in self._answers}
        shown = self._progress and sys.stderr.isatty()
        with tqdm(total=len(new), desc="judge", unit=" answers", disable=not shown) as bar:
            asked = at_once(lambda key: self._ask(key, new[key], is_usable), new, self._at_once)
            unusable = {}
            for key, answer in asked:
                bar.update()
                if key not in self._answers:
                    unusable[key] = answer
        return [unusable[key] if key in unusable else self._answers[key] for key in keys]

    def _request(self, prompt: str, system: str | None, options: dict[str, Any]) -> dict[str, Any]:
        texts = [("system", system)] if system is not None else []
        messages = [
            {"role": role, "content": text.encode("utf-8", "replace").decode()}
            for role, text in [*texts, ("user", prompt)]
        ]
        return {"model": self.model, "messages": messages, **options}

    def _ask(self, key: str, request: dict[str, Any], is_usable: Callable[[str], bool]) -> str:
        sent, last = dict(request), ""
        for _ in range(EMPTY):
            text = self._sent(sent).strip()
            last = text or last
            if text and is_usable(text):
                break
        else:
            if not last:
                raise ValueError(
                    f"judge {self._url} has given an empty answer {EMPTY} times, of at most "
                    f"{request['max_tokens']} tokens"
                )
            return last
        line = {"key": key, **request, "answer": text}
        with self._lock:
            if self._file.closed:  # a thread that outlived an error
                return text
            self._file.write(f"{json.dumps(line)}\n".encode())
            self._file.flush()
            self._answers[key] = text
            self.asked += 1
        return text

    def _sent(self, request: dict[str, Any]) -> str:
        openai = self._openai
        try:
            try:
                found = self._client.chat.completions.create(**request)
            except openai.BadRequestError as error:
                if "max_completion_tokens" not in told_by(error) or "max_tokens" not in request:
                    raise
                request["max_completion_tokens"] = request.pop("max_tokens")  # the newer name
                found = self._client.chat.completions.create(**request)
            return found.choices[0].message.content or ""
        except openai.AuthenticationError as error:
            raise ValueError(f"judge {self._url} refuses the key in {KEY}: {told_by(error)}") from None
        except openai.APIStatusError as error:
            told = f"refuses a request ({error.status_code}): {told_by(error)}"
            raise ValueError(f"judge {self._url} {told}") from None
        except openai.APIError as error:
            raise ValueError(f"judge {self._url} cannot be asked: {told_by(error)}") from None
        except Exception as error:  # what a server sends that has another interface
            told = f"{type(error).__name__}: {told_by(error)}"
            raise ValueError(f"judge {self._url} does not have OpenAI's interface: {told}") from None

    def _open(self, path: Path) -> None:
        """Open the file, drop the end of a line that a killed run has left behind, and read the rest."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
        except OSError as error:
            raise ValueError(f"cache {str(path)!r} cannot be written: {error.strerror or error}") from None
        try:
            if not claimed(self._file):
                raise ValueError(f"cache {str(path)!r} is in use by another run: wait for it")
            self._file.seek(0)
            content = self._file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                self._file.truncate(end)
            for number, line in enumerate(content[:end].splitlines(), 1):
                try:
                    value = json.loads(line)
                    key, answer = value["key"], value["answer"]
                    if not isinstance(key, str) or not isinstance(answer, str):
                        raise TypeError
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{path}, line {number}: must be an answer of a judge") from None
                self._answers[key] = answer
        except BaseException:
            self._file.close()
            raise


def _digest(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
