"""The transforms of torch.func: vmap equals a loop, also around and inside gradients; others are refused."""

import pytest
import torch
from torch import func

from cumo_kernels import (
    Adapter,
    activate,
    combine,
    expert_mlp,
    grouped_gemm,
    pack,
    permute,
    route,
    routing_from_topk,
)
from cumo_kernels.testing import make_routing
from tests.rounding import assert_same_formula

B, T, H, I, O, E, K = 3, 5, 4, 6, 3, 4, 2
PLAN = make_routing("uniform", T, E, K)
SECOND = "has no gradient: cumo_kernels has no second derivatives"


def with_weights(weights):
    return routing_from_topk(weights, PLAN.topk_indices, E)


def statistics(routing):
    stats = routing.stats
    return routing.topk_weights.sum(1) + stats.mean_probs.square().sum() + stats.mean_squared_logsumexp


WIDE = 32
UP = pack(torch.rand(E, 2 * WIDE, WIDE), "nf4", 32)
CALLS = {  # name -> function, shapes of its arguments
    "grouped_gemm-packed": (
        lambda x, b: grouped_gemm(x, UP, PLAN.expert_offsets, bias=b, activation="swiglu"),
        [(T * K, WIDE), (E, 2 * WIDE)],
    ),
    "expert_mlp-adapted": (
        lambda x, w, down, a, b: expert_mlp(x, with_weights(w), UP, down, up_adapters=[Adapter(a, b, 0.5)]),
        [(T, WIDE), (T, K), (E, O, WIDE), (E, 2, WIDE), (E, 2 * WIDE, 2)],
    ),
    "route": (lambda x: route(x, K).topk_weights, [(T, E)]),
    "route-statistics": (lambda x: statistics(route(x, K, groups=T)), [(T, E)]),
    "route-gate": (lambda x, gate: statistics(route(x, K, gate)), [(T, H), (E, H)]),
    "route-compat": (lambda x: route(x, K, compat="cumo").topk_weights, [(T, E)]),
    "routing_from_topk": (lambda w: with_weights(w).topk_weights * 2, [(T, K)]),
    "permute": (lambda x: permute(x, PLAN), [(T, H)]),
    "combine": (lambda rows, w: combine(rows, with_weights(w)), [(T * K, H), (T, K)]),
    "combine-unweighted": (lambda rows: combine(rows, PLAN, weighted=False), [(T * K, H)]),
    "activate": (lambda x: activate(x, "swiglu"), [(T, H)]),
    "grouped_gemm": (
        lambda x, w, b: grouped_gemm(x, w, PLAN.expert_offsets, bias=b, activation="gelu"),
        [(T * K, H), (E, I, H), (E, I)],
    ),
    "grouped_gemm-gather": (
        lambda x, w: grouped_gemm(x, w, PLAN.expert_offsets, gather=PLAN, activation="swiglu"),
        [(T, H), (E, 2 * I, H)],
    ),
    "expert_mlp": (
        lambda x, w, *weights: expert_mlp(x, with_weights(w), *weights, activation="gelu", memory="x"),
        [(T, H), (T, K), (E, I, H), (E, O, I), (E, I), (E, O)],
    ),
    "expert_mlp-gated": (
        lambda x, up, down: expert_mlp(x, PLAN, up, down),
        [(T, H), (E, 2 * I, H), (E, O, I)],
    ),
    "layer": (
        lambda x, g, up, down: expert_mlp(x, route(x, K, g), up, down, activation="gelu"),
        [(T, H), (E, H), (E, I, H), (E, O, I)],
    ),
}


def batches(name):
    """For each choice of batched arguments: in_dims and values; the last batch dimension is not the first."""
    shapes = CALLS[name][1]
    choices = [(0,) * len(shapes)] + [tuple(0 if i == j else None for i in range(len(shapes)))
                                      for j in range(len(shapes))]  # fmt: skip
    if len(shapes) > 1:
        choices.append((*(0,) * (len(shapes) - 1), 1))
    for dims in dict.fromkeys(choices):
        values = []
        for dim, shape in zip(dims, shapes, strict=True):
            size = shape if dim is None else (*shape[:dim], B, *shape[dim:])
            values.append(torch.rand(size, dtype=torch.float64))
        yield dims, values


def looped(function, dims, values):
    part = lambda i: [v if d is None else v.select(d, i) for d, v in zip(dims, values, strict=True)]
    return torch.stack([function(*part(i)) for i in range(B)])


def gradients(function, values):
    leaves = [value.clone().requires_grad_() for value in values]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("name", CALLS)
