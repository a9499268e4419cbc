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
SOURCE = "Figures of the paper: Table 1 of arXiv 2405.05949."


def number(value: float | None, metric: str = "") -> str:
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
               "questions"]  # fmt: skip
    rows = []
    for one in found:
        interval = f"{one.low:+.2f} to {one.high:+.2f}"
        asked = str(one.units) + (f", and {one.only_one} of one run alone" if one.only_one else "")
        rows.append([one.task.title, one.task.metric, one.run, number(one.score), number(one.first),
                     f"{one.difference:+.2f}", interval, one.verdict, asked])  # fmt: skip
    return columns, rows


def explained(found: Sequence[Difference]) -> str:
    """How the table that compares runs is to be read."""
    return (
        f"Intervals of a paired bootstrap with {RESAMPLES} draws of the same questions; noise: the interval "
        "holds 0, so that other questions of the same kind could turn the difference around."
    )


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
    text = f"{markdown(*results(outcomes, model))}\n{SOURCE}\n\n{markdown(*figures(outcomes))}"
    write_whole(path, text)
    return path


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table.

    Raises:
        ValueError: the package rich is missing.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise ValueError("a table needs the package rich: pip install 'cumo[eval]'") from None
    table = Table()
    for name in columns:
        is_number = any(row[columns.index(name)].replace(".", "").lstrip("+-").isdigit() for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(text.replace("[", "\\[") for text in row))
    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = WIDE
    console.print(table)
