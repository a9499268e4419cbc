"""Runs side by side: differences of their figures, with intervals of a paired bootstrap.

Two runs are compared on the questions that both have answered. The same questions are drawn for both, with
replacement; questions about one picture are drawn together, as their answers depend on each other. The
figure's difference is computed for each of RESAMPLES such draws, and the middle 95 % of the differences are
the interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13, percentile intervals).
A difference whose interval holds 0 is called noise. Such intervals are too narrow for a few draws, so that
fewer than FEWEST have no verdict.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cumo_model.evaluation.run import SCORES, Scores, read_scores
from cumo_model.evaluation.task import Row, Task

RESAMPLES = 1000
LEVEL = 0.95
NOISE, BETTER, WORSE, FEW = "noise", "better", "worse", "too few questions"
FEWEST = 20  # pictures, or questions without one


@dataclass(frozen=True)
class Difference:
    """The difference of a run to the first one in one benchmark.

    Attributes:
        task: the benchmark.
        run: folder of the run.
        first: figure of the first run, on the common questions.
        score: figure of this run, on the common questions.
        low: lower end of the interval of `score` - `first`.
        high: upper end of the interval.
        units: number of common units.
        only_one: number of units that one of the runs has alone.
        draws: number of pictures, or of units without one.
        note: what else differs between the two, or "".
    """

    task: Task
    run: str
    first: float
    score: float
    low: float
    high: float
    units: int
    only_one: int
    draws: int
    note: str = ""

    @property
    def difference(self) -> float:
        """`score` - `first`."""
        return self.score - self.first

    @property
    def verdict(self) -> str:
        """BETTER or WORSE than the first run, NOISE, or too FEW questions to tell."""
        if self.draws < FEWEST:
            return FEW
        if not (self.low > 0 or self.high < 0):
            return NOISE
        return BETTER if (self.low > 0) != self.task.lower_is_better else WORSE


def compare(runs: Sequence[Path], tasks: dict[str, Task], seed: int = 0) -> list[Difference]:
    """Compare runs with the first of them, in all benchmarks that both have scores of.

    Args:
        runs: folders as `evaluate` writes them, at least two.
        tasks: name -> benchmark.
        seed: of the draws.

    Raises:
        ValueError: a folder has no scores, or two runs have no benchmark in common.
    """
    if len(runs) < 2:
        raise ValueError(f"compare must have at least two runs, got {len(runs)}")
    found = [scores_of(Path(run), tasks) for run in runs]
    differences = []
    for name, task in tasks.items():
        for run, scores in zip(runs[1:], found[1:], strict=True):
            if name in found[0] and name in scores:
                differences.append(difference(task, str(run), found[0][name], scores[name], seed))
    for run, scores in zip(runs[1:], found[1:], strict=True):
        if not found[0].keys() & scores.keys():
            raise ValueError(
                f"{run} has scores of {', '.join(scores)}, and {runs[0]} of {', '.join(found[0])}: "
                "they have none in common"
            )
    return differences


def not_compared(runs: Sequence[Path], tasks: dict[str, Task]) -> list[str]:
    """A line for each run that lacks scores which another one has."""
    found = {run: scores_of(run, tasks) for run in runs}
    lines = []
    for run, scores in found.items():
        if missing := [
            name for name in tasks if name not in scores and any(name in s for s in found.values())
        ]:
            lines.append(f"{run} has no scores of {', '.join(missing)}.")
    return lines


def scores_of(run: Path, tasks: dict[str, Task]) -> dict[str, Scores]:
    """The scores in the folder of a run, by benchmark.

    Raises:
        ValueError: there are none, or a file of them is damaged.
    """
    if not run.is_dir():
        raise ValueError(f"{run} {'is not a folder' if run.exists() else 'does not exist'}")
    paths = {name: run / name / SCORES for name in tasks if (run / name / SCORES).is_file()}
    if not paths:
        raise ValueError(f"{run} has no scores: run `eval` with --out {run} first")
    return {name: read_scores(path) for name, path in paths.items()}


def difference(task: Task, run: str, first: Scores, second: Scores, seed: int = 0) -> Difference:
    """The difference of two runs in one benchmark.

    Raises:
        ValueError: they have no question in common.
    """
    a, b = (_by_unit(task, scores) for scores in (first, second))
    common = [unit for unit in a if unit in b]
    if not common:
        raise ValueError(f"{task.title}: {run} has answered none of the questions of the first run")
    rows = [[found[unit] for unit in common] for found in (a, b)]
    try:
        score_a, score_b = (headline(task, part) for part in rows)
        groups = _groups(rows[0])
        generator = np.random.default_rng(seed)
        draws = (generator.integers(len(groups), size=len(groups)) for _ in range(RESAMPLES))
        found = (_means if task.mean_of else _figures)(task, rows, groups, draws)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{task.title}: the scores of {run} or of the first run are damaged: {error!r}"
        ) from None
    outside = 100 * (1 - LEVEL) / 2
    known = found[np.isfinite(found)]
    low, high = np.percentile(known, [outside, 100 - outside]) if len(known) else (math.nan, math.nan)
    only_one = len(a) + len(b) - 2 * len(common)
    differ = [name for name in ("source", "judge") if getattr(first, name) != getattr(second, name)]
    note = "; ".join(f"other {name}: {getattr(second, name) or 'none'}" for name in differ)
    return Difference(
        task, run, score_a, score_b, float(low), float(high), len(common), only_one, len(groups), note
    )


def _groups(rows: Sequence[Row]) -> list[np.ndarray]:
    """Places of the rows that are drawn together."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.picture or (row.unit,), []).append(place)
    return [np.array(places) for places in groups.values()]


def _by_unit(task: Task, scores: Scores) -> dict[str, Row]:
    found = {row.unit: row for row in scores.rows}
    if len(found) < len(scores.rows):
        raise ValueError(f"{task.title}: the scores of {scores.model} name a question twice")
    return found


def headline(task: Task, rows: Sequence[Row]) -> float:
    """The figure of a benchmark that is in the paper's table."""
    return next(iter(task.figures(rows).values()))


def _means(task: Task, rows: list[list[Row]], groups: list[np.ndarray], draws: Iterable) -> np.ndarray:
    """Differences for all draws, where the figure is a mean."""
    a, b = (np.array([float(row.values[task.mean_of]) for row in part]) for part in rows)
    sums, sizes = np.array([(b - a)[places].sum() for places in groups]), np.array(list(map(len, groups)))
    return np.array([100 * sums[draw].sum() / sizes[draw].sum() for draw in draws])


def _figures(task: Task, rows: list[list[Row]], groups: list[np.ndarray], draws: Iterable) -> np.ndarray:
    """Differences for all draws, with any figure."""
    found = []
    shown = {"total": RESAMPLES, "desc": task.name, "unit": " draws", "leave": False}
    for draw in tqdm(draws, **shown, disable=not sys.stderr.isatty()):
        places = np.concatenate([groups[number] for number in draw])
        first, second = (headline(task, [part[place] for place in places]) for part in rows)
        found.append(second - first)
    return np.array(found)
