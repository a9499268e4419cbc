"""permute and combine: every backend compared with the reference, output and gradients, and with a loop."""

import pytest
import torch

import cumo_kernels
from cumo_kernels import routing_from_topk, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import PATTERNS, assert_as_accurate_as_torch, make_routing
from tests.rounding import assert_same_formula

SHAPES = [  # num_tokens, hidden_size, num_experts, top_k
    pytest.param(0, 64, 4, 2, id="no-token"),
    pytest.param(1, 64, 4, 2, id="one-token"),
    pytest.param(57, 97, 7, 3, id="odd-tails"),
    pytest.param(64, 32, 8, 8, id="top_k-equals-experts"),
    pytest.param(33, 40, 1, 1, id="one-expert-in-all"),
    pytest.param(577, 128, 4, 2, marks=pytest.mark.large, id="clip-crop"),
    pytest.param(9, 1536, 4, 2, id="several-column-tiles"),
]


def loop_permute(x, routing):
    slots = sorted(range(routing.num_slots), key=lambda s: (int(routing.topk_indices.flatten()[s]), s))
    return torch.stack([x[s // routing.top_k] for s in slots])


def loop_combine(rows, routing):
    slots = sorted(range(routing.num_slots), key=lambda s: (int(routing.topk_indices.flatten()[s]), s))
    out = rows.new_zeros(routing.num_tokens, rows.shape[1])
    for position, slot in enumerate(slots):
        out[slot // routing.top_k] += routing.topk_weights.flatten()[slot].to(rows) * rows[position]
    return out


def test_reference_is_the_loop():
    routing = make_routing("skewed", 23, 5, 2)
    x, rows = torch.randn(23, 6, dtype=torch.float64), torch.randn(46, 6, dtype=torch.float64)
    assert torch.equal(cumo_kernels.permute(x, routing), loop_permute(x, routing))
    assert_same_formula(cumo_kernels.combine(rows, routing), loop_combine(rows, routing))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens, hidden_size, num_experts, top_k", SHAPES)
def test_permute(backend, device, dtype, num_tokens, hidden_size, num_experts, top_k, pattern):
    routing = make_routing(pattern, num_tokens, num_experts, top_k, device)
    x = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    expected = lambda x: reference.permute(x, routing.permutation, routing.inverse_permutation, top_k)
    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x: cumo_kernels.permute(x, routing), expected, x)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens, hidden_size, num_experts, top_k", SHAPES)
def test_combine(backend, device, dtype, num_tokens, hidden_size, num_experts, top_k, pattern):
    routing = make_routing(pattern, num_tokens, num_experts, top_k, device)
    rows = torch.randn(routing.num_slots, hidden_size, device=device, dtype=dtype)
    indices = routing.topk_indices

    def op(rows, weights):
        return cumo_kernels.combine(rows, routing_from_topk(weights, indices, num_experts))

    def expected(rows, weights):
        return reference.combine(rows, weights, routing.inverse_permutation, top_k)

    with use_backend(backend):
        assert_as_accurate_as_torch(op, expected, rows, routing.topk_weights)
        assert_as_accurate_as_torch(
            lambda rows: cumo_kernels.combine(rows, routing, weighted=False),
            lambda rows: expected(rows, None),
            rows,
        )


def test_dropped_slots_give_zero_rows_and_no_contribution(backend, device):
    indices = torch.tensor([[0, 3], [3, 3], [2, 0]], device=device)  # E = 3: id 3 drops the slot
    weights = torch.full((3, 2), 0.5, device=device, requires_grad=True)
    x = torch.randn(3, 16, device=device, requires_grad=True)
    with use_backend(backend):
        routing = routing_from_topk(weights, indices, 3)
        rows = cumo_kernels.permute(x, routing)
        assert routing.expert_offsets.tolist() == [0, 2, 2, 3]
        assert torch.equal(rows[3:], torch.zeros_like(rows[3:]))
        poisoned = torch.cat([rows[:3], torch.full_like(rows[3:], float("nan"))])
        poisoned.retain_grad()
        out = cumo_kernels.combine(poisoned, routing)
        out.sum().backward()
    assert torch.equal(poisoned.grad[3:], torch.zeros_like(rows[3:]))
    assert torch.equal(out, torch.stack([x[0] / 2, torch.zeros_like(x[0]), x[2]]))
    assert weights.grad[1].tolist() == [0, 0] and weights.grad[0, 1] == 0
    assert torch.equal(x.grad[1], torch.zeros_like(x[1]))


def test_non_contiguous(backend, device):
    routing = make_routing("uniform", 24, 4, 2, device)
    x = torch.randn(17, 24, device=device).T
    expected = lambda x: reference.permute(x, routing.permutation, routing.inverse_permutation, 2)
    with use_backend(backend):
        assert_as_accurate_as_torch(lambda x: cumo_kernels.permute(x, routing), expected, x)


def test_gradcheck():
    routing = make_routing("uniform", 7, 3, 2)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(14, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    combine = lambda rows, weights: cumo_kernels.combine(
        rows, routing_from_topk(weights, routing.topk_indices, 3)
    )
    assert torch.autograd.gradcheck(lambda x: cumo_kernels.permute(x, routing), x)
    assert torch.autograd.gradcheck(combine, (rows, weights))


def test_names_the_bad_argument():
    routing = make_routing("uniform", 8, 4, 2)
    with pytest.raises(ValueError, match=r"x must be \(8, H\), got \(7, 16\)"):
        cumo_kernels.permute(torch.randn(7, 16), routing)
    with pytest.raises(ValueError, match=r"rows must be \(16, H\), got \(8, 16\)"):
        cumo_kernels.combine(torch.randn(8, 16), routing)
