"""What a benchmark is: questions with references, and the figures of a set of answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cumo_model.evaluation.judge import Judge
from cumo_model.serving.questions import Question

SHORT, LONG = 128, 1024  # tokens: the longest answers in CuMo's scripts (model_vqa_loader.py, and the others)


@dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Attributes:
        question: as it is asked.
        reference: what its answer is compared with, as JSON; None: not known here.
        group: the category that figures are also given for, or "".
        unit: the name of what is scored, and drawn, as one: such as the picture of two questions, or a
            question that is asked in several orders of its choices; by default each question is one.
    """

    question: Question
    reference: Any = None
    group: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Data:
    """The questions of a benchmark, and the place of their pictures.

    Attributes:
        items: the questions. Items of one unit have the same `unit`.
        pictures: folders or .tar files, or an object with the methods `load` and `problem` of `Pictures`.
        more: what else the scorer needs; "source": the files that were read.
        of: number of questions in the official files, where `items` may be fewer; 0: all are there.
        note: what must be known about the figures, or "".
    """

    items: list[Item]
    pictures: Any
    more: dict[str, Any] = field(default_factory=dict)
    of: int = 0
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What the scorer found about one unit.

    Attributes:
        unit: name of the unit.
        group: its category, or "".
        values: numbers or words from which `Task.figures` computes the figures; JSON.
        picture: of the unit; units with one picture are drawn together where runs are compared. "": none.
    """

    unit: str
    group: str
    values: dict[str, Any]
    picture: str = ""


class Task(ABC):
    """A benchmark.

    Attributes:
        name: in commands and paths.
        title: in tables.
        metric: what the first of `figures` is, in a few words, with its unit.
        folders: names of its folder in the folder of all data; the first that exists is used.
        max_new_tokens: the longest answer, in tokens.
        judged: whether a judge is needed for `rows`.
        server: where its answers are scored if the references are not public, or "".
        mean_of: the value of the rows whose mean, times 100, is the first figure; "" where it is no mean.
        lower_is_better: whether a smaller first figure is a better one.
    """

    name: str
    title: str
    metric: str = "accuracy, %"
    folders: tuple[str, ...]
    max_new_tokens: int = SHORT
    judged: bool = False
    server: str = ""
    mean_of: str = ""
    lower_is_better: bool = False

    @abstractmethod
    def read(self, folder: Path) -> Data:
        """Read the official files in the folder of this benchmark.

        Raises:
            ValueError: a file is missing or is not what it should be; it is named.
        """

    @abstractmethod
    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        """Score answers.

        Args:
            data: as from `read`, perhaps with fewer items.
            answers: one for each item.
            judge: is asked where a judge is needed; None where `judged` is False.

        Returns:
            A row for each unit; None where the references are not known.
        """

    @abstractmethod
    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        """The figures of a set of rows; the first one is that of the paper's table.

        It is a function of the rows alone, so that it can be computed again for samples of them.
        """

    def note(self, rows: Sequence[Row]) -> str:
        """What must be known about the figures of these rows, or "".

        Raises:
            ValueError: the rows allow no figures.
        """
        return ""

    def submission(self, data: Data, answers: Sequence[str], path: Path) -> Path | None:
        """Write the file that the server of the benchmark takes.

        Args:
            data: as in `rows`.
            answers: as in `rows`.
            path: of the file, without its suffix.

        Returns:
            The file; None if there is no such server.
        """
        return None


def unit_of(item: Item) -> str:
    """The name of an item's unit: the id of its question unless it has another."""
    return item.unit or str(item.question.id)


def percent(values: Sequence[float]) -> float:
    """100 times the mean; nan without values."""
    return 100 * sum(values) / len(values) if values else float("nan")


def by_group(rows: Sequence[Row], value: str) -> dict[str, float]:
    """100 times the mean of a value in each group, in the order in which groups occur."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(float(row.values[value]))
    return {group: percent(values) for group, values in groups.items() if group}
