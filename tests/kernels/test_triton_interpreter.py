"""The Triton backend without a GPU: the tests of this folder, run in Triton's interpreter.

The interpreter is selected when Triton is imported, hence separate processes. Rows marked large run only on
GPUs, and rows that conftest.py marks `sweep` only in `make test-all`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STEMS = {  # file: minimum number of rows, and in a sweep; guards against a filter that matches nothing
    "activation": (40, 70),
    "experts": (50, 80),
    "given_choice": (40, 130),
    "grouped_gemm": (55, 100),
    "packed": (95, None),
    "permutation": (50, 70),
    "router_noise": (8, 8),
    "routing": (60, 10),
    "scoring": (55, 100),
    "sorting": (20, None),
    "tuning": (15, None),
}
RUNS = [
    pytest.param(stem, rows, least, id=f"{stem}-{rows}", marks=[pytest.mark.sweep] * (rows == "sweep"))
    for stem, numbers in STEMS.items()
    for rows, least in zip(("pairs", "sweep"), numbers, strict=True)
    if least is not None
]


def interpret(stem: str, rows: str, **switches: str) -> int:
    """-> the number of rows of tests/kernels/test_<stem>.py that ran; all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton"]
    command += ["-m", f"{'' if rows == 'sweep' else 'not '}sweep and not large", f"test_{stem}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **switches}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@interpreted
@pytest.mark.parametrize(("stem", "rows", "at_least"), RUNS)
def test_in_the_interpreter(stem, rows, at_least):
    assert interpret(stem, rows) >= at_least


@pytest.mark.slow
@pytest.mark.timeout(1500)
@interpreted
def test_the_interpreter_has_nothing_to_wait_for():
    assert interpret("permutation", "pairs", CUMO_PDL="1") >= STEMS["permutation"][0]
