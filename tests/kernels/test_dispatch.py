"""The choice of a backend: forced, refused, explained."""

import json
import os
import subprocess
import sys
import sysconfig
import threading
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cumo_kernels
from cumo_kernels import dispatch, explain, extension, use_backend
from cumo_kernels.__main__ import main
from cumo_kernels.dispatch import BACKENDS, OPS
from cumo_kernels.tiles import hardware, measured


def run(code, cwd=None, **environment):
    command, environment = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_cpu_tensors_run_on_the_reference():
    assert dispatch.choose("route", torch.zeros(1, 1, dtype=torch.float64)) == "reference"


def test_fp64_is_refused_by_everyone_but_the_reference():
    for backend in BACKENDS[:-1]:
        assert backend.refuse("route", "cuda", torch.float64)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), extension.ARCHITECTURES, False),
        ((8, 9), extension.ARCHITECTURES, True),
        ((9, 0), extension.ARCHITECTURES, True),
        ((9, 0), "9.0a", True),
        ((10, 3), "10.0", True),
        ((10, 0), "9.0a", False),
        ((10, 0), "9.0", False),
        ((10, 0), "9.0+PTX", True),
        ((12, 1), extension.ARCHITECTURES, True),
        ((8, 0), "8.6", False),
        ((8, 6), "Ampere", True),
    ],
)
def test_binaries_run_within_their_generation_and_ptx_later(capability, architectures, runs):
    assert extension.runs_on(capability, architectures) == runs


@pytest.mark.parametrize(
    ("op", "gpu", "dtype", "experts", "fits"),
    [
        ("expert_mlp", "nvidia_h200", torch.bfloat16, 1023, True),
        ("expert_mlp", "nvidia_h200", torch.bfloat16, 1024, False),
        ("grouped_gemm_weight_grad", "nvidia_b200", torch.bfloat16, 1500, False),
        ("combine", "nvidia_h200", torch.bfloat16, 1500, True),
        ("expert_mlp", "nvidia_h200", torch.float16, 1500, True),
        ("expert_mlp", "nvidia_a100", torch.bfloat16, 1500, True),
    ],
)
def test_grouped_mm_is_refused_beyond_its_groups(monkeypatch, op, gpu, dtype, experts, fits):
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: hardware.find(gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = dispatch._refuse_torch(op, "cuda", dtype, experts)
    assert (
        reason is None
        if fits
        else f"at most 1023 experts in bf16 on compute capability 9.x and 10.x, got {experts}" in reason
    )
    assert dispatch._refuse_torch(op, "cpu", dtype, experts) is None


@pytest.mark.parametrize(
    ("name", "op", "gpu", "dtype", "asks"),
    [
        ("torch", "expert_mlp", "nvidia_h100", torch.bfloat16, False),
        ("torch", "grouped_gemm_weight_grad", "nvidia_b200", torch.bfloat16, False),
        ("torch", "expert_mlp", "nvidia_h100", torch.float16, True),
        ("torch", "expert_mlp_backward", "nvidia_a100", torch.bfloat16, True),
        ("torch", "grouped_gemm", "nvidia_rtx_pro_6000", torch.bfloat16, True),
        ("torch", "combine", "nvidia_a100", torch.float32, False),
        ("reference", "permute", "nvidia_h100", torch.bfloat16, True),
        ("triton", "expert_mlp", "nvidia_a100", torch.float32, False),
        ("cuda", "expert_mlp", "nvidia_a100", torch.float32, False),
    ],
)
def test_backends_that_synchronise_are_refused_while_a_graph_is_captured(
    monkeypatch, name, op, gpu, dtype, asks
):
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: hardware.find(gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device, row = torch.device("cuda"), next(row for row in BACKENDS if row.name == name)
    assert (dispatch.asks_host(name, op, device, dtype) is not None) == asks
    assert dispatch.asks_host(name, op, torch.device("cpu"), dtype) is None
    if name in ("torch", "reference"):
        for capturing in (False, True):
            refused = row.refuse(op, device, dtype)
            assert (refused is not None) == (asks and capturing)
            assert refused is None or "a CUDA graph is being captured, and" in refused


def test_cuda_refuses_a_gpu_it_was_not_built_for(monkeypatch):
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", None)
    monkeypatch.setattr(extension, "EMULATE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(extension, "load", lambda: types.SimpleNamespace(architectures="8.0;9.0a"))
    extension.unfit.cache_clear()
    reason = dispatch._refuse_cuda("permute", "cuda:0", torch.float32)
    assert reason == "cumo_kernels._C was built for 8.0;9.0a, but this GPU is 7.5: build it here"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    extension.unfit.cache_clear()
    assert dispatch._refuse_cuda("permute", "cuda:0", torch.float32) is None
    extension.unfit.cache_clear()


# x replaces a tensor, since there is no GPU
STALE = """
import torch, types
import cumo_kernels
from cumo_kernels import dispatch, use_backend
from cumo_kernels.tiles import hardware, measured
from cumo_kernels.verification import proofs, verified

cumo_kernels.route(torch.zeros(2, 4), 2)
torch.cuda.is_available = lambda: True
for module in (dispatch, measured, proofs, verified):
    module.gpu_of = lambda device: hardware.find("nvidia_h100")
x = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(2, 4))
print(cumo_kernels.explain("route", x))
print("chosen:", dispatch.choose("route", x))
with use_backend("cuda"):
    dispatch.choose("route", x)
"""


def test_an_extension_for_another_torch_is_refused_and_other_backends_run(tmp_path):
    package = tmp_path / "cumo_kernels"
    package.mkdir()
    for path in (extension.ROOT / "cumo_kernels").iterdir():
        if path.suffix != ".so":
            (package / path.name).symlink_to(path)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"of another torch")
    switches = {"CUMO_BACKEND": "", "CUMO_EMULATE": "", "CUMO_JIT": "", "TRITON_INTERPRET": ""}
    done = run(STALE, tmp_path, **switches)
    reason = "cumo_kernels._C was built for another torch, build it again: "
    assert f"cuda       refuses: {reason}" in done.stdout, done.stderr
    assert "chosen: torch" in done.stdout
    assert f"RuntimeError: no backend runs route (forced: cuda): cuda: {reason}" in done.stderr


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS])
@pytest.mark.parametrize("op", OPS)
def test_every_backend_that_exists_implements_every_op(backend, op):
    if dispatch._missing(f"cumo_kernels.backends.{backend}"):
        pytest.skip(f"{backend} is not in this installation")
    if backend == "cuda" and (reason := extension.missing() or extension.unusable()):
        pytest.skip(reason)
    if backend == "cuda" and dispatch.MODULES.get(op) == "adapted":
        refusal = dispatch._refuse_cuda(op, "cpu" if extension.EMULATE else "cuda", torch.float32)
        assert refusal == "it has no kernels for packed weights and adapters"
        return
    assert callable(dispatch.implementation(backend, op))


