"""The vision tower compared with plain PyTorch and transformers' CLIP; layers that run and get gradients."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPMLP

from cumo_model import CumoVisionConfig, CumoVisionModel, record_routing
from cumo_model.model.losses import place_losses
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula, assert_spread

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def tower(num_experts=4, attention="eager", **options) -> CumoVisionModel:
    config = CumoVisionConfig(**SIZES, num_experts=num_experts, **options)
    config._attn_implementation = attention
    model = CumoVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def norm(x, p, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attention(x, p, name, num_heads=2):
    N, n, H = x.shape
    q, k, v = (
        linear(x, p, f"{name}.{part}_proj").view(N, n, num_heads, H // num_heads).transpose(1, 2)
        for part in "qkv"
    )
    scores = ((H // num_heads) ** -0.5 * q @ k.transpose(2, 3)).softmax(-1)
    return linear((scores @ v).transpose(1, 2).reshape(N, n, H), p, f"{name}.out_proj")


def moe(x, p, name):
    """Literal loop over crops and tokens -> output, balance loss, z-loss."""
    gate = p[f"{name}.gate.weight"]
    up, up_bias, down, down_bias = (
        p[f"{name}.experts.{part}"] for part in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    )
    E, crops, balance, z = gate.shape[0], [], 0, 0
    for crop in x:
        first, probs, rows = [0.0] * E, 0, []
        for token in crop:
            logits = gate @ token
            p_token = logits.softmax(0)
            chosen = sorted(range(E), key=lambda e: -p_token[e].item())[:2]
            first[chosen[0]] += 1 / len(crop)
            probs = probs + p_token / len(crop)
            z = z + logits.logsumexp(0) ** 2 / len(crop) / len(x)
            out = 0
            for e in chosen:
                inner = up[e] @ token + up_bias[e]
                inner = inner * torch.sigmoid(1.702 * inner)
                out = out + p_token[e] / p_token[chosen].sum() * (down[e] @ inner + down_bias[e])
            rows.append(out)
        crops.append(torch.stack(rows))
        balance = balance + E * sum(f * P for f, P in zip(first, probs, strict=True)) / len(x)
    return torch.stack(crops), balance, z


def literal_tower(pixels, p, num_layers=3):
    """Returns hidden_states[-2] and both losses averaged over all layers, the last one included."""
    patches = torch.nn.functional.conv2d(pixels, p["embeddings.patch_embedding.weight"], stride=4)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([p["embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + p["embeddings.position_embedding.weight"], p, "pre_layrnorm")
    states, balance, z = [x], 0, 0
    for i in range(num_layers):
        name = f"encoder.layers.{i}"
        x = x + attention(norm(x, p, f"{name}.layer_norm1"), p, f"{name}.self_attn")
        out, layer_balance, layer_z = moe(norm(x, p, f"{name}.layer_norm2"), p, f"{name}.mlp")
        x, balance, z = x + out, balance + layer_balance / num_layers, z + layer_z / num_layers
        states.append(x)
    return states[-2], balance, z


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tower_losses_and_gradients_are_the_loops(attention):
    model = tower(attention=attention)
    pixels = torch.randn(2, 3, 12, 12)
    with record_routing() as records:
        state = model(pixels, feature_layer=-2, all_routers=True).last_hidden_state
    assert [(r.place, r.layer) for r in records] == [("clip", 0), ("clip", 1), ("clip", 2)]
    got = (state, *place_losses([r.routing.stats for r in records]))

    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    wanted = literal_tower(pixels, copies)
    upstream = torch.randn(wanted[0].shape)
    for outputs in (got, wanted):
        ((outputs[0] * upstream).mean() + outputs[1] + 3 * outputs[2]).backward()
    assert_same_formula(got, wanted)
    assert_same_formula(gradients(model), gradients(model, [p.grad for p in copies.values()]))
    dead = {name for name, p in model.named_parameters() if p.grad is None}
    assert dead and all(name.startswith("encoder.layers.2.mlp.experts") for name in dead)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("layer", range(-4, 4))
def test_dense_tower_is_transformers_clip(layer):
    options = {"layer_norm_eps": 0.1}  # not that of nn.LayerNorm
    model = tower(num_experts=1, **options).eval()
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES, **options, attn_implementation="eager")).eval()
    missing, unexpected = clip.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == [] and all("post_layernorm" in name for name in missing)
    pixels = torch.randn(2, 3, 12, 12)
    theirs = clip(pixels, output_hidden_states=True).hidden_states
    assert_same_formula(model(pixels, feature_layer=layer).last_hidden_state, theirs[layer])
    ours = model(pixels, output_hidden_states=True).hidden_states
    assert_same_formula(ours, theirs)


def clip_of(model: CumoVisionModel, attention: str = "eager") -> CLIPVisionModel:
    """transformers' CLIP with the weights of a dense tower."""
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES, attn_implementation=attention)).eval()
    clip.load_state_dict(model.state_dict(), strict=False)
    return clip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", [12, 20])
