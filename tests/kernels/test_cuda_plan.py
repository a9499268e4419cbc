"""Host decisions of the CUDA extension (tiles, partial sums, blocks), and their effects.

Most tests need only the module, built or emulated; results of split sums need a device that runs them.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cumo_kernels
from cumo_kernels import extension, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import assert_as_accurate_as_torch, make_routing
from cumo_kernels.tiles import hardware, tuning
from tests.rounding import assert_outputs_of_fp32

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
HERE = "cpu" if extension.EMULATE else "cuda"
runs = pytest.mark.skipif(HERE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
emulated = pytest.mark.skipif(not extension.EMULATE, reason="sets the number of emulated processors")
H100 = 132


@pytest.fixture(scope="module")
def module():
    return extension.load()


def plan(S, E, width, K, *, gated=False, can_split=False, steady=False, hopper=True, places=H100):
    """-> columns of a tile, tiles along the columns, splits, blocks"""
    cols, tiles_n, _, splits, blocks, cuts = extension.load()._plan_rows(
        hopper, S, E, width, gated, K // 64, places, can_split, steady
    )
    assert cuts == (cols == 256 and not steady)
    return cols, tiles_n, splits, blocks


def test_plans_of_cumos_layers_on_an_h100():
    """Columns of a tile, tiles along them, parts of the sum, blocks; one crop is 3 row tiles per expert."""
    assert plan(1154, 4, 4096, 1024) == (
        128,
        32,
        1,
        132,
    )  # one crop: 384 narrow tiles, or 192 wide in 2 rounds
    assert plan(1154, 4, 1024, 4096, can_split=True) == (256, 4, 2, 132)  # 48 wide tiles
    assert plan(9232, 4, 4096, 1024) == (128, 32, 1, 132)  # a short sum: its epilogue overlaps the next tile
    assert plan(83088, 4, 1024, 4096, can_split=True) == (256, 4, 1, 132)  # a long sum
    # 304 wide tiles in 2.3 rounds, the last of halves; five rounds of narrow tiles take a tenth longer
    assert plan(9232, 4, 1024, 4096, can_split=True) == (256, 4, 1, 132)
    assert plan(16384, 8, 14336, 4096, gated=True) == (256, 112, 1, 132)
    assert plan(2, 8, 14336, 4096, gated=True) == (256, 112, 1, 132)  # one token: two experts
    assert plan(2, 8, 4096, 14336, can_split=True) == (256, 16, 4, 132)


def test_batch_invariant_plans_do_not_depend_on_the_rows():
    for S in (1, 2, 1154, 9232):
        assert plan(S, 4, 1024, 14336, can_split=True, steady=True)[:3] == (256, 4, 1)
        assert plan(S, 4, 1024, 14336, can_split=True, steady=True, hopper=False)[:3] == (128, 8, 1)


SIZES = {
    "S": st.integers(1, 40000), "E": st.integers(1, 256), "width": st.integers(1, 30000),
    "K": st.integers(1, 30000), "places": st.sampled_from([2, 108, 132, 264]),
}  # fmt: skip


@given(**SIZES, hopper=st.booleans(), gated=st.booleans())
def test_a_plan_fills_the_chip_once_with_parts_long_enough(S, E, width, K, places, hopper, gated):
    cols, tiles_n, splits, blocks = plan(
        S, E, width, K, gated=gated, can_split=not gated, hopper=hopper, places=places
    )
    assert cols == 128 or hopper
    each = cols // 2 if gated else cols
    assert (tiles_n - 1) * each < width <= tiles_n * each and 1 <= blocks <= places
    assert splits & (splits - 1) == 0 and (splits == 1 or not gated)
    if splits > 1:
        assert K // 64 >= splits * 8 and tiles_n * splits <= places


@given(**SIZES)
def test_the_rule_is_that_of_triton(S, E, width, K, places):
    gpu = hardware.Gpu("x", "x", 80, places, 1 << 20)
    config = tuning.Config(128, 128, 64, 8, 3)
    asked = tuning.Problem("gemm", torch.bfloat16, S, width, K, E, can_split=True)
    assert plan(S, E, width, K, can_split=True, hopper=False, places=places)[2] == tuning.splits(
        asked, config, gpu
    )
    # here BLOCK_M is the step of the sum
    config = tuning.Config(64, 128, 256, 8, 3)
    asked = tuning.Problem("weight_grad", torch.bfloat16, S, width, K, E, can_split=True)
    found = extension.load()._plan_weight_grad(True, S, E, width, K, 64, places)
    assert found[3] == tuning.splits(asked, config, gpu)
    assert found[4] == min(places, E * found[1] * found[2] * found[3])


def test_blocks_fit_into_every_gpu(module):
    least = min(gpu.shared_memory for gpu in hardware.GPUS)
    portable, *hopper = module._shared_bytes()
    assert portable <= least and all(size <= hardware.find("nvidia_h100").shared_memory for size in hopper)


@pytest.fixture(
    params=[(80, torch.float32), (80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16)],
    ids=["portable-fp32", "portable-bf16", "hopper-bf16", "hopper-fp16"],
)
def kernels(request, monkeypatch) -> torch.dtype:
    """Both generations of kernels, on enough processors that sums are split; the dtype to use."""
    capability, dtype = request.param
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", str(capability))
    monkeypatch.setenv("CUMO_EMULATE_SMS", "16")
    return dtype


def launches(module, run) -> int:
    before = module._launches()
    run()
    return module._launches() - before


@emulated
@pytest.mark.parametrize("bias", [True, False])
def test_split_rows(kernels, module, bias):
    """A long sum of few tiles, with rows after the last expert, an expert without rows and an odd width."""
    dtype = kernels
    offsets = torch.tensor([0, 3, 3, 14], dtype=torch.int32)
    x, weight = torch.randn(16, 1100, dtype=dtype), torch.randn(3, 37, 1100, dtype=dtype) / 33
    x, weight = x[:, :1096], weight[:, :, :1096]
    biases = (torch.randn(3, 37, dtype=dtype),) if bias else ()
    run = lambda x, w, b=None: cumo_kernels.grouped_gemm(x, w, offsets, bias=b)
    with use_backend("cuda"):
        assert_as_accurate_as_torch(
            run,
            lambda x, w, b=None: reference.grouped_gemm(x, w, offsets, b, None, None, 1, None)[0],
            x,
            weight,
            *biases,
        )
        with torch.no_grad():
            assert (
                launches(module, lambda: run(x, weight, *biases)) == 2
            )  # the product, and the sum of its parts
            assert torch.equal(run(x, weight, *biases), run(x, weight, *biases))
            assert torch.equal(run(x, weight)[14:], torch.zeros(2, 37, dtype=dtype))


@emulated
@pytest.mark.parametrize("gated", [True, False])
def test_split_sums_of_a_layer(kernels, module, gated):
    """Both weight gradients, split over rows."""
    dtype = kernels
    plan = make_routing("skewed", 1030, 1, 1)
    x = torch.randn(1030, 24, dtype=dtype)
    up = torch.randn(1, 32 * (1 + gated), 24, dtype=dtype) / 5
    down = torch.randn(1, 16, 32, dtype=dtype) / 6
    biases = torch.randn(1, up.shape[1], dtype=dtype), torch.randn(1, 16, dtype=dtype)
    arguments = (plan.permutation, plan.inverse_permutation, plan.expert_offsets)
    name = "swiglu" if gated else "gelu"
    with use_backend("cuda"):
        assert_as_accurate_as_torch(
            lambda x, up, down, a, b: cumo_kernels.expert_mlp(x, plan, up, down, a, b, activation=name),
            lambda x, up, down, a, b: reference.expert_mlp(
                x, plan.topk_weights, *arguments, up, down, a, b, name, "none"
            )[0],
            x, up, down, *biases,
        )  # fmt: skip
    grad = torch.randn(1030, 16, dtype=dtype)
    run = lambda: module.grouped_gemm_weight_grad(grad, x, plan.expert_offsets, None, None, 1, True)
    assert launches(module, run) == 3  # the product, the sums of weights and of biases
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@emulated
def test_combine_adds_up_the_parts(kernels, module):
    """A decoding step: down projection and input gradient are split, and combine adds their parts."""
    dtype = kernels
    plan = make_routing("uniform", 3, 4, 2)
    x, up = torch.randn(3, 40, dtype=dtype), torch.randn(4, 1096, 40, dtype=dtype) / 6
    down = torch.randn(4, 24, 1096, dtype=dtype) / 33
    bias = torch.randn(4, 24, dtype=dtype)
    order = (plan.permutation, plan.inverse_permutation, plan.expert_offsets)
    run = lambda x, up, down, b: cumo_kernels.expert_mlp(x, plan, up, down, None, b, activation="silu")
    with use_backend("cuda"):
        assert_as_accurate_as_torch(
            run,
            lambda x, up, down, b: reference.expert_mlp(
                x, plan.topk_weights, *order, up, down, None, b, "silu", "none"
            )[0],
            x, up, down, bias,
        )  # fmt: skip
        with torch.no_grad():
            assert launches(module, lambda: run(x, up, down, bias)) == 3
            assert torch.equal(run(x, up, down, bias), run(x, up, down, bias))


@emulated
@pytest.mark.parametrize("steady", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("gathered", [False, True])
def test_several_long_tiles_for_each_block(monkeypatch, gathered, steady):
    """Hopper's consumers alternating or together; an odd number of tiles, longer than the ring of stages."""
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", "90")
    monkeypatch.setenv("CUMO_BATCH_INVARIANT", str(int(steady)))
    assert plan(90, 3, 300, 832, places=2, steady=steady)[:2] == ((256, 2) if steady else (128, 3))
    routing = make_routing("uniform", 45, 3, 2)
    offsets, order = routing.expert_offsets, (routing.permutation, routing.inverse_permutation)
    x, weight = torch.randn(45 if gathered else 90, 832).half(), torch.randn(3, 300, 832).half() / 29
    gather, rest = (routing, (*order, 2, "gelu")) if gathered else (None, (None, None, 1, "gelu"))
    with use_backend("cuda"):
        assert_as_accurate_as_torch(
            lambda x, w: cumo_kernels.grouped_gemm(x, w, offsets, gather=gather, activation="gelu"),
            lambda x, w: reference.grouped_gemm(x, w, offsets, None, *rest)[0],
            x,
            weight,
        )


