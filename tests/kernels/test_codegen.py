"""Ahead-of-time compilation: every Triton kernel for GPUs that are not present, with its machine code."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime.jit import JITFunction

from cumo_kernels import versions
from cumo_kernels.backends.triton import (
    activation,
    bias_grad,
    experts,
    grad_hidden,
    grouped_gemm,
    permutation,
    routing,
    routing_backward,
    sorting,
    tiles,
    weight_grad,
)
from cumo_kernels.backends.triton.grad_hidden import launch_grad_hidden
from cumo_kernels.backends.triton.grouped_gemm import launch_gemm
from cumo_kernels.tiles import codegen, hardware, problems, tuning

MODULES = (
    activation, bias_grad, experts, grad_hidden, grouped_gemm, permutation, routing, routing_backward,
    sorting, tiles, weight_grad,
)  # fmt: skip
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "codegen.md"
HOPPER = hardware.find("nvidia_h100")
# Triton 3.9 spills more than codegen.PARKED of its large tiles outside the loop (NOTES.md, 2026-11-28)
KNOWN = {"grad_hidden_kernel"} if versions.minor(versions.installed("triton")) >= (3, 9) else set()
KERNELS = {
    name
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_hopper_and_none_has_a_problem():
    tokens = {
        "clip": (577, 4616),
        "llm": (64,),
        **dict.fromkeys(codegen.PARTS, (4096,)),
    }  # split sums, plain sums and one sort of each kind; no biases
    reports = codegen.survey(HOPPER, tokens, ["bf16"], lambda shape, dtype: tokens[shape])
    assert {report.kernel for report in reports} == KERNELS
    found = {report.kernel: report.problems for report in reports if report.problems}
    assert found.keys() == KNOWN, found
    assert all("0 in a loop over operands" in words for rows in found.values() for words in rows)
    gemms = [r for r in reports if r.kernel == "grouped_gemm_kernel"]
    assert all(r.opcodes.get("HGMMA") and r.opcodes.get("UTMALDG") for r in gemms)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [  # Ampere has the least shared memory and no descriptors; the newer two run in the sweep
        pytest.param(name, marks=[] if name == "nvidia_a100" else pytest.mark.sweep)
        for name in codegen.TARGETS
        if name != "nvidia_h100"
    ],
)
def test_the_gemms_of_other_generations(name):
    gemms = lambda kernel: not kernel.startswith("_")
    reports = codegen.survey(hardware.find(name), ["clip"], ["bf16"], lambda shape, dtype: (4616,), gemms)
    assert {report.kernel for report in reports} == {name for name in KERNELS if gemms(name)}
    assert {report.kernel: report.problems for report in reports if report.problems} == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["nvidia_h100", pytest.param("nvidia_a100", marks=pytest.mark.sweep)])
def test_layers_with_packed_weights_and_adapters(name):
    """Decoding and training: the bytes of the weights are copied while earlier ones are multiplied."""
    tokens = {"llm-nf4": (1,), "llm-int4z": (4096,), "llm-lora": (64,)}
    gemms = lambda kernel: kernel in ("grouped_gemm_kernel", "grad_hidden_kernel", "weight_grad_kernel")
    reports = codegen.survey(hardware.find(name), tokens, ["bf16"], lambda shape, dtype: tokens[shape], gemms)
    assert {report.kernel: report.problems for report in reports if report.problems} == {}
    packed = [report for report in reports if report.constants.get("FORMAT")]
    assert {report.constants["FORMAT"] for report in packed} == {"nf4", "int4"}
    assert all(report.opcodes.get("LDGSTS") for report in packed)
    assert any(report.constants["BLOCK_R"] for report in packed)


@pytest.mark.slow
def test_a_tile_too_large_for_its_warps_is_reported():
    spilling = tuning.Config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=4, num_stages=2)
    x, weight = (
        torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((256, 512), (4, 512, 512))
    )
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    with codegen.compiling(HOPPER) as launched:
        launch_gemm(x, weight, offsets, None, None, 1, "gelu", config=spilling)
    (report, _), *_ = launched
    assert any("spills" in problem for problem in report.problems), report


@pytest.mark.parametrize(("shape", "dtype"), [("experts-384", "bf16"), ("many", "fp32")])
def test_scores_of_hundreds_of_experts_do_not_spill_on_ampere(shape, dtype):
    """The widest tiles of `router_tiles`, of which four warps spilled two registers on sm_80."""
    with codegen.compiling(hardware.find("nvidia_a100")) as launched:
        for name, call in codegen.calls(shape, 4096, codegen.DTYPES[dtype]):
            if name == "route by scores":
                call()
    routes = [report for report, _ in launched if report.kernel == "_route_kernel"]
    assert [report.problems for report in routes] == [[]]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "sorted_rows"), [(4104, True), (4104, False), (4100, False)])
def test_a_width_with_a_partial_tile_does_not_spill(width, sorted_rows):
    """dH at CLIP's sizes except the width: with a descriptor of the weight, and without."""
    meta = lambda *size, dtype=torch.int32: torch.empty(size, dtype=dtype, device="meta")
    rows = 9232 if sorted_rows else 1154
    grad = meta(rows if sorted_rows else rows // 2, 1024, dtype=torch.bfloat16)
    with codegen.compiling(HOPPER) as launched:
        launch_grad_hidden(
            grad, meta(rows // 2, 2, dtype=torch.float32), meta(rows), meta(5),
            meta(4, 1024, width, dtype=torch.bfloat16), meta(rows, width, dtype=torch.bfloat16), "gelu",
            need_dz=True, need_weighted=True, need_dots=True, is_sorted=sorted_rows,
        )  # fmt: skip
    (report, _), *_ = launched
    assert report.problems == [], report


def test_only_the_innermost_multiplying_loop_is_counted():
    def count(*lines):
        sass = (f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
        return codegen._count_in_loops("\n".join(sass))

    loop = ("HMMA.16816 R4", "LDL R2, [R1]", "@P1 BRA 0x0010")
    after = ("HMMA.16816 R4", "LDL R2, [R1]", "BRA 0x0040")  # a second loop, whose exit is at its begin
    assert count("STL [R1], R2", *loop, *after) == (2, 2, 6)
    assert count("STL [R1], R2", *loop, "LDL R3, [R1]", "BRA 0x0000") == (1, 1, 3)
    assert count("STL [R1], R2", *loop, "LDL R3, [R1]", "@P0 BRA 0x0000") == (1, 1, 3)  # the outer loop
    assert count("STL [R1], R2", *loop, "LDL R3, [R1]", "BRA 0x0020") == (1, 1, 3)  # an out-of-line wait
    assert count("STL [R1], R2", "FFMA R4", "LDL R2, [R1]", "BRA 0x0010") == (1, 0, 3)


def test_each_problem_is_reported():
    good = codegen.Report(
        "_permute_kernel", HOPPER, "bf16", {}, 4, 3, 64, 0, 1024, {"HMMA": 1, "LDGSTS": 1}, 2, True, True
    )
    assert good.problems == []
    for change, word in (
        ({"stack": 8, "has_loop_dot": False}, "spills"),
        ({"stack": codegen.PARKED + 8}, "spills"),
        ({"loop_spills": 1}, "spills"),
        ({"shared": HOPPER.shared_memory + 1}, "shared memory"),
        ({"opcodes": {"FFMA": 1, "LDGSTS": 1}}, "without tensor cores"),
        ({"opcodes": {"HMMA": 1}}, "without asynchronous copies"),
        ({"wide": 0}, "no 16-byte access"),
    ):
        (problem,) = dataclasses.replace(good, **change).problems
        assert word in problem


@pytest.mark.parametrize("shape", problems.SHAPES)
def test_a_layer_asks_for_the_tiles_that_tune_finds(shape, monkeypatch):
    asked, choose = set(), tuning.get_config
    monkeypatch.setattr(tuning, "get_config", lambda problem, gpu: asked.add(problem) or choose(problem, gpu))
    tuning.forget()
    with codegen.compiling(HOPPER, lambda kernel: False):
        for name, call in codegen.calls(shape, 64, torch.bfloat16):
            if name in ("expert_mlp, preact", "expert_mlp backward, preact"):
                call()
    tuning.forget()
    assert asked == set(problems.layer_problems(shape, 64, torch.bfloat16))


def test_the_committed_table_has_every_kernel_on_every_target():
    text = TABLE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| sm_(\d+) \| (\w+) \|.*\| (.*) \|$", text, re.M)
    wanted = {hardware.find(name).capability for name in codegen.TARGETS}
    assert {(kernel, int(sm)) for kernel, sm, _, _ in rows} == {(k, sm) for k in KERNELS for sm in wanted}
    assert {dtype for *_, dtype, _ in rows} == set(codegen.DTYPES)
    assert {verdict for *_, verdict in rows} == {"ok"}
