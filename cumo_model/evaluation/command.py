"""The command `python -m cumo_model eval`."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cumo_model.checkpoints.folders import write_whole
from cumo_model.evaluation import report
from cumo_model.evaluation.compare import compare, not_compared
from cumo_model.evaluation.judge import OPENAI, Judge
from cumo_model.evaluation.registry import TASKS
from cumo_model.evaluation.run import Outcome, earlier, evaluate
from cumo_model.evaluation.task import Task
from cumo_model.serving.answer import BATCH, join_group, this_process
from cumo_model.serving.engines import Source

ALL = "all"
REVIEWS = "judge.jsonl"


def tasks_of(names: str) -> list[Task]:
    """The benchmarks of a list of names with commas, or all that are in the paper's table.

    Raises:
        ValueError: there is no benchmark with a name, or it is there twice.
    """
    of_paper = ",".join(name for name in TASKS if name in report.paper.TABLE)
    found = [name.strip() for name in re.sub(rf"\b{ALL}\b", of_paper, names).split(",")]
    for name in found:
        if name not in TASKS:
            raise ValueError(f"task must be {ALL} or some of {', '.join(TASKS)}, got {name!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"task must have each benchmark once, got {names!r}")
    return [TASKS[name] for name in found]


def run_eval(
    checkpoint: str | os.PathLike | None,
    task: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    limit: int | None = None,
    batch_size: int = BATCH,
    judge: str | None = None,
    judge_url: str | None = None,
    answers: str | os.PathLike | None = None,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    endpoint: str | None = None,
    at_once: int = 16,
) -> int:
    """Run benchmarks, print the table of results and write it; torchrun may start it in several processes.

    Args:
        checkpoint: folder of the checkpoint; None: ask an endpoint, or score `answers`.
        task: names of benchmarks with commas between them, or "all".
        data: as of `evaluate`, and so are `out`, `limit`, `batch_size` and `answers`.
        out: folder of the results; with a limit, its folder limit-N.
        limit: number of units of each benchmark.
        batch_size: questions per batch.
        judge: name of the model that judges, where a benchmark needs one.
        judge_url: address of its OpenAI-compatible interface; by default that of OpenAI.
        answers: a file of answers to be scored in place of asking.
        template: as of `Source.of`, and so are the others.
        device: of the model.
        dtype: of the weights.
        bits: 4 or 8.
        endpoint: address of a running server.
        at_once: requests at the same time to the endpoint and to the judge.

    Returns:
        0, or 1 if a benchmark could not be run.

    Raises:
        ValueError: as `tasks_of`, `Source.of`, `Judge` and `evaluate`.
    """
    tasks = tasks_of(task)
    if limit is not None:  # other questions, so other answers
        out = Path(out) / f"limit-{limit}"
    join_group(endpoint)
    source = None
    if answers is None:
        source = Source.of(checkpoint, endpoint, template, device, dtype, bits, at_once)
    is_first = this_process()[0] == 0
    name = source.name if source else Path(answers).stem
    opened = contextlib.nullcontext()
    if judge is not None and is_first and any(task.judged for task in tasks):
        opened = Judge(judge, Path(out) / REVIEWS, judge_url or OPENAI, at_once)
    with opened as asked:
        outcomes = evaluate(
            source and source.engine,
            tasks,
            data,
            out,
            limit,
            batch_size,
            asked,
            source and source.settings,
            name,
            answers,
            each=_told,
        )
    if is_first:
        asked_now = {outcome.task.name: outcome for outcome in outcomes}
        shown = [asked_now.get(task.name) or earlier(task, Path(out), name) for task in TASKS.values()]
        shown = [outcome for outcome in shown if outcome is not None]
        path = report.write_results(shown, name, out)
        report.show(*report.results(shown, name))
        print(f"{report.SOURCE} " * report.has_paper(shown) + f"All figures: {path}", flush=True)
    code = [int(any(outcome.error for outcome in outcomes))]
    if this_process()[1] > 1:  # torchrun ends the others as soon as one ends
        torch.distributed.broadcast_object_list(code, 0)
        torch.distributed.destroy_process_group()
    return code[0]


def _told(outcome: Outcome) -> None:
    """A line about one benchmark, as soon as it is over."""
    name = outcome.task.name
    told = functools.partial(print, file=sys.stderr, flush=True)  # standard output has the table alone
    if outcome.figures is not None:
        note = f" ({outcome.note})" if outcome.note else ""
        told(f"{name}: {outcome.task.metric} {report.number(outcome.score)}{note}")
    elif not outcome.error:
        told(f"{name}: {outcome.questions} questions answered; {outcome.note}")
    if outcome.error:
        told(f"cumo: {name}: {outcome.error}")
    if outcome.submission is not None:
        told(f"{name}: file for the server: {outcome.submission}")


def run_compare(runs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> int:
    """Print a table that compares runs with the first of them.

    Args:
        runs: their folders.
        out: a folder, to write the table there too.

    Returns:
        0.

    Raises:
        ValueError: as `compare`.
    """
    found = compare([Path(run) for run in runs], TASKS)
    table = report.differences(found, str(runs[0]))
    told = [report.EXPLAINED, *not_compared([Path(run) for run in runs], TASKS)]
    report.show(*table)
    print("\n".join(told))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(told)
        write_whole(Path(out) / report.COMPARISON, f"{report.markdown(*table)}\n{text}\n")
    return 0
