"""Plant faults one at a time and check that a test fails for each.

    python -m tests.mutate [--only WORD] [--package NAME] [--jobs N] [--write FILE]

Each fault is one replacement in a copy of the tree. In cumo_kernels the tests of the affected stem then run:
for the Triton backend in Triton's interpreter, for csrc/ in emulation, for the reference directly. In
cumo_model the tests run that the fault names, after all of them have passed without a fault. A fault that no
test detects shows a missing test, or code that nothing needs.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import Fault
from tests.faults.activations import FAULTS as ACTIVATIONS
from tests.faults.checkpoints import FAULTS as CHECKPOINTS
from tests.faults.data import FAULTS as DATA
from tests.faults.demo import FAULTS as DEMO
from tests.faults.evaluation import FAULTS as EVALUATION
from tests.faults.evaluation_choice import FAULTS as EVALUATION_CHOICE
from tests.faults.evaluation_lmms import FAULTS as EVALUATION_LMMS
from tests.faults.evaluation_vqa import FAULTS as EVALUATION_VQA
from tests.faults.kernels import CUDA, HOPPER, TRITON
from tests.faults.kernels import FAULTS as KERNELS
from tests.faults.model import FAULTS as MODEL
from tests.faults.packing import FAULTS as PACKING
from tests.faults.packing_kernels import FAULTS as PACKING_KERNELS
from tests.faults.packing_lora import FAULTS as LORA
from tests.faults.packing_lora import FAULTS_OF_CUMO as LORA_OF_CUMO
from tests.faults.packing_model import FAULTS as PACKING_MODEL
from tests.faults.routers import FAULTS as ROUTERS
from tests.faults.routers_model import FAULTS as ROUTERS_MODEL
from tests.faults.routers_model import FAULTS_OF_KERNELS as BALANCING
from tests.faults.serving import FAULTS as SERVING
from tests.faults.serving_answer import FAULTS as SERVING_ANSWER
from tests.faults.serving_vllm import FAULTS as SERVING_VLLM
from tests.faults.serving_web import FAULTS as SERVING_WEB
from tests.faults.training import FAULTS as TRAINING

ROOT = Path(__file__).parents[1]
ALL_MODEL = MODEL + PACKING_MODEL + LORA_OF_CUMO + ROUTERS_MODEL
ALL_SERVING = SERVING + SERVING_ANSWER + SERVING_VLLM + SERVING_WEB
ALL_EVALUATION = EVALUATION + EVALUATION_CHOICE + EVALUATION_LMMS + EVALUATION_VQA
FAULTS = {
    "cumo_kernels": KERNELS + ACTIVATIONS + ROUTERS + BALANCING + PACKING + PACKING_KERNELS + LORA,
    "cumo_model": ALL_MODEL + DATA + CHECKPOINTS + TRAINING + ALL_SERVING + ALL_EVALUATION + DEMO,
}
TIMEOUT_S = 1800  # a fault may make a loop endless, which counts as caught
# stems whose tests need neither interpreter nor emulation
ALONE = ("cute", "ptx_tables", "launch", "pdl")
PYTEST = ["-x", "-q", "-p", "no:cacheprovider"]
NAMED = ["-m", "not network"]  # also slow ones


def named_tests(fault: Fault) -> list[str]:
    """The pytest ids of the tests that a fault of cumo_model names."""
    ids = []
    for part in fault.tests.split(";"):
        file, _, names = part.strip().partition("::")
        folder, _, stem = file.rpartition("/")
        path = "/".join(["tests/model", *filter(None, [folder]), f"test_{stem}.py"])
        ids += [f"{path}::{name}" for name in names.split()]
    return ids


class Tree:
    """A copy of the project in which faults are planted and tests run."""

    def __init__(self, folder: Path):
        self.folder, self.output = copied(folder), folder.with_suffix(".txt")
        self.output.touch()
        self.environment = os.environ | {
            "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        }  # fmt: skip
        self.forks: subprocess.Popen | None = None

    def pytest(self, arguments: list[str], more: dict[str, str] | None) -> tuple[int | None, str]:
        """Run pytest -> its exit code, None after TIMEOUT_S, and its output.

        Args:
            arguments: of pytest.
            more: environment variables for a new process; None: a fork, which starts in a moment.
        """
        self.output.write_text("")
        if more is not None:
            command = [sys.executable, "-m", "pytest", *arguments]
            with self.output.open("w") as file:
                try:
                    code = subprocess.run(
                        command, cwd=self.folder, env=self.environment | more, stdout=file,
                        stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
                    ).returncode  # fmt: skip
                except subprocess.TimeoutExpired:
                    code = None
            return code, self.output.read_text()
        if self.forks is None:
            self.forks = subprocess.Popen(
                [sys.executable, "-m", "tests.forks"], cwd=self.folder, env=self.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self.forks.stdin.write(json.dumps([arguments, str(self.output), TIMEOUT_S]) + "\n")
        self.forks.stdin.flush()
        return json.loads(self.forks.stdout.readline()), self.output.read_text()

    def close(self) -> None:
        if self.forks is not None:
            self.forks.stdin.close()
            self.forks.wait()


def pytest_of(fault: Fault) -> tuple[list[str], dict[str, str] | None]:
    """The arguments of `Tree.pytest` that run a fault's tests."""
    if not fault.path.startswith(("cumo_kernels/", CUDA)):
        return [*PYTEST, *NAMED, *(["-k", fault.select] if fault.select else []), *named_tests(fault)], None
    select, more = "not triton", {}
    if fault.tests in ALONE:
        select = "test"
    elif fault.path.startswith(TRITON):
        more, select = {"TRITON_INTERPRET": "1"}, "triton"
    elif fault.path.startswith(CUDA):
        more, select = {"CUMO_EMULATE": "1"}, "cuda"
        more["CUMO_EMULATE_CAPABILITY"] = "90" if fault.path.startswith(HOPPER) else "80"
    if fault.select:
        select = f"({fault.select}) and {select}"
    files = [f"tests/kernels/test_{stem}.py" for stem in fault.tests.split()]
    return [*PYTEST, "-m", "not slow and not sweep and not large", "-k", select, *files], more


