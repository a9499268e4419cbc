"""Products with weights in four bits and low-rank terms: every backend compared with the reference."""

import os
from dataclasses import replace

import pytest
import torch

from cumo_kernels import Adapter, dispatch, expert_mlp, grouped_gemm, pack, routing_from_topk, use_backend
from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.packing.tensor import PackedWeight
from cumo_kernels.testing import assert_as_accurate_as_torch, make_routing
from cumo_kernels.tiles import packed_layers, tuning
from cumo_kernels.verification import verified
from cumo_kernels.verification.cases import Case, build
from cumo_kernels.verification.packed_cases import WEIGHTS, packed

PACKED = WEIGHTS[1:]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# sizes that no tile of the interpreter (32 x 64, steps of 32) divides; H and I are packed along
SIZES = {"T": 32, "H": 96, "I": 32, "O": 35, "E": 3}  # T * K fills one draw of the accuracy rule
ROUTINGS = [
    pytest.param({"T": 0}, id="no-token"),
    pytest.param({"T": 1, "O": 64}, id="one-token"),
    pytest.param({"K": 3}, id="top_k-equals-experts"),
    pytest.param({"pattern": "empty"}, id="empty-experts"),
    pytest.param({"pattern": "one_expert"}, id="all-to-one"),
    pytest.param({"pattern": "dropped"}, id="dropped-slots"),
    pytest.param({"layout": "strided", "T": 70}, id="several-tiles-strided"),
    pytest.param({"layout": "transposed", "E": 7}, id="transposed"),
]


def hold(backend, device, case):
    with use_backend(backend):
        call = build(case, device)
        assert_as_accurate_as_torch(call.run, call.reference, *call.inputs)


