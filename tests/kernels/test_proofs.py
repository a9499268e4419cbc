"""The self-check: what runs on a GPU unasked has been tried there, and what fails costs its caller nothing.

There is no GPU here, so CPU tensors stand for one's (hardware.assume), the interpreter and the emulator for
what runs on it. The processes, files and locks are real ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from cumo_kernels import dispatch, explain, extension, hardware, permute, proofs, verified
from cumo_kernels.__main__ import main
from cumo_kernels.testing import make_routing

TREE = Path(__file__).parents[2]
SWITCHES = (
    "CUMO_BACKEND",
    "CUMO_EMULATE",
    "CUMO_JIT",
    "CUMO_SELF_CHECK",
    "CUMO_BATCH_INVARIANT",
    "LOCAL_RANK",
)
X = torch.zeros(4, 4)

CALLER = """
import json, sys, torch
from cumo_kernels import dispatch, extension, hardware, proofs

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
groups = [("triton", op) for op in ("activate", "permute", "route", "expert_mlp")]
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


PLANTED = {  # file -> what is put at its end
    "activation": "_right = activate\ndef activate(x, name):\n    return _right(x, name) * (1 + 2.0**-7)\n",
    "permutation": "def permute(*_):\n    raise RuntimeError('planted')\n"
    "def combine(*_):\n    import time\n    time.sleep(1000)\n",
    "routing": "def route(*_):\n    import os\n    os.abort()\n",
    "experts": "def expert_mlp(*_):\n    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_planted_backends_are_refused_and_their_caller_lives(tmp_path):
    """One that is wrong, one that raises, one that aborts, one that dies of a signal, one that hangs."""
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(TREE / "cumo_kernels", tree / "cumo_kernels", ignore=ignored)
    for name, text in PLANTED.items():
        path = tree / "cumo_kernels" / "backends" / "triton" / f"{name}.py"
        path.write_text(f"{path.read_text()}\n\n{text}")
    ops = ["activate", "permute", "route", "expert_mlp", "combine"]
    found, errors = finish(start(ops, tree, cache, HANGING))
    reasons = {
        "activate": r"output 0 is off at most by",
        "permute": r"RuntimeError: planted",
        "route": r"its process ended, signal SIGABRT",
        "expert_mlp": r"its process ended, signal SIGSEGV",
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
        assert re.search(rf"triton failed its self-check .*{op}: .*{wanted}", errors, re.DOTALL)
    rows = json.loads((cache / proofs.FILE).read_text())
    assert {row["op"]: row["passed"] for row in rows} == dict.fromkeys(ops, False)
    # and what it says now is what the next process believes
    found, errors = finish(start(ops, tree, cache))
    assert {op: chosen for op, (chosen, _) in found.items()} == dict.fromkeys(ops, "torch")
    assert "checking" not in errors and "triton failed its self-check on nvidia_h100 in float32" in errors


@pytest.mark.timeout(300)
def test_of_several_processes_at_once_local_rank_0_checks(tmp_path):
    ranks = [start(["activate"], TREE, tmp_path, LOCAL_RANK=rank) for rank in ("2", "1", "0")]
    results = [finish(process) for process in ranks]
    for found, _ in results:
        chosen, said = found["activate"]
        assert chosen == "triton" and "self-check passed here" in said["triton"]
    line = "cumo_kernels: checking triton on nvidia_h100 in float32, once for this machine: it takes seconds"
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
    assert [row["code"] for row in json.loads((tmp_path / proofs.FILE).read_text())] == ["emulated"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """CPU tensors are an H100's, which no table knows, and Triton's; gpu[...] counts and changes checks."""
    state = {"checks": [], "passed": True, "error": None}

    def ask(words, _):
        state["checks"].append(words)
        if state["error"] is not None:
            return [], state["error"]
        only = json.loads(words[words.index("--only") + 1])
        ours = {
            "passed": state["passed"],
            "cases": 2,
            "reason": "" if state["passed"] else "wrong",
            "command": "c",
        }
        return [{"backend": backend, "op": op, **ours} for backend, op in only], ""

    monkeypatch.setattr(proofs, "_ask", ask)
    monkeypatch.setattr(verified, "TABLE", {})
    monkeypatch.setattr(dispatch, "_forced", None)
    monkeypatch.setattr(dispatch, "_INTERPRET", True)
    monkeypatch.setattr(dispatch, "_TRITON_MISSING", False)
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", "not here")
    monkeypatch.setenv("CUMO_CACHE", str(tmp_path / "cache"))
    for name in (*SWITCHES, *verified.OTHER_CODE):
        monkeypatch.delenv(name, raising=False)
    start_again()
    with hardware.assume(hardware.find("nvidia_h100")):
        yield state
    start_again()


def start_again():
    """As another process, that has what is kept and nothing else."""
    verified.proof.cache_clear()
    dispatch.forget()


def test_checked_once_and_kept_for_the_next_process(gpu, capsys):
    assert dispatch.choose("permute", X) == dispatch.choose("permute", X) == "triton"
    assert len(gpu["checks"]) == 1 and capsys.readouterr().err.count("checking triton on nvidia_h100") == 1
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 1
    assert "checking" not in capsys.readouterr().err
    assert "self-check passed here, 20" in explain("permute", X)
    assert dispatch.choose("combine", X) == "triton" and len(gpu["checks"]) == 2  # a verdict for each op
    assert dispatch.choose("permute", X.half()) == "triton" and len(gpu["checks"]) == 3  # and dtype


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source_of", lambda backend: "0" * 16),
        ("triton_version", lambda: "9.9.9"),
        ("other_code", lambda: ["CUMO_BATCH_INVARIANT=1"]),
    ],
)
def test_another_source_version_or_switch_is_checked_again(gpu, monkeypatch, name, value):
    dispatch.choose("permute", X)
    monkeypatch.setattr(verified, name, value)
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 2
    with hardware.assume(hardware.find("nvidia_a100")):
        start_again()
        assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 3


def test_a_new_source_takes_the_place_of_the_old(gpu, monkeypatch):
    for source in "abc":
        monkeypatch.setattr(verified, "source_of", lambda backend, source=source: source)
        start_again()
        dispatch.choose("permute", X)
    dispatch.choose("combine", X)
    rows = json.loads(proofs.file().read_text())
    assert [(row["op"], row["source"]) for row in rows] == [("permute", "c"), ("combine", "c")]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[1]", "{}", '[{"gpu": "nvidia_h100"}]', '[{"passed": 1}]', "null"]
)
def test_a_damaged_file_is_no_error_and_is_written_anew(gpu, text):
    dispatch.choose("permute", X)
    whole = proofs.file().read_text()
    proofs.file().write_text(text)
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 2
    assert proofs.file().read_text() == whole


