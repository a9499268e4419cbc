"""Plant faults one at a time and check that a test fails for each.

    python -m tests.mutate [--only WORD] [--package NAME] [--jobs N] [--write FILE]

Each fault is one replacement in a copy of the tree. In cumo_kernels the tests of the affected stem then run:
for the Triton backend in Triton's interpreter, for csrc/ in emulation, for the reference directly. In
cumo_model the tests run that the fault names, after all of them have passed without a fault. A fault that no
test detects shows a missing test, or code that nothing needs.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import Fault
from tests.faults.checkpoints import FAULTS as CHECKPOINTS
from tests.faults.data import FAULTS as DATA
from tests.faults.demo import FAULTS as DEMO
from tests.faults.kernels import CUDA, HOPPER, TRITON
from tests.faults.kernels import FAULTS as KERNELS
from tests.faults.model import FAULTS as MODEL
from tests.faults.training import FAULTS as TRAINING

ROOT = Path(__file__).parents[1]
FAULTS = {"cumo_kernels": KERNELS, "cumo_model": MODEL + DATA + CHECKPOINTS + TRAINING + DEMO}
TIMEOUT_S = 1800  # a fault may make a loop endless, which counts as caught
# stems whose tests need neither interpreter nor emulation
ALONE = ("cute", "ptx_tables", "launch", "pdl")
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]


def named_tests(fault: Fault) -> list[str]:
    """The pytest ids of the tests that a fault of cumo_model names."""
    ids = []
    for part in fault.tests.split(";"):
        file, _, names = part.strip().partition("::")
        folder, _, stem = file.rpartition("/")
        path = "/".join(["tests/model", *filter(None, [folder]), f"test_{stem}.py"])
        ids += [f"{path}::{name}" for name in names.split()]
    return ids


def command_and_environment(fault: Fault, tree: Path) -> tuple[list[str], dict[str, str]]:
    """The command that runs the fault's tests in the tree, and its environment variables."""
    environment = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    if not fault.path.startswith(("cumo_kernels/", CUDA)):
        select = ["-k", fault.select] if fault.select else []
        return [*PYTEST, *select, *named_tests(fault)], environment
    select = "not triton"
    if fault.tests in ALONE:
        select = "test"
    elif fault.path.startswith(TRITON):
        environment["TRITON_INTERPRET"], select = "1", "triton"
    elif fault.path.startswith(CUDA):
        environment["CUMO_EMULATE"], select = "1", "cuda"
        environment["CUMO_EMULATE_CAPABILITY"] = "90" if fault.path.startswith(HOPPER) else "80"
    if fault.select:
        select = f"({fault.select}) and {select}"
    files = [f"tests/kernels/test_{stem}.py" for stem in fault.tests.split()]
    return [*PYTEST, "-m", "not slow and not sweep and not large", "-k", select, *files], environment


def notice(fault: Fault, tree: Path) -> tuple[bool, str]:
    """-> whether a test failed, and which one or why."""
    path = tree / fault.path
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.what}: occurs {text.count(fault.old)} times in {fault.path}: {fault.old!r}")
    command, environment = command_and_environment(fault, tree)
    path.write_text(text.replace(fault.old, fault.new))
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return True, "endless loop"
    finally:
        path.write_text(text)
    if done.returncode < 0:
        return True, "the interpreter crashes"
    if done.returncode not in (0, 1):  # 2 to 5: pytest ran no test
        raise SystemExit(f"{fault.what}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = re.search(r"^FAILED \S*?::(\S+)", done.stdout, re.M)
    if done.returncode and not failed:  # a failing fixture, for example a compile timeout, proves nothing
        raise SystemExit(f"{fault.what}: no test failed, pytest ended with:\n{done.stdout[-4000:]}")
    return done.returncode == 1, failed[1] if failed else ""


def without_fault(faults: list[Fault], tree: Path, jobs: int) -> None:
    """Run all tests that faults of cumo_model name; SystemExit if one fails: it would prove nothing."""
    ids = sorted({test for fault in faults if fault in FAULTS["cumo_model"] for test in named_tests(fault)})
    if not ids:
        return
    print(f"without a fault: {len(ids)} tests", flush=True)
    _, environment = command_and_environment(FAULTS["cumo_model"][0], tree)
    done = subprocess.run(
        [*PYTEST, "-n", str(jobs), *ids], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"tests fail without a fault:\n{done.stdout[-4000:]}{done.stderr}")


def copied(target: Path) -> Path:
    """A copy of the files that git knows, and of the compiled extension."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in [
        *filter(None, names),
        *(f"cumo_kernels/{so.name}" for so in ROOT.glob("cumo_kernels/_C*.so")),
    ]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def table(faults: list[Fault], jobs: int) -> tuple[list[str], int, int]:
    """Plant the faults -> rows, how many were noticed, how many of the others are harmless."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        own = threading.local()
        count = iter(range(jobs))
        without_fault(faults, copied(Path(folder, "without")), jobs)

        def row(fault: Fault) -> tuple[str, bool]:
            if not hasattr(own, "tree"):
                own.tree = copied(Path(folder, str(next(count))))
            start = time.monotonic()
            noticed, by = notice(fault, own.tree)
            where = (
                fault.path.removeprefix("cumo_kernels/").removeprefix("backends/").removeprefix("cumo_model/")
            )
            verdict = "caught" if noticed else "harmless" if fault.harmless else "MISSED"
            line = f"| {fault.what} | {where} | {verdict} | {by or fault.harmless} |"
            print(f"{line} {time.monotonic() - start:.0f} s", flush=True)
            return line, noticed

        found = list(pool.map(row, faults))
    rows = [line for line, _ in found]
    harmless = sum(
        bool(fault.harmless) and not noticed for fault, (_, noticed) in zip(faults, found, strict=True)
    )
    return rows, sum(noticed for _, noticed in found), harmless


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--only", default="", help="only faults with this word in their name, file or tests")
    parser.add_argument("--package", choices=FAULTS, action="append", help="default: both")
    parser.add_argument(
        "--jobs", type=int, default=1, help="faults at a time, each in its own copy of the tree"
    )
    parser.add_argument("--write", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    text = ["# Faults planted by `python -m tests.mutate`", ""]
    missed = 0
    for package in args.package or FAULTS:
        faults = [f for f in FAULTS[package] if args.only in f"{f.what} {f.path} {f.tests}"]
        if not faults:
            continue
        rows, caught, harmless = table(faults, args.jobs)
        missed += len(rows) - caught - harmless
        summary = f"{package}: {caught} of {len(rows)} faults caught, {harmless} harmless"
        print(summary, flush=True)
        text += [
            f"## {summary}",
            "",
            "| fault | file | verdict | first test to fail |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    if args.write:
        args.write.write_text("\n".join(text))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
