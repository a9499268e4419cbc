"""Messages of a conversation with pictures, in the form of transformers' chat templates.

A message is {"role": "system" | "user" | "assistant", "content": text or parts}; a part is
{"type": "text", "text": str} or {"type": "image", "image": a picture as `load_image` reads it}; as in
transformers the key of the picture may also be url, path or base64.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from cumo_model.processing.conversation import reserved_marker
from cumo_model.processing.messages import PICTURE_KEYS, check_messages
from cumo_model.processing.templates import IMAGE_MARKER

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")


def user_message(text: str, pictures: Sequence[Image.Image] = ()) -> Message:
    """A message of the user, with its pictures before the text."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """The text of a message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def pictures_of(message: Message) -> list[Any]:
    """The pictures of a message."""
    content = message["content"]
    return (
        [] if isinstance(content, str) else [picture_in(part) for part in content if part["type"] != "text"]
    )


def picture_in(part: dict[str, Any]) -> Any:
    """The picture of a part, under any of its names."""
    if part["type"] == "image_url":
        found = part["image_url"]
        return found["url"] if isinstance(found, dict) else found
    return next(part[key] for key in PICTURE_KEYS if part.get(key) is not None)


def text_problem(text: str, template: str | None = None) -> str | None:
    """The reason why `text` cannot be a question or a system text of a template, or None.

    Args:
        text: what a user typed.
        template: name of a conversation template; None: of any.
    """
    if not text.strip():
        return "must not be empty"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "must be text in UTF-8, got bytes that are not"
    if IMAGE_MARKER in text:
        return f"must not hold {IMAGE_MARKER}: pictures are given beside the text"
    if template and (found := reserved_marker([{"value": text}], template)):
        return f"must not hold {found}, which separates turns"
    return None


def check_conversation(messages: Sequence[Message], template: str | None = None) -> None:
    """Check a conversation that ends with a question.

    Args:
        messages: at most one message of role system, first; then user and assistant in turn.
        template: name of its conversation template, whose marks no question may hold; None: of any.

    Raises:
        ValueError: a message is not of this form; its number is named.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} must have a role and content, got {type(message).__name__}")
    check_messages(messages, needs_pictures=True)
    turns = 0
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"message {number} must be of role {', '.join(ROLES)}, got {role!r}")
        if role == "system" and number == 1:
            wanted = role
        else:
            wanted, turns = ROLES[1 + turns % 2], turns + 1
        if role != wanted:
            raise ValueError(f"message {number} must be of role {wanted}, got {role!r}")
        if role != "assistant" and (reason := text_problem(text_of(message), template)):
            raise ValueError(f"the {'question' if role == 'user' else 'system text'} {reason}")
        if role != "user" and pictures_of(message):
            raise ValueError(f"message {number} must have no pictures, as it is of role {role}")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message must be of role user, got {messages[-1]['role']!r}")
