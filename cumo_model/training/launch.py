"""Start the processes of a training run on this machine, restart them after a crash, and stop them together.

torchrun does the same for several machines. On one machine this needs no options and differs in four ways:
an error that would occur again is not tried again, every error is printed once, workers have the time that
they need to save after a SIGTERM, and new workers never use the store of earlier ones.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cumo_model.model.full_disk import is_no_room
from cumo_model.training.lock import locked
from cumo_model.training.run_folder import finished_step

MAX_RESTARTS = 3
GRACE_S = 10  # time for the other workers to end after one has failed, then they get SIGKILL
STOPPED = 130  # exit code of a run that was asked to stop
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # ATTEMPT/LOCAL_RANK/error.json; torchrun sets it too
REPORTED = "reported.json"  # file in ATTEMPT: the error that its workers have reported
HOST = "127.0.0.1"


def cores() -> int:
    """Number of CPU cores of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Called in a new process before its program starts: it gets SIGTERM when its parent ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Let only the first worker of this machine that fails report its error; the others end without a word.

    Their errors have the same cause, or are caused by the first: a connection to a worker that has ended. It
    has no effect in a process that is not a worker.

    Raises:
        SystemExit: another worker has reported before.
    """
    file = os.environ.get(ERROR_FILE)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not file:
            raise
        # when another worker ends, this one gets a signal, which must not replace its message
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        if not _claim(Path(file).parents[1] / REPORTED, error):
            raise SystemExit(STOPPED if _is_stop(error) else 1) from None
        raise


def _claim(path: Path, error: BaseException) -> bool:
    try:
        with path.open("x") as out:
            json.dump({"is_final": _is_final(error)}, out)
    except FileExistsError:
        return False
    except OSError:  # a launcher without this folder
        pass
    return True


def _is_stop(error: BaseException) -> bool:
    from cumo_model.training.recover import Interrupted

    return isinstance(error, KeyboardInterrupt | Interrupted)


def _is_final(error: BaseException) -> bool:
    """Whether the error would occur again: all but those of devices, connections, memory and file systems."""
    return is_no_room(error) or not isinstance(error, RuntimeError | OSError | MemoryError)


def launch(
    config: str | os.PathLike,
    overrides: Sequence[str] = (),
    processes: int = 1,
    max_restarts: int = MAX_RESTARTS,
) -> int:
    """Run a recipe on several processes of this machine, as `python -m cumo_model train --processes N`.

    A worker that is killed, or fails with an error of a device, a connection or a disk, ends the others; all
    then start again from the last checkpoint. SIGTERM and SIGINT are passed on to the workers, which save. A
    second signal stops them at once.

    Args:
        config: path or name of the recipe.
        overrides: `key=value` strings.
        processes: number of processes.
        max_restarts: how often the workers are started again.

    Returns:
        The exit code of the run: 0 if it is finished, 130 if it was stopped by a signal, else 1. The error is
        printed.

    Raises:
        ValueError: an argument is not valid, the recipe cannot be read, or this process is a worker itself.
    """
    from cumo_model.training.recipe import load_recipe

    _check(processes, max_restarts)
    # here, because workers need seconds before they could say what is wrong
    recipe = load_recipe(config, overrides, files=True)
    if finished_step(recipe.output_dir) is None:
        with locked(recipe.output_dir):  # else each worker would find out after seconds of imports
            pass
    _check_devices(processes, bool(recipe.trainer.get("use_cpu")))
    train = ["-m", "cumo_model", "train", "--config", os.fspath(config), "--", *overrides]
    return supervise([sys.executable, *train], processes, max_restarts)


def supervise(command: Sequence[str], processes: int, max_restarts: int) -> int:
    """Run a program on several processes, as `launch`.

    The program should run in `reported_once`. If it has several processes, each gets the variables from which
    `torch.distributed` starts.

    Args:
        command: the program and its arguments.
        processes: number of processes.
        max_restarts: how often they are started again.

    Returns:
        The exit code, as `launch`.
    """
    with tempfile.TemporaryDirectory(prefix="cumo-train-") as folder, _Signals() as signals:
        for attempt in range(max_restarts + 1):
            work = Path(folder, f"attempt-{attempt}")
            failure = _Workers(command, processes, work).wait(signals)
            if failure is None:
                return 0
            reported = _read(work / REPORTED)
            if signals.count and reported is None:
                _say("stopped")
            if signals.count or failure[1] == STOPPED:
                return STOPPED
            if reported is not None and reported["is_final"]:
                return 1
            if attempt < max_restarts:
                again = f"restart {attempt + 1} of {max_restarts}, from the last checkpoint"
                _say(f"{_ending(*failure)}: {again}")
            elif reported is None:
                _say(_ending(*failure))
    return 1


def _say(text: str) -> None:
    print(f"cumo: {text}", file=sys.stderr, flush=True)


def _check(processes: int, max_restarts: int) -> None:
    if "RANK" in os.environ:
        raise ValueError(
            "--processes and --max-restarts must be left out in a process that torchrun or another launcher "
            f"has started, got {processes} and {max_restarts} with RANK={os.environ['RANK']}"
        )
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    if max_restarts < 0:
        raise ValueError(f"--max-restarts must be at least 0, got {max_restarts}")


def _check_devices(processes: int, is_cpu: bool) -> None:
    import torch

    if torch.cuda.is_available() and not is_cpu and processes > torch.cuda.device_count():
        number = torch.cuda.device_count()
        raise ValueError(f"--processes must be at most {number}, the number of GPUs, got {processes}")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # its writer was killed
        return {"is_final": False}


class _Signals:
    """Counts SIGTERM and SIGINT inside the `with` block instead of following them."""

    def __enter__(self) -> "_Signals":
        self.count, self._before = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame) -> None:
        self.count += 1

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Workers:
    """The processes of one attempt. They find each other in a store that this process holds, on a free port.

    Each attempt has a new store: workers would otherwise read the addresses of earlier ones and wait.
    """

    def __init__(self, command: Sequence[str], number: int, work: Path):
        self.processes: list[subprocess.Popen] = []
        self.store, self.work = None, work
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // number)), **os.environ}
        if number > 1:
            from torch.distributed import TCPStore

            self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
            environment |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(self.store.port)}
            environment |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        try:
            for rank in range(number):
                own = {ERROR_FILE: str(work / str(rank) / "error.json")}
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
                (work / str(rank)).mkdir(parents=True)
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=environment | own,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
                        preexec_fn=end_with_parent,
                    )
                )
        except BaseException:
            self._send(signal.SIGKILL)
            raise

    def wait(self, signals: _Signals) -> tuple[int, int] | None:
        """Wait for all workers, and end the others if one fails.

        Returns:
            Rank and exit code of the one that failed first, or None if all have finished.
        """
        failure, sent, end = None, 0, None
        try:
            while True:
                running = [process for process in self.processes if process.poll() is None]
                bad = [(rank, p.returncode) for rank, p in enumerate(self.processes) if p.returncode]
                # a worker that was killed is the cause of connection errors of others
                failure = failure or min(bad, key=lambda found: found[1], default=None)
                if not running:
                    return failure
                if signals.count > sent:
                    sent = signals.count
                    # SIGINT would print a traceback in a worker that is still importing
                    self._send(signal.SIGTERM)
                if bad and end is None and (_read(self.work / REPORTED) or {}).get("is_final"):
                    self._send(signal.SIGKILL)  # nothing was trained that the others could save
                # workers that were asked once to stop have all the time they need to save
                if end is None and (bad or sent > 1):
                    end = time.monotonic() + GRACE_S
                if end is not None and time.monotonic() > end:
                    self._send(signal.SIGKILL)
                time.sleep(0.05)
        finally:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _ending(rank: int, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"worker {rank} {how}"
