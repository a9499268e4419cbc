"""Test programs in separate processes in which all imports are already done.

A program of this project needs seven seconds for its imports, and a test of training starts up to twelve
programs. `Forked` takes its processes from the fork server of multiprocessing, which imports everything
once. torchrun starts Python itself, so tests of torchrun use torchrun (tests/model/training/test_recover.py).
"""

import atexit
import contextlib
import faulthandler
import math
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["peft", "cumo_model.training.trainer", "torch._dynamo", "torch.distributed.fsdp"]
)
GRACE_S = 10  # time for the other ranks to end after one has failed


def _become(argv: Sequence[str], environment: dict[str, str], out: str) -> None:
    """Run what `python ARGV` would run, in this process."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(stream, standard)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(stream)  # for `wait_until`
    import torch

    torch.set_num_threads(1)
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Forked:
    """A subset of `subprocess.Popen` for one program, or for all ranks of a program as torchrun starts them.

    Args:
        argv: arguments of `python`: a file, or "-m" and a module, or "-c" and code; then the program's
            arguments.
        out: file for standard output and standard error of all ranks.
        ranks: number of processes. If there are several, torch's environment variables are set for each.
    """

    def __init__(self, argv: Sequence[str], out: Path, ranks: int = 1):
        self.out, self.ranks = out, []
        RUNNING.append(self)
        out.write_text("")
        shared = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            process = SERVER.Process(target=_become, args=(list(map(str, argv)), shared | own, str(out)))
            process.start()
            self.ranks.append(process)

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    @property
    def returncode(self) -> int | None:
        """None while a rank runs; then the code of the first rank that failed, or 0."""
        codes = [process.exitcode for process in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    poll = lambda self: self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.ranks:
            if process.is_alive():
                os.kill(process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until all ranks have ended and return everything they printed."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while self.returncode is None and time.monotonic() < end:
            multiprocessing.connection.wait([p.sentinel for p in self.ranks if p.exitcode is None], timeout=1)
            if any(p.exitcode for p in self.ranks):  # the other ranks may wait for it
                end = min(end, time.monotonic() + GRACE_S)
        if self.returncode is None:
            late = not any(p.exitcode for p in self.ranks)
            kill(self)
            for process in self.ranks:
                process.join()
            if late:
                raise subprocess.TimeoutExpired(str(self.out), timeout, output=self.out.read_text()[-3000:])
        return self.out.read_text(errors="replace"), None


RUNNING: list[Forked] = []


def kill(process: subprocess.Popen | Forked) -> None:
    """Send SIGKILL to all processes of a run, also to torchrun's workers, which have their own sessions."""
    heads = [rank.pid for rank in process.ranks] if isinstance(process, Forked) else [process.pid]
    for head in heads:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(head), *psutil.Process(head).children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):  # each leads a process group, which may outlive it
            os.killpg(head, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def wait_until(
    process: subprocess.Popen | Forked, holds: Callable[[], bool], out: Path, seconds: float = 200
) -> None:
    """Wait until `holds`, while the process runs; else fail with what it printed to `out`.

    A process that is late is aborted, so that its stacks are part of the message if it prints them
    (PYTHONFAULTHANDLER=1).
    """
    end = time.monotonic() + seconds
    while not holds():
        code = process.poll()
        if code is None and time.monotonic() < end:
            time.sleep(0.005)
            continue
        if code is None:
            process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            kill(process)
        why = f"it is not so after {seconds} s" if code is None else f"it ended with code {code} before"
        raise AssertionError(f"{why}: {out.read_text(errors='replace')[-3000:]}")


def finish(process: subprocess.Popen | Forked, code: int = 0, seconds: float = 110) -> str:
    """Wait for the end, check the exit code `code` and return what was printed."""
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        kill(process)
        raise AssertionError(f"it still runs after {seconds} s and has printed: {error.output}") from None
    assert process.returncode == code, out[-3000:]
    return out


@atexit.register  # before multiprocessing waits for them
def leave_none_behind() -> None:
    while RUNNING:
        process = RUNNING.pop()
        if process.returncode is None:
            kill(process)