def test_every_output_of_the_dense_tower_is_clips(attention, side):
    model = tower(num_experts=1, attention=attention).eval()
    options = {"output_hidden_states": True, "output_attentions": True, "interpolate_pos_encoding": side > 12}
    pixels = torch.randn(2, 3, side, side)
    wanted, got = clip_of(model, attention)(pixels, **options), model(pixels, **options)
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4
    assert all(map(torch.equal, got.hidden_states, wanted.hidden_states))
    assert len(got.attentions) == len(wanted.attentions) == (3 if attention == "eager" else 0)
    assert all(map(torch.equal, got.attentions, wanted.attentions))
    assert wanted.pooler_output is not None and got.pooler_output is None
    last, states, weights = model(pixels, return_dict=False, **options)
    assert torch.equal(last, got.last_hidden_state)
    assert all(map(torch.equal, states + weights, got.hidden_states + got.attentions))


def test_outputs_may_be_requested_by_the_config():
    model, pixels = tower(), torch.randn(1, 3, 12, 12)
    plain = model(pixels, feature_layer=-2)
    assert "hidden_states" not in plain and "attentions" not in plain
    model.config.output_hidden_states = model.config.output_attentions = True
    asked = model(pixels, feature_layer=-2)
    assert torch.equal(asked.last_hidden_state, plain.last_hidden_state)
    assert len(asked.hidden_states) == 4 and len(asked.attentions) == 3
    assert torch.equal(asked.hidden_states[-2], plain.last_hidden_state)


@pytest.mark.parametrize("layers", [[-2, 0, -3], [-1, 0]])
def test_features_of_several_layers_are_concatenated(layers):
    model, pixels = tower().eval(), torch.randn(2, 3, 12, 12)
    states = model(pixels, output_hidden_states=True).hidden_states
    with record_routing() as records:
        several = model(pixels, feature_layer=layers, all_routers=True).last_hidden_state
    assert torch.equal(several, torch.cat([states[i] for i in layers], -1))
    assert [record.layer for record in records] == [0, 1, 2]
    one = model(pixels, feature_layer=[1]).last_hidden_state
    assert torch.equal(one, model(pixels, feature_layer=1).last_hidden_state)


@pytest.mark.parametrize("place", ["layer", "gate"])
def test_hooks_run_where_only_the_router_runs(place):
    """As accelerate's offloading and FSDP units need, which prepare the weights in a hook."""
    model, seen = tower(), []
    mlp = model.encoder.layers[-1].mlp
    (mlp if place == "layer" else mlp.gate).register_forward_pre_hook(lambda *_: seen.append("before"))
    (mlp if place == "layer" else mlp.gate).register_forward_hook(lambda *_: seen.append("after"))
    model(torch.randn(1, 3, 12, 12), feature_layer=-2, all_routers=True)
    assert seen == ["before", "after"]


def test_a_layer_without_experts_gets_its_gradient_before_its_router():
    """FSDP gathers the weights of a unit when its output gets a gradient, which must come first."""
    model, order = tower(), []
    mlp = model.encoder.layers[-1].mlp
    mlp.register_forward_hook(
        lambda *given: given[-1].register_hook(lambda _: order.append("output")) and None
    )
    mlp.gate.weight.register_hook(lambda _: order.append("gate"))
    with record_routing() as records:
        state = model(torch.randn(1, 3, 12, 12), feature_layer=-2, all_routers=True).last_hidden_state
    (state.sum() + sum(place_losses([r.routing.stats for r in records]))).backward()
    assert order == ["output", "gate"]


def run_count(model, **options):
    """Counts the calls of each layer's attention and of each layer's experts."""
    attended, expert = [0] * 3, [0] * 3
    handles = []
    for i, layer in enumerate(model.encoder.layers):
        for module, counts in (
            (layer.self_attn, attended),
            (getattr(layer.mlp, "experts", layer.mlp), expert),
        ):

            def count(*_, counts=counts, i=i):
                counts[i] += 1

            handles.append(module.register_forward_hook(count))
    model(torch.randn(1, 3, 12, 12), **options)
    for handle in handles:
        handle.remove()
    return attended, expert