@emulated
@pytest.mark.parametrize("kind", ["rows", "gated", "gated-apart", "across"])
def test_halves_of_a_short_last_round_change_no_bit(monkeypatch, kind):
    """Six wide tiles on six processors, and on four, where the last two are split."""
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", "90")
    if kind == "gated-apart":
        monkeypatch.setenv("CUMO_EMULATE_STRICT_MAPS", "1")
    routing, gated = make_routing("uniform", 45, 3, 2), kind.startswith("gated")
    x = torch.randn(45 if gated else 90, 2688).bfloat16()
    weight = torch.randn(3, 512, 2688).bfloat16()
    if kind == "across":
        weight = weight.mT.contiguous().mT
    gather = routing if gated else None
    name, bias = ("swiglu", torch.randn(3, 512).bfloat16()) if gated else (None, None)

    def run(processors):
        monkeypatch.setenv("CUMO_EMULATE_SMS", str(processors))
        sizes = {"gated": gated, "can_split": not gated, "places": processors}
        assert plan(90, 3, 256 if gated else 512, 2688, **sizes)[:3] == (256, 2, 1)
        with use_backend("cuda"):
            return cumo_kernels.grouped_gemm(
                x, weight, routing.expert_offsets, bias=bias, gather=gather, activation=name
            )

    cut, whole = (extension.load()._whole_tiles(6, processors) for processors in (4, 6))
    assert (cut, whole) == (4, 6)
    assert torch.equal(run(4), run(6))


