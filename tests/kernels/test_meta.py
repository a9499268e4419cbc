"""Meta, fake and traced tensors: every public op gives results like those of real tensors, without values."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import cumo_kernels.integrations.transformers
from cumo_kernels import (
    ACTIVATIONS,
    Adapter,
    PackedWeight,
    Routing,
    activate,
    combine,
    expert_mlp,
    grouped_gemm,
    permute,
    route,
    routing_from_topk,
)

H, I, O, E, K = 6, 8, 10, 4, 2


def plan_of(weights, indices):
    return routing_from_topk(weights, indices, E)


def routed(**options):
    def run(x, *gate):
        routing = route(x, K, *gate, **options)
        stats = routing.stats
        return routing.topk_weights, stats.mean_probs, stats.mean_squared_logsumexp, *fields_of(routing)

    return run


def fields_of(routing: Routing):
    return (
        routing.topk_indices, routing.tokens_per_expert, routing.expert_offsets, routing.permutation,
        routing.inverse_permutation, routing.token_indices,
    )  # fmt: skip


def layer(activation, memory, bias):
    def run(x, weights, up, down, *rest):
        *biases, indices = rest
        return expert_mlp(
            x, plan_of(weights, indices), up, down, *biases, activation=activation, memory=memory
        )

    width = I * (2 if ACTIVATIONS[activation].is_gated else 1)
    biases = [(E, width), (E, O)] if bias else []
    return run, [("T", H), ("T", K), (E, width, H), (E, O, I), *biases]


def gemm(gathers, activation):
    def run(x, weight, bias, weights, indices):
        plan = plan_of(weights, indices)
        rows = x if gathers else permute(x, plan)
        return grouped_gemm(
            rows,
            weight,
            plan.expert_offsets,
            bias=bias,
            gather=plan if gathers else None,
            activation=activation,
        )

    return run, [("T", H), (E, 2 * I, H), (E, 2 * I), ("T", K)]


WIDE = 32


def packed(rows, x):
    """Weights in 4 bits, of the kind of `x`: meta, fake or traced."""
    scales = x.new_ones(E, rows, 1, dtype=torch.float32)
    return PackedWeight(x.new_zeros(E, rows, WIDE // 2, dtype=torch.uint8), scales)


def over_packed(memory):
    def run(x, weights, bias, a, b, c, d, indices):
        up, down = packed(2 * WIDE, x), packed(O, x)
        adapters = {"up_adapters": [Adapter(a, b)], "down_adapters": [Adapter(c, d, 0.5)]}
        return expert_mlp(x, plan_of(weights, indices), up, down, bias, memory=memory, **adapters)

    thin = [(E, 3, WIDE), (E, 2 * WIDE, 3), (E, 2, WIDE), (E, O, 2)]
    return run, [("T", WIDE), ("T", K), (E, 2 * WIDE), *thin]


def packed_gemm(x, bias, weights, indices):
    plan = plan_of(weights, indices)
    return grouped_gemm(
        x, packed(2 * WIDE, x), plan.expert_offsets, bias=bias, gather=plan, activation="geglu"
    )


CALLS = {  # name -> function of differentiable tensors and, last, indices; shapes of the former
    "route": (lambda x, indices: routed()(x), [("T", E)]),
    "route-gate": (lambda x, gate, indices: routed()(x, gate), [("T", H), (E, H)]),
    "route-cumo": (lambda x, indices: routed(compat="cumo", renormalize=False)(x), [("T", E)]),
    "route-cumo_llm": (lambda x, indices: routed(compat="cumo_llm")(x), [("T", E)]),
    "routing_from_topk": (lambda w, i: (plan_of(w, i).topk_weights, *fields_of(plan_of(w, i))), [("T", K)]),
    "permute": (lambda x, w, i: permute(x, plan_of(w, i)), [("T", H), ("T", K)]),
    "combine": (lambda x, w, i: combine(permute(x, plan_of(w, i)), plan_of(w, i)), [("T", H), ("T", K)]),
    "combine-unweighted": (
        lambda x, w, i: combine(permute(x, plan_of(w, i)), plan_of(w, i), weighted=False),
        [("T", H), ("T", K)],
    ),
    "activate": (lambda x, indices: activate(x, "gelu"), [("T", 3, H)]),
    "activate-gated": (lambda x, indices: activate(x, "swiglu"), [("T", 3, H)]),
    "grouped_gemm": gemm(False, None),
    "grouped_gemm-gather": gemm(True, "geglu"),
    "expert_mlp": layer("swiglu", "preact", False),
    "expert_mlp-bias": layer("gelu", "all", True),
    "expert_mlp-x": layer("geglu", "x", True),
    "grouped_gemm-packed": (packed_gemm, [("T", WIDE), (E, 2 * WIDE), ("T", K)]),
    "expert_mlp-adapted": over_packed("preact"),
    "expert_mlp-adapted-all": over_packed("all"),
    "expert_mlp-adapted-x": over_packed("x"),
}


def inputs_of(name, tokens, dtype=torch.float32):
    sizes = [tuple(tokens if size == "T" else size for size in shape) for shape in CALLS[name][1]]
    indices = torch.randint(0, E, (tokens, K))
    return [torch.rand(size, dtype=dtype).requires_grad_() for size in sizes], indices


def results_of(name, leaves, indices):
    """Outputs and gradients. The upstream gradients are dense."""
    outs = CALLS[name][0](*leaves, indices)
    outs = outs if isinstance(outs, tuple) else (outs,)
    trained = [out for out in outs if out.requires_grad]
    grads = torch.autograd.grad(trained, leaves, [torch.ones_like(out) for out in trained], allow_unused=True)
    return [*outs, *grads]


def described(results):
    return [None if t is None else (t.shape, t.dtype, t.stride(), t.requires_grad) for t in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", CALLS)
def test_meta_and_fake_tensors_give_results_like_real_ones(name, tokens, dtype):
    leaves, indices = inputs_of(name, tokens, dtype)
    wanted = described(results_of(name, leaves, indices))
    meta = [leaf.detach().to("meta").requires_grad_() for leaf in leaves]
    found = results_of(name, meta, indices.to("meta"))
    assert described(found) == wanted and all(t is None or t.is_meta for t in found)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(leaf) for leaf in leaves]
        found = results_of(name, fake, mode.from_tensor(indices))
        assert described(found) == wanted and all(t is None or t.device.type == "cpu" for t in found)


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_of_a_gpu_run_forward_without_one(name):
    """Backward of such tensors asks torch for the GPU, with torch's own operators too."""
    leaves, _ = inputs_of(name, 5)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        outs = CALLS[name][0](
            *(torch.empty(leaf.shape) for leaf in leaves), torch.empty(5, K, dtype=torch.int64)
        )
    assert all(out.device.type == "cuda" for out in pytree.tree_leaves(outs))


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", ["route-gate", "expert_mlp", "grouped_gemm"])
def test_autocast_casts_fake_tensors_as_real_ones_and_no_meta_tensors(name, kind):
    """torch's own operators do not cast meta tensors either."""
    leaves, indices = inputs_of(name, 5)
    plain = described(results_of(name, leaves, indices))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = described(results_of(name, leaves, indices))
        assert (
            torch.mm(torch.ones(1, 1, device="meta"), torch.ones(1, 1, device="meta")).dtype == torch.float32
        )
    with FakeTensorMode() if kind == "fake" else nullcontext(), torch.autocast("cpu", torch.bfloat16):
        device = "meta" if kind == "meta" else "cpu"
        like = [torch.empty(leaf.shape, device=device, requires_grad=True) for leaf in leaves]
        whole = torch.zeros(indices.shape, dtype=indices.dtype, device=device)
        found = described(results_of(name, like, whole))
    assert found == (plain if kind == "meta" else wanted)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CALLS)
