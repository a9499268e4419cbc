"""route: weights and statistics compared with a plain loop, every gradient."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cumo_kernels import dispatch, route, routing_from_topk, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import Yardstick, assert_as_accurate_as_torch
from tests.rounding import assert_outputs_of_fp32, assert_same_formula

SHAPES = [  # num_tokens, num_experts, top_k, groups
    pytest.param(0, 4, 2, 1, id="no-token"),
    pytest.param(1, 4, 2, 1, id="one-token"),
    pytest.param(54, 7, 3, 6, id="prime-experts-in-groups"),
    pytest.param(33, 8, 8, 3, id="top_k-equals-experts"),
    pytest.param(12, 1, 1, 2, id="one-expert"),
    pytest.param(577 * 2, 4, 2, 2, id="two-clip-crops"),
    pytest.param(64, 256, 16, 1, id="many-experts"),
    pytest.param(18, 384, 8, 2, id="384-experts"),
    pytest.param(5, 512, 32, 1, id="512-experts"),
    pytest.param(6, 1000, 32, 3, id="1000-experts"),
]


def loop(logits, top_k, groups):
    """cumo_spec.md section 2.1 token by token, in Python floats."""
    num_tokens, num_experts = logits.shape
    size = num_tokens // groups
    weights, indices = [], []
    mean_probs = [[0.0] * num_experts for _ in range(groups)]
    density = [[0.0] * num_experts for _ in range(groups)]
    z = [0.0] * groups
    for t, row in enumerate(logits.tolist()):
        top = max(row)
        total = sum(math.exp(v - top) for v in row)
        probs = [math.exp(v - top) / total for v in row]
        chosen = sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k]
        weights.append([probs[e] / sum(probs[c] for c in chosen) for e in chosen])
        indices.append(chosen)
        g = t // size
        for e in range(num_experts):
            mean_probs[g][e] += probs[e] / size
        density[g][chosen[0]] += 1 / size
        z[g] += (top + math.log(total)) ** 2 / size
    return weights, indices, mean_probs, density, z


def test_reference_is_the_loop():
    logits = torch.randn(30, 5, dtype=torch.float64)
    routing = route(logits, 3, groups=6)
    weights, indices, *stats = loop(logits, 3, 6)
    assert routing.topk_indices.tolist() == indices
    wanted = [torch.tensor(values, dtype=torch.float64) for values in (weights, *stats)]
    assert_same_formula([routing.topk_weights, *vars(routing.stats).values()], wanted)


def outputs(routing):
    return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp


def assert_same_shares(got, wanted):
    """For exact counts: a division, or a product with the reciprocal, has at most two roundings."""
    assert ((got - wanted).abs() <= 2 * torch.finfo(torch.float32).eps * wanted).all()


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "raw"])
@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_route(backend, device, dtype, num_tokens, num_experts, top_k, groups, renormalize):
    logits = torch.randn(num_tokens, num_experts, device=device, dtype=dtype)
    expected = lambda x: reference.route(x, None, None, groups, top_k, renormalize)[::2]
    op = lambda x: outputs(route(x, top_k, groups=groups, renormalize=renormalize))
    with use_backend(backend):
        assert_as_accurate_as_torch(op, expected, logits)
        routing = route(logits, top_k, groups=groups, renormalize=renormalize)
    exact = reference.route(logits, None, None, groups, top_k, renormalize)
    assert torch.equal(routing.topk_indices, exact[1])
    assert_same_shares(routing.stats.top1_density, exact[3])


@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_route_with_gate(backend, device, num_tokens, num_experts, top_k, groups):
    x = torch.randn(num_tokens, 24, device=device)
    gate = torch.randn(num_experts, 24, device=device) / 24**0.5
    expected = lambda x, w: reference.route(x, w, None, groups, top_k, True)[::2]
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda x, w: outputs(route(x, top_k, w, groups=groups)), expected, x, gate
        )


def test_ragged_groups(backend, device):
    offsets = torch.tensor(
        [0, 5, 5, 12], dtype=torch.int32, device=device
    )  # the second has no token, 3 have no group
    logits = torch.randn(15, 4, device=device)
    expected = lambda x: reference.route(x, None, offsets, 3, 2, True)[::2]
    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x: outputs(route(x, 2, groups=offsets)), expected, logits)
        stats = route(logits, 2, groups=offsets).stats
        last = route(logits[5:12], 2).stats
    assert not stats.mean_probs[1].any() and not stats.mean_squared_logsumexp[1].any()
    assert_same_shares(stats.top1_density[2], last.top1_density[0])


GROUPS = [  # offsets for 300 tokens; a tile has 8 to 256 tokens, a power of two
    pytest.param([0, 128, 256, 300], id="at-tile-ends"),
    pytest.param([0, 0, 64, 64, 64, 65, 256, 256, 300, 300], id="empty-at-both-ends-and-tile-ends"),
    pytest.param([10, 20, 290], id="tokens-before-and-after"),
    pytest.param([0, *range(100, 131), 299], id="many-in-one-tile"),
]


@pytest.mark.parametrize("num_experts", [384, 600, pytest.param(1000, marks=pytest.mark.large)])
def test_ragged_groups_of_many_experts(backend, device, num_experts):
    """A tile has 4, 16 or 32 tokens here: groups end inside tiles and at their ends, one is empty."""
    offsets = torch.tensor([0, 4, 16, 16, 33, 64, 70], dtype=torch.int32, device=device)
    logits = torch.randn(75, num_experts, device=device)
    expected = lambda x: reference.route(x, None, offsets, 6, 3, False)
    with use_backend(backend):
        op = lambda x: route(x, 3, groups=offsets, renormalize=False)
        assert_as_accurate_as_torch(lambda x: outputs(op(x)), lambda x: expected(x)[::2], logits)
        found, wanted = op(logits), expected(logits)
    assert torch.equal(found.topk_indices, wanted[1])
    assert_same_shares(found.stats.top1_density, wanted[3])


@pytest.mark.large
def test_every_of_many_experts_is_chosen(backend, device):
    """K = E at the largest E, which needs the most shared memory; ties go to the lowest index."""
    logits = torch.randint(-3, 4, (3, 1024), device=device).float()
    found = dispatch.implementation(backend, "route")(logits, None, None, 1, 1024, True)[1]
    assert torch.equal(found.long(), logits.sort(dim=-1, descending=True, stable=True).indices)


@pytest.mark.parametrize("gated", [False, True], ids=["logits", "gate"])
@pytest.mark.parametrize("offsets", GROUPS)
def test_ragged_groups_are_slices(offsets, gated):
    x, *gate = (torch.randn(n, 5, dtype=torch.float64) for n in ((300, 5) if gated else (300,)))
    results = []
    for sliced in (False, True):
        x, *gate = leaves = [t.clone().requires_grad_() for t in (x, *gate)]
        whole = route(x, 2, *gate, groups=torch.tensor(offsets, dtype=torch.int32))
        stats = [whole.stats]
        if sliced:
            whole = route(x, 2, *gate)
            stats = [route(x[begin:end], 2, *gate).stats for begin, end in pairwise(offsets)]
        outs = [whole.topk_weights, *map(torch.cat, zip(*(vars(s).values() for s in stats), strict=True))]
        results.append((outs, torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves)))
    assert_same_formula(*results)


@pytest.mark.parametrize("offsets", [None, *GROUPS])
def test_groups_of_many_tiles(backend, device, offsets, monkeypatch):
    """In Triton another kernel adds the sums of a group with many tiles; here it adds all of them."""
    if backend == "triton":
        monkeypatch.setattr("cumo_kernels.backends.triton.routing.CLOSED_STEPS", 0)
    logits = torch.randn(300, 37, device=device)
    groups = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device=device)
    number = 3 if offsets is None else len(offsets) - 1
    expected = lambda x: reference.route(x, None, groups, number, 2, True)
    with use_backend(backend):
        found = route(logits, 2, groups=number if groups is None else groups)
        rows = Yardstick(lambda x: expected(x)[::2], (logits,), pool=False).measure(
            lambda x: outputs(route(x, 2, groups=number if groups is None else groups))
        )
    for row in rows:
        assert row.reason is None, row.reason
    assert_same_shares(found.stats.top1_density, expected(logits)[3])


@pytest.mark.parametrize("gated", [False, True], ids=["logits", "gate"])
@pytest.mark.parametrize("offsets", GROUPS)
def test_ragged_groups_at_tile_ends(backend, device, offsets, gated):
    x, *gate = (torch.randn(n, 5, device=device) for n in ((300, 5) if gated else (300,)))
    groups = torch.tensor(offsets, dtype=torch.int32, device=device)
    expected = lambda x, gate=None: reference.route(x, gate, groups, len(offsets) - 1, 2, True)
    with use_backend(backend):
        rows = Yardstick(lambda *inputs: expected(*inputs)[::2], (x, *gate), pool=False).measure(
            lambda x, *gate: outputs(route(x, 2, *gate, groups=groups))
        )
        found, wanted = route(x, 2, *gate, groups=groups), expected(x, *gate)
    for row in rows:
        assert row.reason is None, row.reason
    assert torch.equal(found.topk_indices, wanted[1])
    assert_same_shares(found.stats.top1_density, wanted[3])


GATES = [  # num_tokens, hidden_size, num_experts, top_k
    pytest.param(1, 16, 4, 2, id="one-token"),
    pytest.param(70, 300, 4, 2, id="several-column-blocks"),
    pytest.param(67, 97, 7, 3, id="odd-tails"),
    pytest.param(40, 64, 40, 2, id="more-experts-than-one-kernel-takes-in-backward"),
    pytest.param(40, 64, 300, 4, id="more-experts-than-one-kernel-takes"),
]


@pytest.mark.parametrize("num_tokens, hidden_size, num_experts, top_k", GATES)
def test_gate_in_every_dtype(backend, device, dtype, num_tokens, hidden_size, num_experts, top_k):
    """Every logit is an integer, so that all backends must choose the same experts."""
    x = torch.randint(-1, 2, (num_tokens, hidden_size), device=device).to(dtype)
    gate = torch.randint(-1, 2, (num_experts, hidden_size), device=device).to(dtype)
    x[:, 8:] *= torch.rand(hidden_size - 8, device=device) < 8 / hidden_size
    more = (None, 1, top_k, True)
    forward, backward = (dispatch.implementation(backend, op) for op in ("route", "route_backward"))

    def expected(x, gate):
        logits = x @ gate.T  # integers also inside UnsplitSums (cumo_kernels/verification/rounding.py)
        return reference.route(logits + (logits.round() - logits).detach(), None, *more)[::2]

    found = forward(x, gate, *more)
    assert torch.equal(found[1], reference.route(x, gate, *more)[1])
    assert_outputs_of_fp32(lambda *inputs: forward(*inputs, *more)[::2], expected, dtype, x, gate)
    with use_backend(backend):
        rows = Yardstick(expected, (x, gate), pool=False).measure(lambda x, w: outputs(route(x, top_k, w)))
    for row in rows:
        assert row.reason is None or row.name.startswith("output"), row.reason
    upstream = [torch.randn_like(t) for t in found[::2]]
    gradients = backward(*upstream, x, gate, found[1], None, True, True, True)
    assert [t.dtype for t in gradients] == [dtype, dtype]


@pytest.mark.parametrize("num_experts", [5, 40], ids=["fused", "gate-in-front"])
@pytest.mark.parametrize("num_tokens", [0, 70])
def test_only_gradients_that_are_needed(backend, device, num_tokens, num_experts):
    x, gate = (torch.randn(n, 33, device=device) for n in (num_tokens, num_experts))
    indices = dispatch.implementation(backend, "route")(x, gate, None, 1, 2, True)[1]
    upstream = [torch.randn(*size, device=device) for size in ((num_tokens, 2), (1, num_experts), (1,))]
    backward = dispatch.implementation(backend, "route_backward")
    both = backward(*upstream, x, gate, indices, None, True, True, True)
    for needs in ((True, False), (False, True), (False, False)):
        found = backward(*upstream, x, gate, indices, None, True, *needs)
        for got, want, needed in zip(found, both, needs, strict=True):
            assert torch.equal(got, want) if needed else got.shape == (0,)


def test_no_gradient_is_computed_for_a_frozen_gate(backend, device):
    """And if only the gate is trained, none for x."""
    x, gate = torch.randn(9, 8, device=device), torch.randn(4, 8, device=device)
    for frozen in (False, True):
        leaf = (x if frozen else gate).clone().requires_grad_()
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            outputs(route(leaf, 2, gate) if frozen else route(x, 2, leaf))[0].square().sum().backward()
        assert leaf.grad.shape == leaf.shape
        assert counter.get_flop_counts()["Global"][torch.ops.cumo.route_backward] == 2 * 9 * 8 * 4


def test_non_contiguous(backend, device):
    x, gate = torch.randn(24, 50, device=device).T, torch.randn(24, 4, device=device).T
    expected = lambda x, w: reference.route(x, w, None, 5, 2, True)[::2]
    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x, w: outputs(route(x, 2, w, groups=5)), expected, x, gate)
        assert_as_accurate_as_torch(
            lambda x: outputs(route(x, 2, groups=5)),
            lambda x: reference.route(x, None, None, 5, 2, True)[::2],
            x[:, :6],
        )


@pytest.mark.parametrize("gated", [False, True], ids=["logits", "gate"])
def test_repeats_are_bitwise_equal(backend, device, gated):
    x, gate = torch.randn(150, 20, device=device), torch.randn(6, 20, device=device) if gated else None
    runs = []
    with use_backend(backend):
        for _ in range(3):
            leaves = [t.clone().requires_grad_() for t in (x, gate) if t is not None]
            routing = route(leaves[0], 2, *leaves[1:], groups=3)
            sum(o.square().sum() for o in outputs(routing)).backward()
            runs.append([*outputs(routing), routing.permutation, *(leaf.grad for leaf in leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_rows_without_a_maximum_stay_in_range(backend, device, dtype):
    """NaN, +inf, only -inf: garbage weights, but valid distinct experts and no harm to other rows."""
    logits = torch.randn(64, 6, device=device).to(dtype)
    bad = logits.clone()
    bad[3, 2], bad[20], bad[37, 5], bad[63] = math.copysign(math.nan, -1), math.nan, math.inf, -math.inf
    good = [t for t in range(64) if t not in (3, 20, 37, 63)]
    route_of = dispatch.implementation(backend, "route")
    weights, indices, *_ = route_of(bad, None, None, 1, 3, True)
    assert indices.min() >= 0 and indices.max() < 6
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert indices[3, 0] == 2  # NaN of either sign ranks highest, as in torch.sort
    assert not weights[[3, 20, 37, 63]].isfinite().any()
    wanted = route_of(logits, None, None, 1, 3, True)
    assert torch.equal(indices[good], wanted[1][good]) and torch.equal(weights[good], wanted[0][good])
    backward = dispatch.implementation(backend, "route_backward")
    upstream = torch.randn_like(weights), torch.randn(1, 6, device=device), torch.randn(1, device=device)
    found, exact = (backward(*upstream, x, None, indices, None, True, True, False)[0] for x in (bad, logits))
    assert torch.equal(found[good], exact[good])


@pytest.mark.parametrize("compat", [None, "cumo", "cumo_llm"])
def test_logits_of_the_gate_are_rounded_as_those_of_a_linear_layer(backend, device, dtype, compat):
    """Sums exact in fp32 and too long for 16 bits: the same bits with the gate in or before the kernel."""
    x, gate = (torch.randint(-99, 100, (n, 64), device=device).to(dtype) / 64 for n in (57, 5))
    logits = (x.double() @ gate.double().T).to(dtype)
    with use_backend(backend):
        inside = route(x, 2, gate, compat=compat)
        in_front = route(logits, 2, compat=compat)
    assert torch.equal(inside.topk_weights, in_front.topk_weights)
    assert torch.equal(inside.topk_indices, in_front.topk_indices)
    assert dtype == torch.float32 or not torch.equal(logits.double(), x.double() @ gate.double().T)


MIXED = [  # x, gate_weight, logits
    pytest.param(torch.bfloat16, torch.float32, torch.float32, id="fp32-gate-of-bf16"),
    pytest.param(torch.float16, torch.float32, torch.float32, id="fp32-gate-of-fp16"),
    pytest.param(torch.float32, torch.bfloat16, torch.float32, id="bf16-gate-of-fp32"),
    pytest.param(torch.bfloat16, torch.float16, torch.float32, id="fp16-gate-of-bf16"),
]


@pytest.mark.parametrize("num_tokens", [0, 33])
@pytest.mark.parametrize("of_x, of_gate, of_logits", MIXED)
def test_gate_of_another_dtype(backend, device, of_x, of_gate, of_logits, num_tokens):
    """The logits are those of the wider dtype, and each gradient has the dtype of its argument."""
    x, gate = torch.randn(num_tokens, 24, device=device), torch.randn(5, 24, device=device)
    x, gate = x.to(of_x).requires_grad_(), gate.to(of_gate).requires_grad_()
    with use_backend(backend):
        found = route(x, 2, gate, groups=3)
        wide = [t.detach().to(of_logits).requires_grad_() for t in (x, gate)]
        wanted = route(wide[0] @ wide[1].T, 2, groups=3)
        grads = []
        for routing, leaves in ((found, (x, gate)), (wanted, wide)):
            grads.append(torch.autograd.grad(sum(o.sin().sum() for o in outputs(routing)), leaves))
    assert found.topk_weights.dtype == of_logits
    assert torch.equal(found.topk_indices, wanted.topk_indices)
    for one, other in zip(outputs(found), outputs(wanted), strict=True):
        assert torch.equal(one, other)
    for leaf, one, other in zip((x, gate), *grads, strict=True):
        assert one.dtype == leaf.dtype and torch.equal(one, other.to(leaf.dtype))


def test_gate_in_fp64_of_other_dtypes():
    x, gate = torch.randn(33, 24).bfloat16(), torch.randn(5, 24, dtype=torch.float64)
    routing = route(x, 2, gate)
    assert routing.topk_weights.dtype == torch.float64
    assert torch.equal(routing.topk_weights, route(x.double() @ gate.T, 2).topk_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # like torch's own autocast, fp64 stays fp64
        assert torch.equal(route(x, 2, gate).topk_weights, routing.topk_weights)


@pytest.mark.parametrize("num_experts", [5, 40])  # the gate inside the kernels, and before them
def test_backward_under_an_autocast_not_active_in_forward(backend, device, num_experts):
    """Routers compute in fp32 outside autocast, and loss.backward() is called inside it."""
    x = torch.randn(24, 16, device=device, requires_grad=True)
    gate = torch.randn(num_experts, 16, device=device, requires_grad=True)
    upstream = torch.randn(24, 2, device=device)

    def gradients(inside: bool):
        with use_backend(backend):
            weights = route(x, 2, gate).topk_weights
        with torch.autocast(device, torch.bfloat16, enabled=inside):
            return torch.autograd.grad(weights, (x, gate), upstream)

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, wanted)


def test_gradcheck():
    offsets = torch.tensor([0, 2, 7], dtype=torch.int32)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for groups, renormalize in ((1, True), (4, False), (offsets, True)):
        function = lambda x, w, g=groups, r=renormalize: outputs(route(x, 2, w, groups=g, renormalize=r))
        assert torch.autograd.gradcheck(function, (x, gate))


def test_ties_go_to_the_lowest_index(backend, device, dtype):
    logits = torch.tensor([[1.0, 3, 3, 3], [0, 0, 0, 0], [2, 1, 2, 1]], device=device, dtype=dtype)
    with use_backend(backend):
        routing = route(logits, 2)
    assert routing.topk_indices.tolist() == [[1, 2], [0, 1], [0, 2]]


def test_masked_experts_get_no_token(backend, device):
    logits = torch.randn(20, 4, device=device)
    logits[:, 1] = -math.inf
    with use_backend(backend):
        routing = route(logits, 3)
    assert routing.tokens_per_expert[1] == 0 and routing.stats.mean_probs[0, 1] == 0


def test_compat_repeats_the_original_rounding(backend, device):
    """The original's own order of bf16 operations (cumo_spec.md 2.1, 2.2), written out."""
    logits = (3 * torch.randn(200, 4, device=device)).bfloat16()
    probs = logits.softmax(-1, dtype=torch.float32).bfloat16()
    values, indices = probs.topk(2)
    weights = values / values.sum(-1, keepdim=True)
    with use_backend(backend):
        routing = route(logits, 2, groups=4, compat="cumo")
        mixtral = route(logits, 2, compat="cumo_llm")
    assert torch.equal(routing.topk_indices.long(), indices)
    assert torch.equal(routing.topk_weights, weights.float())
    assert torch.equal(routing.stats.mean_probs, probs.view(4, 50, 4).mean(1).float())
    z = logits.logsumexp(-1).square()
    assert torch.equal(routing.stats.mean_squared_logsumexp, z.float().view(4, 50).mean(1))

    probs = logits.softmax(-1, dtype=torch.float32)
    values, indices = probs.topk(2)
    weights = values / values.sum(-1, keepdim=True)
    assert torch.equal(mixtral.topk_indices.long(), indices)
    assert torch.equal(mixtral.topk_weights, weights.bfloat16().float())
    assert torch.equal(mixtral.stats.mean_probs, probs[None].mean(1))