@emulated
@pytest.mark.parametrize("steady", [False, True], ids=["narrow", "wide"])
def test_gated_weights_where_a_driver_wants_strides_to_ascend(monkeypatch, steady):
    """Two boxes of plain rows instead of one that alternates eight and eight: the same products."""
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", "90")
    monkeypatch.setenv("CUMO_BATCH_INVARIANT", str(int(steady)))
    routing = make_routing("uniform", 33, 2, 2)
    x, weight = torch.randn(33, 136).half(), torch.randn(2, 2 * 200, 136).half() / 12
    bias = torch.randn(2, 400).half()
    offsets = routing.expert_offsets
    run = lambda: extension.load().grouped_gemm(
        x, weight, offsets, bias, routing.permutation, None, 2, "geglu"
    )
    in_turns = run()
    monkeypatch.setenv("CUMO_EMULATE_STRICT_MAPS", "1")
    for apart, together in zip(run(), in_turns, strict=True):
        assert torch.equal(apart, together)


@emulated
@pytest.mark.parametrize("capability", [80, 90])
def test_dependent_launches_change_no_bit(module, monkeypatch, capability):
    """CUMO_PDL=1: on Hopper each product prefetches its whole weight once; every kernel waits."""
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", str(capability))
    routing = make_routing("uniform", 70, 2, 2)
    x, up, down = torch.randn(70, 40), torch.randn(2, 96, 40), torch.randn(2, 24, 48)
    inputs = [tensor.bfloat16().requires_grad_() for tensor in (x, up, down)]

    def run():
        with use_backend("cuda"):
            out = cumo_kernels.expert_mlp(inputs[0], routing, *inputs[1:], activation="swiglu")
            return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    before, fetched = run(), module._fetched_ahead()
    monkeypatch.setenv("CUMO_PDL", "1")
    for got, want in zip(run(), before, strict=True):
        assert torch.equal(got, want)
    # both of them forward, and in backward for dH and dX
    wanted = 2 * (up.numel() + down.numel()) * 2 if capability == 90 else 0
    assert module._fetched_ahead() - fetched == wanted


@emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [72, 70], ids=["runs", "single-columns"])
def test_bias_gradient_in_parts(module, monkeypatch, dtype, width):
    """Many rows on many processors, some experts without any, dropped slots whose weights are NaN."""
    monkeypatch.setenv("CUMO_EMULATE_SMS", "64")
    indices = torch.randint(0, 4, (3200, 2))
    indices[indices == 1] = 2
    weights = torch.rand(3200, 2)
    weights[indices == 3] = torch.nan
    routing = cumo_kernels.routing_from_topk(weights, indices, 3)
    x, up, down = (torch.randn(*size).to(dtype) for size in ((3200, 8), (3, 8, 8), (3, width, 8)))
    bias = torch.randn(3, width).to(dtype)
    order = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)
    grad = torch.randn(3200, width).to(dtype)
    z, a = torch.empty(6400, 8, dtype=dtype), torch.empty(0, dtype=dtype)
    run = lambda grad: module.expert_mlp_backward(
        grad, x, routing.topk_weights, *order, up, down, None, bias, z, a, "relu", "preact",
        *(False,) * 5, True,
    )[5]  # fmt: skip
    assert launches(module, lambda: run(grad)) == 2

    def expected(grad):
        member = torch.nn.functional.one_hot(indices, 4)[..., :3].to(grad)
        return torch.einsum("tke,tk,to->eo", member, weights.nan_to_num().to(grad), grad)

    with torch.no_grad():
        assert_as_accurate_as_torch(run, expected, grad)
    assert torch.equal(run(grad), run(grad)) and torch.equal(run(grad)[1], torch.zeros(width, dtype=dtype))


@emulated
def test_bias_gradient_with_several_tiles(kernels, monkeypatch):
    """Several stages, the last ragged; tiles of other columns of x sum the bias of other columns of z."""
    monkeypatch.setenv("CUMO_EMULATE_SMS", "2")
    plan = make_routing("uniform", 165, 2, 2)
    x, up = torch.randn(165, 264, dtype=kernels), torch.randn(2, 264, 264, dtype=kernels) / 16
    down = torch.randn(2, 16, 264, dtype=kernels) / 16
    biases = torch.randn(2, 264, dtype=kernels), torch.randn(2, 16, dtype=kernels)
    order = (plan.permutation, plan.inverse_permutation, plan.expert_offsets)
    with use_backend("cuda"):
        assert_as_accurate_as_torch(
            lambda x, *rest: cumo_kernels.expert_mlp(x, plan, *rest, activation="relu"),
            lambda x, *rest: reference.expert_mlp(x, plan.topk_weights, *order, *rest, "relu", "none")[0],
            x, up, down, *biases,
        )  # fmt: skip


