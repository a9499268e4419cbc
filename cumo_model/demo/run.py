"""The demo from nothing to a table: data, three stages, a dense twin, held-out scores, pictures.

Every step leaves a finished folder or file behind, so the same command goes on wherever it was stopped.
"""

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cumo_model.demo.questions import make_dataset
from cumo_model.demo.settings import Settings, quick
from cumo_model.training.train import Interrupted

PHASES = (  # tasks that run side by side, and how many threads each one has
    ("vision", "text"),
    ("dense",),
    ("moe", "twin"),
)
# glibc returns big blocks to the system at every free and pays page faults for them at every step; keeping
# them made a CPU training step of the experts a quarter faster
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
LOCK_SECONDS = 60  # what a task that was told to stop may need to save its step
ELAPSED = "seconds.txt"
DONE_BY = {
    "vision": "vision",
    "text": "text",
    "dense": "compute.json",
    "moe": "scores-sft.json",
    "twin": "scores-sft_plain.json",
}


def run_demo(out_dir: str | os.PathLike, is_quick: bool = False, seed: int = 0) -> int:
    """Run what is not done yet in `out_dir`, then print the table.

    Raises:
        ValueError: `out_dir` holds something else, or a demo with other settings; it is left as it is.
        Interrupted: stopped on request; the same call goes on.
    """
    out = Path(out_dir)
    settings = Settings(seed=seed)
    settings = quick(settings) if is_quick else settings
    claim(out, settings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"CuMo demo in {out} on {_machine(cores)}; Ctrl-C stops it, the same command goes on", flush=True)
    with locked(out):
        with _timed(out):
            make_dataset(out / "data", settings.image_size, seed=seed, quick=is_quick)
        for tasks in PHASES:
            if left := [task for task in tasks if not (out / DONE_BY[task]).exists()]:
                with _timed(out):
                    run_tasks(out, left, cores)
        from cumo_model.demo.report import (
            report,  # matplotlib, and a model to ask: not before training is done
        )

        report(out, settings, _seconds(out))
    return 0


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One demo at a time in `out`; the tasks inherit the lock: it is free when the last of them has ended."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with (out / ".lock").open("a") as file:
        for second in range(LOCK_SECONDS + 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == LOCK_SECONDS:
                    raise ValueError(f"another demo is running in {out}: wait for it, or stop it") from None
                if second == 0:
                    print(f"another demo, or what is left of one, still runs in {out}; waiting", flush=True)
                time.sleep(1)
        os.set_inheritable(file.fileno(), True)
        yield


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


def _end_with_parent() -> None:
    """In a new task before it starts: a killed demo leaves no trainer behind."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def claim(out: Path, settings: Settings) -> None:
    path, wanted = out / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != wanted:
            raise ValueError(f"{out} holds a demo with other settings: choose another --out or delete it")
        return
    part = path.with_name(".settings.json.part")
    if out.exists() and any(found != part for found in out.iterdir()):
        raise ValueError(f"{out} holds something that is not a demo: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(wanted, indent=1))
    os.replace(part, path)


def _machine(cores: int) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} CPU cores"


def run_tasks(out: Path, tasks: list[str], cores: int) -> None:
    """Run tasks, as many side by side as there are cores; ends them all when one fails or a stop is asked
    for."""
    if not tasks:
        return
    places = list(range(min(cores, len(tasks))))  # lines of the terminal, one per running task
    threads = max(1, cores // len(places))
    # threads that spin while they wait take the core from those they wait for
    environment = MALLOC | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    waiting, running, codes = list(tasks), {}, {}
    used: dict[str, int] = {}
    try:
        while waiting or len(codes) < len(running):
            while waiting and places:
                task, used_place = waiting.pop(0), places.pop(0)
                command = [sys.executable, "-m", "cumo_model.demo.task", task, str(out)]
                command += ["--position", str(used_place), "--threads", str(threads)]
                # a session of its own: Ctrl-C reaches only this process, which then asks the tasks to stop
                running[task] = subprocess.Popen(
                    command,
                    env={**environment, **os.environ},
                    start_new_session=True,
                    close_fds=False,  # the lock goes with it
                    preexec_fn=_end_with_parent,
                )
                used[task] = used_place
            for task, process in running.items():
                if task not in codes and process.poll() is not None:
                    codes[task] = process.returncode
                    places.append(used[task])
                    if process.returncode:
                        waiting.clear()
                        _stop(running)
            time.sleep(0.1)
    except KeyboardInterrupt:
        _stop(running)
        codes = {task: process.wait() for task, process in running.items()}
    print("\n" * (min(cores, len(tasks)) - 1), end="", flush=True)
    failed = {task: code for task, code in codes.items() if code not in (0, 130, -signal.SIGTERM)}
    if failed:
        how = [f"{task} {_ending(code)}" for task, code in failed.items()]
        raise RuntimeError(f"{', '.join(how)}; what was reached is kept in {out}")
    if any(codes.values()):
        raise Interrupted(f"stopped; the same command goes on from {out}")


def _ending(code: int) -> str:
    return "failed" if code > 0 else f"was ended by {signal.Signals(-code).name}"


def _stop(running: dict[str, subprocess.Popen]) -> None:
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
