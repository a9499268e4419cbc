"""Requests that the model cannot answer get HTTP 400: the marker of pictures as text, and damaged pictures.

vLLM's server loads `CheckedRequests` (--middleware). Without it the marker would be an image token without a
picture, and a picture that makes its decoder raise an unusual error would be HTTP 500.
"""

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from cumo_model.processing.templates import IMAGE_MARKER

MEDIA = "vllm.multimodal.media"  # the modules in which vLLM reads pictures of requests


class CheckedRequests:
    """ASGI middleware around vLLM's server."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, messages = b"", []
        while True:
            messages.append(await receive())
            body += messages[-1].get("body", b"")
            if not messages[-1].get("more_body", False):
                break
        if reason := problem_of(body):
            await _refuse(send, reason)
            return
        has_begun = False

        async def again():
            return messages.pop(0) if messages else await receive()

        async def noted(message):
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, again, noted)
        except Exception as error:
            if has_begun or not _is_of_media(error.__traceback__):
                raise
            await _refuse(send, f"a picture cannot be read: {' '.join(str(error).split())}")


def problem_of(body: bytes) -> str | None:
    """Why a request cannot be answered; None if it can, or if vLLM itself says why not."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if any(IMAGE_MARKER in text for text in _texts(value)):
        return f"text must not hold {IMAGE_MARKER}: give a picture as a part of type image_url"
    return None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, those of its keys left out; the texts of parts of a message also joined."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
            parts = [part.get("text") for part in value if isinstance(part, dict)]
            yield "".join(text for text in parts if isinstance(text, str))


def _is_of_media(trace: TracebackType | None) -> bool:
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(MEDIA):
            return True
        trace = trace.tb_next
    return False


async def _refuse(send, reason: str) -> None:
    error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