@emulated
@pytest.mark.parametrize("memory", ["none", "x", "preact", "all"])
@pytest.mark.parametrize("dropping", [False, True])
def test_a_copy_in_expert_order_changes_no_bit(module, monkeypatch, memory, dropping):
    """Hopper uses the copy instead of gathering when there are many rows: the same products."""
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", "90")
    indices = torch.randint(0, 4 if dropping else 3, (90, 2))
    routing = cumo_kernels.routing_from_topk(torch.rand(90, 2), indices, 3)
    order = (routing.topk_weights, routing.permutation, routing.inverse_permutation, routing.expert_offsets)
    x, grad = torch.randn(90, 32).bfloat16(), torch.randn(90, 24).bfloat16()
    up, down = torch.randn(3, 80, 32).bfloat16(), torch.randn(3, 24, 40).bfloat16()
    biases = torch.randn(3, 80).bfloat16(), torch.randn(3, 24).bfloat16()

    def run():
        arguments = (*order, up, down, *biases)
        out, z, a = module.expert_mlp(x, *arguments, "swiglu", memory)
        if memory == "none":
            return [out]
        return [out, *module.expert_mlp_backward(grad, x, *arguments, z, a, "swiglu", memory, *(True,) * 6)]

    gathered, before = run(), launches(module, run)
    monkeypatch.setenv("CUMO_EMULATE_COPY_FROM", "16")
    copies = {"none": 1, "x": 4, "preact": 3, "all": 3}[memory]
    assert launches(module, run) == before + copies
    end = int(routing.expert_offsets[-1])
    assert end < 180 or not dropping
    for got, want in zip(run(), gathered, strict=True):
        assert torch.equal(got, want)


@emulated
def test_batch_invariance(kernels, module, monkeypatch):
    """Forward, a row has the same bits alone and in a batch; without the option the sum is split."""
    offsets = torch.tensor([0, 200], dtype=torch.int32)
    x, weight = torch.randn(200, 1096, dtype=kernels), torch.randn(1, 40, 1096, dtype=kernels)
    run = lambda x, offsets: module.grouped_gemm(x, weight, offsets, None, None, None, 1, None)[0]
    monkeypatch.setenv("CUMO_BATCH_INVARIANT", "1")
    assert launches(module, lambda: run(x[:1], offsets.clamp(max=1))) == 1
    assert torch.equal(run(x[:1], offsets.clamp(max=1)), run(x, offsets)[:1])
    monkeypatch.delenv("CUMO_BATCH_INVARIANT")
    assert launches(module, lambda: run(x[:1], offsets.clamp(max=1))) == 2


@runs
@pytest.mark.parametrize("num_tokens, num_experts, top_k", [(5770, 4, 2), (130, 256, 8), (1, 1, 1)])
def test_routing_and_metadata_take_two_launches(module, num_tokens, num_experts, top_k):
    hidden = 8 if num_experts <= 32 else num_experts
    x = torch.randn(num_tokens, hidden, device=HERE)
    gate = torch.randn(num_experts, hidden, device=HERE) if num_experts <= 32 else None
    run = lambda: cumo_kernels.route(x, top_k, gate, groups=10 if num_tokens == 5770 else 1)
    with use_backend("cuda"):
        assert launches(module, run) == 2
        found = run()
    with use_backend("reference"):
        wanted = run()
    assert torch.equal(found.permutation, wanted.permutation)
    assert torch.equal(found.expert_offsets, wanted.expert_offsets)