def test_a_forced_refusal_raises_with_the_reason():
    x = torch.zeros(2, 4, dtype=torch.float64)
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"no backend runs route \(forced: cuda\): cuda: "),
    ):
        cumo_kernels.route(x, 2)


def test_use_backend_restores_and_rejects_unknown_names():
    with use_backend("reference"):
        with (
            pytest.raises(ValueError, match=r"name must be one of .*'triton'.*, got 'tpu'"),
            use_backend("tpu"),
        ):
            pass
        assert dispatch._forced.name == "reference"
    assert dispatch._forced.name == (os.environ.get("CUMO_BACKEND") or None)


def test_use_backend_forces_without_with_like_set_grad_enabled():
    before = dispatch._forced.name
    try:
        use_backend("reference")
        assert dispatch._forced.name == "reference"
        with use_backend("torch") as entered:
            assert dispatch._forced.name == "torch" and entered is None
        assert dispatch._forced.name == "reference"
        context = use_backend("torch")
        for _ in range(2):
            with context:
                assert dispatch._forced.name == "torch"
            assert dispatch._forced.name == "reference"
        forced = use_backend("torch")(lambda: dispatch._forced.name)
        assert dispatch._forced.name == "reference" and forced() == "torch"
        assert dispatch._forced.name == "reference"
    finally:
        use_backend(before)
    assert dispatch._forced.name == before


def test_a_thread_forces_its_own_backend():
    """Threads that end in another order than they began leave nothing forced."""
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with use_backend("torch"):
            inside.set()
            leave.wait()
            seen.append(dispatch._forced.name)

    default, thread = dispatch._forced.name, threading.Thread(target=other)
    with use_backend("reference"):
        thread.start()
        inside.wait()
        seen.append(dispatch._forced.name)
    seen.append(dispatch._forced.name)
    leave.set()
    thread.join()
    assert [*seen, dispatch._forced.name] == ["reference", default, "torch", default]


