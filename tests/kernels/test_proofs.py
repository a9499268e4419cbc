"""How dispatch uses verdicts and self-checks: run once, saved, shared, refused with a reason.

CPU tensors replace a GPU's, and given answers replace checks: test_self_check.py tests the checks themselves.
"""

import json
import os
import re
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cumo_kernels import dispatch, explain, permute
from cumo_kernels.__main__ import main
from cumo_kernels.testing import make_routing
from cumo_kernels.tiles import hardware
from cumo_kernels.verification import proofs, verdict_file, verdicts, verified

SWITCHES = (*verdicts.SWITCHES, "CUMO_BACKEND", "CUMO_SELF_CHECK", "LOCAL_RANK")
X = torch.zeros(4, 4)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """CPU tensors count as an H100's without table entries; gpu[...] counts and changes checks."""
    state = {"checks": [], "passed": True, "error": None, "kept": 0}

    def ask(words, _):
        state["checks"].append(words)
        if state["error"] is not None:
            return [], state["error"]
        only = json.loads(words[words.index("--only") + 1])
        row = {"passed": state["passed"], "cases": 2, "reason": "", "command": "", "kept": state["kept"]}
        row |= {} if state["passed"] else {"reason": "wrong", "command": "c"}
        return [{"backend": backend, "op": op, **row} for backend, op in only], ""

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(proofs, "_ask", ask)
    monkeypatch.setattr(verified, "TABLE", {})
    monkeypatch.setattr(dispatch._forced, "name", None)
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


def kept():
    return verdict_file.folders()[0] / verdict_file.NAME


def start_again():
    """Act as another process, which has only the saved file."""
    dispatch.forget()


def test_checked_once_and_saved_for_the_next_process(gpu, capsys):
    assert dispatch.choose("permute", X) == dispatch.choose("permute", X) == "triton"
    assert not list(Path(tempfile.gettempdir()).iterdir())  # no other folder is used if the user's can be
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
    rows = json.loads(kept().read_text())
    assert [(row["op"], row["source"]) for row in rows] == [("permute", "c"), ("combine", "c")]


DAMAGED = ["", "{", "[]", "[1]", "{}", "null", "[" * 100_000, "\0", '[{"gpu": "nvidia_h100"}]']
DAMAGED_ROWS = [
    {"passed": 1}, {"cases": "many"}, {"cases": None}, {"op": []}, {"op": {}}, {"reason": None}, {"date": 5},
    {"until": "never"}, {"capability": True}, {"until": 1},
]  # fmt: skip


@pytest.mark.parametrize("damage", [*DAMAGED, *DAMAGED_ROWS], ids=lambda damage: str(damage)[:20])
def test_a_damaged_file_is_not_an_error_and_is_rewritten(gpu, damage):
    dispatch.choose("permute", X)
    whole = json.loads(kept().read_text())
    kept().write_text(damage if isinstance(damage, str) else json.dumps([whole[0] | damage]))
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 2
    assert json.loads(kept().read_text()) == whole


def test_a_damaged_row_is_ignored(gpu):
    dispatch.choose("permute", X)
    dispatch.choose("combine", X)
    one, other = json.loads(kept().read_text())
    kept().write_text(json.dumps([7, one, other | {"cases": None}]))
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 2
    assert dispatch.choose("combine", X) == "triton" and len(gpu["checks"]) == 3
    assert json.loads(kept().read_text()) == [one, other]


