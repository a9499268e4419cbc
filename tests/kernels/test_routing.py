"""route: the sort's properties, the weights and statistics against a literal loop, every gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cumo_kernels import route, routing_from_topk, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import assert_as_accurate_as_torch

SHAPES = [  # num_tokens, num_experts, top_k, groups
    pytest.param(0, 4, 2, 1, id="no-token"),
    pytest.param(1, 4, 2, 1, id="one-token"),
    pytest.param(54, 7, 3, 6, id="prime-experts-in-groups"),
    pytest.param(33, 8, 8, 3, id="top_k-equals-experts"),
    pytest.param(12, 1, 1, 2, id="one-expert"),
    pytest.param(577 * 2, 4, 2, 2, id="two-clip-crops"),
    pytest.param(64, 256, 16, 1, id="many-experts"),
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
    found = (routing.topk_weights, *vars(routing.stats).values())
    for got, wanted in zip(found, (weights, *stats), strict=True):
        assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)


def outputs(routing):
    return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "raw"])
@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_route(backend, device, dtype, num_tokens, num_experts, top_k, groups, renormalize):
    logits = torch.randn(num_tokens, num_experts, device=device, dtype=dtype)
    truth = lambda x: reference.route(x, None, None, groups, top_k, renormalize, None)[::2]
    op = lambda x: outputs(route(x, top_k, groups=groups, renormalize=renormalize))
    with use_backend(backend):
        assert_as_accurate_as_torch(op, truth, logits)
        routing = route(logits, top_k, groups=groups, renormalize=renormalize)
    exact = reference.route(logits, None, None, groups, top_k, renormalize, None)
    assert torch.equal(routing.topk_indices, exact[1])
    assert torch.allclose(routing.stats.top1_density, exact[3], rtol=1e-6)


@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_route_with_gate(backend, device, num_tokens, num_experts, top_k, groups):
    x = torch.randn(num_tokens, 24, device=device)
    gate = torch.randn(num_experts, 24, device=device) / 24**0.5
    truth = lambda x, w: reference.route(x, w, None, groups, top_k, True, None)[::2]
    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x, w: outputs(route(x, top_k, w, groups=groups)), truth, x, gate)


def test_ragged_groups(backend, device):
    offsets = torch.tensor(
        [0, 5, 5, 12], dtype=torch.int32, device=device
    )  # the second has no token, 3 have no group
    logits = torch.randn(15, 4, device=device)
    truth = lambda x: reference.route(x, None, offsets, 3, 2, True, None)[::2]
    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x: outputs(route(x, 2, groups=offsets)), truth, logits)
        stats = route(logits, 2, groups=offsets).stats
        first = route(logits[:5], 2).stats
    assert torch.allclose(stats.mean_probs[:1], first.mean_probs) and not stats.mean_probs[1].any()
    assert torch.allclose(stats.mean_squared_logsumexp[0], first.mean_squared_logsumexp[0])
    assert torch.allclose(stats.top1_density[2], route(logits[5:12], 2).stats.top1_density[0])


def test_gradcheck():
    offsets = torch.tensor([0, 2, 7], dtype=torch.int32)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for groups, renormalize in ((1, True), (4, False), (offsets, True)):
        function = lambda x, w, g=groups, r=renormalize: outputs(route(x, 2, w, groups=g, renormalize=r))
        assert torch.autograd.gradcheck(function, (x, gate))


@settings(deadline=None, max_examples=40)
@given(num_tokens=st.integers(0, 60), num_experts=st.integers(1, 9), data=st.data())
def test_sort_properties(num_tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(num_experts + 1, (num_tokens, top_k), generator=generator)  # E drops the slot
    routing = routing_from_topk(torch.ones(num_tokens, top_k), indices, num_experts)
    flat, end = indices.flatten(), int(routing.expert_offsets[-1])
    assert routing.tokens_per_expert.tolist() == [int((flat == e).sum()) for e in range(num_experts)]
    assert routing.expert_offsets[0] == 0
    assert torch.equal(routing.expert_offsets.diff(), routing.tokens_per_expert)
    assert sorted(routing.permutation.tolist()) == list(range(num_tokens * top_k))
    slots = routing.permutation[:end].tolist()
    assert slots == sorted(slots, key=lambda s: (int(flat[s]), s))  # by expert, stable inside
    assert torch.equal(routing.inverse_permutation[slots], torch.arange(end, dtype=torch.int32))
    assert torch.equal(routing.inverse_permutation < 0, flat == num_experts)


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


def test_compat_repeats_the_original_rounding():
    """The original's own order of bf16 operations (cumo_spec.md 2.1, 2.2), spelled out."""
    logits = (3 * torch.randn(200, 4)).bfloat16()
    probs = logits.softmax(-1, dtype=torch.float32).bfloat16()
    values, indices = probs.sort(dim=-1, descending=True, stable=True)
    weights = values[:, :2] / values[:, :2].sum(-1, keepdim=True)
    routing = route(logits, 2, groups=4, compat="cumo")
    assert torch.equal(routing.topk_indices.long(), indices[:, :2])
    assert torch.equal(routing.topk_weights, weights.float())
    assert torch.equal(routing.stats.mean_probs, probs.view(4, 50, 4).mean(1).float())
    z = logits.logsumexp(-1).square()
    assert torch.equal(routing.stats.mean_squared_logsumexp.mean().bfloat16(), z.mean())

    probs = logits.softmax(-1, dtype=torch.float32)
    values = probs.topk(2).values
    routing = route(logits, 2, compat="cumo_llm")
    assert torch.equal(routing.topk_weights, (values / values.sum(-1, keepdim=True)).bfloat16().float())
    assert torch.equal(routing.stats.mean_probs[0], probs.mean(0))


def test_compat_equals_default_in_fp32():
    logits = torch.randn(40, 4)
    default = outputs(route(logits, 2, groups=4))
    for compat in ("cumo", "cumo_llm"):
        assert all(
            torch.equal(a, b)
            for a, b in zip(outputs(route(logits, 2, groups=4, compat=compat)), default, strict=True)
        )


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
    with pytest.raises(ValueError, match=r"gate_weight must be \(E, 4\), got \(4, 5\)"):
        route(logits, 2, torch.randn(4, 5))
    logits[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"finite maximum in every row, got \[.*nan.*\] for token 3"):
        route(logits, 2)
    with pytest.raises(ValueError, match=r"topk_indices must lie in \[0, 4\], got values from 0 to 5"):
        routing_from_topk(torch.ones(2, 1), torch.tensor([[0], [5]]), 4)