def test_make_fx_traces_forward_and_backward(name, tracing_mode):
    leaves, indices = inputs_of(name, 5)
    run = lambda indices, *leaves: results_of(name, [t.detach().requires_grad_() for t in leaves], indices)
    traced = make_fx(run, tracing_mode=tracing_mode)(indices, *leaves)
    for tokens in (5, 7) if tracing_mode == "symbolic" else (5,):
        leaves, indices = inputs_of(name, tokens)
        for found, wanted in zip(traced(indices, *leaves), run(indices, *leaves), strict=True):
            assert (found is None) == (wanted is None) and (wanted is None or torch.equal(found, wanted))


def test_a_forced_backend_does_not_matter_for_meta_tensors(backend):
    with cumo_kernels.use_backend(backend):
        assert route(torch.empty(5, E, dtype=torch.float64, device="meta"), K).topk_weights.is_meta


def test_groups_and_checks_of_meta_tensors():
    x = torch.empty(6, E, device="meta")
    assert route(x, K, groups=3).stats.mean_probs.shape == (3, E)
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    assert route(x, K, groups=offsets).stats.mean_probs.shape == (3, E)
    with pytest.raises(ValueError, match="groups must divide the 6 tokens evenly, got 4"):
        route(x, K, groups=4)
    with pytest.raises(ValueError, match="routing must be on the device of x, cpu, got meta"):
        permute(torch.empty(6, H), route(x, K))


def test_experts_of_transformers_on_meta():
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "cumo"
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
        x = torch.empty(1, 5, 8, requires_grad=True)
        out = block(x)
    assert out.is_meta and out.shape == (1, 5, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape and block.experts.down_proj.grad.is_meta


def test_a_plan_is_a_plan_on_meta():
    plan = plan_of(torch.rand(5, K), torch.randint(0, E, (5, K)))
    meta = replace(plan, **{k: v.to("meta") for k, v in vars(plan).items() if v is not None})
    assert permute(torch.empty(5, H, device="meta"), meta).shape == (10, H)
