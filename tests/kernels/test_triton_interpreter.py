"""The Triton backend on a machine without a GPU: this folder's tests again, in Triton's interpreter.

The interpreter is chosen when Triton is imported, hence processes of their own. All but the largest rows run
here, in fp16 (which differs from bf16 by one cast) only the odd ones; `TRITON_INTERPRET=1 pytest -k triton`
runs every one.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LARGE = "connector-like or many-experts or two-clip-crops or clip-vit-l"
PASSED = {  # file: how many at least, since a filter that matches nothing proves nothing
    "activation": 80,
    "experts": 105,
    "grouped_gemm": 110,
    "permutation": 110,
    "routing": 70,
    "tuning": 15,
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("stem", PASSED)
def test_in_the_interpreter(stem):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", f"triton and not ({LARGE}) and (odd or not fp16)", f"test_{stem}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= PASSED[stem]