@runs
@pytest.mark.parametrize("num_experts", [8, 12], ids=["one-fragment", "several-fragments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_share_of_a_long_gate_counts(module, dtype, num_experts):
    """Several whole batches of loads per warp and a partial one; integers have the same sum in any order."""
    x, gate = (torch.randint(-1, 2, (n, 2248), device=HERE).to(dtype) for n in (37, num_experts))
    more = (None, 1, 2, True)
    assert torch.equal(module.route(x, gate, *more)[1], reference.route(x, gate, *more)[1])
    # integers also inside UnsplitSums (cumo_kernels/verification/rounding.py)
    expected = lambda x, gate: reference.route((x @ gate.T).round(), None, *more)[::2]
    assert_outputs_of_fp32(lambda *inputs: module.route(*inputs, *more)[::2], expected, dtype, x, gate)


@runs
@pytest.mark.parametrize("num_experts", [3, 8, 9, 200])
@pytest.mark.parametrize("num_slots", [0, 1, 1024, 1025, 5000, 32768, 33000])
def test_sorting_is_stable_for_every_way_of_counting(module, num_slots, num_experts):
    """Counted by every block itself up to 32768 slots, in advance with more; id E is a dropped slot."""
    ids = torch.randint(0, num_experts + 1, (num_slots,), dtype=torch.int32, device=HERE)
    assert launches(module, lambda: module.sort_by_expert(ids, num_experts)) == 1 + (num_slots > 32768)
    found = module.sort_by_expert(ids, num_experts)
    for got, wanted in zip(found, reference.sort_by_expert(ids, num_experts), strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 values that TF32 can represent."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@runs
@pytest.mark.parametrize("k_inner", [True, False])
def test_tf32(tf32, k_inner):
    """Products of operands that TF32 represents equal those of fp32, also in backward; others are rounded."""
    plan = make_routing("skewed", 70, 3, 2, HERE)
    x, bias = torch.randn(70, 44, device=HERE), torch.randn(3, 36, device=HERE)
    weight = torch.randn(3, 36, 44, device=HERE) if k_inner else torch.randn(3, 44, 36, device=HERE).mT
    down = torch.randn(3, 20, 36, device=HERE)
    order = (plan.permutation, plan.inverse_permutation, plan.expert_offsets)
    with use_backend("cuda"):
        assert_as_accurate_as_torch(
            lambda x, w, b: cumo_kernels.grouped_gemm(x, w, order[2], bias=b, gather=plan),
            lambda x, w, b: reference.grouped_gemm(x, w, order[2], b, *order[:2], 2, None)[0],
            cut(x), cut(weight), bias,
        )  # fmt: skip
        run = lambda x, w: cumo_kernels.grouped_gemm(x, w, order[2], gather=plan)
        rounded = run(x, weight)
        assert torch.equal(rounded, run(cut(x), cut(weight)))
        torch.backends.cuda.matmul.allow_tf32 = False
        assert not torch.equal(rounded, run(x, weight))
        layer = lambda x, up, down: cumo_kernels.expert_mlp(x, plan, up, down, activation="relu")
        torch.backends.cuda.matmul.allow_tf32 = True
        leaves = [t.clone().requires_grad_() for t in (cut(x), cut(weight), cut(down))]
        grads = torch.autograd.grad(layer(*leaves).square().sum(), leaves)

    def grads_in(dtype):
        own = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = reference.expert_mlp(
            own[0], plan.topk_weights.to(dtype), *order, *own[1:], None, None, "relu", "none"
        )
        return torch.autograd.grad(out[0].square().sum(), own)

    # fp16 has TF32's mantissa, and the reference rounds what it saves in the same way
    for got, want, rough in zip(grads, grads_in(torch.float64), grads_in(torch.float16), strict=True):
        assert (got - want).norm() < (rough - want).norm()


@runs
@pytest.mark.parametrize("capability", [80, 90])
def test_one_column(dtype, capability, monkeypatch):
    """A reduction of one step, from strided and transposed views; for example bias gradients alone."""
    monkeypatch.setenv("CUMO_EMULATE_CAPABILITY", str(capability))
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32, device=HERE)
    for x in (torch.randn(5, 16, device=HERE), torch.randn(16, 5, device=HERE).T):
        x, weight = x.to(dtype), torch.randn(2, 24, 8, device=HERE, dtype=dtype)
        with use_backend("cuda"):
            assert_as_accurate_as_torch(
                lambda x, w: cumo_kernels.grouped_gemm(x[:, :1], w[..., :1], offsets),
                lambda x, w: reference.grouped_gemm(x[:, :1], w[..., :1], offsets, None, None, None, 1, None)[
                    0
                ],
                x,
                weight,
            )
