"""The demo from nothing to a table: data, three stages, the last one dense too, held-out scores, pictures.

Every step leaves a finished folder or file behind, so the same command goes on wherever it was stopped.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cumo_model.demo.processes import claim, cores, locked, named, run_tasks
from cumo_model.demo.questions import make_dataset
from cumo_model.demo.settings import Settings

PHASES = (  # tasks that run side by side, and how many threads each one has
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
    """Run what is not done yet in `out_dir`, then print the table.

    Raises:
        ValueError: `out_dir` holds something else, or a demo with other settings; it is left as it is.
        Interrupted: stopped on request; the same call goes on.
    """
    out = named(out_dir)
    settings = Settings(seed=seed, quick=is_quick)
    claim(out, settings)
    print(f"CuMo demo in {out} on {_machine()}; Ctrl-C stops it, the same command goes on", flush=True)
    with locked(out):
        with _timed(out):
            make_dataset(out / "data", settings.image_size, seed=seed, quick=is_quick)
        for tasks in PHASES:
            if left := [task for task in tasks if not (out / DONE_BY[task]).exists()]:
                with _timed(out):
                    run_tasks(out, left, cores(), len(tasks))
        from cumo_model.demo.report import (
            report,  # matplotlib, and a model to ask: not before training is done
        )

        report(out, settings, _seconds(out))
    return 0


def _seconds(out: Path) -> float:
    try:
        return float((out / ELAPSED).read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


@contextmanager
def _timed(out: Path) -> Iterator[None]:
    """Adds the time inside to what earlier calls in `out` took."""
    start = time.monotonic()
    try:
        yield
    finally:
        part = out / f".{ELAPSED}.part"
        part.write_text(f"{_seconds(out) + time.monotonic() - start:.1f}")
        os.replace(part, out / ELAPSED)


def _machine() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores()} CPU cores"
