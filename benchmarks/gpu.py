"""make gpu: build, compile, verify, test, sanitize, tune, measure and report on a GPU, within a budget.

Steps run in order of what one learns from them; each step's output is on disk before the next begins, so a
run that is cut off leaves what it found. In the folder given by --out:

    summary.md     a line per step, rewritten after each
    log.txt        everything the steps printed
    verify.json    every case of verify
    results.tgz    CSV files, pictures, REPORT.md, tile sizes, which backend was faster, which is verified
"""

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cumo_kernels import extension

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0
GPU_TESTS = "odd-tails or aligned or clip-crop"  # of tests/kernels/test_gpu.py: every op, ragged and at size
RESERVE = 20.0  # seconds kept for the steps that run `always`


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    cap: float  # seconds at most, out of BUDGET; another budget scales it
    why_not: Callable[[], str | None] = lambda: None  # the reason to skip it, or None
    environment: dict[str, str] = field(default_factory=dict)
    must_pass: bool = False  # else `main` ends with 1, also if time or a tool was missing
    always: bool = False  # runs even when the budget is spent
    budget: float | None = None  # the command is told --budget: this, or less where less time is left

    def told(self, seconds: float) -> tuple[str, ...]:
        """The command, when it is given `seconds`: what it starts last has a minute or a third to end."""
        if self.budget is None:
            return self.command
        return (*self.command, "--budget", f"{min(self.budget, seconds - min(60, seconds / 3)):.0f}")


@dataclass
class Outcome:
    name: str
    verdict: str  # ok | FAILED (code) | out of time | skipped
    seconds: float
    remark: str


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )


def no_build() -> str | None:
    if not (ROOT / "csrc" / "bindings.cpp").exists():
        return "this tree has no csrc/bindings.cpp"
    if (
        os.environ.get("CUDA_HOME")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    ):
        return None
    return "no nvcc on PATH, in /usr/local/cuda or under CUDA_HOME"


def build_environment(capability: tuple[int, int] | None) -> dict[str, str]:
    """Compile for this GPU alone, whatever list a container brings, and fail rather than go on without."""
    if capability is None:
        return {"CUMO_BUILD": "1"}
    return {"CUMO_BUILD": "1", "TORCH_CUDA_ARCH_LIST": extension.architecture(capability)}


def plan(device: str, out: Path, capability: tuple[int, int] | None = None) -> list[Step]:
    """Every step, in order; on a CPU those that need a GPU say so. `capability` is that of the GPU."""
    python = sys.executable
    cumo = (python, "-m", "cumo_kernels")
    need_gpu = lambda: None if device == "cuda" else "torch sees no CUDA device"
    verify = (*cumo, "verify", "--device", device, "--no-interpreter")
    bench = (python, "-m", "benchmarks", "--device", device, "--no-report")
    tune = (*cumo, "tune", "--seconds", "2")
    tests = (
        python,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    )
    # most of a cold run is compiling, which every core can do
    cores = str(min(os.cpu_count() or 1, 16))
    spread = ("-n", str(min(os.cpu_count() or 1, 8))) if importlib.util.find_spec("xdist") else ()
    sanitize = (sanitizer() or "compute-sanitizer", "--error-exitcode", "9")
    no_sanitizer = lambda: need_gpu() or (None if sanitizer() else "compute-sanitizer is not installed")
    # what hangs costs its case; a budget that cuts verify off leaves unrecorded what has not run whole
    apart, keep = (("--workers", cores), ("--record",)) if device == "cuda" else ((), ())
    small = (*verify, "--few", "--dtype", "bf16")
    return [
        Step("machine", (*cumo, "explain", "--device", device), 30),
        Step(
            "build", (python, "setup.py", "build_ext", "--inplace"), 240, no_build,
            build_environment(capability), must_pass=True,
        ),
        Step(
            "compile", (python, "-m", "cumo_kernels.codegen", "--gpu", "this", "--dtype", "bf16",
                        "--workers", cores), 120, need_gpu,
        ),
        Step("first verify", (*small, *apart), 90, must_pass=True),
        Step("first bench", (*bench, "--only", "experts", "--seconds", "0.5"), 90, budget=60),
        Step(
            "gpu tests", (*tests, *spread, "tests/kernels/test_gpu.py", "-k", GPU_TESTS), 150,
            need_gpu, must_pass=True,
        ),
        # ends by itself within the cap, a case that compiles for long included
        Step(
            "verify",
            (*verify, *apart, *keep, "--budget", "60", "--json", str(out / "verify.json")), 120,
            must_pass=True,
        ),
        Step(
            "memcheck", (*sanitize, "--tool", "memcheck", *small), 75, no_sanitizer,
            # memory from the driver for each tensor, so that its end is its end
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, must_pass=True,
        ),
        Step(
            "racecheck", (*sanitize, "--tool", "racecheck", *small, "--op", "route", "--op", "expert_mlp"),
            75, no_sanitizer, must_pass=True,
        ),
        Step("tune", (*tune, "--shape", "clip"), 75, need_gpu),
        Step("bench", (*bench, "--seconds", "0.3"), 300, budget=240),
        Step("tune more", (*tune, "--shape", "llm", "--shape", "mlp"), 120, need_gpu),
        Step("all gpu tests", (*tests, *spread, "-m", "gpu", "tests/kernels"), 300, need_gpu),
        # all the time that is left; what it does not come to is recorded as left out for time
        Step("full bench", (*bench, "--full", "--seconds", "0.3"), 600, need_gpu, budget=math.inf),
        Step("choose", (python, "-m", "benchmarks.choose"), RESERVE, always=True),
        Step("report", (python, "-m", "benchmarks.plot"), RESERVE, always=True),
    ]  # fmt: skip


