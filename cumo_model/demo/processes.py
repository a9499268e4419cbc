"""Processes of a demo: a lock on its folder, and tasks in parallel, each with a line of the terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cumo_model.demo.settings import Settings, plain
from cumo_model.training.launch import cores as cores
from cumo_model.training.launch import end_with_parent as _end_with_parent
from cumo_model.training.lock import name_of, this_process
from cumo_model.training.recover import Interrupted

# by default glibc returns large blocks to the system, which causes page faults in every step; keeping them
# made a training step with experts a quarter faster on a CPU
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
LOCK_SECONDS = 60  # time that a stopped task may need to save a checkpoint


def named(out_dir: str | os.PathLike) -> Path:
    """The canonical path of a folder for its recipes, relative to the working directory if it is inside."""
    path, here = Path(out_dir).resolve(), Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def claim(out: Path, settings: Settings) -> None:
    """Create the folder of a demo with its settings, or check that an existing one has the same settings.

    Raises:
        ValueError: the folder contains a demo with other settings, or something else.
    """
    path, wanted = out / "settings.json", plain(settings)
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != wanted:
            raise ValueError(f"{out} contains a demo with other settings: choose another --out or delete it")
        return
    part = path.with_name(".settings.json.part")
    if out.exists() and any(found != part for found in out.iterdir()):
        raise ValueError(f"{out} contains something that is not a demo: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(wanted, indent=1))
    os.replace(part, path)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Allow one demo at a time in `out`. Tasks inherit the lock, so it is free after the last task ends.

    Unfinished folders of a call that was killed are deleted.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with (out / ".lock").open("a+") as file:
        for second in range(LOCK_SECONDS + 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                try:
                    who = name_of(json.loads(file.read()))
                except ValueError:  # it is being written
                    who = name_of({})
                if second == LOCK_SECONDS:
                    raise ValueError(
                        f"another demo is running in {out}, {who}: wait for it, or stop it"
                    ) from None
                if second == 0:
                    print(f"another demo, or a task of one, still runs in {out}, {who}; waiting", flush=True)
                time.sleep(1)
        file.truncate(0)
        json.dump(this_process(), file)
        file.flush()
        os.set_inheritable(file.fileno(), True)
        # nothing else writes here: these are left over from a call that was killed
        for name in (".data-", "*/.model-", "rows/*/.model-"):
            for stale in out.glob(name + "?" * 8):
                shutil.rmtree(stale, ignore_errors=True)
        yield


def run_tasks(out: Path, tasks: list[str], width: int, phase: int) -> None:
    """Run tasks of cumo_model.demo.task. All tasks are stopped if one fails or a stop is requested.

    Args:
        out: folder of the demo.
        tasks: names of the tasks.
        width: number of tasks that run in parallel.
        phase: number of tasks of the phase, including finished ones. It determines the threads per task, so a
            task that is resumed alone has the same number of threads and gives bitwise the same result.

    Raises:
        RuntimeError: a task failed.
        Interrupted: a stop was requested; the same call resumes.
    """
    if not tasks:
        return
    places = list(range(min(width, len(tasks))))  # lines of the terminal, one per running task
    threads = max(1, width // min(width, phase))
    # threads that wait actively would use the cores of the threads they wait for
    environment = MALLOC | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    waiting, running, codes = list(tasks), {}, {}
    used: dict[str, int] = {}
    try:
        while waiting or len(codes) < len(running):
            while waiting and places:
                task, used_place = waiting.pop(0), places.pop(0)
                command = [sys.executable, "-m", "cumo_model.demo.task", task, str(out)]
                command += ["--position", str(used_place), "--threads", str(threads)]
                # in a new session, so that Ctrl-C reaches only this process, which then stops the tasks
                running[task] = subprocess.Popen(
                    command,
                    env={**environment, **os.environ},
                    start_new_session=True,
                    close_fds=False,  # the task inherits the lock
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
    print("\n" * (min(width, len(tasks)) - 1), end="", flush=True)
    failed = {task: code for task, code in codes.items() if code not in (0, 130, -signal.SIGTERM)}
    if failed:
        how = [f"{task} {_ending(code)}" for task, code in failed.items()]
        raise RuntimeError(f"{', '.join(how)}; progress is kept in {out}")
    if any(codes.values()):
        raise Interrupted(f"{out}: stopped, progress is kept")


def _ending(code: int) -> str:
    return "failed" if code > 0 else f"was stopped by {signal.Signals(-code).name}"


def _stop(running: dict[str, subprocess.Popen]) -> None:
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
