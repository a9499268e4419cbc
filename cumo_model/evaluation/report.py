"""Tables of results: the paper's figures beside ours, and runs side by side."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from cumo_model.checkpoints.folders import write_whole
from cumo_model.evaluation import paper
from cumo_model.evaluation.compare import LEVEL, RESAMPLES, Difference
from cumo_model.evaluation.run import Outcome

TABLE, COMPARISON = "table.md", "comparison.md"
WIDE = 200  # characters
EXPLAINED = (
    f"Intervals of a paired bootstrap with {RESAMPLES} draws of the same pictures. Noise: the interval holds "
    "0, so that other questions of the same kind could turn the difference around. Of twenty rows that only "
    "differ by noise, one is called better or worse."
)
SOURCE = "Figures of the paper: Table 1 of arXiv 2405.05949."


def number(value: float | None) -> str:
    """A figure as a table shows it."""
    if value is None:
        return "-"
    return "undefined" if math.isnan(value) else f"{value:.1f}"


def results(outcomes: Sequence[Outcome], model: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of results."""
    columns = ["benchmark", "figure", *paper.MODELS, model, "questions", "note"]
    rows = []
    for outcome in outcomes:
        task = outcome.task
        known = paper.TABLE.get(task.name, (None, None))
        asked = str(outcome.questions)
        if outcome.questions < outcome.of:
            asked += f" of {outcome.of}"
        note = outcome.error or outcome.note
        if outcome.error:
            note = f"failed: {note}"
        rows.append(
            [task.title, task.metric, *map(number, known), number(outcome.score), asked, note]
        )  # fmt: skip
    return columns, rows


def has_paper(outcomes: Sequence[Outcome]) -> bool:
    """Whether the table of results has a figure of the paper."""
    return any(outcome.task.name in paper.TABLE for outcome in outcomes)


def figures(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of all figures."""
    rows = [
        [outcome.task.title, name, number(value)]
        for outcome in outcomes
        for name, value in (outcome.figures or {}).items()
    ]
    return ["benchmark", "figure", "value"], rows


def differences(found: Sequence[Difference], first: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that compares runs with the first one."""
    columns = ["benchmark", "figure", "run", "score", first, "difference", f"{LEVEL:.0%} interval", "verdict",
               "questions", "note"]  # fmt: skip
    rows = []
    for one in found:
        interval = f"{one.low:+.2f} to {one.high:+.2f}"
        alone = f"{one.only_one} questions are in one run only" if one.only_one else ""
        note = "; ".join(filter(None, (alone, one.note)))
        rows.append([one.task.title, one.task.metric, one.run, number(one.score), number(one.first),
                     f"{one.difference:+.2f}", interval, one.verdict, str(one.units), note])  # fmt: skip
    return columns, rows


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    cell = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def write_results(outcomes: Sequence[Outcome], model: str, out: str | os.PathLike) -> Path:
    """Write the tables of results into the folder of a run.

    Returns:
        The file.
    """
    path = Path(out) / TABLE
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"{SOURCE}\n\n" if has_paper(outcomes) else ""
    text = f"{markdown(*results(outcomes, model))}\n{source}{markdown(*figures(outcomes))}"
    write_whole(path, text)
    return path


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; without the package rich as Markdown."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(markdown(columns, rows), end="")
        return
    table = Table()
    for place, name in enumerate(columns):
        is_number = any(row[place].replace(".", "").lstrip("+-").isdigit() for row in rows)
        table.add_column(escape(name), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = WIDE
    console.print(table)