@pytest.mark.parametrize(
    "num_experts, options, attended, expert",
    [
        pytest.param(4, {"feature_layer": -2}, [1, 1, 0], [1, 1, 0], id="dead-layers-do-not-run"),
        pytest.param(4, {"feature_layer": 1}, [1, 0, 0], [1, 0, 0], id="as-early-as-asked"),
        pytest.param(4, {"feature_layer": -1}, [1, 1, 1], [1, 1, 1], id="last-state-needs-all"),
        pytest.param(4, {"feature_layer": [1, 0]}, [1, 0, 0], [1, 0, 0], id="up-to-the-last-of-several"),
        pytest.param(
            4, {"feature_layer": 1, "output_attentions": True}, [1, 1, 1], [1, 1, 1], id="attentions-need-all"
        ),
        pytest.param(
            4, {"feature_layer": -2, "all_routers": True}, [1, 1, 1], [1, 1, 0], id="last-router-only"
        ),
        pytest.param(4, {"feature_layer": -1, "all_routers": True}, [1, 1, 1], [1, 1, 1], id="last-in-full"),
        pytest.param(
            1, {"feature_layer": -2, "all_routers": True}, [1, 1, 0], [1, 1, 0], id="dense-has-no-routers"
        ),
    ],
)
def test_only_what_is_needed_runs(num_experts, options, attended, expert):
    assert run_count(tower(num_experts), **options) == (attended, expert)


def test_last_layer_learns_from_the_losses_alone():
    """cumo_spec.md 1.2: norms, attention and gate get gradients from the router losses only, experts none."""
    model = tower()
    with record_routing() as records:
        state = model(torch.randn(2, 3, 12, 12), feature_layer=-2, all_routers=True).last_hidden_state
    last = dict(model.encoder.layers[-1].named_parameters())
    state.sum().backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in last.values())
    assert last["self_attn.v_proj.weight"].grad is not None  # FSDP waits for a gradient at the layer's output
    sum(place_losses([r.routing.stats for r in records])).backward()
    for name, parameter in last.items():
        assert (parameter.grad is None) == ("experts" in name), name
    assert last["mlp.gate.weight"].grad.abs().sum() > 0
    assert last["self_attn.v_proj.weight"].grad.abs().sum() > 0


def test_checkpointed_layers_give_the_same_gradients():
    model = tower().train()
    pixels, gradients, counts = torch.randn(2, 3, 12, 12), [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with record_routing() as records:
            state = model(pixels, feature_layer=-2, all_routers=True).last_hidden_state
            (state.square().sum() + sum(place_losses([r.routing.stats for r in records]))).backward()
        counts.append(len(records))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert counts == [3, 3]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_experts_have_the_activation_of_the_config(act):
    """Experts with the weights of CLIP's MLP compute what it does."""
    model = tower(hidden_act=act)
    layer, mlp = model.encoder.layers[1].mlp, CLIPMLP(model.config)
    experts = layer.experts
    with torch.no_grad():
        for name, part in (("up_proj", mlp.fc1), ("down_proj", mlp.fc2)):
            part.weight.normal_(), part.bias.normal_()
            getattr(experts, name).copy_(part.weight.expand_as(getattr(experts, name)))
            getattr(experts, f"{name}_bias").copy_(part.bias.expand_as(getattr(experts, f"{name}_bias")))
    x = torch.randn(2, 10, 16)
    assert_same_formula(layer(x), mlp(x))


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_weights_start_as_clips_and_gates_as_the_originals(factor):
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
    model = CumoVisionModel(CumoVisionConfig(**sizes, initializer_factor=factor))
    mlp = model.encoder.layers[0].mlp
    for weight, std in ((mlp.experts.up_proj, 128**-0.5), (mlp.experts.down_proj, (2 * 64 * 3) ** -0.5)):
        for expert in weight:
            assert_spread(expert, std * factor)
    assert mlp.experts.up_proj_bias.abs().max() == 0 and mlp.experts.down_proj_bias.abs().max() == 0
    assert mlp.gate.weight.abs().max() <= 1 / 8
    assert_spread(mlp.gate.weight, 1 / 8 / 3**0.5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"vision_config.num_experts must be at least 1 .*got 0"):
        CumoVisionConfig(num_experts=0)
    with pytest.raises(ValueError, match=r"num_experts_per_tok must be between 1 and the 4 experts, got 5"):
        CumoVisionConfig(num_experts_per_tok=5)
