"""Checks of chat messages, because a chat template drops in silence what it does not know."""

import re
from typing import Any

PICTURE_KEYS = ("image", "url", "path", "base64")  # of a part of type image, as in transformers


# keys beside role and content that chat templates of other models read, and media beside the content
READ_BY_SOME = {
    "tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking",
    "image", "images", "image_url", "picture", "pictures", "video", "videos", "audio",
}  # fmt: skip


def check_messages(talks: Any, needs_pictures: bool, chat_template: str = "") -> None:
    """Check one conversation or several, lists of messages, as `apply_chat_template` takes them.

    Args:
        talks: messages with role and content, text or a list of parts; objects of other classes than dict are
            not checked.
        needs_pictures: whether each part of type image must have its picture.
        chat_template: the template; keys of messages that it names may be given.

    Raises:
        ValueError: a message or a part of one is not what chat template and model take.
    """
    if not isinstance(talks, list | tuple) or not talks:
        raise ValueError(f"conversation must be a non-empty list of messages, got {in_brief(talks)}")
    for talk in talks if isinstance(talks[0], list | tuple) else [talks]:
        if not talk:
            raise ValueError("conversation must be a non-empty list of messages, got an empty one")
        for number, message in enumerate(talk, 1):
            if not isinstance(message, dict):
                continue
            problem = _message_problem(message, needs_pictures)
            unread = [key for key in READ_BY_SOME.intersection(message) if message[key]]
            unread = [key for key in unread if not re.search(rf"(\.|\[['\"]){key}\b", chat_template)]
            if problem is None and unread:
                problem = f"has {sorted(unread)[0]}, which the chat template does not read"
            if problem:
                raise ValueError(f"message {number} {problem}")


def _message_problem(message: dict, needs_pictures: bool) -> str | None:
    content = message.get("content")
    if "role" not in message or not isinstance(content, str | list | tuple):
        return f"must have a role and content, text or a list of parts, got {in_brief(message)}"
    if isinstance(content, str):
        return None
    return next((problem for part in content if (problem := _part_problem(part, needs_pictures))), None)


def _part_problem(part: Any, needs_pictures: bool) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image", "image_url"):
        got = in_brief(part) if kind is None else repr(kind)
        return f"must have parts of type text or image, got {got}"
    lost = set(part) & ({*PICTURE_KEYS, "image_url"} if kind == "text" else {"text"})
    lost = sorted(key for key in lost if part[key] is not None)
    if lost:
        return f"must have one thing in a part, got {lost[0]} in a part of type {kind}"
    if kind == "text":
        is_right = isinstance(part.get("text"), str)
        return None if is_right else f"must have text in a part of type text, got {in_brief(part)}"
    if kind == "image_url":
        is_right = bool(part.get("image_url"))
        return None if is_right else f"must have image_url in a part of type image_url, got {in_brief(part)}"
    sources = [key for key in PICTURE_KEYS if part.get(key) is not None]
    if sources and isinstance(part[sources[0]], list | tuple):
        return f"must have one picture in a part of type image, got {in_brief(part[sources[0]])}"
    if len(sources) > 1 or (needs_pictures and not sources):
        wanted, got = ", ".join(PICTURE_KEYS), " and ".join(sources) or "none"
        return f"must have one of {wanted} in a part of type image, got {got}"
    return None


def in_brief(value: Any) -> str:
    """A few words on a value of a wrong kind, for error messages."""
    if isinstance(value, dict):
        return f"keys {', '.join(map(str, value)) or 'none'}"
    return f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, list | tuple) else ''}"