def test_explain_names_every_backend():
    text = explain("expert_mlp", torch.zeros(1, dtype=torch.float64))
    assert "reference  chosen" in text and "cuda       refuses: " in text and "triton     refuses: " in text
    with use_backend("reference"):
        assert "not asked: reference is forced" in explain("expert_mlp", torch.zeros(1))
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'nothing'"):
        explain("nothing", torch.zeros(1))


def test_environment_forces_a_backend():
    code = "import torch, cumo_kernels; print(cumo_kernels.explain('route', torch.zeros(1)))"
    assert "not asked: reference is forced" in run(code, CUMO_BACKEND="reference").stdout
    failed = run(code, CUMO_BACKEND="tpu")
    assert failed.returncode and "CUMO_BACKEND must be one of" in failed.stderr


def test_the_command_line_has_a_table_with_every_reason_once(capsys):
    with use_backend(None):
        assert main(["explain", "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert main(["explain", "--device", "cpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert lines[0].startswith("cpu, torch ")
    assert lines[2].split() == ["bfloat16", *(row.name for row in BACKENDS)]
    table = {line.split()[0]: line for line in lines[3 : 3 + len(OPS)]}
    assert list(table) == list(OPS) and all("chosen" in line for line in table.values())
    numbered = [line.split(maxsplit=1) for line in lines[4 + len(OPS) :]]
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    reasons = dict(numbered)
    assert len(set(reasons.values())) == len(reasons)
    assert [(row["op"], row["backend"]) for row in found] == [(op, b.name) for op in OPS for b in BACKENDS]
    for row in found:
        assert row["state"] in table[row["op"]] and row["state"] in dispatch.STATES
        assert not row["reason"] or row["reason"] in reasons.values()


def test_the_command_line_explains_one_op(capsys):
    assert main(["explain", "--op", "route", "--device", "cpu", "--dtype", "fp64"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("route")] and "permute" not in out
    assert "grouped_mm computes in fp32, fp16 and bf16, got torch.float64" in out


@pytest.fixture
def h100():
    """CPU tensors are treated as this GPU's."""
    with hardware.assume(hardware.find("nvidia_h100")):
        yield


def test_the_measured_backend_wins(monkeypatch, h100):
    rivals = tuple(replace(row, refuse=lambda *_: None, needs_proof=False) for row in BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", rivals)
    measured.forget()
    x = torch.zeros(900, 4, dtype=torch.bfloat16)
    monkeypatch.setattr(measured, "TABLE", {})
    assert dispatch.choose("permute", x) == "triton"
    assert "triton     chosen: nothing is measured" in explain("permute", x)
    row = {"op": "permute", "dtype": "bfloat16", "mode": "both"}
    rows = [
        {**row, "shape": [100, 4], "ms": {"triton": 0.1, "cuda": 0.2}},
        {**row, "shape": [1000, 4], "ms": {"triton": 0.4, "cuda": 0.3}},
        {**row, "shape": [1000, 4096], "ms": {"triton": 0.5, "cuda": 0.6}},
        {**row, "shape": [900, 4], "ms": {"triton": 9.0}},  # a single time gives no comparison
        {**row, "dtype": "float32", "shape": [900, 4], "ms": {"triton": 0.1, "cuda": 0.2}},
        {**row, "mode": "forward", "shape": [900, 4], "ms": {"triton": 0.1, "cuda": 0.2}},
    ]
    monkeypatch.setattr(measured, "TABLE", {"nvidia_h100": rows})
    measured.forget()
    choose = partial(dispatch.choose, with_backward=True)
    assert choose("permute", x) == "cuda"
    assert choose("permute", x.half()) == "cuda"
    assert choose("permute", x[:150]) == "triton"
    assert choose("permute", x.repeat(1, 900)) == "triton"
    assert choose("combine", x) == "triton"
    assert dispatch.choose("permute", x) == "triton"
    text = explain("permute", x, with_backward=False)
    assert (
        "triton     chosen: measured on nvidia_h100 at 900 x 4 bfloat16: triton 0.1 ms, cuda 0.2 ms" in text
    )
    text = explain("permute", x)
    line = "measured on nvidia_h100 at 1000 x 4 bfloat16 with backward: triton 0.4 ms, cuda 0.3 ms"
    assert f"cuda       chosen: {line}" in text
    assert "triton     available" in text and "reference  available" in text
    with use_backend("reference"):
        assert dispatch.choose("permute", x) == "reference"
    measured.forget()


def test_more_experts_than_a_backend_routes_to_go_to_another(monkeypatch):
    if (header := extension.CSRC / "kernels.h").exists():
        assert f"kMaxExperts = {dispatch.CUDA_EXPERTS};" in header.read_text()
    monkeypatch.setattr(dispatch, "_CUDA_MISSING", None)
    monkeypatch.setattr(extension, "EMULATE", True)
    rows = [replace(row, needs_proof=False) for row in BACKENDS if row.name != "triton"]
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    x = torch.zeros(2, 1025)
    assert dispatch.choose("route", x, 1024) == dispatch.choose("expert_mlp", x, 1025) == "cuda"
    assert dispatch.choose("route", x, 1025) == dispatch.choose("sort_by_expert", x, 1025) == "torch"
    reason = "it routes to at most 1024 experts, got 1025"
    assert f"cuda       refuses: {reason}" in explain("route", x, 1025)
    indices = torch.zeros(2, 1, dtype=torch.int32)
    cumo_kernels.route(x, 2)
    cumo_kernels.routing_from_topk(torch.ones(2, 1), indices, 1025)
    with use_backend("cuda"):
        with pytest.raises(RuntimeError, match=reason):
            cumo_kernels.route(x, 2)
        with pytest.raises(RuntimeError, match=reason):
            cumo_kernels.routing_from_topk(torch.ones(2, 1), indices, 1025)


def test_the_measured_table_is_one():
    for gpu, rows in measured.TABLE.items():
        assert gpu == measured.CPU or hardware.find(gpu).name == gpu
        for row in rows:
            assert row["op"] in OPS and set(row["ms"]) <= {row.name for row in BACKENDS}
            assert row["mode"] in ("forward", "both") and len(row["shape"]) == 2


@pytest.mark.parametrize("trained", [None, "x", "weights", "up", "down", "bias"])
def test_timings_with_backward_count_where_an_input_needs_a_gradient(monkeypatch, trained):
    rows = [
        {"op": op, "mode": mode, "dtype": "float32", "shape": [6, 4], "ms": ms}
        for op in ("expert_mlp", "grouped_gemm", "permute", "combine", "route", "activate")
        for mode, ms in (
            ("forward", {"torch": 2.0, "reference": 1.0}),
            ("both", {"torch": 1.0, "reference": 2.0}),
        )
    ]
    monkeypatch.setattr(measured, "TABLE", {measured.CPU: rows})
    measured.forget()
    ran = []
    implementation = dispatch.implementation
    monkeypatch.setattr(
        dispatch,
        "implementation",
        lambda backend, op: ran.append((op, backend)) or implementation(backend, op),
    )
    sizes = {"x": (6, 4), "weights": (6, 2), "up": (3, 8, 4), "down": (3, 4, 8), "bias": (3, 8)}
    made = {name: torch.randn(size, requires_grad=name == trained) for name, size in sizes.items()}
    indices = torch.tensor([[0, 1]] * 6)
    plan = cumo_kernels.routing_from_topk(made["weights"], indices, 3)
    with use_backend(None):
        for enabled in (True, False):
            ran.clear()
            with torch.set_grad_enabled(enabled):
                cumo_kernels.expert_mlp(
                    made["x"], plan, made["up"], made["down"], made["bias"], activation="gelu"
                )
                cumo_kernels.permute(made["x"], plan)
            wanted = {
                "expert_mlp": "torch" if trained else "reference",  # enabled or not
                "permute": "torch" if trained == "x" else "reference",
            }
            assert dict(ran) == wanted
    measured.forget()


def test_fake_tensors_of_a_gpu_need_no_gpu():
    """A compiler's fake tensors, and others without a GPU."""
    with FakeTensorMode(), use_backend(None):
        for op in OPS:
            assert dispatch.choose(op, torch.empty(8, 16, device="cuda"), 4) == "torch"
            assert "torch" in explain(op, torch.empty(8, 16, device="cuda"))


def test_on_cpus_the_choice_is_never_slower_by_more_than_noise():
    """At every shape that was timed, in fp32 and bf16."""
    device, seen = torch.device("cpu"), set()
    for row in measured.TABLE[measured.CPU]:
        dtype, both = getattr(torch, row["dtype"]), row["mode"] == "both"
        chosen = measured.pick(
            measured.decisions(row["op"], device, dtype, ["torch", "reference"], both), row["shape"]
        )
        assert row["ms"][chosen] <= (1 + measured.NOISE) * min(row["ms"].values()), row
        seen.add(row["dtype"])
    assert seen >= {"float32", "bfloat16"} and measured.NOISE == 0.03
