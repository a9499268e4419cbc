"""No op has a formula for forward-mode differentiation: every one refuses a tangent, of each argument."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import cumo_kernels
import cumo_kernels.integrations.transformers
from cumo_kernels import (
    Adapter,
    activate,
    combine,
    expert_mlp,
    grouped_gemm,
    noisy_top_k,
    pack,
    permute,
    route,
    routing_from_topk,
    sparsemixer,
    use_backend,
    with_capacity,
)
from cumo_kernels.testing import make_routing

T, H, I, O, E, K = 7, 5, 6, 3, 4, 2
PLAN = make_routing("uniform", T, E, K)


def experts(x, up, down, up_bias, down_bias):
    return expert_mlp(x, PLAN, up, down, up_bias, down_bias, activation="gelu")


def gemm(x, weight, bias):
    return grouped_gemm(x, weight, PLAN.expert_offsets, bias=bias, activation="gelu")


def statistics(x, gate):
    routing = route(x, K, gate)
    return routing.topk_weights.sum() + routing.stats.mean_squared_logsumexp.sum()


def noisy(x, gate, noise):
    found = noisy_top_k(x, K, gate, noise, seed=1)
    return found.routing.topk_weights.sum() + found.importance_loss + found.load_loss


def with_weights(weights):
    """PLAN with other weights; routing_from_topk would refuse a tangent itself."""
    return replace(PLAN, topk_weights=weights)


CALLS = {  # the op named in the error -> its function of differentiable arguments, their shapes
    "route": (lambda x: route(x, K).topk_weights, [(T, E)]),
    "route-gate": (statistics, [(T, H), (E, H)]),
    "route-compat": (lambda x: route(x, K, compat="cumo").topk_weights, [(T, E)]),
    "scored_route": (
        lambda x, gate: route(x, K, gate, score="sigmoid", selection_bias=torch.ones(E)).topk_weights,
        [(T, H), (E, H)],
    ),
    "noisy_top_k": (noisy, [(T, H), (E, H), (E, H)]),
    "sparsemixer": (lambda x: sparsemixer(x, seed=1).topk_weights, [(T, E)]),
    "with_capacity": (lambda w: with_capacity(with_weights(w), 2, "weight").topk_weights, [(T, K)]),
    "routing_from_topk": (lambda w: routing_from_topk(w, PLAN.topk_indices, E).topk_weights, [(T, K)]),
    "permute": (lambda x: permute(x, PLAN), [(T, H)]),
    "combine": (lambda rows, w: combine(rows, with_weights(w)), [(T * K, H), (T, K)]),
    "activate": (lambda x: activate(x, "swiglu"), [(T, 2 * I)]),
    "grouped_gemm": (gemm, [(T * K, H), (E, I, H), (E, I)]),
    "grouped_gemm-gather": (
        lambda x: grouped_gemm(x, torch.ones(E, I, H), PLAN.expert_offsets, gather=PLAN),
        [(T, H)],
    ),
    "expert_mlp": (experts, [(T, H), (E, I, H), (E, O, I), (E, I), (E, O)]),
    "expert_mlp-weights": (
        lambda w: expert_mlp(
            torch.ones(T, H), with_weights(w), torch.ones(E, I, H), torch.ones(E, O, I), activation="gelu"
        ),
        [(T, K)],
    ),
}
WIDE = 32
UP, DOWN = (
    pack(torch.rand(E, WIDE, WIDE), "nf4", 32),
    pack(torch.rand(E, O, WIDE), "int4", 32, symmetric=False),
)
CALLS |= {
    "packed_grouped_gemm": (
        lambda x, bias: grouped_gemm(x, UP, PLAN.expert_offsets, bias=bias),
        [(T * K, WIDE), (E, WIDE)],
    ),
    "adapted_expert_mlp": (
        lambda x, w, a, b: expert_mlp(
            x, with_weights(w), UP, DOWN, activation="gelu", up_adapters=[Adapter(a, b)]
        ),
        [(T, WIDE), (T, K), (E, 2, WIDE), (E, WIDE, 2)],
    ),
}
ARGUMENTS = [
    pytest.param(name, i, id=f"{name}-{i}") for name, (_, shapes) in CALLS.items() for i in range(len(shapes))
]


def by_jvp(function, value):
    return torch.func.jvp(function, (value,), (torch.ones_like(value),))


def by_jvp_of_vmap(function, value):
    return by_jvp(torch.func.vmap(function), torch.stack([value, value]))


def by_jvp_below_grad(function, value):
    """The tangent is one level below the transform that calls the op."""
    scale = lambda v: torch.func.grad(lambda s: (s * function(v)).sum())(torch.ones(()))
    return by_jvp(scale, value)


def by_dual_level(function, value):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(value, torch.ones_like(value)))


def by_dual_level_of_parameter(function, value):
    return by_dual_level(function, value.requires_grad_())


def by_jacfwd(function, value):
    return torch.func.jacfwd(function)(value)


WAYS = [by_jvp, by_jacfwd, by_jvp_of_vmap, by_jvp_below_grad, by_dual_level, by_dual_level_of_parameter]


def test_every_op_is_called_here():
    ops = {name for name in cumo_kernels.__all__ if inspect.isfunction(getattr(cumo_kernels, name))}
    assert ops - {"explain", "pack", "update_selection_bias", "use_backend"} <= {
        name.split("-")[0] for name in CALLS
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, position", ARGUMENTS)
def test_a_tangent_is_refused(name, position, way):
    function, shapes = CALLS[name]
    values = [torch.rand(shape) for shape in shapes]
    one = lambda value: function(*values[:position], value, *values[position + 1 :])
    words = (
        f"{name.split('-')[0]} does not support forward-mode automatic differentiation .*: use reverse mode"
    )
    with pytest.raises(NotImplementedError, match=words):
        way(one, values[position])


def test_every_backend_refuses(backend, device):
    value = torch.rand(T, 2 * I, device=device)
    for way in WAYS:
        with use_backend(backend), pytest.raises(NotImplementedError, match="activate does not support"):
            way(lambda x: activate(x, "swiglu"), value)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_without_a_tangent_are_accepted(name):
    function, shapes = CALLS[name]
    values = [torch.rand(shape) for shape in shapes]
    wanted = function(*values)
    with forward_ad.dual_level():
        assert torch.equal(function(*values), wanted)
    found = []
    by_jvp(lambda x: found.append(function(*values)) or x, torch.ones(3))
    assert torch.equal(found[0], wanted)


def test_experts_of_transformers_refuse():
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "cumo"
    block = MixtralSparseMoeBlock(config)
    torch.nn.init.normal_(block.experts.gate_up_proj)
    torch.nn.init.normal_(block.experts.down_proj)
    x = torch.randn(1, T, 8)
    with pytest.raises(NotImplementedError, match="does not support forward-mode"):
        by_jvp(block, x)
    indices, weights = PLAN.topk_indices.long(), torch.rand(T, K)
    with pytest.raises(NotImplementedError, match="expert_mlp does not support"):
        by_jvp(lambda rows: block.experts(rows, indices, weights), x[0])
    with pytest.raises(NotImplementedError, match="routing_from_topk does not support"):
        by_jvp(lambda weights: block.experts(x[0], indices, weights), weights)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_refuses(fullgraph):
    torch._dynamo.reset()
    x = torch.rand(T, I)
    compiled = torch.compile(lambda x: activate(x, "gelu"), backend="aot_eager", fullgraph=fullgraph)
    compiled(x)  # this graph must not run in forward mode
    error = torch._dynamo.exc.Unsupported if fullgraph else NotImplementedError
    for way in (by_jvp, by_dual_level):
        with pytest.raises(error):
            way(compiled, x)
    inside = torch.compile(
        lambda x: by_jvp(lambda v: activate(v, "gelu"), x), backend="aot_eager", fullgraph=fullgraph
    )
    with pytest.raises(error):
        inside(x)
    torch._dynamo.reset()
