"""Files of questions about pictures, in the form of LLaVA's question files.

Each line is {"question_id": int or text, "text": the question}, and optionally "image", the name of a picture
or a list of names, and "category". Other keys are ignored. A .json file holds the same objects in one list.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from cumo_model.data.pictures import Pictures
from cumo_model.processing.templates import IMAGE_MARKER
from cumo_model.serving.messages import Message, text_problem, user_message

NAMED = 3  # missing pictures that a message names


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        id: an int or a text; no two questions with the same text have the same.
        text: the question. Each `<image>` in it stands for a picture; without any, all pictures go before it.
        images: names of its pictures.
        category: anything, for those who read the answers; None: none.
        place: where it was read, for messages.
    """

    id: int | str
    text: str
    images: tuple[str, ...] = ()
    category: Any = None
    place: str = ""

    @property
    def key(self) -> tuple[int | str, str]:
        """Id and text: LLaVA's files ask several questions under the id of one picture."""
        return self.id, self.text

    def message(self, pictures: Sequence[Image.Image] = ()) -> Message:
        """The question as a message of the user, with its pictures."""
        texts = self.text.split(IMAGE_MARKER)
        if len(texts) == 1:
            return user_message(self.text, pictures)
        if len(texts) == 2:  # a single picture goes before the text, wherever its marker stands
            return user_message("".join(texts).strip(), pictures)
        parts: list[dict] = []
        for number, text in enumerate(texts):
            parts += [{"type": "text", "text": text}] if text else []
            parts += [{"type": "image", "image": pictures[number]}] if number < len(pictures) else []
        return {"role": "user", "content": parts}


def read_questions(path: str | os.PathLike, limit: int | None = None) -> list[Question]:
    """Read a file of questions.

    Args:
        path: JSON lines, or a .json file with one list.
        limit: read only so many; None: all.

    Raises:
        ValueError: the file or a question in it cannot be used; the line is named.
    """
    questions: list[Question] = []
    seen: dict[Any, str] = {}
    for place, value in islice(_objects(Path(path)), limit):
        question = _question(value, place)
        if question.key in seen:
            raise ValueError(
                f"{place}: question_id must be that of no other question with the same text, "
                f"got {question.id!r}, as in {seen[question.key]}"
            )
        seen[question.key] = place
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} must hold at least one question, got none")
    return questions


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Each object of a file, and its place."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"questions {str(path)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: must be text in UTF-8, got other bytes") from None
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must be JSON: {error}") from None
        if not isinstance(values, list):
            raise ValueError(f"{path} must be a list of questions, got {type(values).__name__}")
        yield from ((f"{path}, question {number}", value) for number, value in enumerate(values, 1))
        return
    yield from json_lines(text, path)


def json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Each value of JSON lines, and its place; blank lines are passed over.

    Raises:
        ValueError: a line is no JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: must be JSON: {error}") from None
            yield f"{path}, line {number}", value


def _question(value: Any, place: str) -> Question:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object with question_id and text, got {type(value).__name__}")
    for name in ("question_id", "text"):
        if name not in value:
            raise ValueError(f"{place}: must have {name}, got {', '.join(value) or 'nothing'}")
    number, text, images = value["question_id"], value["text"], value.get("image")
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise ValueError(f"{place}: question_id must be an int or text, got {number!r}")
    if not isinstance(text, str):
        raise ValueError(f"{place}: text must be text, got {type(text).__name__}")
    if reason := text_problem(text.replace(IMAGE_MARKER, "")):
        raise ValueError(f"{place}: text {reason}")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError(f"{place}: image must be the name of a picture or a list of names, got {images!r}")
    if (marks := text.count(IMAGE_MARKER)) not in (0, len(images)):
        raise ValueError(
            f"{place}: text must have one {IMAGE_MARKER} for each of the {len(images)} pictures, or none, "
            f"got {marks}"
        )
    return Question(number, text, tuple(images), value.get("category"), place)


def pictures_of_questions(
    questions: Sequence[Question], images: Pictures | str | os.PathLike | Sequence[str | os.PathLike] | None
) -> Pictures:
    """The pictures of questions; all are looked for, none is decoded.

    Args:
        questions: the questions.
        images: the folder or .tar file of the pictures, or several, or an object with the methods `load` and
            `problem` of `Pictures`; None if no question has any.

    Raises:
        ValueError: a picture is missing, or lies outside these places; it is named.
    """
    first = next((question for question in questions if question.images), None)
    if images is None and first is not None:
        raise ValueError(f"images must be given: {first.place} names the picture {first.images[0]!r}")
    pictures = images if hasattr(images, "problem") else Pictures([] if images is None else images)
    missing = []
    for question in questions:
        missing += [
            f"{question.place}: {problem}" for name in question.images if (problem := pictures.problem(name))
        ]
    if missing:
        more = f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ValueError("; ".join(missing[:NAMED]) + more)
    return pictures
