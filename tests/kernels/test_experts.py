"""expert_mlp: every backend compared with the reference, output and all gradients, and with a loop."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cumo_kernels import ACTIVATIONS, expert_mlp, route, routing_from_topk, use_backend
from cumo_kernels.activations import get_activation
from cumo_kernels.backends import reference
from cumo_kernels.testing import PATTERNS, assert_as_accurate_as_torch, make_routing
from cumo_kernels.tiles import tuning
from tests.rounding import assert_same_formula

SHAPES = [  # num_tokens, hidden_size, intermediate_size, output_size, num_experts, top_k
    pytest.param((0, 32, 48, 32, 4, 2), id="no-token"),
    pytest.param((1, 32, 48, 32, 4, 2), id="one-token"),
    pytest.param((57, 49, 66, 35, 7, 3), id="odd-tails-prime-experts"),
    pytest.param((24, 32, 64, 48, 4, 4), id="top_k-equals-experts"),
    pytest.param((160, 64, 128, 96, 4, 2), marks=pytest.mark.large, id="connector-like-wider-output"),
]

SPELLED = [  # limits in reach of random numbers
    "swiglu_clamped(limit=0.75)",
    "clamped_swiglu(limit=0.375)",
    "swiglu_oai(alpha=1.25,limit=0.5,interleaved)",
]


def make_case(shape, activation, bias, dtype, device, pattern="uniform"):
    num_tokens, hidden_size, intermediate_size, output_size, num_experts, top_k = shape
    routing = make_routing(pattern, num_tokens, num_experts, top_k, device)
    width = 2 * intermediate_size if get_activation(activation).is_gated else intermediate_size
    draw = lambda *size: torch.randn(*size, device=device, dtype=dtype)
    x = draw(num_tokens, hidden_size)
    up_proj = draw(num_experts, width, hidden_size) / hidden_size**0.5
    down_proj = draw(num_experts, output_size, intermediate_size) / intermediate_size**0.5
    biases = (draw(num_experts, width), draw(num_experts, output_size)) if bias else ()
    return routing, (x, routing.topk_weights, up_proj, down_proj, *biases)


def op_and_expected(routing, activation, memory="preact"):
    def op(x, weights, up_proj, down_proj, up_bias=None, down_bias=None):
        plan = routing_from_topk(weights, routing.topk_indices, routing.num_experts)
        return expert_mlp(x, plan, up_proj, down_proj, up_bias, down_bias, activation, memory)

    def expected(x, weights, up_proj, down_proj, up_bias=None, down_bias=None):
        plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)
        return reference.expert_mlp(
            x, weights, *plan, up_proj, down_proj, up_bias, down_bias, activation, "none"
        )[0]

    return op, expected


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *SPELLED])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_reference_is_the_loop(activation, bias):
    routing, inputs = make_case((11, 6, 8, 5, 3, 2), activation, bias, torch.float64, "cpu")
    x, weights, up_proj, down_proj, *biases = inputs
    up_bias, down_bias = biases or (torch.zeros(3, up_proj.shape[1]).double(), torch.zeros(3, 5).double())
    wanted = torch.zeros(11, 5, dtype=torch.float64)
    for token in range(11):
        for choice in range(2):
            e = int(routing.topk_indices[token, choice])
            hidden = get_activation(activation).forward(up_proj[e] @ x[token] + up_bias[e])
            wanted[token] += weights[token, choice].double() * (down_proj[e] @ hidden + down_bias[e])
    assert_same_formula(op_and_expected(routing, activation)[0](*inputs), wanted)


@pytest.mark.parametrize("activation", ["quick_gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_expert_mlp(backend, device, dtype, shape, activation, bias):
    routing, inputs = make_case(shape, activation, bias, dtype, device)
    with use_backend(backend):
        assert_as_accurate_as_torch(*op_and_expected(routing, activation), *inputs)


@pytest.mark.parametrize("memory", ["x", "preact", "all"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_memory_plans_and_patterns(backend, device, dtype, memory, pattern, activation):
    routing, inputs = make_case((57, 48, 32, 40, 5, 2), activation, True, dtype, device, pattern)
    with use_backend(backend):
        assert_as_accurate_as_torch(*op_and_expected(routing, activation, memory), *inputs)


@pytest.mark.parametrize(
    ("memory", "activation", "sizes"),
    [
        pytest.param("preact", "quick_gelu", (48, 32, 40), id="preact-descriptors"),
        pytest.param("x", "swiglu", (48, 32, 40), id="x-gated-descriptors"),
        pytest.param("all", "quick_gelu", (48, 32, 40), id="all-descriptors"),
        pytest.param("preact", "swiglu", (47, 32, 41), id="rows-no-copy-engine-reads"),
    ],
)
def test_sorted_rows(backend, device, memory, activation, sizes, monkeypatch):
    """Many rows are copied into expert order before they are multiplied."""
    if backend != "triton":
        pytest.skip("only triton makes that copy here; csrc's is tested in test_cuda_plan.py")
    from cumo_kernels.backends.triton import experts

    routing, inputs = make_case((33, *sizes, 5, 2), activation, True, torch.bfloat16, device, "skewed")
    op, expected = op_and_expected(routing, activation, memory)
    monkeypatch.setattr(experts, "SORT_FROM", 0)
    with use_backend(backend):
        assert_as_accurate_as_torch(op, expected, *inputs)
        out = op(*inputs)
        monkeypatch.setattr(experts, "SORT_FROM", 10**9)
        assert torch.equal(out, op(*inputs))


def test_sorted_gradients_that_no_copy_engine_reads(backend, device):
    """dH reads rows in expert order through pointers too, with the same bits as gathered rows."""
    if backend != "triton":
        pytest.skip("only a launcher of Triton")
    from cumo_kernels.backends.triton.grad_hidden import launch_grad_hidden

    routing, (_, weights, _, down) = make_case((33, 24, 40, 41, 5, 2), "gelu", False, torch.bfloat16, device)
    draw = lambda *size: torch.randn(*size, device=device, dtype=torch.bfloat16)
    grad, z = draw(33, 41), draw(66, 40)
    plan = (weights, routing.permutation, routing.expert_offsets, down, z, "gelu")
    wanted = {"need_dz": True, "need_weighted": True, "need_dots": True}
    gathered = launch_grad_hidden(grad, *plan, **wanted)
    in_order = grad[routing.permutation.long() // 2]
    for a, b in zip(gathered, launch_grad_hidden(in_order, *plan, **wanted, is_sorted=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pattern", ["skewed", "empty"])
def test_bias_gradient_in_parts(backend, device, pattern):
    """Experts whose rows are summed in parts, and experts with few or none."""
    routing, inputs = make_case((150, 16, 16, 160, 4, 2), "quick_gelu", True, torch.float32, device, pattern)
    with use_backend(backend):
        assert_as_accurate_as_torch(*op_and_expected(routing, "quick_gelu"), *inputs)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *SPELLED])
def test_every_activation(backend, device, activation):
    routing, inputs = make_case((40, 32, 24, 16, 4, 2), activation, True, torch.float32, device)
    with use_backend(backend):
        assert_as_accurate_as_torch(*op_and_expected(routing, activation), *inputs)


@pytest.mark.parametrize("memory", ["x", "preact", "all"])
def test_gradient_of_a_single_input(backend, device, memory):
    """Skipping gradients that are not needed does not change the others."""
    routing, inputs = make_case((30, 16, 24, 16, 4, 2), "quick_gelu", True, torch.float32, device)
    op, _ = op_and_expected(routing, "quick_gelu", memory)
    with use_backend(backend):
        everything = [t.clone().requires_grad_() for t in inputs]
        out = op(*everything)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        for needed, wanted in enumerate(everything):
            alone = [t.clone() for t in inputs]
            alone[needed].requires_grad_()
            op(*alone).backward(upstream)
            assert torch.equal(alone[needed].grad, wanted.grad), needed


def test_empty_expert_has_exactly_zero_gradients(backend, device):
    routing, inputs = make_case((16, 16, 16, 16, 4, 2), "quick_gelu", True, torch.float32, device, "empty")
    leaves = [t.clone().requires_grad_() for t in inputs]
    with use_backend(backend):
        op_and_expected(routing, "quick_gelu")[0](*leaves).sum().backward()
    for leaf in leaves[2:]:
        assert not leaf.grad[0].any() and not leaf.grad[2].any()
        assert leaf.grad[1].any() and leaf.grad[3].any()


def test_repeats_are_bitwise_equal(backend, device, dtype):
    routing, inputs = make_case((64, 32, 48, 32, 4, 2), "quick_gelu", True, dtype, device, "skewed")
    runs = []
    with use_backend(backend):
        for _ in range(5 if device == "cuda" else 2):  # a CPU's order is fixed
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = op_and_expected(routing, "quick_gelu")[0](*leaves)
            out.backward(torch.ones_like(out))
            runs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.usefixtures("ordered_dots")
def test_batch_invariant_mode_gives_a_token_the_same_bits_in_any_batch(backend, device, dtype, monkeypatch):
    if backend in ("reference", "torch"):
        pytest.skip("it leaves the order of sums to torch")
    monkeypatch.setattr(tuning, "BATCH_INVARIANT", True)
    monkeypatch.setenv("CUMO_BATCH_INVARIANT", "1")
    monkeypatch.setenv("CUMO_EMULATE_SMS", "16")
    x, gate = (torch.randn(*size, device=device, dtype=dtype) for size in ((96, 512), (3, 512)))
    up_proj, down_proj = (torch.randn(3, 64, width, device=device, dtype=dtype) for width in (512, 64))

    def layer(tokens):
        routing = route(tokens, 2, gate / 512**0.5)
        out = expert_mlp(tokens, routing, up_proj / 512**0.5, down_proj / 8, activation="gelu")
        return routing.topk_weights, out

    tuning.get_config.cache_clear()
    try:
        with use_backend(backend):
            weights, out = layer(x)
            for some in (slice(3, 4), slice(40, 75)):
                for whole, alone in zip((weights, out), layer(x[some]), strict=True):
                    assert torch.equal(whole[some], alone)
    finally:
        tuning.get_config.cache_clear()


def test_dropped_slots_contribute_nothing(backend, device):
    indices = torch.tensor([[0, 2], [2, 2], [1, 0]], device=device)  # E = 2: id 2 drops the slot
    routing = routing_from_topk(torch.full((3, 2), 0.5, device=device), indices, 2)
    _, (x, _, up_proj, down_proj, *biases) = make_case(
        (3, 8, 8, 8, 2, 2), "relu", True, torch.float32, device
    )
    x.requires_grad_()
    with use_backend(backend):
        out = expert_mlp(x, routing, up_proj, down_proj, *biases, activation="relu")
        out.sum().backward()
    assert torch.equal(out[1], torch.zeros_like(out[1])) and torch.equal(x.grad[1], torch.zeros_like(out[1]))
    assert bool(out[0].any()) and bool(out[2].any()) and bool(x.grad[2].any())


@pytest.mark.parametrize("activation", ["quick_gelu", "geglu"])
@pytest.mark.parametrize("memory", ["x", "preact", "all"])
def test_gradcheck(activation, memory):
    routing, inputs = make_case((5, 3, 4, 2, 3, 2), activation, True, torch.float64, "cpu")
    leaves = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(op_and_expected(routing, activation, memory)[0], leaves)


@pytest.mark.parametrize("memory, saved_elements", [("x", 0), ("preact", 60 * 24), ("all", 2 * 60 * 24)])
def test_memory_plan_saves_what_it_promises(memory, saved_elements):
    routing, inputs = make_case((30, 16, 24, 16, 4, 2), "quick_gelu", True, torch.float32, "cpu")
    leaves = [t.clone().requires_grad_() for t in inputs]
    given = {t.data_ptr() for t in leaves}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op_and_expected(routing, "quick_gelu", memory)[0](*leaves)
    kept = sum(t.numel() for t in saved if t.is_floating_point() and t.data_ptr() not in given)
    assert kept == saved_elements


def test_flop_counter_sees_the_layer():
    routing, inputs = make_case((30, 16, 24, 12, 4, 2), "swiglu", False, torch.float32, "cpu")
    leaves = [t.clone().requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        op_and_expected(routing, "swiglu")[0](*leaves).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (30 * 2) * (48 * 16 + 12 * 24)


def test_autocast():
    routing, inputs = make_case((20, 16, 24, 16, 4, 2), "quick_gelu", True, torch.float32, "cpu")
    leaves = [t.clone().requires_grad_() for t in inputs]
    op, _ = op_and_expected(routing, "quick_gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(*leaves)
    out.sum().backward()
    x, weights, *rest = inputs
    assert out.dtype == torch.bfloat16 and all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    assert torch.equal(out, op(x.bfloat16(), weights, *(t.bfloat16() for t in rest)))


def test_names_the_bad_argument():
    routing, (x, _, up_proj, down_proj, up_bias, _) = make_case(
        (8, 16, 24, 12, 4, 2), "quick_gelu", True, torch.float32, "cpu"
    )
    with pytest.raises(ValueError, match=r"x must be \(8, H\), got \(7, 16\)"):
        expert_mlp(x[:7], routing, up_proj, down_proj, activation="gelu")
    with pytest.raises(ValueError, match=r"up_proj must be \(4, I, 16\), got \(3, 24, 16\)"):
        expert_mlp(x, routing, up_proj[:3], down_proj, activation="gelu")
    with pytest.raises(ValueError, match=r"down_proj must be \(4, O, 12\), got \(4, 12, 24\)"):
        expert_mlp(x, routing, up_proj, down_proj, activation="swiglu")
    with pytest.raises(ValueError, match=r"down_bias must be \(4, 12\), got \(4, 24\)"):
        expert_mlp(x, routing, up_proj, down_proj, up_bias, up_bias, activation="gelu")
    with pytest.raises(ValueError, match=r"memory must be one of .*, got 'none'"):
        expert_mlp(x, routing, up_proj, down_proj, activation="gelu", memory="none")
    with pytest.raises(
        ValueError, match=r"up_proj must have the dtype of x, torch.float32, got torch.float16"
    ):
        expert_mlp(x, routing, up_proj.half(), down_proj, activation="gelu")


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("storage", ["rows", "transposed"])
def test_interleaved_and_transposed_weights(backend, device, dtype, shape, storage):
    """gpt-oss' storage: weights transposed, gate and up in turns; gradients in the order of the weights."""
    activation = "swiglu_oai(alpha=1.25,limit=0.5)"
    routing, inputs = make_case(shape, activation, True, dtype, device)
    x, weights, up_proj, down_proj, up_bias, down_bias = inputs
    if storage == "transposed":
        up_proj, down_proj = up_proj.transpose(1, 2).contiguous(), down_proj.transpose(1, 2).contiguous()
    as_rows = lambda weight: weight.transpose(1, 2) if storage == "transposed" else weight
    apart = lambda rows: torch.cat([rows[:, ::2], rows[:, 1::2]], 1)
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)

    def op(x, weights, up_proj, down_proj, up_bias, down_bias):
        return expert_mlp(
            x, routing_from_topk(weights, routing.topk_indices, routing.num_experts), as_rows(up_proj),
            as_rows(down_proj), up_bias, down_bias, activation, interleaved=True,
        )  # fmt: skip

    def expected(x, weights, up_proj, down_proj, up_bias, down_bias):
        up, down = apart(as_rows(up_proj)), as_rows(down_proj)
        return reference.expert_mlp(
            x, weights, *plan, up, down, apart(up_bias), down_bias, activation, "none"
        )[0]

    with use_backend(backend):
        assert_as_accurate_as_torch(op, expected, x, weights, up_proj, down_proj, up_bias, down_bias)


def test_interleaved_needs_a_gated_activation():
    routing, inputs = make_case(SHAPES[1].values[0], "gelu", False, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"interleaved must be False for gelu, which is not gated, got True"):
        expert_mlp(inputs[0], routing, *inputs[2:], activation="gelu", interleaved=True)
    with pytest.raises(ValueError, match=r"interleaved must be True or False, got 1"):
        expert_mlp(inputs[0], routing, *inputs[2:], activation="gelu", interleaved=1)
