"""Ctrl-C and SIGTERM end the commands of cumo_kernels and benchmarks in one line, with code 130."""

import contextlib
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


def test_handlers_are_restored_and_a_signal_is_a_code(monkeypatch):
    ended = []
    monkeypatch.setattr(interrupts, "GRACE", 0.2)
    monkeypatch.setattr(interrupts, "_end", lambda: ended.append(True))
    before = signal.getsignal(signal.SIGTERM)
    assert interrupts.stoppable(lambda: 7) == 7

    def stop() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    assert interrupts.stoppable(stop) == interrupts.STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
    time.sleep(0.5)
    assert not ended  # the process is not ended later, when the command is over


def test_a_command_that_catches_the_exception_is_ended(monkeypatch):
    ended = []
    monkeypatch.setattr(interrupts, "GRACE", 0.2)
    monkeypatch.setattr(interrupts, "_end", lambda: ended.append(True))

    def caught() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        time.sleep(0.5)
        return 0

    interrupts.stoppable(caught)
    assert ended


def test_a_signal_in_a_destructor_is_not_lost():
    class Caught:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def command() -> int:
        caught = Caught()
        del caught
        time.sleep(10)
        return 0

    begin = time.monotonic()
    assert interrupts.stoppable(command) == interrupts.STOPPED and time.monotonic() - begin < 4


@pytest.mark.parametrize("module", ["cumo_kernels.interrupts", "cumo_model.signals"])
def test_a_signal_in_code_that_c_evaluates_is_a_code(module, tmp_path):
    """Python ends with SIGINT's own exit code if it has seen KeyboardInterrupt there."""
    (tmp_path / "command.py").write_text(f"""
import ctypes, sys
from {module} import raising

text = b"import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
evaluate, scope = ctypes.pythonapi.PyRun_String, ctypes.py_object({{}})
evaluate.restype = ctypes.py_object
try:
    with raising():
        evaluate(text, 257, scope, scope)
except KeyboardInterrupt:
    sys.exit(130)
""")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "command"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == interrupts.STOPPED, run.stderr