def test_vmap_equals_a_loop_forward_and_backward(name):
    function = CALLS[name][0]
    for dims, values in batches(name):
        found = gradients(lambda *v, dims=dims: func.vmap(function, dims)(*v), values)
        assert_same_formula(found, gradients(lambda *v, dims=dims: looped(function, dims, v), values))


@pytest.mark.parametrize("name", CALLS)
def test_vmap_of_grad_and_grad_of_vmap(name):
    function, shapes = CALLS[name]
    scalar = lambda *v: function(*v).square().sum()
    every = tuple(range(len(shapes)))
    for dims, values in batches(name):
        one = func.grad(scalar, every)
        found = func.vmap(one, dims)(*values)
        wanted = [looped(lambda *v, i=i, one=one: one(*v)[i], dims, values) for i in every]
        plain = [looped(lambda *v, i=i: gradient_of(scalar, v)[i], dims, values) for i in every]
        assert_same_formula(list(found), wanted)
        assert_same_formula(wanted, plain)
        total = lambda *v, dims=dims: func.vmap(scalar, dims)(*v).sum()
        assert_same_formula(list(func.grad(total, every)(*values)), gradient_of(total, values))


def gradient_of(function, values):
    leaves = [value.detach().clone().requires_grad_() for value in values]
    return list(torch.autograd.grad(function(*leaves), leaves))


@pytest.mark.parametrize("name", CALLS)
def test_jacobians_are_those_of_a_loop_over_outputs(name):
    function, shapes = CALLS[name]
    values = tuple(torch.rand(shape, dtype=torch.float64) for shape in shapes)
    wanted = torch.autograd.functional.jacobian(function, values)
    found = torch.autograd.functional.jacobian(function, values, vectorize=True)
    assert_same_formula(list(found), list(wanted))
    assert_same_formula(list(func.jacrev(function, tuple(range(len(shapes))))(*values)), list(wanted))
    chunks = func.jacrev(function, tuple(range(len(shapes))), chunk_size=2)(*values)
    assert_same_formula(list(chunks), list(wanted))


def test_nested_vmap_and_an_empty_batch():
    x, up = torch.rand(2, B, T, H, dtype=torch.float64), torch.rand(B, E, 2 * I, H, dtype=torch.float64)
    function = lambda x, up: grouped_gemm(x, up, PLAN.expert_offsets, gather=PLAN, activation="swiglu")
    found = func.vmap(func.vmap(function), (0, None))(x, up)
    assert_same_formula(found, torch.stack([torch.stack([function(x[i, j], up[j]) for j in range(B)])
                                            for i in range(2)]))  # fmt: skip
    empty = torch.rand(0, T, H, dtype=torch.float64, requires_grad=True)
    out = func.vmap(function, (0, None))(empty, up[0])
    assert out.shape == (0, T * K, I)
    out.sum().backward()
    assert empty.grad.shape == empty.shape


def test_a_batched_plan_is_a_plan():
    x = torch.rand(B, T, E, dtype=torch.float64)

    def run(x):
        plan = route(x, K)
        return combine(permute(x, plan), plan), plan.permutation, plan.token_indices

    for i, parts in enumerate(zip(*func.vmap(run)(x), strict=True)):
        assert all(torch.equal(mine, one) for mine, one in zip(parts, run(x[i]), strict=True))


@pytest.mark.parametrize("name", ["activate", "expert_mlp-gated", "layer"])
def test_compiled_vmap_equals_a_loop(name):
    torch._dynamo.reset()
    function = CALLS[name][0]
    dims, values = next(batches(name))
    compiled = torch.compile(lambda *v: func.vmap(function, dims)(*v), backend="aot_eager", fullgraph=True)
    wanted = gradients(lambda *v: looped(function, dims, v), values)
    assert_same_formula(gradients(compiled, values), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["activate", "expert_mlp", "combine", "route"])
def test_second_derivatives_are_refused_or_right(name):
    function, shapes = CALLS[name]
    values = tuple(torch.rand(shape, dtype=torch.float64) for shape in shapes)
    scalar = lambda x: function(x, *values[1:]).square().sum()
    for hessian in (
        lambda: torch.autograd.functional.hessian(scalar, values[0]),
        lambda: torch.autograd.functional.hessian(scalar, values[0], vectorize=True),
        lambda: func.jacrev(func.jacrev(scalar))(values[0]),
    ):
        with pytest.raises(RuntimeError, match=f"{name}_backward {SECOND}"):
            hessian()
    with pytest.raises(NotImplementedError, match=f"{name} does not support forward-mode"):
        func.hessian(scalar)(values[0])
