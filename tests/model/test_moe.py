"""MoELayer in the shapes of all three places compared with a literal loop; record_routing; errors."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import gelu, linear, silu
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cumo_kernels import route
from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_model import MoELayer, load_balancing_loss, record_routing, router_z_loss
from cumo_model.model import moe
from tests.rounding import assert_same_formula


def quick_gelu(z):
    return z * torch.sigmoid(1.702 * z)


def clip_expert(x, e, up, up_bias, down, down_bias):
    return down[e] @ quick_gelu(up[e] @ x + up_bias[e]) + down_bias[e]


def mlp_expert(x, e, up, up_bias, down, down_bias):
    return down[e] @ gelu(up[e] @ x + up_bias[e]) + down_bias[e]


def llm_expert(x, e, gate_up, down):
    gate, up = (gate_up[e] @ x).chunk(2)
    return down[e] @ (silu(gate) * up)


def loop(x, gate, weights, expert, top_k):
    """cumo_spec.md 2.1, literally: x (N, n, H) -> outputs (N, n, O), L_b, L_z."""
    N, n, _ = x.shape
    E = gate.shape[0]
    rows, balance, z_loss = [], 0, 0
    for i in range(N):
        f, P = [0.0] * E, 0
        for t in range(n):
            z = gate @ x[i, t]
            p = z.softmax(0)
            idx = sorted(range(E), key=lambda e: -p[e].item())[:top_k]
            w = p[idx] / p[idx].sum()
            rows.append(sum(w[k] * expert(x[i, t], idx[k], *weights) for k in range(top_k)))
            f[idx[0]] += 1 / n
            P = P + p / n
            z_loss = z_loss + torch.logsumexp(z, 0) ** 2 / (N * n)
        for e in range(E):
            balance = balance + E**2 * f[e] * P[e] / (N * E)
    return torch.stack(rows).unflatten(0, (N, n)), balance, z_loss


PLACES = [  # layer, its expert, shape of x, groups over which the balance loss is averaged
    pytest.param(MoELayer(10, 12, 4, 2, "quick_gelu"), clip_expert, (3, 5, 10), 3, id="clip-per-crop"),
    pytest.param(MoELayer(8, 6, 4, 2, "gelu", output_size=6), mlp_expert, (2, 7, 8), 2, id="mlp-per-image"),
    pytest.param(MoELayer(6, 9, 8, 2, "swiglu", bias=False), llm_expert, (2, 6, 6), 1, id="llm-whole-batch"),
    pytest.param(MoELayer(6, 9, 5, 3, "swiglu", bias=False), llm_expert, (1, 9, 6), 1, id="three-of-five"),
    pytest.param(MoELayer(6, 7, 3, 1, "quick_gelu"), clip_expert, (2, 4, 6), 2, id="one-expert-per-token"),
]


@pytest.mark.parametrize("layer, expert, shape, groups", PLACES)
def test_output_losses_and_every_gradient_are_the_loops(layer, expert, shape, groups):
    parameters = {name: torch.randn_like(value) for name, value in layer.named_parameters()}

    def op(x, *values):
        with record_routing() as records:
            out = functional_call(layer, dict(zip(parameters, values, strict=True)), (x,), {"groups": groups})
        stats = records[0].routing.stats
        return out, load_balancing_loss(stats), router_z_loss(stats)

    def reference(x, gate, *weights):
        out, balance, z = loop(x.reshape(groups, -1, x.shape[-1]), gate, weights, expert, layer.top_k)
        return out.view(*x.shape[:-1], -1), balance, z

    assert_as_accurate_as_torch(op, reference, torch.randn(shape), *parameters.values())


@pytest.mark.parametrize("num_groups", [1, 3])
def test_compat_cumo_rounds_where_the_original_does(num_groups):
    """All values after the fp32 softmax are bf16; ties among rounded probabilities reveal this."""
    layer = MoELayer(16, 8, 4, 2, "quick_gelu", compat="cumo").bfloat16()
    x = torch.randn(3, 100, 16, dtype=torch.bfloat16)
    routing = layer.route(x, groups=num_groups)
    z = layer.gate(x).view(num_groups, -1, 4)
    p = z.float().softmax(-1).bfloat16()
    v, idx = p.topk(2)
    w = v / v.sum(-1, keepdim=True)
    assert torch.equal(routing.topk_indices, idx.flatten(0, 1).int())
    assert torch.equal(routing.topk_weights, w.flatten(0, 1).float())
    f = torch.nn.functional.one_hot(idx[..., 0], 4).float().mean(1)
    assert torch.equal(load_balancing_loss(routing.stats), (f * p.mean(1).float()).sum(-1).mul(4).mean())
    squares = torch.logsumexp(z, -1).square()
    assert squares.dtype == torch.bfloat16
    assert torch.equal(router_z_loss(routing.stats), squares.float().mean(1).mean())


def test_compat_cumo_llm_rounds_only_the_weights():
    layer = MoELayer(16, 8, 8, 2, "swiglu", bias=False, compat="cumo_llm").bfloat16()
    x = torch.randn(40, 16, dtype=torch.bfloat16)
    routing = layer.route(x)
    p = layer.gate(x).float().softmax(-1)
    v, idx = p.topk(2)
    assert torch.equal(routing.topk_indices, idx.int())
    assert torch.equal(routing.topk_weights, (v / v.sum(-1, keepdim=True)).bfloat16().float())
    assert torch.equal(routing.stats.mean_probs, p.mean(0, keepdim=True))


def test_without_compat_the_router_is_fp32():
    layer = MoELayer(16, 8, 4, 2, "quick_gelu").bfloat16()
    x = torch.randn(40, 16, dtype=torch.bfloat16)
    routing = layer.route(x)
    v, idx = layer.gate(x).float().softmax(-1).topk(2)
    assert torch.equal(routing.topk_indices, idx.int())
    assert torch.equal(routing.topk_weights, v / v.sum(-1, keepdim=True))
    assert layer(x).dtype == torch.bfloat16


def test_eager_experts_are_added_in_fp32():
    layer = MoELayer(16, 8, 4, 3, "gelu").bfloat16()
    layer.experts.implementation = "eager"
    x, wanted = torch.randn(40, 16, dtype=torch.bfloat16), torch.zeros(40, 16)
    routing, experts = layer.route(x), layer.experts
    for e in range(4):
        tokens, slots = (routing.topk_indices == e).nonzero(as_tuple=True)
        inner = gelu(linear(x[tokens], experts.up_proj[e], experts.up_proj_bias[e]))
        rows = linear(inner, experts.down_proj[e], experts.down_proj_bias[e])
        wanted[tokens] += rows.float() * routing.topk_weights[tokens, slots, None]
    assert torch.equal(layer(x), wanted.bfloat16())


def test_padding_may_be_anything():
    """It has no part in the statistics of the others, not even if its squares are infinite."""
    layer, x = MoELayer(16, 8, 4, 2, "gelu"), torch.randn(12, 16)
    counted = torch.arange(12) % 3 > 0
    wanted = layer.route(x, counted=counted)
    x[~counted] *= 1e30
    found = layer.route(x, counted=counted)
    for name in ("mean_probs", "top1_density", "mean_squared_logsumexp"):
        assert torch.equal(getattr(found.stats, name), getattr(wanted.stats, name))


def test_parameters_have_the_names_of_transformers():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=6, intermediate_size=9, num_local_experts=5)
    theirs = MixtralSparseMoeBlock(config).state_dict()
    ours = MoELayer(6, 9, 5, 2, "swiglu", bias=False).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    plain = MoELayer(6, 9, 5, 2, "quick_gelu", output_size=7).state_dict()
    assert {k: tuple(v.shape) for k, v in plain.items()} == {
        "gate.weight": (5, 6),
        "experts.up_proj": (5, 9, 6),
        "experts.up_proj_bias": (5, 9),
        "experts.down_proj": (5, 7, 9),
        "experts.down_proj_bias": (5, 7),
    }


def test_gates_start_where_the_originals_do():
    bound = 64**-0.5
    gate = MoELayer(64, 8, 32, 2, "gelu").gate.weight
    # one of 2048 draws is in the last hundredth, except with probability 0.99 ** 2048
    assert gate.abs().max() <= bound and gate.abs().max() > 0.99 * bound


def test_recorder_sees_place_layer_and_routing_in_order():
    layers = [MoELayer(6, 6, 4, 2, "gelu", place="clip", layer=i) for i in range(2)]
    x = torch.randn(5, 6)
    with record_routing() as outer:
        layers[0](x)
        with record_routing() as inner:
            layers[1](x)
    layers[0](x)
    assert [(r.place, r.layer) for r in outer] == [("clip", 0), ("clip", 1)]
    assert [(r.place, r.layer) for r in inner] == [("clip", 1)]
    assert inner[0].routing.topk_indices.shape == (5, 2)


def test_recorder_forgets_after_an_exception():
    layer = MoELayer(6, 6, 4, 2, "gelu")
    with pytest.raises(RuntimeError, match="stop"), record_routing() as records:
        raise RuntimeError("stop")
    layer(torch.randn(5, 6))
    assert records == []


def test_recomputation_is_not_recorded_twice():
    layer = MoELayer(6, 6, 4, 2, "gelu")
    x = torch.randn(5, 6, requires_grad=True)
    with record_routing() as records:
        out = checkpoint(layer, x, use_reentrant=False)
        (out.sum() + load_balancing_loss(records[0].routing.stats)).backward()
    assert len(records) == 1
    checkpointed = [layer.gate.weight.grad.clone(), x.grad.clone()]
    layer.zero_grad()
    x.grad = None
    with record_routing() as records:
        out = layer(x)
    (out.sum() + load_balancing_loss(records[0].routing.stats)).backward()
    assert torch.equal(checkpointed[0], layer.gate.weight.grad) and torch.equal(checkpointed[1], x.grad)


@pytest.mark.parametrize("implementation", ["cumo", "eager"])
@pytest.mark.parametrize("compat", [None, "cumo_llm"])
@pytest.mark.parametrize("order", ["", ",interleaved"])
def test_activations_with_parameters(implementation, compat, order):
    name = f"swiglu_oai(limit=0.5{order})"
    layer = MoELayer(6, 9, 4, 2, name, bias=False, compat=compat).double()
    assert layer.experts.activation == f"swiglu_oai(alpha=1.702,limit=0.5{order})"
    layer.experts.implementation = implementation

    def oai_expert(x, e, up, down):
        z = 3 * up[e] @ x  # beyond the limit on both sides
        gate, up = (z[::2], z[1::2]) if order else z.chunk(2)
        gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
        return down[e] @ (gate * torch.sigmoid(1.702 * gate) * (up + 1))

    weights = tuple(layer.experts.parameters())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    wanted = loop(x, layer.gate.weight, weights, oai_expert, 2)[0]
    with torch.no_grad():
        weights[0].mul_(3)
    assert_same_formula(layer(x), wanted)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MoELayer(6, 6, 4, 5, "gelu"), r"top_k must be between 1 and the 4 experts, got 5"),
        (lambda: MoELayer(6, 6, 4, 2, "sigmoid"), r"activation must be one of .*, got 'sigmoid'"),
        (lambda: MoELayer(6, 6, 4, 2, "gelu")(torch.randn(3, 7)), r"x must be \(\.\.\., 6\), got \(3, 7\)"),
        (
            lambda: MoELayer(6, 6, 4, 2, "gelu")(torch.randn(3, 6), groups=2),
            r"groups must divide the 3 tokens evenly, got 2",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("x", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float64])
def test_a_gate_computes_in_the_wider_of_its_dtypes(x, weight):
    gate, rows = moe.Gate(16, 4, bias=False).to(weight), torch.randn(7, 16).to(x)
    wanted = torch.float64 if torch.float64 in (x, weight) else torch.bfloat16
    logits = gate(rows)
    assert logits.dtype == wanted
    assert torch.equal(logits, torch.nn.functional.linear(rows.to(wanted), gate.weight.to(wanted)))


@pytest.mark.usefixtures("fp64")
def test_a_watched_gate_computes_what_the_router_does(monkeypatch):
    """The router computes the gate's product unless the gate has hooks: same results, same FLOPs."""
    layer, x = MoELayer(12, 16, 4, 2, "gelu"), torch.randn(5, 12)
    results, given = [], []

    def noted(*args, **options):
        given.append(len(args))
        return route(*args, **options)

    monkeypatch.setattr(moe, "route", noted)
    for watched in (False, True):
        if watched:
            layer.gate.register_forward_hook(lambda *_: None)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        with FlopCounterMode(display=False) as counter:
            out = layer(leaf)
            out.square().sum().backward()
        results.append([out, leaf.grad, layer.gate.weight.grad, counter.get_total_flops()])
    assert given == [3, 2]
    assert results[0][-1] == results[1][-1] > 0
    assert_same_formula(*results)
