"""verified.json: backends verified on a GPU run there unforced, and no others; verify --record writes it."""

import argparse
import json
import types
from dataclasses import replace

import pytest
import torch

from cumo_kernels import dispatch, explain, extension, permute
from cumo_kernels.__main__ import main
from cumo_kernels.testing import make_routing
from cumo_kernels.tiles import hardware, measured
from cumo_kernels.verification import cases, proofs, verdicts, verified, verify
from cumo_kernels.verification.verdicts import Result

H100, H200 = hardware.find("nvidia_h100"), hardware.find("nvidia_h200")
X = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, ndim=2, shape=(4, 4))


def entry(backend="triton", op="permute", dtype="bfloat16", **changes):
    return {
        "backend": backend, "op": op, "dtype": dtype, "cases": 23, "failed": 0, "date": "2026-11-28",
        "torch": torch.__version__, "triton": verified.triton_version(), "driver": "580", "commit": "abc",
        "code": "9.0a" if backend == "cuda" else "", "source": verified.source_of(backend),
    } | changes  # fmt: skip


def forget():
    """Clear the caches, since the GPU changes."""
    dispatch.forget()
    dispatch._unfit_for_triton.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(table, card): a machine with that GPU, the tables empty but for `table`; nothing refuses."""
    monkeypatch.setenv("CUMO_CACHE", str(tmp_path / "cache"))

    def pretend(table, card=H100):
        forget()
        monkeypatch.setattr(verified, "TABLE", table)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for module in (verified, dispatch, proofs, measured):
            monkeypatch.setattr(module, "gpu_of", lambda device: card)
        monkeypatch.setattr(measured, "TABLE", {})
        measured.forget()
        monkeypatch.setattr(extension, "code_for", lambda device: "9.0a")
        monkeypatch.setattr(extension, "outdated", lambda: None)
        monkeypatch.setattr(extension, "load", lambda: types.SimpleNamespace(source="0" * 16))
        monkeypatch.setattr(dispatch, "_CUDA_MISSING", None)
        monkeypatch.setattr(dispatch, "_TRITON_MISSING", False)
        monkeypatch.setattr(dispatch, "_INTERPRET", False)
        for name in ("EMULATE", "JIT"):
            monkeypatch.setattr(extension, name, False)
        monkeypatch.setattr(extension, "unfit", lambda device: None)
        monkeypatch.setattr(dispatch._forced, "name", None)
        for name in (*verified.OTHER_CODE, verify.NO_CACHE):
            monkeypatch.delenv(name, raising=False)

    yield pretend
    forget()
    measured.forget()


NO_TIMES = "nothing is measured for this"


def line(name, op="permute", x=X):
    return next(line.strip() for line in explain(op, x).splitlines() if line.strip().startswith(name))


def test_only_verified_backends_run_unforced(gpu):
    gpu({"nvidia_h100": [entry(), entry("cuda", "combine")]})
    assert dispatch.choose("permute", X) == "triton"
    assert dispatch.choose("combine", X) == dispatch.choose("combine_backward", X) == "cuda"
    assert dispatch.choose("expert_mlp", X) == "torch"
    half = types.SimpleNamespace(**{**vars(X), "dtype": torch.float16})
    assert dispatch.choose("permute", half) == "torch"
    torch_minor = ".".join(torch.__version__.split(".")[:2])
    triton_minor = ".".join(verified.triton_version().split(".")[:2])
    proof = f"verified on nvidia_h100, 2026-11-28, torch {torch_minor}"
    assert line("triton") == f"triton     chosen: {NO_TIMES}; {proof}, triton {triton_minor}, 23 cases"
    assert line("cuda", "combine") == f"cuda       chosen: {NO_TIMES}; {proof}, 23 cases"
    reason = "not verified on nvidia_h100 in bfloat16; CUMO_SELF_CHECK=0 disables its self-check"
    assert line("cuda") == f"cuda       refuses: {reason}; CUMO_BACKEND=cuda forces it"
    with dispatch.use_backend("cuda"):
        assert dispatch.choose("permute", X) == "cuda"
        assert line("cuda") == f"cuda       chosen: {reason}"


def test_of_two_verified_backends_the_first_runs(gpu):
    gpu({"nvidia_h100": [entry(), entry("cuda")]})
    assert dispatch.choose("permute", X) == "triton"
    assert line("triton").startswith(
        "triton     chosen: nothing is measured for this; verified on nvidia_h100"
    )
    assert line("cuda").startswith("cuda       available: verified on nvidia_h100")


def test_sorting_needs_every_op_that_sorts(gpu):
    gpu({"nvidia_h100": [entry()]})
    assert dispatch.choose("sort_by_expert", X) == "torch"
    gpu({"nvidia_h100": [entry(), entry(op="route", cases=20, date="2026-11-27")]})
    assert dispatch.choose("sort_by_expert", X) == "triton"
    assert "2026-11-27" in line("triton", "sort_by_expert") and "43 cases" in line("triton", "sort_by_expert")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source": "0" * 16}, "verified on nvidia_h100, 2026-11-28, but its source has changed since"),
        ({"torch": "2.10.1"}, f"with torch 2.10, but this is {torch.__version__}"),
        ({"triton": "3.5.0"}, f"with triton 3.5, but this is {verified.triton_version()}"),
    ],
)
def test_another_source_or_version_invalidates_an_entry(gpu, changes, reason):
    gpu({"nvidia_h100": [entry(**changes)]})
    assert dispatch.choose("permute", X) == "torch"
    assert reason in line("triton") and "refuses" in line("triton")


def test_cuda_depends_on_its_machine_code_and_not_on_triton(gpu, monkeypatch):
    gpu({"nvidia_h100": [entry("cuda", triton="none")]})
    assert dispatch.choose("permute", X) == "cuda"
    gpu({"nvidia_h100": [entry("cuda", code="9.0")]})
    assert dispatch.choose("permute", X) == "torch"
    assert "compiled for 9.0, but this is for 9.0a" in line("cuda")


def test_a_wheel_trusts_the_table_packed_with_it(gpu, monkeypatch):
    monkeypatch.setattr(verified, "source_of", lambda backend: None)
    gpu({"nvidia_h100": [entry("cuda", source="0" * 16)]})
    assert dispatch.choose("permute", X) == "cuda"
    gpu({"nvidia_h100": [entry("cuda", torch="2.10.0")]})
    assert dispatch.choose("permute", X) == "torch"


def test_the_same_multiprocessors_share_a_proof(gpu):
    table = {"nvidia_h100": [entry()]}
    gpu(table, H200)
    assert dispatch.choose("permute", X) == "triton"
    assert "verified on nvidia_h100, with the multiprocessors of nvidia_h200, 2026-11-28" in line("triton")
    gpu(table | {"nvidia_h200": []}, H200)  # it has its own list
    assert dispatch.choose("permute", X) == "torch"
    gpu({"nvidia_h200": [entry()]}, H100)
    assert dispatch.choose("permute", X) == "torch"
    gpu(table, hardware.find("nvidia_a100"))
    assert dispatch.choose("permute", X) == "torch"
    assert "not verified on nvidia_a100 in bfloat16" in line("triton")


def test_old_gpus_and_other_makers_are_refused(gpu, monkeypatch):
    gpu({}, replace(H100, capability=75))
    assert "refuses: it needs compute capability 8.0 or later, but this GPU has 7.5" in line("triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    gpu({})
    assert "refuses: it is written for NVIDIA GPUs" in line("triton")


def test_the_interpreter_does_not_count_as_verified(gpu, monkeypatch):
    gpu({"nvidia_h100": [entry()]})
    monkeypatch.setattr(dispatch, "_INTERPRET", True)
    assert dispatch.choose("permute", X) == "torch"
    assert "refuses: on CPU tensors, or interpreted" in line("triton")


@pytest.mark.parametrize("changes", [{}, {"source": "0" * 16}, {"torch": "2.10.1"}])
def test_a_failed_backend_is_refused_until_it_changes(gpu, monkeypatch, changes):
    monkeypatch.setenv("CUMO_SELF_CHECK", "1")
    asked = []
    monkeypatch.setattr(proofs, "check", lambda groups, dtype, device: asked.append(groups) or [])
    gpu({"nvidia_h100": [entry(failed=2, **changes), entry("cuda")]})
    assert dispatch.choose("permute", X) == "cuda"
    assert "failed verify on nvidia_h100, 2026-11-28" in line("triton")
    assert bool(asked) == bool(changes)
    assert changes or "2 of 23 cases of permute" in line("triton")


def test_without_a_gpu_its_tensors_are_not_trusted(gpu, monkeypatch):
    gpu({"nvidia_h100": [entry()]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.choose("permute", X) == "torch"
    assert "there is no CUDA device here to identify" in line("triton")


@pytest.mark.parametrize("proven", [True, False])
def test_compiled_code_gets_the_same_answer(monkeypatch, tmp_path, proven):
    """On CPU tensors instead of a GPU's: only tests the choice, and which function runs."""
    monkeypatch.setattr(dispatch._forced, "name", None)
    monkeypatch.setattr(verified, "TABLE", {"nvidia_h100": [entry(dtype="float32")] if proven else []})
    monkeypatch.setenv("CUMO_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_INTERPRET", False)
    for name in verified.OTHER_CODE:
        monkeypatch.delenv(name, raising=False)
    forget()
    verified.source_of.cache_clear()  # files are read while a graph is traced
    plain, ran = dispatch.implementation("reference", "permute"), []
    for name in ("triton", "reference"):
        spy = lambda *args, name=name: ran.append(name) or plain(*args)
        monkeypatch.setitem(dispatch._implementations, (name, "permute"), spy)
    rows = (dispatch.Backend("triton", dispatch._refuse_reference, needs_proof=True), dispatch.BACKENDS[-1])
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    routing, x = make_routing("uniform", 8, 4, 2), torch.randn(8, 16)
    torch._dynamo.reset()
    with hardware.assume(H100):
        compiled = torch.compile(lambda x: permute(x, routing) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), permute(x, routing) * 2)
    assert set(ran) == {"triton" if proven else "reference"} and len(ran) == 2