@pytest.fixture(autouse=True)
def has_kernels(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        pytest.skip("csrc/ has no kernels for packed weights or adapters")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("weights", PACKED)
def test_products(backend, device, dtype, weights, gathered, activation):
    case = Case("packed_grouped_gemm", **SIZES, weights=weights, gated=gathered, activation=activation)
    hold(backend, device, replace(case, dtype=NAMES[dtype]))


@pytest.mark.parametrize("change", ROUTINGS)
@pytest.mark.parametrize("weights", ["nf4", "int4z"])
def test_products_of_every_routing(backend, device, weights, change):
    case = Case("packed_grouped_gemm", **SIZES | change, weights=weights, gated=True, bias=False)
    hold(backend, device, case)


@pytest.mark.parametrize("memory", ["x", "preact", "all"])
@pytest.mark.parametrize("rank", [0, 5, 16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_layers(backend, device, dtype, weights, rank, memory):
    if weights == "plain" and not rank:
        pytest.skip("expert_mlp")
    activation = "geglu" if memory == "preact" else "quick_gelu"
    case = Case("adapted_expert_mlp", **SIZES, weights=weights, rank=rank, memory=memory, dtype=NAMES[dtype])
    hold(backend, device, replace(case, activation=activation, bias=rank != 5))


@pytest.mark.parametrize("change", ROUTINGS)
@pytest.mark.parametrize("weights", ["plain", "mxfp4"])
def test_layers_of_every_routing(backend, device, weights, change):
    case = Case("adapted_expert_mlp", **SIZES | change, weights=weights, rank=3, activation="swiglu")
    hold(backend, device, case)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("weights", PACKED)
def test_a_weight_has_the_bits_of_dequantize(backend, device, dtype, weights, group, is_transposed):
    """Unit vectors read the weight, of an odd number of rows, in both directions."""
    row = FORMATS[weights.removesuffix("z")]
    if group not in row.groups:
        pytest.skip(f"{weights} has no groups of {group}")
    plain = torch.randn(2, 37, max(group, 96 if group == 32 else group), device=device)
    weight = pack(plain, row.name, group, weights != "int4z")
    weight = weight.transpose(1, 2) if is_transposed else weight
    width = weight.shape[2]
    unit = torch.eye(width, dtype=dtype, device=device)
    offsets = torch.tensor([0, 0, width], dtype=torch.int32, device=device)
    with use_backend(backend):
        found = grouped_gemm(unit, weight, offsets)
    assert torch.equal(found.T, weight.dequantize(dtype)[1])


@pytest.mark.parametrize("width", [32, 96])
def test_the_second_half_of_a_transposed_gate_may_begin_within_a_group(backend, device, width):
    """Columns are packed: with 32 of them, gate and up share one scale."""
    weight = packed(torch.randn(3, 40, width, device=device), "nf4").transpose(1, 2)
    routing = make_routing("uniform", 9, 3, 2, device)

    def product(x, weight):
        return grouped_gemm(x, weight, routing.expert_offsets, gather=routing, activation="swiglu")

    def expected(x):
        with use_backend("reference"):
            return product(x, weight.dequantize(torch.float32).to(x.dtype))

    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x: product(x, weight), expected, torch.randn(9, 40, device=device))


def test_scales_at_the_ends_of_e8m0(backend, device):
    """2^-127 is subnormal, 2^127 is finite, and 255 is NaN, in its own block only."""
    codes = torch.full((1, 4, 16), 0x22, dtype=torch.uint8, device=device)  # 1.0 twice
    scales = torch.tensor([0, 1, 254, 255], dtype=torch.uint8, device=device).view(1, 4, 1)
    weight = PackedWeight(codes, scales, None, "mxfp4", torch.float32)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=device)
    with use_backend(backend):
        found = grouped_gemm(torch.eye(32, device=device)[:1], weight, offsets)[0]
    assert found[:3].tolist() == [2.0**-127, 2.0**-126, 2.0**127] and bool(found[3].isnan())


def make_layer(device, weights="nf4", dtype=torch.bfloat16, requires_grad=True):
    draw = lambda *size: torch.randn(*size, device=device, dtype=dtype)
    up, down = packed(draw(4, 64, 64) / 8, weights), packed(draw(4, 48, 32) / 6, weights)
    a, b = draw(4, 6, 64) / 8, draw(4, 64, 6)
    leaves = [draw(10, 64), a, b, draw(4, 6, 32), draw(4, 48, 6)]
    return up, down, [leaf.requires_grad_(requires_grad) for leaf in leaves]


def run_layer(routing, up, down, leaves, memory="preact"):
    x, *thin = leaves
    return expert_mlp(
        x, routing, up, down, memory=memory,
        up_adapters=[Adapter(*thin[:2], 0.5)], down_adapters=[Adapter(*thin[2:], 2.0)],
    )  # fmt: skip


def test_experts_without_rows_are_not_read(backend, device):
    """Their scales are NaN, and so are their adapters."""
    routing = make_routing("empty", 10, 4, 2, device)
    results = []
    for poisoned in (False, True):
        torch.manual_seed(1)
        up, down, leaves = make_layer(device, requires_grad=False)
        if poisoned:
            for tensor in (up.scales, down.scales, *leaves[1:]):
                tensor[::2] = torch.nan
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with use_backend(backend):
            out = run_layer(routing, up, down, leaves)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for clean, other in zip(*results, strict=True):
        assert torch.equal(clean, other)


def test_repeats_are_bitwise_equal(backend, device):
    routing = make_routing("skewed", 10, 4, 2, device)
    up, down, leaves = make_layer(device)
    runs = []
    with use_backend(backend):
        for _ in range(2):
            out = run_layer(routing, up, down, leaves, "x")
            runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_adapter_of_zeros_changes_no_bit(backend, device, dtype):
    """LoRA starts with B = 0."""
    routing = make_routing("uniform", 10, 4, 2, device)
    _, _, (x, a, b, c, d) = make_layer(device, dtype=dtype)
    up, down = (
        torch.randn(4, 64, 64, device=device).to(dtype),
        torch.randn(4, 48, 32, device=device).to(dtype),
    )
    with use_backend(backend), torch.no_grad():
        out = run_layer(routing, up, down, [x, a, b * 0, c, d * 0])
        assert torch.equal(out, expert_mlp(x, routing, up, down))


@pytest.mark.parametrize("memory", ["x", "preact", "all"])
def test_gradients_that_are_not_needed_change_no_other(backend, device, memory):
    routing = make_routing("uniform", 10, 4, 2, device)
    up, down, leaves = make_layer(device, dtype=torch.float32)
    with use_backend(backend):
        out = run_layer(routing, up, down, leaves, memory)
        upstream = torch.randn_like(out)
        everything = torch.autograd.grad(out, leaves, upstream)
        for needed in ([0], [1, 3], [2, 4]):
            some = [leaf.detach().requires_grad_(i in needed) for i, leaf in enumerate(leaves)]
            found = torch.autograd.grad(
                run_layer(routing, up, down, some, memory), [some[i] for i in needed], upstream
            )
            assert all(torch.equal(a, everything[i]) for a, i in zip(found, needed, strict=True)), needed


def test_the_routing_weights_have_their_gradient_alone(backend, device):
    routing = make_routing("uniform", 10, 4, 2, device)
    up, down, leaves = make_layer(device, dtype=torch.float32, requires_grad=False)
    found = []
    with use_backend(backend):
        for grads in (False, True):
            w = routing.topk_weights.clone().requires_grad_()
            some = [leaf.requires_grad_(grads) for leaf in leaves]
            out = run_layer(routing_from_topk(w, routing.topk_indices, 4), up, down, some)
            found.append(torch.autograd.grad(out.sum(), w)[0])
    assert torch.equal(*found) and bool(found[0].any())


@pytest.mark.parametrize("weights", ["plain", *PACKED])
def test_sums_in_parts(backend, device, weights):
    """Partial sums over K, one of which has the low-rank term, for the forward and for dX."""
    if backend != "triton":
        pytest.skip("a launcher of Triton")
    from cumo_kernels.backends.triton.grouped_gemm import launch_gemm
    from cumo_kernels.backends.triton.packed import LowRank, Packed
    from cumo_kernels.backends.triton.tiles import sum_rows

    config = tuning.Config(BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2, SPLITS=4)
    routing = make_routing("uniform", 9, 3, 2, device)
    rows = torch.randn(18, 160, device=device)
    stored = torch.randn(3, 35, 160, device=device)
    u, v = torch.randn(18, 5, device=device), torch.randn(3, 35, 5, device=device)
    u[routing.expert_offsets[-1] :] = torch.nan
    given = stored
    if weights != "plain":
        weight = packed(stored, weights)
        given, stored = Packed(*weight.parts(), weight.format), weight.dequantize(torch.float32)
    offsets = routing.expert_offsets

    def split(rows, u, v):
        out, _ = launch_gemm(rows, given, offsets, None, None, 1, None, low_rank=LowRank(u, v), config=config)
        assert out.shape[0] == 4
        return sum_rows(out, rows.dtype)

    def expected(rows, u, v):
        with use_backend("reference"):
            wide = torch.cat((stored.to(rows.dtype), v), 2)
            return grouped_gemm(torch.cat((rows, u), 1), wide, offsets)

    with torch.no_grad():
        assert_as_accurate_as_torch(split, expected, rows, u, v)


@pytest.mark.parametrize("weights", PACKED)
def test_bytes_of_a_weight_are_those_of_its_tensors(weights):
    weight = packed(torch.randn(3, 40, 256), weights)
    row = FORMATS[weight.format]
    bytes_of = packed_layers.weight_bytes(
        40, 256, row.name, weight.group, weight.scales.dtype, weight.zeros is not None
    )
    assert 3 * bytes_of == weight.nbytes


@pytest.mark.parametrize("weights", [None, *FORMATS])
def test_one_token_reads_a_quarter_of_the_bytes(weights):
    """Of bf16's, plus the scales: Mixtral's layer at T = 1, two experts of eight."""
    plain = packed_layers.decode_bytes()
    assert plain == 2 * 3 * 14336 * 4096 * 2
    if weights is not None:
        row = FORMATS[weights]
        scales = row.scales[0].itemsize * 8 / row.group  # bits for each weight
        assert packed_layers.decode_bytes(format=weights) == plain * (4 + scales) / 16
    assert packed_layers.decode_bytes(num_tokens=64, format=weights) == 4 * packed_layers.decode_bytes(
        format=weights
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts loads of the interpreter")
@pytest.mark.parametrize("weights", PACKED)
def test_the_kernel_reads_the_bytes_of_the_hit_experts(weights, monkeypatch):
    """One token: codes, scales and zero points of two experts, and nothing else of the weight; codes once."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    reads = []
    load = InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *rest):
        reads.append((ptrs.data[mask.data].ravel(), ptrs.get_element_ty().primitive_bitwidth // 8))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    weight = packed(torch.randn(4, 40, 128), weights)
    routing = make_routing("uniform", 1, 4, 2)
    with use_backend("triton"):
        grouped_gemm(torch.randn(1, 128), weight, routing.expert_offsets, gather=routing)
    total = 0
    for part in filter(lambda part: part is not None, weight.parts()):
        begin, count = part.data_ptr(), part[0].numel() * part.element_size()
        found = [
            a[(a >= begin) & (a < begin + part.nbytes)] for a, size in reads if size == part.element_size()
        ]
        addresses = np.concatenate(found).astype(np.int64) - begin
        assert set((addresses // count).tolist()) == set(routing.topk_indices.flatten().tolist())
        distinct = len(set(addresses.tolist()))
        assert (
            distinct == len(addresses) or part is not weight.packed
        )  # a step within a group reads its scale
        total += distinct * part.element_size()
    bytes_of = packed_layers.weight_bytes(
        40, 128, weight.format, weight.group, weight.scales.dtype, weight.zeros is not None
    )
    assert total == 2 * bytes_of


def test_tiles_of_thin_and_packed_products():
    gpu = next(gpu for gpu in tuning.GPUS if gpu.name == "nvidia_h100")
    problem = tuning.Problem("gemm", torch.bfloat16, 8192, 16, 4096, 8)
    assert tuning.get_config(problem, gpu).BLOCK_N == 16
    assert tuning.get_config(replace(problem, n=1), gpu).BLOCK_N == 16
    thin = tuning.get_config(replace(problem, kind="weight_grad", n=4096, k=20), gpu)
    assert thin.BLOCK_K == 32 and thin.BLOCK_N > 32
    down = replace(problem, n=4096, k=14336)
    plain, four_bits = (tuning.get_config(replace(down, packed=p), gpu) for p in (False, True))
    held = lambda c: c.BLOCK_N * (c.BLOCK_M + c.BLOCK_K) / 32 / c.num_warps
    assert held(plain) > tuning.DEQUANTISED >= held(four_bits)
    assert plain.FLATTEN and not tuning.get_config(replace(down, low_rank=True), gpu).FLATTEN


def test_csrc_refuses_and_is_not_verified():
    """verify and self-check have the same list as dispatch."""
    refused = {op for op in dispatch.OPS if "no kernels for packed" in (reason_of(op) or "")}
    assert refused == {call for case in verified.LACKS["cuda"] for call in verified.COVERS[case]}


def reason_of(op):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_CUDA_MISSING", None)
        patch.setattr(dispatch.extension, "EMULATE", True)
        return dispatch._refuse_cuda(op, "cpu", torch.float32)