@pytest.mark.parametrize("place", ["{tmp}/file/cache", "/proc/cumo", "/proc/sys"])
def test_where_the_folder_cannot_be_written_there_is_another(gpu, monkeypatch, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUMO_CACHE", place.format(tmp=tmp_path))
    assert dispatch.choose("permute", X) == "triton"
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 1
    assert "cannot be saved" not in capsys.readouterr().err
    (own,) = (tmp_path / "tmp").iterdir()
    assert sorted(path.name for path in own.iterdir()) == ["self_check.json", "self_check.lock"]
    assert own.stat().st_mode & 0o777 == 0o700


def test_where_nothing_can_be_written_each_process_checks_once(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUMO_CACHE", "/proc/cumo")
    own = tmp_path / "tmp" / f"cumo-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)  # anyone who can write there could declare kernels correct
    for _ in range(2):
        assert dispatch.choose("permute", X) == dispatch.choose("permute", X) == "triton"
        assert dispatch.choose("combine", X) == "triton"
    assert len(gpu["checks"]) == 2 and not list(own.iterdir())
    assert capsys.readouterr().err.count("verdicts of the self-check cannot be saved") == 1


def test_shared_rows_are_read_and_a_blocked_write_leaves_nothing(gpu, tmp_path):
    kept().mkdir(parents=True)  # no file can replace it
    assert dispatch.choose("permute", X) == "triton"
    assert {path.name for path in kept().parent.iterdir()} == {"self_check.json", "self_check.lock"}
    kept().rmdir()
    start_again()
    dispatch.choose("combine", X)
    assert kept().stat().st_mode & 0o777 == 0o644


def test_a_user_without_a_home_is_no_error(gpu, monkeypatch, tmp_path):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in ("CUMO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert dispatch.choose("permute", X) == "triton" and kept().parent.parent == tmp_path / "tmp"


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("CUMO_CACHE", "~/there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept() == Path.home() / "there" / "self_check.json"
    monkeypatch.delenv("CUMO_CACHE")
    assert kept() == tmp_path / "cumo" / "self_check.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept() == Path.home() / ".cache" / "cumo" / "self_check.json"


def test_a_failure_is_warned_of_once_with_its_command(gpu):
    gpu["passed"] = False
    with pytest.warns(UserWarning, match="self-check on nvidia_h100 in float32 failed.*reproduce: c"):
        assert dispatch.choose("permute", X) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("permute", X) == "torch"
    assert re.search(r"triton +refuses: its self-check failed here, .*: wrong; c", explain("permute", X))
    with dispatch.use_backend("triton"):
        assert dispatch.choose("permute", X) == "triton"
    assert len(gpu["checks"]) == 1


@pytest.mark.parametrize(("passed", "words"), [(None, "was inconclusive"), (False, "failed")])
def test_a_temporary_failure_is_reported_and_retried_later(gpu, monkeypatch, passed, words):
    """No memory for a check, or a slow machine: processes that start together do not all wait for it."""
    gpu["passed"], gpu["kept"] = passed, 600
    for _ in range(2):
        start_again()
        match = f"triton's self-check on nvidia_h100 in float32 {words}, so the next backend runs there"
        with pytest.warns(UserWarning, match=match):
            assert dispatch.choose("permute", X) == "torch"
        assert f"its self-check {words} here" in explain("permute", X)
    assert len(gpu["checks"]) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    gpu["passed"], gpu["kept"] = True, 0
    start_again()
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 2
    assert len(json.loads(kept().read_text())) == 1


def test_a_process_without_output_is_inconclusive(gpu):
    gpu["error"] = "its process ended with -9: no output"
    with pytest.warns(UserWarning, match="was inconclusive.*its process ended with -9"):
        assert dispatch.choose("permute", X) == "torch"


def test_a_check_that_cannot_run_does_not_fail_the_call(gpu, monkeypatch):
    def broken(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(proofs, "_ask", broken)
    with pytest.warns(UserWarning, match="triton cannot be checked on this GPU.*no more processes"):
        assert dispatch.choose("permute", X) == "torch"
    assert "its self-check could not run, OSError: no more processes" in explain("permute", X)


def test_a_repeated_check_replaces_earlier_verdicts(gpu):
    dispatch.choose("permute", X)
    gpu["error"] = "no memory"
    proofs.check_again([("triton", "permute")], torch.float32, torch.device("cpu"))
    with pytest.warns(UserWarning, match="no memory"):
        assert dispatch.choose("permute", X) == "torch"


def test_a_capture_without_a_verdict_raises_with_advice(gpu, monkeypatch):
    refused = [replace(row, refuse=lambda *_: "it reads on the host") for row in dispatch.BACKENDS[1:]]
    monkeypatch.setattr(dispatch, "BACKENDS", (dispatch.BACKENDS[0], *refused))
    monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"triton: .* not run yet: .* python -m cumo_kernels self-check"):
        dispatch.choose("permute", X)


def test_another_gpu_in_the_same_process_has_its_own_verdict(gpu):
    dispatch.choose("permute", X)
    with hardware.assume(hardware.find("nvidia_a100")):
        dispatch.choose("permute", X)
    assert len(gpu["checks"]) == 2
    assert [row["gpu"] for row in json.loads(kept().read_text())] == ["nvidia_h100", "nvidia_a100"]


def test_disabled_checks_do_not_run_and_saved_verdicts_count(gpu, monkeypatch):
    monkeypatch.setenv("CUMO_SELF_CHECK", "0")
    assert dispatch.choose("permute", X) == "torch" and not gpu["checks"]
    assert "CUMO_SELF_CHECK=0 disables its self-check" in explain("permute", X)
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


def test_explanations_and_captures_start_no_check(gpu, monkeypatch):
    assert "its self-check has not run yet: the first eager call runs it, or " in explain("permute", X)
    monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
    assert dispatch.choose("permute", X) == "torch" and not gpu["checks"]
    monkeypatch.setattr(dispatch, "_capturing", lambda device: False)
    assert dispatch.choose("permute", X) == "triton" and len(gpu["checks"]) == 1
    monkeypatch.setattr(dispatch, "_capturing", lambda device: True)
    assert dispatch.choose("permute", X) == "triton"  # a kept verdict


def test_a_graph_uses_a_saved_verdict_or_torch(gpu, monkeypatch):
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
    assert "tested with up to 1024 experts, got 1025" in explain("expert_mlp", X, 1025)
    with dispatch.use_backend("triton"):
        assert dispatch.choose("expert_mlp", X, 2000) == "triton"


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
def test_the_command_line_needs_a_gpu(capsys):
    assert main(["self-check"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
