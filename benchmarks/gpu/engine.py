"""Runs steps one after the other within a budget; each step's result is saved before the next starts."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST = 3.0  # seconds: with less time left no step starts


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    cap: float  # time limit in seconds; then it is killed with all its processes
    expected: float = 0.0  # seconds, for --list
    # called before it starts: why it cannot run, and why it has nothing to do; or None
    why_not: Callable[[], str | None] = lambda: None
    done: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)
    must_pass: bool = False  # else `main` ends with 1, also if time ran out
    always: bool = False  # runs even when the budget is spent
    parallel: tuple[str, ...] = ()  # a second command that runs at the same time
    margin: float | None = None  # pass --budget to the command: its seconds minus this

    def words(self, seconds: float) -> tuple[str, ...]:
        """The command for a limit of `seconds`."""
        if self.margin is None:
            return self.command
        return (*self.command, "--budget", f"{max(1.0, seconds - self.margin):.0f}")


@dataclass
class Outcome:
    name: str
    verdict: str  # ok | FAILED (code) | out of time | skipped
    seconds: float
    remark: str


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def execute(step: Step, seconds: float, log: Path) -> tuple[int | None, str]:
    """Run one step, with its output in `log` and printed -> exit code (None: out of time), last line."""
    # timed and verified backends are forced, and time is limited: no self-check in between
    common = {"PYTHONUNBUFFERED": "1", "CUMO_SELF_CHECK": "0"}
    environment = {**os.environ, **common, **step.environment}
    command = step.words(seconds)
    with log.open("ab") as file, log.open("rb") as seen:
        switches = "".join(f"{name}={value} " for name, value in step.environment.items())
        file.write(f"\n== {step.name}: {switches}{' '.join(command)}\n".encode())
        file.flush()
        seen.seek(0, os.SEEK_END)
        start = lambda words: subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        children, stop, text, running = [], time.monotonic() + seconds, "", True
        try:
            for words in filter(None, (command, step.parallel)):
                children.append(start(words))
        except OSError as error:
            for child in children:
                _end(child)
            return 127, str(error)
        while running:
            # polled before the last read, so that no output is lost
            running = any(child.poll() is None for child in children)
            part = seen.read().decode(errors="replace")
            print(part, end="", flush=True)
            text = (text + part)[-4000:]
            if running and time.monotonic() > stop:
                for child in children:
                    _end(child)
                return None, last_line(text)
            time.sleep(0.1 if running else 0)
        for child in children:
            _end(child)  # processes that it has left behind
        return next((c.returncode for c in children if c.returncode), 0), last_line(text)


def _end(child: subprocess.Popen) -> None:
    """Kill it with all its processes; one that waits inside a driver may never end, and is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)


def run(
    steps: Iterable[Step], budget: float, log: Path, note: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run `steps` within `budget` seconds; `note` gets the outcomes after each."""
    begin = time.monotonic()
    steps, outcomes = list(steps), []
    # reserve the time of steps that always run, at the end
    reserve = sum(step.cap for step in steps if step.always)
    for step in steps:
        left = budget - (time.monotonic() - begin) - (0 if step.always else reserve)
        if (reason := step.done()) is not None:
            outcomes.append(Outcome(step.name, "ok", 0, reason))
        elif (reason := step.why_not()) is not None:
            outcomes.append(Outcome(step.name, "skipped", 0, reason))
        elif left < LEAST and not step.always:
            outcomes.append(Outcome(step.name, "skipped", 0, "the budget is spent"))
        else:
            seconds = step.cap if step.always else min(left, step.cap)
            print(f"== {step.name} (at most {seconds:.0f} s)", flush=True)
            started = time.monotonic()
            code, words = execute(step, seconds, log)
            verdict = "out of time" if code is None else "ok" if code == 0 else f"FAILED ({code})"
            outcomes.append(Outcome(step.name, verdict, time.monotonic() - started, words))
        note(outcomes)
    return outcomes


def unproven(outcomes: Iterable[Outcome], steps: Iterable[Step]) -> list[Outcome]:
    """Required steps that are not ok."""
    required = {step.name for step in steps if step.must_pass}
    return [o for o in outcomes if o.name in required and o.verdict != "ok"]


def find_tool(name: str) -> str | None:
    """Find the tool on PATH, or where CUDA's installer puts it."""
    found = shutil.which(name)
    return found or next((str(p) for p in sorted(Path("/usr/local").glob(f"cuda*/bin/{name}"))), None)
