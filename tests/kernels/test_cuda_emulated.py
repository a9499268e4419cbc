"""The CUDA kernels without a GPU: the tests of this folder, run on csrc/emulate.h.

Every kernel is compiled for the CPU and executed thread by thread in a separate process, including barriers,
asynchronous copies, tensor-core and Hopper instructions. A race, a missing wait or a wrong layout gives a
wrong number; a barrier that not all threads reach is an error. By hand:
`CUMO_EMULATE=1 CUMO_EMULATE_CAPABILITY=90 pytest tests/kernels -k cuda`. Small tests use Hopper's narrow
tiles (csrc/plan.h), so one more run uses batch invariance, which needs the wide ones.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cumo_kernels import extension

HOPPER = " and (test_grouped_gemm or test_experts) and not fp32"
NARROWER = HOPPER + " and not fp16"
WIDE = {"CUMO_BATCH_INVARIANT": "1"}
RUNS = [  # at_least: guards against a filter that matches nothing
    pytest.param(80, "", {}, "not sweep", 400, id="sm_80"),
    pytest.param(90, HOPPER, {}, "not sweep", 150, id="sm_90a"),
    pytest.param(90, NARROWER, WIDE, "not sweep", 80, id="sm_90a-wide"),
    pytest.param(80, "", {}, "sweep", 300, marks=pytest.mark.sweep, id="sm_80-sweep"),
    pytest.param(90, HOPPER, {}, "sweep", 35, marks=pytest.mark.sweep, id="sm_90a-sweep"),
    pytest.param(90, NARROWER, WIDE, "sweep", 15, marks=pytest.mark.sweep, id="sm_90a-wide-sweep"),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not (extension.CSRC / "bindings.cpp").exists(), reason="there is no csrc/")
@pytest.mark.parametrize(("capability", "rows", "more", "marked", "at_least"), RUNS)
def test_kernels_in_emulation(capability, rows, more, marked, at_least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"cuda{rows}"]
    command += ["-m", f"{marked} and not slow", "--ignore=test_cuda_codegen.py", "."]
    environment = {
        **os.environ,
        "CUMO_EMULATE": "1",
        "CUMO_EMULATE_CAPABILITY": str(capability),
        "OMP_NUM_THREADS": "1",
    }
    for name in (
        "PYTEST_XDIST_WORKER", "CUMO_JIT", "CUMO_BACKEND", "CUMO_BATCH_INVARIANT", "CUMO_EMULATE_SMS",
        "CUMO_EMULATE_COPY_FROM", "TRITON_INTERPRET",
    ):  # fmt: skip
        environment.pop(name, None)
    environment |= more
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least
