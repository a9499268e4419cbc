"""What several benchmarks share: prompts, LLaVA's question files, and one row for each question."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import read_lines, value_of
from cumo_model.evaluation.task import Data, Item, Judge, Row, Task
from cumo_model.serving.messages import text_problem
from cumo_model.serving.questions import Question

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def short_prompt(question: str) -> str:
    """A question that wants a word or a phrase, in LLaVA's and CuMo's words."""
    return f"{question}\n{SHORT_ANSWER}"


def letter_prompt(question: str, choices: Sequence[str]) -> str:
    """A question with lettered choices, in LLaVA's and CuMo's words."""
    lines = [f"{chr(ord('A') + number)}. {choice}" for number, choice in enumerate(choices)]
    return "\n".join([question, *lines, LETTER])


def first_file(folder: Path, *names: str) -> Path | None:
    """The first of several files that exists, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def ask(number: Any, text: str, image: str, place: str, category: Any = None) -> Question:
    """A question about one picture.

    Raises:
        ValueError: the text cannot be asked, or there is no name of a picture; the place is named.
    """
    if reason := text_problem(text.replace("<image>", "")):
        raise ValueError(f"{place}: text {reason}")
    if not image:
        raise ValueError(f"{place}: image must be the name of a picture, got ''")
    return Question(number, text, (image,), category, place)


def read_list(path: Path) -> list[Question]:
    """The questions of one of LLaVA's files of JSON lines, each about one picture.

    Raises:
        ValueError: the file cannot be read, is empty, or a line is not such a question.
    """
    questions = [
        ask(
            value_of(line, "question_id", (int, str), place),
            value_of(line, "text", str, place),
            value_of(line, "image", str, place),
            place,
            line.get("category"),
        )
        for place, line in read_lines(path)
    ]
    if not questions:
        raise ValueError(f"{path} must hold at least one question, got none")
    return questions


def told_apart(items: Iterable[Item]) -> list[Item]:
    """Items of which no two have the same id and text.

    Files may ask a question twice about one picture. Official scorers count it twice; here the later ones get
    another id and unit, so that they have answers of their own.
    """
    seen: dict[Any, int] = {}
    kept = []
    for item in items:
        key = item.question.key
        seen[key] = seen.get(key, 0) + 1
        if (times := seen[key]) > 1:
            question = replace(item.question, id=f"{item.question.id} ({times})")
            item = replace(item, question=question, unit=f"{unit_of(item)} ({times})")
        kept.append(item)
    return kept


def unit_of(item: Item) -> str:
    """The name of an item's unit: the id of its question unless it has another."""
    return item.unit or str(item.question.id)


class OneByOne(Task):
    """A benchmark in which each question is scored by itself, with a row of numbers for each."""

    @abstractmethod
    def score(self, item: Item, answer: str) -> dict[str, Any]:
        """The values of the row of an answer."""

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        return [
            Row(unit_of(item), item.group, self.score(item, answer))
            for item, answer in zip(data.items, answers, strict=True)
        ]
