"""The self-check's processes: planted faults are refused, ranks wait for each other, no process is left over.

There is no GPU here, so CPU tensors replace a GPU's (hardware.assume), and the interpreter and the emulator
run its kernels. Processes, files and locks are real. test_proofs.py tests how dispatch uses the verdicts.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cumo_kernels import dispatch, extension
from cumo_kernels.verification import cases, proofs, self_check, verdict_file, verdicts, verified

TREE = Path(__file__).parents[2]
SWITCHES = (*verdicts.SWITCHES, "CUMO_BACKEND", "CUMO_SELF_CHECK", "LOCAL_RANK")

CALLER = """
import json, sys, torch
from cumo_kernels import dispatch, extension
from cumo_kernels.tiles import hardware
from cumo_kernels.verification import proofs

proofs.HEAD_START = 120.0  # of a local rank 0 that has not imported anything yet
x = torch.zeros(33, 32)
{before}
with hardware.assume(hardware.find("nvidia_h100")):
    found = {{}}
    for op in {ops!r}:
        chosen = dispatch.choose(op, x)
        found[op] = [chosen, {{verdict.backend: verdict.reason for verdict in dispatch.judge(op, x)}}]
print(json.dumps(found))
"""
HANGING = """
groups = [("triton", op) for op in ("activate", "permute", "route", "expert_mlp", "grouped_gemm")]
with hardware.assume(hardware.find("nvidia_h100")):
    proofs.check_again(groups, x.dtype, torch.device("cpu"))
proofs.CASE_SECONDS = 8.0
"""


def environment(cache, **more):
    own = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return own | {"CUMO_CACHE": str(cache), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | more


def start(ops, tree, cache, before="", **more):
    code = CALLER.format(ops=ops, before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=tree, env=environment(cache, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, seconds=280):
    out, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1]), errors


PLANTED = {  # file -> code appended to it
    "activation": "_right = activate\ndef activate(x, name):\n    return _right(x, name) * (1 + 2.0**-7)\n",
    "permutation": "def permute(*_):\n    raise RuntimeError('planted')\n"
    "def combine(*_):\n    import time\n    time.sleep(1000)\n",
    "routing": "def route(*_):\n    import os\n    os.abort()\n",
    "experts": "def expert_mlp(*_):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "grouped_gemm": "def grouped_gemm(*_):\n    import os\n    os.kill(os.getpid(), 9)\n",
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_planted_backends_are_refused_and_their_caller_survives(tmp_path):
    """One is wrong, one raises, one aborts, one is killed by a signal, one hangs."""
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(TREE / "cumo_kernels", tree / "cumo_kernels", ignore=ignored)
    for name, text in PLANTED.items():
        path = tree / "cumo_kernels" / "backends" / "triton" / f"{name}.py"
        path.write_text(f"{path.read_text()}\n\n{text}")
    ops = ["activate", "permute", "route", "expert_mlp", "grouped_gemm", "combine"]
    found, errors = finish(start(ops, tree, cache, HANGING))
    reasons = {
        "activate": r"output 0 is off at most by",
        "permute": r"RuntimeError: planted",
        "route": r"its process ended, signal SIGABRT",
        "expert_mlp": r"its process ended, signal SIGSEGV",
        "grouped_gemm": r"its process ended, signal SIGKILL",
        "combine": r"its process ended, .*Timeout .*in combine",
    }
    for op, wanted in reasons.items():
        chosen, said = found[op]
        assert chosen == "torch"
        assert re.search(rf"its self-check failed here, [\d-]+: .*{wanted}", said["triton"], re.DOTALL), said
        command = (
            rf"TRITON_INTERPRET=1 python -m cumo_kernels verify --backend triton --device cpu --case '{op} "
        )
        assert command in said["triton"]
        assert re.search(rf"triton's self-check .* failed, .*{op}: .*{wanted}", errors, re.DOTALL)
    rows = json.loads((cache / verdict_file.NAME).read_text())
    assert {row["op"]: row["passed"] for row in rows} == dict.fromkeys(ops, False)
    soon = {row["op"]: row["until"] for row in rows if row["until"]}  # the machine may have been slow
    assert list(soon) == ["combine"] and 0 < soon["combine"] - time.time() < 2 * proofs.DAY
    # and the next process uses the saved verdict
    found, errors = finish(start(ops, tree, cache))
    assert {op: chosen for op, (chosen, _) in found.items()} == dict.fromkeys(ops, "torch")
    assert "checking" not in errors and "triton's self-check on nvidia_h100 in float32 failed" in errors


WATCHED = """
import subprocess, sys
from cumo_kernels.verification import self_check
self_check._end_with_caller()
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
"""


def marked(mark):
    """Processes whose environment contains the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"CUMO_MARK={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
    return found


def until(condition, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_check_ends_with_its_caller(tmp_path, number):
    """A caller that ends while it waits leaves no process on the GPU."""
    code = f"""
import signal
from cumo_kernels.verification import proofs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
proofs.command = lambda: {[sys.executable, "-c", WATCHED]!r}
print("asking", flush=True)
proofs._ask([], {{**__import__("os").environ, "CUMO_MARK": {str(tmp_path)!r}}})
"""
    caller = subprocess.Popen(
        [sys.executable, "-c", code], cwd=TREE, env=environment(tmp_path), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until(lambda: len(marked(tmp_path)) == 2)
    caller.send_signal(number)
    caller.communicate(timeout=60)
    until(lambda: not marked(tmp_path))


@pytest.mark.timeout(300)
def test_of_several_processes_at_once_local_rank_0_checks(tmp_path):
    ranks = [start(["activate"], TREE, tmp_path, LOCAL_RANK=rank) for rank in ("2", "1", "0")]
    results = [finish(process) for process in ranks]
    for found, _ in results:
        chosen, said = found["activate"]
        assert chosen == "triton" and "self-check passed here" in said["triton"]
    line = "cumo_kernels: checking triton on nvidia_h100 in float32, once for this machine; takes seconds"
    assert [errors.count(line) for _, errors in results] == [0, 0, 1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not (extension.CSRC / "bindings.cpp").exists(), reason="there is no csrc/")
def test_the_emulator_is_checked_like_a_gpu(tmp_path):
    switches = {"CUMO_EMULATE": "1", "TRITON_INTERPRET": "0"}
    found, errors = finish(start(["permute"], TREE, tmp_path, "extension.load()", **switches), 1700)
    assert found["permute"][0] == "cuda", (found, errors)
    assert "self-check passed here" in found["permute"][1]["cuda"]
    assert [row["code"] for row in json.loads((tmp_path / verdict_file.NAME).read_text())] == ["emulated"]


def test_the_trusted_number_of_experts_is_tested():
    for op in cases.OPS:
        tried = [
            case.E for _, case in cases.all_cases(self_check.FAMILIES["cuda"], ("bf16",)) if case.op == op
        ]
        assert max(tried) == dispatch.EXPERTS_TESTED or op == "activate"
    assert set(cases.OPS) == set(verified.COVERS)
    assert max(family.get("E", 0) for family in cases.GPU_FAMILIES.values()) == dispatch.EXPERTS_TESTED
