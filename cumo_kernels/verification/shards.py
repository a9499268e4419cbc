"""Runs verify's cases in several processes, so that a crash, a hang or a lost device fails only its case.

The parent sends each worker one case at a time: one JSON line in, two lines out, the first before the case
starts. If a worker dies, its case has failed, and a new process continues. A worker runs one backend only.
Cases whose memory together exceeds the GPU's wait for each other; a case that runs out of memory anyway is
tried once more alone on the GPU.
"""

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from cumo_kernels.activations import get_activation
from cumo_kernels.verification.accuracy import ROUNDS, SMALL
from cumo_kernels.verification.cases import LAYERS, MATMULS, ROUTES, Case, parse
from cumo_kernels.verification.packed_cases import OPS as PACKED
from cumo_kernels.verification.proofs import command

START = 180.0  # seconds until a worker must have imported what it needs
GRACE = 30.0  # seconds that the parent waits for a worker's own watchdog before it kills the worker
WRAP_UP = 5.0  # seconds that running cases have after the time limit of the whole run
LINGER = 5.0  # seconds to wait for a killed worker: one that waits inside a driver may never end
TRIES = 3  # consecutive workers of a backend that may end before their first case
CONTEXT = 3 << 28  # bytes of GPU memory that a process uses before its first tensor
SHARE = 0.8  # share of the GPU's memory that is used
OUT_OF_MEMORY = (
    "OutOfMemoryError", "out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "signal SIGKILL",
)  # fmt: skip
NO_PROCESS = "no process for"
LATE = "killed after its time"
LACKING = ("Failed to find C compiler", "No space left on device", "Read-only file system")


@dataclass(frozen=True)
class Job:
    backend: str
    family: str
    case: Case


def _out_of_memory(failures: Iterable[str]) -> bool:
    return any(word in reason for reason in failures for word in OUT_OF_MEMORY)


def is_late(failures: Iterable[str]) -> bool:
    """Whether a case did not end in its time: it may hang, or the machine was slow."""
    return any(LATE in reason or "Timeout (" in reason for reason in failures)


def of_the_machine(failures: Iterable[str]) -> bool:
    """Whether a case failed because this machine lacks something, not because of the backend."""
    lacks = lambda reason: reason.startswith(NO_PROCESS) or any(word in reason for word in LACKING)
    return _out_of_memory(failures) or any(map(lacks, failures))


