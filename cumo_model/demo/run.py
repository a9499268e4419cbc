"""The command of the demo: data, all stages with and without experts, evaluation, and the report.

Every step creates a finished folder or file, so the same command resumes an interrupted demo.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cumo_model.checkpoints.folders import write_whole
from cumo_model.demo.processes import claim, cores, locked, named, run_tasks
from cumo_model.demo.questions import make_dataset
from cumo_model.demo.settings import Settings

PHASES = (  # tasks of a phase run in parallel; their number determines the threads of each
    ("vision", "text"),
    ("dense",),
    ("sft", "sft_dense"),
)
ELAPSED = "seconds.txt"
DONE_BY = {
    "vision": "vision/model",
    "text": "text/model",
    "dense": "compute.json",
    "sft": "scores-sft.json",
    "sft_dense": "scores-sft_dense.json",
}


def run_demo(out_dir: str | os.PathLike, is_quick: bool = False, seed: int = 0) -> int:
    """Run all unfinished steps of the demo in `out_dir`, then print the report.

    Args:
        out_dir: folder of the demo.
        is_quick: use fewer and smaller steps, to test the whole path in a short time.
        seed: seed of the data, of new weights and of the order of samples.

    Raises:
        ValueError: `out_dir` contains something else, or a demo with other settings; it is not changed.
        Interrupted: the demo was stopped by a signal; the same call resumes.
    """
    out = named(out_dir)
    settings = Settings(seed=seed, quick=is_quick)
    claim(out, settings)
    print(f"CuMo demo in {out} on {_machine()}; Ctrl-C stops it, the same command resumes", flush=True)
    with locked(out):
        with _timed(out):
            make_dataset(out / "data", settings.image_size, seed=seed, quick=is_quick)
        for tasks in PHASES:
            if left := [task for task in tasks if not (out / DONE_BY[task]).exists()]:
                with _timed(out):
                    run_tasks(out, left, cores(), len(tasks))
        from cumo_model.demo.report import report  # imports matplotlib, which training does not need

        report(out, settings, _seconds(out))
    return 0


def _seconds(out: Path) -> float:
    try:
        return float((out / ELAPSED).read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


@contextmanager
def _timed(out: Path) -> Iterator[None]:
    """Add the time inside the `with` block to the time of earlier calls in `out`."""
    start = time.monotonic()
    try:
        yield
    finally:
        write_whole(out / ELAPSED, f"{_seconds(out) + time.monotonic() - start:.1f}")


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores()} CPU cores"