@pytest.mark.parametrize("compat", ["cumo", "cumo_llm"])
@pytest.mark.parametrize("num_experts, top_k", [(4, 2), (7, 3), (8, 2), (64, 8), (200, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_compat_breaks_ties_as_topk(backend, device, dtype, num_experts, top_k, compat):
    """Integer logits: most tokens have ties among their top-k. Gradients go to the chosen experts."""
    logits = torch.randint(3, (500, num_experts), device=device).to(dtype)
    with use_backend(backend):
        routing = route(logits, top_k, compat=compat)
    probs = logits.softmax(-1, dtype=torch.float32)
    chosen = (probs.to(dtype) if compat == "cumo" else probs).topk(top_k).indices
    assert torch.equal(routing.topk_indices.long(), chosen)
    lowest = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert not torch.equal(chosen, lowest)  # else this test shows nothing
    assert torch.equal(routing.expert_offsets.diff(), torch.bincount(chosen.flatten(), minlength=num_experts))

    def expected(x):
        weights = x.softmax(-1).gather(1, chosen)
        return weights / weights.sum(1, keepdim=True)

    with use_backend(backend):
        op = lambda x: route(x, top_k, compat=compat).topk_weights
        gradient = Yardstick(expected, (logits,), pool=False).measure(op)[1]
    assert gradient.reason is None, gradient.reason


@pytest.mark.parametrize("compat", ["cumo", "cumo_llm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_compat_of_every_backend_is_the_reference(backend, device, dtype, compat):
    logits = (2 * torch.randn(90, 7, device=device)).to(dtype)
    with use_backend(backend):
        found = route(logits, 3, groups=3, compat=compat)
    wanted = reference.route(logits, None, None, 3, 3, True, compat)
    got = (found.topk_weights, found.topk_indices, *vars(found.stats).values())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_compat_in_fp32_is_the_reference_without(backend, device):
    logits = torch.randn(40, 4, device=device)
    with use_backend("reference"):
        default = outputs(route(logits, 2, groups=4))
    with use_backend(backend):
        for compat in ("cumo", "cumo_llm"):
            found = outputs(route(logits, 2, groups=4, compat=compat))
            assert all(torch.equal(a, b) for a, b in zip(found, default, strict=True))


def test_names_the_bad_argument():
    logits = torch.randn(6, 4)
    with pytest.raises(ValueError, match="top_k must be between 1 and the 4 experts, got 5"):
        route(logits, 5)
    with pytest.raises(ValueError, match=r"x must be \(T, E\), got \(2, 3, 4\)"):
        route(torch.randn(2, 3, 4), 2)
    with pytest.raises(ValueError, match="groups must divide the 6 tokens evenly, got 4"):
        route(logits, 2, groups=4)
    with pytest.raises(ValueError, match=r"compat must be one of .*, got 'llava'"):
        route(logits, 2, compat="llava")
    with pytest.raises(ValueError, match=r"x must be float32, .*, got torch.int64"):
        route(logits.long(), 2)
    with pytest.raises(ValueError, match=r"gate_weight must be float32, .*, got torch.int32"):
        route(logits, 2, torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"gate_weight must be \(E, 4\), got \(4, 5\)"):
        route(logits, 2, torch.randn(4, 5))
    with pytest.raises(ValueError, match="x must be a tensor, got list"):
        route(logits.tolist(), 2)
    with pytest.raises(ValueError, match=r"top_k must be an int between 1 and the 4 experts, got 2\.0"):
        route(logits, 2.0)
    with pytest.raises(ValueError, match=r"groups must be an int or an int32 tensor, got list"):
        route(logits, 2, groups=[0, 6])
    for offsets in ([0, 7], [-3, 6], [0, 4, 2]):
        with pytest.raises(ValueError, match=r"groups must ascend from 0 or more to at most 6, got .*"):
            route(logits, 2, groups=torch.tensor(offsets, dtype=torch.int32))
    logits[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"finite maximum in every row, got \[.*nan.*\] for token 3"):
        route(logits, 2)
    with pytest.raises(ValueError, match=r"topk_indices must lie in \[0, 4\], got values from 0 to 5"):
        routing_from_topk(torch.ones(2, 1), torch.tensor([[0], [5]]), 4)


def test_zeros_of_both_signs_tie(backend, device, dtype):
    logits = torch.tensor([[-1.0, -0.0, 0.0, 0.0], [-0.0, 0.0, -2.0, -3.0]], device=device, dtype=dtype)
    with use_backend(backend):
        routing = route(logits, 2)
    assert routing.topk_indices.tolist() == [[1, 2], [0, 1]]