def bytes_of(case: Case) -> int:
    """Estimated peak memory of checking `case`: fp64 copies of inputs, gradients and intermediate values.

    Packed weights have no gradients, and no draws.
    """
    width = case.I * (1 + get_activation(case.activation).is_gated)
    slots, smallest, weights, packed = case.T * case.K, SMALL, 0, 0
    if case.op in LAYERS:
        rows = case.T * (case.H + case.O) + slots * (case.H + 2 * width + case.O)
        weights = case.E * (width * case.H + case.O * case.I)
        smallest = slots
    elif case.op in MATMULS:
        rows = slots * (case.H + 2 * width)
        weights = case.E * width * case.H
    elif case.op in ROUTES:
        rows = case.T * (case.H * case.gated + 2 * case.E)
        smallest = case.groups  # of the mean squared logsumexp
    elif case.op == "activate":
        rows = 2 * case.T * width
    else:
        rows = 2 * slots * case.H
        smallest = slots if case.op == "combine" else SMALL
    if case.op in PACKED and case.weights != "plain":
        weights, packed = 0, weights
    if case.op == "adapted_expert_mlp":
        weights += case.E * case.rank * (case.H + width + case.I + case.O)
    draws = min(ROUNDS, -(-SMALL // max(smallest, 1)))
    # of several draws the results are kept and stacked
    return 8 * (4 * packed + (weights + rows) * (5 + 7 * draws if draws > 1 else 8))


def room(workers: int, device: str) -> float:
    """Bytes that the running cases may use together."""
    if device != "cuda":
        return math.inf
    return SHARE * torch.cuda.get_device_properties(0).total_memory - workers * CONTEXT


def serve(check: Callable[[Job], dict], device: str, seconds: float) -> None:
    """Run a worker: read a case, announce it, check it, send the result; until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # printed text goes to the error output
    say = lambda **line: print(json.dumps(line), file=answers)
    check(Job("reference", "", Case("activate", T=1)))  # imports and the context must not count for a case
    say(ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        say(begin=asked["case"])
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)
        result = check(Job(asked["backend"], asked["family"], parse(asked["case"])))
        if device == "cuda" and not result["lost"]:
            torch.cuda.empty_cache()
        faulthandler.cancel_dump_traceback_later()
        say(result=result)
        if result["lost"]:
            os._exit(3)
    os._exit(0)  # no clean-up: the device may be in any state


@dataclass(eq=False)
class Worker:
    backend: str
    device: str
    seconds: float  # time limit of one case
    threads: int
    process: subprocess.Popen = field(init=False)
    job: Job | None = None
    begun: bool = False
    ready: bool = False
    late: bool = False
    released: bool = False  # it has no more cases, and ends
    deadline: float = field(default_factory=lambda: time.monotonic() + START)
    text: bytes = b""

    def __post_init__(self):
        self.errors = tempfile.TemporaryFile()
        words = ["verify", "--serve", self.backend, "--device", self.device]
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}
        environment.pop("CUMO_BACKEND", None)
        self.process = subprocess.Popen(
            [*command(), *words, "--case-seconds", str(self.seconds)], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def take(self, job: Job) -> None:
        self.job, self.begun = job, False
        self.deadline = time.monotonic() + (self.seconds + GRACE if self.seconds else math.inf)
        line = {"backend": job.backend, "family": job.family, "case": str(job.case)}
        with contextlib.suppress(BrokenPipeError):  # a later read shows that it has ended
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[dict] | None:
        """The lines received so far; None at the end."""
        part = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self.text = (self.text + part).split(b"\n")
        return [json.loads(line) for line in lines] if part else None

    def release(self) -> None:
        """Let it end, without waiting for that."""
        self.released, self.deadline = True, time.monotonic() + LINGER
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()
        self.late, self.deadline = True, time.monotonic() + LINGER

    def end(self) -> str:
        """Stop the worker, if it still runs -> how it ended and its last output."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            code = self.process.wait(0 if self.late else LINGER)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = -signal.SIGKILL
        self.process.stdout.close()
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - 20_000))
        words = self.errors.read().decode(errors="replace")
        self.errors.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self.late:
            how = LATE
        return f"{how}: {last_output(words)}"


def last_output(text: str) -> str:
    """The end of the output; of a watchdog's stack dump the top, with the innermost calls."""
    if (at := text.rfind("Timeout (")) >= 0:
        # other threads come first; the checking thread is the last
        head, *stacks = text[at:].split("\nThread ")
        calls = [line.strip() for line in (stacks[-1] if stacks else head).splitlines() if "File" in line]
        return f"{head.splitlines()[0]} in {'; '.join(calls[:4])}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-6:])[-500:] or "no output"


