"""Ctrl-C and SIGTERM end the commands of cumo_kernels and benchmarks in one line, with code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cumo_kernels import interrupts

ROOT = Path(__file__).parents[1]
# long enough to be still running at each of the moments
COMMANDS = {
    "cumo-kernels": ["cumo_kernels", "verify", "--backend", "reference", "--no-interpreter"],
    "bench": ["benchmarks", "--only", "experts", "--no-report"],
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.3, 0.8, 3.0])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_a_command_in_one_line(name, seconds, number, tmp_path):
    results = ["--results", str(tmp_path)] if name == "bench" else []
    process = subprocess.Popen(
        [sys.executable, "-m", *COMMANDS[name], *results],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == interrupts.STOPPED, said
    assert said.splitlines()[-1] == f"{name}: stopped" and "Traceback" not in said


def test_a_program_that_imports_the_package_keeps_its_handlers():
    code = "import signal; b = signal.getsignal(2); import cumo_kernels; print(signal.getsignal(2) is b)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.split() == ["True"]


def test_handlers_are_restored_and_a_signal_is_a_code():
    before = signal.getsignal(signal.SIGTERM)
    assert interrupts.stoppable(lambda: 7) == 7

    def stop() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    assert interrupts.stoppable(stop) == interrupts.STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
