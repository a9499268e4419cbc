"""What several benchmarks share: prompts, LLaVA's question files, and one row for each question."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import read_lines, value_of
from cumo_model.evaluation.task import Data, Item, Judge, Row, Task, unit_of
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


def told_apart(items: Iterable[Item], alone: bool = True) -> list[Item]:
    """Items of which no two have the same id and text, and if each is scored alone, no two the same unit.

    Files may ask a question twice about one picture, or have an id twice. Official scorers count both; here
    the later ones get another id or unit, so that they have answers and rows of their own.

    Args:
        items: the items.
        alone: whether each item is a unit.
    """
    keys: Counter[Any] = Counter()
    units: Counter[str] = Counter()
    kept = []
    for item in items:
        key = item.question.key
        keys[key] += 1
        if (times := keys[key]) > 1:
            question = replace(item.question, id=f"{item.question.id} ({times})")
            item = replace(item, question=question, unit=item.unit and f"{item.unit} ({times})")
        units[unit := unit_of(item)] += 1
        if alone and (times := units[unit]) > 1:
            item = replace(item, unit=f"{unit} ({times})")
        kept.append(item)
    return kept


class OneByOne(Task):
    """A benchmark in which each question is scored by itself, with a row of numbers for each."""

    @abstractmethod
    def score(self, item: Item, answer: str) -> dict[str, Any]:
        """The values of the row of an answer."""

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        return [
            Row(unit_of(item), item.group, self.score(item, answer), next(iter(item.question.images), ""))
            for item, answer in zip(data.items, answers, strict=True)
        ]


def unreadable(rows: Sequence[Row]) -> str:
    """How many replies of a judge have no grade, by the value "unreadable" of the rows; "" if all have one.

    Raises:
        ValueError: half of them have none.
    """
    count = sum(row.values["unreadable"] for row in rows)
    told = f"{count} of {len(rows)} replies of the judge have no grade"
    if 2 * count >= len(rows) > 0:
        raise ValueError(f"{told}: is it a judge?")
    return told if count else ""