def notice(fault: Fault, tree: Tree) -> tuple[bool, str]:
    """-> whether a test failed, and which one or why."""
    path = tree.folder / fault.path
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.what}: occurs {text.count(fault.old)} times in {fault.path}: {fault.old!r}")
    path.write_text(text.replace(fault.old, fault.new))
    try:
        code, said = tree.pytest(*pytest_of(fault))
    finally:
        path.write_text(text)
    if code is None:
        return True, "endless loop"
    if code < 0:
        return True, "the interpreter crashes"
    if code not in (0, 1):  # 2 to 5: pytest ran no test
        raise SystemExit(f"{fault.what}: pytest ended with {code}:\n{said}")
    failed = re.search(r"^FAILED \S*?::(\S+)", said, re.M)
    if code and not failed:  # a failing fixture, for example a compile timeout, proves nothing
        raise SystemExit(f"{fault.what}: no test failed, pytest ended with:\n{said[-4000:]}")
    return code == 1, failed[1] if failed else ""


def without_fault(faults: list[Fault], folder: Path, jobs: int) -> None:
    """Run all tests that faults of cumo_model name; SystemExit if one fails: it would prove nothing."""
    ids = sorted({test for fault in faults if fault in FAULTS["cumo_model"] for test in named_tests(fault)})
    if not ids:
        return
    print(f"without a fault: {len(ids)} tests", flush=True)
    code, said = Tree(folder).pytest([*PYTEST, *NAMED, "-n", str(jobs), *ids], {})
    if code:
        raise SystemExit(f"tests fail without a fault:\n{said[-4000:]}")


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
    with tempfile.TemporaryDirectory() as folder:
        without_fault(faults, Path(folder, "without"), jobs)
        trees = [Tree(Path(folder, f"tree-{i}")) for i in range(jobs)]
        free = queue.SimpleQueue()
        for tree in trees:
            free.put(tree)

        def row(fault: Fault) -> tuple[str, bool]:
            tree, start = free.get(), time.monotonic()
            try:
                noticed, by = notice(fault, tree)
            finally:
                free.put(tree)
            where = re.sub("^cumo_(model|kernels)/|backends/", "", fault.path)
            verdict = "caught" if noticed else "harmless" if fault.harmless else "MISSED"
            line = f"| {fault.what} | {where} | {verdict} | {by or fault.harmless} |"
            print(f"{line} {time.monotonic() - start:.0f} s", flush=True)
            return line, noticed

        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(row, faults))
        for tree in trees:
            tree.close()
    caught = [noticed for _, noticed in found]
    harmless = sum(bool(fault.harmless) and not seen for fault, seen in zip(faults, caught, strict=True))
    return [line for line, _ in found], sum(caught), harmless


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--only", default="", help="only faults with this word in their name, file or tests")
    parser.add_argument("--package", choices=FAULTS, action="append", help="default: both")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of the tree")
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