class Shards:
    """run(jobs) passes every result to `note`, in order of completion."""

    def __init__(
        self,
        device: str,
        workers: int,
        case_seconds: float,
        stop: float,
        note: Callable[[dict], None],
        log: Callable[[str], None],
    ):
        """`stop`: time.monotonic() after which no case starts; `WRAP_UP` later running cases are killed."""
        self.device, self.seconds, self.stop = device, case_seconds, stop
        self.note, self.log = note, log
        self.workers = workers
        self.threads = max(1, (os.cpu_count() or 1) // workers)
        self.room = room(workers, device)
        self.running: list[Worker] = []
        self.left: list[Job] = []
        self.again: list[Job] = []
        self.misses: dict[str, int] = {}
        self.missing: list[str] = []
        self.cut: list[Job] = []
        self.done = 0

    def run(self, jobs: Iterable[Job]) -> list[str]:
        """-> messages about what was not checked."""
        self.left = list(jobs)
        total = len(self.left)
        try:
            self._drain(total, retry=True)
            if self.again:
                self.log(f"out of memory next to others, now run alone: {len(self.again)} cases")
            skipped, self.left, self.workers, self.room = self.left, self.again, 1, math.inf
            self._drain(total, retry=False)
            self.left += skipped
        finally:
            for worker in self.running:
                worker.kill()
            for worker in self.running:
                worker.end()
        if self.left:
            self.missing.append(f"{len(self.left)} of {total} cases: --budget was spent")
        if self.cut:
            names = ", ".join(f"{job.backend} {job.case}" for job in self.cut)
            self.missing.append(
                f"{len(self.cut)} of {total} cases were running when --budget was spent: {names}"
            )
        return self.missing

    def _drain(self, total: int, retry: bool) -> None:
        while True:
            over = time.monotonic() > self.stop
            for worker in list(self.running):
                if worker.released:
                    continue
                if worker.ready and worker.job is None:
                    self._assign(worker, over)
                elif over and not worker.ready:
                    worker.kill()
                    self._stop(worker)
                elif time.monotonic() > self.stop + WRAP_UP:
                    self.cut.append(worker.job)
                    worker.kill()
                    self._stop(worker)
            while not over and len(self.running) < self.workers and (backend := self._wanted()):
                self.running.append(Worker(backend, self.device, self.seconds, self.threads))
            if not self.running:
                return
            pipes = {worker.process.stdout: worker for worker in self.running}
            for pipe in select.select(list(pipes), [], [], 0.5)[0]:
                self._receive(pipes[pipe], total, retry)
            for worker in list(self.running):
                if time.monotonic() > worker.deadline and worker.late:
                    self._handle_end(worker, total, retry)
                elif time.monotonic() > worker.deadline:
                    worker.kill()

    def _wanted(self) -> str | None:
        """The backend with most cases left per worker; None if a new worker would have no case."""
        left: dict[str, int] = {}
        for job in self.left:
            left[job.backend] = left.get(job.backend, 0) + 1
        has = lambda name: sum(worker.backend == name for worker in self.running)
        coming = lambda name: sum(w.backend == name and w.job is None for w in self.running)
        open_ = [name for name, number in left.items() if number > coming(name)]
        return max(open_, key=lambda name: left[name] / (1 + has(name)), default=None)

    def _assign(self, worker: Worker, over: bool) -> None:
        mine = [job for job in self.left if job.backend == worker.backend]
        if over or not mine:
            worker.release()
            return
        taken = [bytes_of(w.job.case) for w in self.running if w.job is not None]
        fits = lambda job: not taken or sum(taken) + bytes_of(job.case) <= self.room
        large = lambda size: size * self.workers > self.room
        able = [job for job in mine if fits(job)]
        # always keep one large case running: left for the end, they would run one by one
        first = [] if any(map(large, taken)) else [job for job in able if large(bytes_of(job.case))]
        if able:
            job = (first or able)[0]
            self.left.remove(job)
            worker.take(job)

    def _receive(self, worker: Worker, total: int, retry: bool) -> None:
        lines = worker.read()
        for line in lines or ():
            if "ready" in line:
                worker.ready, worker.deadline = True, math.inf
            elif "begin" in line:
                worker.begun, self.misses[worker.backend] = True, 0
                self.log(f"-> {worker.backend} {line['begin']}")
            else:
                job, worker.job, worker.deadline = worker.job, None, math.inf
                self._finish(job, line["result"], total, retry)
        if lines is None:
            self._handle_end(worker, total, retry)

    def _handle_end(self, worker: Worker, total: int, retry: bool) -> None:
        words = self._stop(worker)
        if worker.job is not None and worker.begun:
            reason = f"its process ended, {words}"
            self._finish(worker.job, self._failure(worker.job, reason), total, retry)
        elif worker.job is not None:
            self.left.insert(0, worker.job)
        if not worker.begun and not worker.released:
            self._count_failed_start(worker.backend, words)

    def _count_failed_start(self, backend: str, words: str) -> None:
        """Count a worker that ended before its first case; after several, give up on its backend."""
        self.misses[backend] = self.misses.get(backend, 0) + 1
        mine = [job for job in self.left if job.backend == backend]
        if self.misses[backend] >= TRIES and mine:
            self.left = [job for job in self.left if job.backend != backend]
            self.note(self._failure(mine[0], f"{NO_PROCESS} {backend} starts, {words}"))
            self.missing.append(f"{len(mine) - 1} cases of {backend}: no process for it starts")

    def _finish(self, job: Job, result: dict, total: int, retry: bool) -> None:
        if retry and _out_of_memory(result["failures"]):
            self.again.append(job)
            return
        self.note(result)
        self.done += 1
        if self.done % 50 == 0:
            self.log(f"{self.done} of {total} cases")

    def _failure(self, job: Job, reason: str) -> dict:
        return {
            "case": str(job.case), "backend": job.backend, "device": self.device, "family": job.family,
            "failures": [reason],
        }  # fmt: skip

    def _stop(self, worker: Worker) -> str:
        self.running.remove(worker)
        return worker.end()