def test_the_questions_about_a_gpu_fit_into_one_graph(monkeypatch):
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", None)

    def asks(x):
        device, able = torch.device("cuda:0"), 0
        for row in dispatch.BACKENDS[:2]:
            if row.refuse("permute", device, x.dtype) is None:
                able += 1 + 10 * dispatch._trusted([row.name], "permute", device, x.dtype, 4)[0][0]
        return x + able

    torch._dynamo.reset()
    x = torch.zeros(1)
    assert torch.compile(asks, fullgraph=True, backend="eager")(x) == asks(x)


def lacking(key):
    return json.dumps({"nvidia_h100": [entry(), {k: v for k, v in entry().items() if k != key}]})


@pytest.mark.parametrize(
    "text",
    [
        None, "{", "[]", '{"nvidia_h100": [{"backend": "triton"}]}', '{"a": 1}', '{"a": [1]}',
        *map(lacking, ("date", "source", "code", "torch", "triton", "cases")),
    ],
)  # fmt: skip
def test_a_damaged_file_gives_a_warning_and_no_entries(tmp_path, text):
    path = tmp_path / "verified.json"
    if text is not None:
        path.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read, so no backend counts as verified"):
        assert verified.load(path) == {}


def test_the_hash_is_of_names_and_bytes(tmp_path):
    for name in (
        "cumo_kernels/backends/triton/a.py",
        "cumo_kernels/ops/b.py",
        "cumo_kernels/tiles/c",
        "csrc/c.cu",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1\n")
    hashed = lambda backend: verified.source_of.__wrapped__(backend, tmp_path)
    triton, cuda = hashed("triton"), hashed("cuda")
    assert len(triton) == len(cuda) == 16 and triton != cuda
    (tmp_path / "cumo_kernels/tiles/tune.py").write_text("x")
    assert (hashed("triton"), hashed("cuda")) == (triton, cuda)
    (tmp_path / "csrc/c.cu").write_bytes(b"1\r\n")
    assert hashed("triton") == triton and hashed("cuda") != cuda
    (tmp_path / "cumo_kernels/ops/b.py").rename(tmp_path / "cumo_kernels/ops/d.py")
    assert hashed("triton") != triton
    (tmp_path / "csrc/c.cu").unlink()
    (tmp_path / "csrc").rmdir()
    assert hashed("cuda") is None


@pytest.mark.parametrize(
    ("capability", "architectures", "name"),
    [
        ((9, 0), extension.ARCHITECTURES, "9.0a"),
        ((9, 0), "8.0;9.0", "9.0"),
        ((9, 0), "8.0+PTX", "8.0+PTX"),
        ((8, 9), extension.ARCHITECTURES, "8.0"),
        ((12, 1), extension.ARCHITECTURES, "12.0+PTX"),
        ((7, 5), extension.ARCHITECTURES, ""),
        ((8, 0), "", ""),
    ],
)
def test_which_machine_code_a_gpu_runs(capability, architectures, name):
    assert extension.best_of(capability, architectures) == name


@pytest.fixture
def recorded(gpu, monkeypatch, tmp_path):
    """recorded(results, words) -> the result of `verify --record` on a file with other entries."""
    path = tmp_path / "verified.json"
    monkeypatch.setattr(verified, "PATH", path)

    def run(results, table, card=H100, **options):
        gpu({}, card)
        monkeypatch.setattr(verdicts, "gpu_of", lambda device: card)
        path.write_text(json.dumps(table))
        plain = {"dtype": None, "op": None, "device": "cuda", "tiny": False, "record": str(path)}
        args = argparse.Namespace(**plain | options)
        verdicts.record(results, args, print)
        return verified.load(path)

    return run


def results(backend="triton", ops=("permute",), dtypes=("bf16",), failing=""):
    found = cases.survey("cuda", False, dtypes, ops)
    return [
        Result(str(case), backend, "cuda", family, failures=["wrong"] if family == failing else [])
        for family, case in found
    ]


def test_a_complete_passing_run_is_recorded(recorded, capsys):
    old = {"nvidia_a100": [entry()], "nvidia_h100": [entry(source="old", cases=1), entry("cuda")]}
    table = recorded(results() + results("reference"), old, dtype=["bf16"])
    assert table["nvidia_a100"] == old["nvidia_a100"]
    cuda, triton = table["nvidia_h100"]
    assert cuda == entry("cuda")  # another backend's entry stays
    assert triton["cases"] == len(results()) and triton["source"] == verified.source_of("triton")
    assert set(triton) == set(entry()) and triton["torch"] == torch.__version__
    assert "recorded for nvidia_h100" in capsys.readouterr().out
    assert [path.name for path in verified.PATH.parent.iterdir()] == ["verified.json"]


def test_recorded_entries_are_used(recorded, gpu):
    gpu(recorded(results() + results("cuda"), {}))
    assert dispatch.choose("permute", X) == "triton"
    assert line("cuda").startswith("cuda       available: verified on nvidia_h100")


def test_a_failure_takes_the_place_of_an_entry(recorded, gpu):
    old = {"nvidia_h100": [entry(), entry(op="combine")]}
    whole = results(failing="odd-tails")
    for ran in (whole, whole[:12]):  # whether the run was complete or not
        table = recorded(ran, old)
        numbers = {row["op"]: (row["failed"], row["cases"]) for row in table["nvidia_h100"]}
        assert numbers == {"combine": (0, 23), "permute": (1, len(ran))}
        gpu(table)
        assert dispatch.choose("permute", X) == "torch" and "failed verify on" in line("triton")
    assert [row["failed"] for row in recorded(whole, {}, H200)["nvidia_h200"]] == [1]


@pytest.mark.parametrize(
    "reason",
    [
        "OutOfMemoryError: CUDA out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate",
        "its process ended, exit code 1: Timeout (0:01:00)! in verify.py:80 in _step",
        "its process ended, killed after its time: no output",
    ],
)
def test_a_missing_resource_or_a_slow_machine_is_not_a_failure(recorded, capsys, reason):
    found = results()
    found[5].failures.append(reason)
    old = {"nvidia_h100": [entry()]}
    assert recorded(found, old) == old
    assert f"not recorded, {len(found) - 1} of {len(found)} cases ran" in capsys.readouterr().out


def test_a_part_is_not_recorded(recorded, capsys):
    number = len(results())
    old = {"nvidia_h100": [entry()]}
    assert recorded(results()[:-1], old) == old
    assert (
        f"not recorded, {number - 1} of {number} cases ran: triton permute bfloat16"
        in capsys.readouterr().out
    )


def test_an_unknown_card_is_not_recorded(gpu, monkeypatch, capsys):
    gpu({}, replace(H100, name="nvidia_titan"))
    monkeypatch.setattr(verify, "gpu_of", verified.gpu_of)
    monkeypatch.setattr(verify, "backends_of", lambda device: (["reference"], []))
    assert main(["verify", "--device", "cuda", "--record", "--backend", "reference"]) == 2
    assert "gpu must be one of" in (err := capsys.readouterr().err) and "got 'nvidia_titan'" in err


@pytest.mark.parametrize("words", [["--few"], ["--fuzz", "1"], ["--case", "permute"], ["--device", "cpu"]])
def test_only_all_families_on_a_gpu_are_recorded(gpu, capsys, words):
    gpu({})
    assert main(["verify", "--device", "cuda", "--record", *words]) == 2
    assert "--record must go with all families on a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*verified.OTHER_CODE, verify.NO_CACHE])
def test_code_other_than_the_default_is_not_recorded(gpu, monkeypatch, capsys, name):
    gpu({})
    monkeypatch.setenv(name, "1")
    assert main(["verify", "--device", "cuda", "--record"]) == 2
    assert f"got {name}=1" in capsys.readouterr().err


@pytest.mark.parametrize("name", verified.OTHER_CODE)
def test_a_proof_is_not_of_other_code(gpu, monkeypatch, name):
    gpu({"nvidia_h100": [entry()]})
    monkeypatch.setenv(name, "0")
    assert dispatch.choose("permute", X) == "triton"
    forget()
    monkeypatch.setenv(name, "1")
    assert dispatch.choose("permute", X) == "torch"
    assert f"not verified under {name}=1" in line("triton")


def test_a_gh200_is_not_an_h200():
    card = hardware.match("NVIDIA GH200 480GB", 90, 132, 227 * 1024)
    assert (card.name, card.tiles_of) == ("nvidia_gh200", "nvidia_h100")
    assert hardware.match("NVIDIA H200", 90, 132, 227 * 1024).name == "nvidia_h200"


def test_every_call_is_covered_and_the_committed_table_is_one():
    assert set(verified.COVERS) == set(cases.OPS)
    assert {call for calls in verified.COVERS.values() for call in calls} == set(dispatch.OPS)
    for name, rows in verified.TABLE.items():
        assert hardware.find(name).name == name
        for row in rows:
            assert set(row) == set(entry()) and row["op"] in cases.OPS and row["cases"] > 0
            assert row["backend"] in verified.SOURCES and row["dtype"] in ("bfloat16", "float16", "float32")


def test_covers_lists_what_cases_call(monkeypatch):
    reached, plain = set(), dispatch.implementation
    monkeypatch.setattr(dispatch, "implementation", lambda b, op: reached.add(op) or plain(b, op))
    for op, calls in verified.COVERS.items():
        reached.clear()
        verify.check(cases.Case(op, T=6), "reference", "cpu")
        assert set(calls) <= reached
