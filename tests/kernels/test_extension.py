"""Compilation on first use, in a folder that several processes share, some of which are killed."""

import subprocess
import sys
import time

import pytest
from torch.utils import cpp_extension

from cumo_kernels import extension

pytest.importorskip("fcntl")

# like torch: a lock file that exists while it compiles
COMPILES = """
import os, pathlib, signal, sys, time
from cumo_kernels import extension

folder = pathlib.Path(sys.argv[1])
with extension._alone(folder):
    lock = folder / "lock"
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    (folder / "begun").touch()
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(sys.argv[2]))
    lock.unlink()
    (folder / "done").touch()
"""


def compiles(folder, how: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", COMPILES, str(folder), how], cwd=extension.ROOT)


def test_the_lock_of_a_killed_process_is_removed_with_one_message(tmp_path, monkeypatch, capsys):
    assert compiles(tmp_path, "killed").wait(60) == -9
    assert (tmp_path / "lock").exists()
    found = []
    monkeypatch.setattr(extension, "_build_directory", lambda name: tmp_path)
    monkeypatch.setattr(cpp_extension, "load", lambda *_, **__: found.append((tmp_path / "lock").exists()))
    for _ in range(2):
        extension._compile("cumo_emulated", [], [])
    assert found == [False, False]
    assert capsys.readouterr().err.count(f"removed {tmp_path / 'lock'}, left by a killed process") == 1


def test_a_process_that_compiles_is_waited_for(tmp_path, capsys):
    other = compiles(tmp_path, "2")
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.05)
    with extension._alone(tmp_path):
        assert (tmp_path / "done").exists()
    assert other.wait(60) == 0 and capsys.readouterr().err == ""


def test_a_lock_is_released_when_compiling_fails(tmp_path):
    with pytest.raises(RuntimeError), extension._alone(tmp_path):
        raise RuntimeError("no compiler")
    assert compiles(tmp_path, "0").wait(60) == 0