def test_a_folder_that_cannot_be_written_is_no_error(gpu, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "cache", Path("/proc/cumo")):
        monkeypatch.setenv("CUMO_CACHE", str(place))
        start_again()
        before = len(gpu["checks"])
        assert dispatch.choose("permute", X) == dispatch.choose("permute", X) == "triton"
        assert len(gpu["checks"]) == before + 1  # not at every call
        assert "verdicts of the self-check are not kept" in capsys.readouterr().err


def test_a_user_without_a_home_is_no_error(gpu, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CUMO_CACHE")
    monkeypatch.setattr(Path, "home", nowhere)
    assert dispatch.choose("permute", X) == "triton" and proofs.file() is None


def test_the_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("CUMO_CACHE", raising=False)
    assert proofs.file() == Path.home() / ".cache" / "cumo" / "self_check.json"


def test_a_failure_is_warned_of_once_with_its_command(gpu):
    gpu["passed"] = False
    with pytest.warns(
        UserWarning, match=r"triton failed its self-check on nvidia_h100 in float32.*see it: c"
    ):
        assert dispatch.choose("permute", X) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("permute", X) == "torch"
    assert re.search(r"triton +refuses: its self-check failed here, .*: wrong; c", explain("permute", X))
    with dispatch.use_backend("triton"):
        assert dispatch.choose("permute", X) == "triton"
    assert len(gpu["checks"]) == 1


def test_a_check_without_a_verdict_is_tried_by_the_next_process(gpu):
    gpu["error"] = "no memory"
    assert dispatch.choose("permute", X) == dispatch.choose("permute", X) == "torch"
    assert "its self-check came to no verdict: no memory" in explain("permute", X) and len(gpu["checks"]) == 1
    gpu["error"] = None
    start_again()
    assert dispatch.choose("permute", X) == "triton"


def test_a_check_that_cannot_run_costs_nothing(gpu, monkeypatch):
    def broken(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(proofs, "_ask", broken)
    assert dispatch.choose("permute", X) == "torch"
    assert "its self-check could not run, OSError: no more processes" in explain("permute", X)


def test_turned_off_nothing_is_checked_and_what_is_kept_counts(gpu, monkeypatch):
    monkeypatch.setenv("CUMO_SELF_CHECK", "0")
    assert dispatch.choose("permute", X) == "torch" and not gpu["checks"]
    assert "CUMO_SELF_CHECK=0 keeps it from being checked" in explain("permute", X)
    monkeypatch.setenv("CUMO_SELF_CHECK", "1")
    start_again()
    assert dispatch.choose("permute", X) == "triton"
    monkeypatch.setenv("CUMO_SELF_CHECK", "0")
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 1
    monkeypatch.setenv("CUMO_SELF_CHECK", "no")
    start_again()
    with pytest.raises(ValueError, match="CUMO_SELF_CHECK must be 0 or 1, got 'no'"):
        dispatch.choose("combine", X)


def test_questions_and_captures_start_no_check(gpu, monkeypatch):
    assert "its self-check has not run yet: the first eager call, or " in explain("permute", X)
    monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
    assert dispatch.choose("permute", X) == "torch" and not gpu["checks"]
    monkeypatch.setattr(dispatch, "_capturing", lambda device: False)
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 1
    monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
    assert dispatch.choose("permute", X) == "triton"  # a kept verdict


def test_a_graph_takes_a_kept_verdict_or_torch(gpu, monkeypatch):
    ran, plain = [], dispatch.implementation("reference", "permute")
    for name in ("triton", "torch"):
        spy = lambda *args, name=name: ran.append(name) or plain(*args)
        monkeypatch.setitem(dispatch._implementations, (name, "permute"), spy)
    with dispatch.use_backend("reference"):
        routing, x = make_routing("uniform", 8, 4, 2), torch.randn(8, 16)

    def compiled():
        torch._dynamo.reset()
        ran.clear()
        torch.compile(lambda x: permute(x, routing) * 2, fullgraph=True, backend="aot_eager")(x)
        return set(ran)

    with pytest.warns(UserWarning, match="a graph with permute is compiled before triton had a self-check"):
        assert compiled() == {"torch"}
    assert not gpu["checks"]
    assert dispatch.choose("permute", x) == "triton" and len(gpu["checks"]) == 1
    assert compiled() == {"triton"} and len(gpu["checks"]) == 1


def test_more_experts_than_were_tested_are_not_trusted(gpu):
    assert dispatch.choose("expert_mlp", X, dispatch.EXPERTS_TESTED) == "triton"
    assert dispatch.choose("expert_mlp", X, dispatch.EXPERTS_TESTED + 1) == "torch"
    assert "tested with up to 256 experts, got 257" in explain("expert_mlp", X, 257)
    with dispatch.use_backend("triton"):
        assert dispatch.choose("expert_mlp", X, 1000) == "triton"


def test_a_process_of_the_check_sees_one_gpu(monkeypatch):
    device = torch.device("cuda", 2)
    see = lambda: proofs._environment(device)["CUDA_VISIBLE_DEVICES"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert see() == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5, 7,MIG-9")
    assert see() == "MIG-9"
    monkeypatch.setenv("CUMO_BACKEND", "cuda")
    own = proofs._environment(device)
    assert own["CUMO_SELF_CHECK"] == "0" and "CUMO_BACKEND" not in own


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_line_wants_a_gpu(capsys):
    assert main(["self-check"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
