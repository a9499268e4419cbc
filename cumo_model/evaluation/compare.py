"""Runs side by side: differences of their figures, with intervals of a paired bootstrap.

Two runs are compared on the questions that both have answered. The same questions are drawn for both, with
replacement, as often as there are questions; the figure's difference is computed for each of RESAMPLES such
draws, and the middle 95 % of the differences are the interval (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13, percentile intervals). A difference whose interval holds 0 is called noise.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cumo_model.evaluation.run import SCORES, Scores, read_scores
from cumo_model.evaluation.task import Row, Task

RESAMPLES = 1000
LEVEL = 0.95
NOISE, BETTER, WORSE = "noise", "better", "worse"


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
    """

    task: Task
    run: str
    first: float
    score: float
    low: float
    high: float
    units: int
    only_one: int

    @property
    def difference(self) -> float:
        """`score` - `first`."""
        return self.score - self.first

    @property
    def verdict(self) -> str:
        """Whether this run is BETTER or WORSE than the first one, or the difference is NOISE."""
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
    a, b = ({row.unit: row for row in scores.rows} for scores in (first, second))
    common = [unit for unit in a if unit in b]
    if not common:
        raise ValueError(f"{task.title}: {run} has answered none of the questions of the first run")
    rows = [[found[unit] for unit in common] for found in (a, b)]
    score_a, score_b = (headline(task, part) for part in rows)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(common), size=len(common)) for _ in range(RESAMPLES))
    found = _means(task, rows, draws) if task.mean_of else _figures(task, rows, draws)
    outside = 100 * (1 - LEVEL) / 2
    known = found[np.isfinite(found)]
    low, high = np.percentile(known, [outside, 100 - outside]) if len(known) else (math.nan, math.nan)
    return Difference(
        task, run, score_a, score_b, float(low), float(high), len(common), len(a) + len(b) - 2 * len(common)
    )


def headline(task: Task, rows: Sequence[Row]) -> float:
    """The figure of a benchmark that is in the paper's table."""
    return next(iter(task.figures(rows).values()))


def _means(task: Task, rows: list[list[Row]], draws: Iterable[np.ndarray]) -> np.ndarray:
    """Differences for all draws, where the figure is a mean."""
    a, b = (np.array([float(row.values[task.mean_of]) for row in part]) for part in rows)
    return 100 * np.array([(b - a)[draw].mean() for draw in draws])


def _figures(task: Task, rows: list[list[Row]], draws: Iterable[np.ndarray]) -> np.ndarray:
    """Differences for all draws, with any figure."""
    scores = lambda part, draw: headline(task, [part[number] for number in draw])
    return np.array([scores(rows[1], draw) - scores(rows[0], draw) for draw in draws])