def execute(step: Step, seconds: float, log: Path) -> tuple[int | None, str]:
    """Run one step, its output to `log` and screen -> exit code (None: out of time) and its last words."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    command = step.told(seconds)
    with log.open("ab") as file, log.open("rb") as seen:
        file.write(f"\n== {step.name}: {' '.join(command)}\n".encode())
        file.flush()
        seen.seek(0, os.SEEK_END)
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            return 127, str(error)
        stop, text, running = time.monotonic() + seconds, "", True
        while running:
            running = child.poll() is None  # asked before the last read, so that nothing is missed
            part = seen.read().decode(errors="replace")
            print(part, end="", flush=True)
            text = (text + part)[-4000:]
            if running and time.monotonic() > stop:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                return None, last_line(text)
            time.sleep(0.1 if running else 0)
        return child.returncode, last_line(text)


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def write_summary(outcomes: Iterable[Outcome], head: str, path: Path) -> str:
    lines = [head, "", "| step | verdict | seconds | last words |", "|---|---|---|---|"]
    lines += [
        f"| {o.name} | {o.verdict} | {o.seconds:.0f} | {o.remark[:100].replace('|', '/')} |" for o in outcomes
    ]
    text = "\n".join(lines) + "\n"
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
    return text


def pack(out: Path) -> None:
    """results.tgz: whatever the benchmarks and the tuning have written so far."""
    part = out / ".results.tgz.part"
    with tarfile.open(part, "w:gz") as tar:
        written = (
            "benchmarks/results",
            "benchmarks/REPORT.md",
            "cumo_kernels/configs",
            "cumo_kernels/measured.json",
            "cumo_kernels/verified.json",
        )
        for name in written:
            if (ROOT / name).exists():
                tar.add(ROOT / name, name)
    part.replace(out / "results.tgz")


def run(steps: Iterable[Step], budget: float, out: Path, head: str) -> list[Outcome]:
    """Run `steps` within `budget` seconds; what each found is on disk before the next begins."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    for step in steps:
        left = budget - (time.monotonic() - begin) - (0 if step.always else RESERVE * budget / BUDGET)
        reason = step.why_not()
        if reason is not None:
            outcomes.append(Outcome(step.name, "skipped", 0, reason))
        elif left < 3 and not step.always:
            outcomes.append(Outcome(step.name, "skipped", 0, "the budget is spent"))
        else:
            seconds = step.cap if step.always else min(left, step.cap * max(1, budget / BUDGET))
            print(f"== {step.name} (at most {seconds:.0f} s)", flush=True)
            started = time.monotonic()
            code, words = execute(step, seconds, out / "log.txt")
            verdict = "out of time" if code is None else "ok" if code == 0 else f"FAILED ({code})"
            outcomes.append(Outcome(step.name, verdict, time.monotonic() - started, words))
        write_summary(outcomes, head, out / "summary.md")
        pack(out)
    return outcomes


def part_of(steps: Iterable[Step], part: str) -> list[Step]:
    """ "prove": what must pass, and what that stands on; "measure": the rest. Both build."""
    proves = lambda step: step.must_pass or step.name in ("machine", "compile")
    return [s for s in steps if s.always or s.name == "build" or proves(s) == (part == "prove")]


def unproven(outcomes: Iterable[Outcome], steps: Iterable[Step], device: str) -> list[Outcome]:
    """Required steps that are not ok; on a CPU, where this script is only tried, some cannot run at all."""
    required = {step.name for step in steps if step.must_pass and (device == "cuda" or not step.why_not())}
    return [o for o in outcomes if o.name in required and o.verdict != "ok"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget", type=float, default=float(os.environ.get("BUDGET", BUDGET)), help="seconds"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder; default runs/gpu/<time>")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    parser.add_argument("--only", action="append", help="steps to run, by name; default: all")
    parser.add_argument("--part", choices=("prove", "measure"), help="half of the steps, for two cold calls")
    args = parser.parse_args(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device on this machine, so there is nothing to run")
        return 1
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU: no GPU was measured"
    now = datetime.now(UTC)
    out = (args.out or ROOT / "runs" / "gpu" / f"{now:%Y%m%dT%H%M%S}").resolve()
    steps = plan(args.device, out, torch.cuda.get_device_capability() if args.device == "cuda" else None)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"--only must be one of {[step.name for step in steps]}, got {sorted(unknown)}")
    steps = [step for step in steps if not args.only or step.name in args.only]
    if args.part:
        steps = part_of(steps, args.part)
    head = f"# {name}, torch {torch.__version__}, {now:%Y-%m-%d %H:%M} UTC, budget {args.budget:.0f} s"
    outcomes = run(steps, args.budget, out, head)
    print(f"\n{(out / 'summary.md').read_text()}\nin {out}")
    missing = unproven(outcomes, steps, args.device)
    for o in missing:
        print(f"required, but {o.verdict}: {o.name} ({o.remark})")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
