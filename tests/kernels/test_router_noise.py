"""Capacity, jitter and noisy top-k: plain torch on top of route, under every backend."""

import math
import re

import pytest
import torch

from cumo_kernels import expert_mlp, noisy_top_k, route, sparsemixer, use_backend, with_capacity
from cumo_kernels.ops.noise import jittered, normal, uniform
from tests.rounding import assert_same_formula, assert_spread

MASK = (1 << 64) - 1


def splitmix(x):
    """Steele, Lea, Flood (2014), in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1])
def test_noise_is_a_function_of_seed_row_and_column(seed):
    found = uniform(seed, torch.empty(5, 3), 2)
    for t in range(5):
        for e in range(3):
            key = splitmix((splitmix(seed & MASK) + 2) & MASK)
            wanted = splitmix(splitmix(t ^ key) ^ e) >> 41
            assert float(found[t, e]) == (wanted + 0.5) / 2**23
    assert torch.equal(uniform(torch.tensor(seed), torch.empty(5, 3), 2), found)
    assert torch.equal(uniform(seed, torch.empty(9, 4), 2)[:5, :3], found)


def test_noise_is_normal():
    drawn = normal(3, torch.empty(400, 300))
    assert_spread(drawn, 1)
    assert abs(float(drawn.mean())) < 4 / 120000**0.5
    tails = (drawn.abs() > 2).float().mean()
    assert abs(float(tails) - 0.0455) < 4 * (0.0455 / 120000) ** 0.5
    a, b = drawn[:, :-1].flatten(), drawn[:, 1:].flatten()
    assert abs(float((a * b).mean())) < 4 / 120000**0.5  # neighbours are independent
    assert torch.equal(drawn * 2**20, (drawn * 2**20).round())


def test_jitter_is_rounded_once():
    x = torch.randn(40, 30).bfloat16()
    assert torch.equal(jittered(x, 0.1, 5), jittered(x.float(), 0.1, 5).bfloat16())


def test_jitter():
    x = torch.ones(300, 200)
    found = jittered(x, 0.1, 5)
    assert 0.9 < found.min() < 0.901 and 1.099 < found.max() < 1.1
    assert_spread(found, 0.1 / 3**0.5)


def dropped_by_loop(indices, weights, num_experts, capacity, drop):
    slots = [(e, s, w) for s, (e, w) in enumerate(zip(indices, weights, strict=True))]
    kept = set()
    for expert in range(num_experts):
        own = [(s, w) for e, s, w in slots if e == expert]
        own.sort(key=(lambda sw: sw[0]) if drop == "position" else (lambda sw: (-sw[1], sw[0])))
        kept |= {s for s, _ in own[:capacity]}
    return kept


@pytest.mark.parametrize("drop", ["position", "weight"])
@pytest.mark.parametrize("capacity", [1, 4, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, 31])
def test_capacity(backend, device, num_tokens, capacity, drop):
    logits = torch.randn(num_tokens, 5, device=device)
    logits[: num_tokens // 2] = logits[:1]  # equal weights
    leaf = logits.requires_grad_()
    with use_backend(backend):
        plan = route(leaf, 2)
        found = with_capacity(plan, capacity, drop)
        at_once = route(leaf, 2, capacity=capacity, drop=drop)
    assert torch.equal(at_once.permutation, found.permutation)
    assert torch.equal(at_once.topk_weights, found.topk_weights)
    flat = plan.topk_indices.flatten().tolist(), plan.topk_weights.flatten().tolist()
    kept = dropped_by_loop(*flat, 5, capacity, drop)
    mask = torch.tensor([s in kept for s in range(2 * num_tokens)], dtype=torch.bool, device=device)
    mask = mask.view(num_tokens, 2)
    assert torch.equal(found.topk_indices, torch.where(mask, plan.topk_indices, 5))
    assert torch.equal(found.topk_weights, torch.where(mask, plan.topk_weights, 0))
    assert found.tokens_per_expert.max() <= capacity
    assert int(found.tokens_per_expert.sum()) == len(kept)
    assert (found.inverse_permutation.view(-1, 2) < 0).equal(~mask)
    (grad,) = torch.autograd.grad(found.topk_weights.sum(), leaf, retain_graph=True)
    (wanted,) = torch.autograd.grad((plan.topk_weights * mask).sum(), leaf)
    assert torch.equal(grad, wanted)
    again = with_capacity(found, capacity, drop)
    assert torch.equal(again.topk_indices, found.topk_indices)


def test_a_layer_with_capacity_leaves_dropped_tokens_out():
    x, up, down = torch.randn(9, 4), torch.randn(3, 8, 4), torch.randn(3, 4, 8)
    plan = with_capacity(route(torch.zeros(9, 3), 1), 2)
    out = expert_mlp(x, plan, up, down, activation="gelu")
    assert out[:2].all() and not out[2:].any()


def test_noisy_top_k_is_the_paper():
    draw = lambda *size: torch.randn(*size, dtype=torch.float64)
    x, gate, noise = draw(20, 6), draw(5, 6), draw(5, 6)
    found = noisy_top_k(x, 2, gate, noise, seed=11)
    eps = normal(11, torch.empty(20, 5)).double()
    cdf = lambda v: (1 + math.erf(v / 2**0.5)) / 2
    importance, load, indices, weights = [0.0] * 5, [0.0] * 5, [], []
    for t in range(20):
        clean = [float(x[t] @ gate[e]) for e in range(5)]
        spread = [math.log1p(math.exp(float(x[t] @ noise[e]))) for e in range(5)]
        h = [clean[e] + float(eps[t, e]) * spread[e] for e in range(5)]
        chosen = sorted(range(5), key=lambda e: -h[e])[:2]
        total = sum(math.exp(h[e]) for e in chosen)
        indices.append(chosen)
        weights.append([math.exp(h[e]) / total for e in chosen])
        for e in range(5):
            importance[e] += math.exp(h[e]) / total if e in chosen else 0
            others = sorted((h[j] for j in range(5) if j != e), reverse=True)
            load[e] += cdf((clean[e] - others[1]) / spread[e])
    squared = lambda v: sum((a - sum(v) / 5) ** 2 for a in v) / 5 / (sum(v) / 5) ** 2
    assert found.routing.topk_indices.tolist() == indices
    wanted = [torch.tensor(weights, dtype=torch.float64), squared(importance), squared(load)]
    assert_same_formula([found.routing.topk_weights, found.importance_loss, found.load_loss], wanted)


def test_noisy_top_k_gradcheck():
    draw = lambda *size: torch.randn(*size, dtype=torch.float64).requires_grad_()

    def run(*inputs):
        found = noisy_top_k(inputs[0], 2, *inputs[1:], seed=1)
        return found.routing.topk_weights, found.importance_loss, found.load_loss

    assert torch.autograd.gradcheck(run, (draw(7, 3), draw(4, 3), draw(4, 3)))


@pytest.mark.parametrize("raw", [-44.0, -110.0])
def test_a_noise_that_vanishes_has_finite_gradients(raw):
    x = torch.ones(6, 8)
    gate, noise = torch.randn(4, 8).requires_grad_(), torch.full((4, 8), raw / 8).requires_grad_()
    found = noisy_top_k(x, 2, gate, noise, seed=1)
    grads = torch.autograd.grad(found.load_loss + found.importance_loss, (gate, noise))
    assert all(grad.isfinite().all() for grad in grads)


def test_noisy_top_k_without_noise_and_of_all_experts():
    x, gate, noise = torch.randn(9, 6), torch.randn(4, 6), torch.randn(4, 6)
    plain, found = route(x @ gate.T, 2), noisy_top_k(x, 2, gate, noise, seed=None)
    assert torch.equal(plain.topk_weights, found.routing.topk_weights)
    assert noisy_top_k(x, 4, gate, noise, seed=3).load_loss == 0
    empty = noisy_top_k(x[:0], 2, gate, noise, seed=3)
    assert empty.load_loss == 0 and empty.importance_loss == 0


PLAN = route(torch.randn(4, 3), 2)
WEIGHTS = torch.randn(4, 6), 2, torch.randn(3, 6)
WRONG = [
    (lambda: with_capacity(PLAN, 0), "capacity must be at least 1, got 0"),
    (lambda: with_capacity(PLAN, 2, "random"), "drop must be one of ('position', 'weight'), got 'random'"),
    (lambda: route(WEIGHTS[0], 2, capacity=-1), "capacity must be at least 1, got -1"),
    (lambda: with_capacity(3, 2), "routing must be a Routing"),
    (lambda: noisy_top_k(*WEIGHTS, torch.randn(3, 6).double(), seed=1), "noise_weight must be torch.float32"),
    (lambda: route(WEIGHTS[0], 2, drop="last"), "drop must be one of ('position', 'weight'), got 'last'"),
    (lambda: route(WEIGHTS[0], 2, seed="now"), "seed must be an int or a () int64 tensor"),
    (lambda: route(WEIGHTS[0], 2, scale=1e39), "scale must be between 1e-30 and 1e+30, got 1e+39"),
    (lambda: route(WEIGHTS[0], 2, scale=torch.tensor(1.0)), "scale must be a number, got"),
    (lambda: route(WEIGHTS[0], 2, jitter=torch.ones(2)), "jitter must be a number, got"),
    (
        lambda: route(WEIGHTS[0], 2, selection_bias=torch.full((6,), 1e300, dtype=torch.float64)),
        "selection_bias must be finite in torch.float32",
    ),
    (
        lambda: sparsemixer(torch.full((2, 3), math.nan)),
        "logits must be finite, got [nan, nan, nan] for token 0",
    ),
    (lambda: noisy_top_k(*WEIGHTS, torch.randn(2, 6), seed=1), "noise_weight must be (3, 6), got (2, 6)"),
    (lambda: noisy_top_k(*WEIGHTS, torch.randn(3, 6), seed=1.5), "seed must be an int or a () int64"),
    (
        lambda: noisy_top_k(*WEIGHTS, torch.full((3, 6), math.nan), seed=1),
        "noise_weight must be finite, got NaN or infinity for expert 0",
    ),
    (lambda: route(*WEIGHTS, jitter=1.0, seed=1), "jitter must be at least 0 and below 1, got 1.0"),
    (lambda: route(*WEIGHTS, jitter=0.1), "seed must be an int or a () int64 tensor"),
    (lambda: route(WEIGHTS[0], 2, jitter=0.1, seed=1), "jitter must be 0 without a gate_weight"),
]


@pytest.mark.parametrize("call, words", WRONG)
def test_wrong_arguments(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_route_with_jitter():
    x, top_k, gate = WEIGHTS
    found, wanted = route(x, top_k, gate, jitter=0.3, seed=9), route(jittered(x, 0.3, 9), top_k, gate)
    assert torch.equal(found.topk_weights, wanted.topk_weights)
    assert not torch.equal(found.topk_weights, route(x, top_k, gate).topk_weights)
