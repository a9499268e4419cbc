"""Co-upcycling: same function at step 0, identical experts, seeded gates, unchanged source model."""

import copy

import pytest
import torch

from cumo_model import CumoForConditionalGeneration, MoELayer, step0_difference, upcycle
from cumo_model.checkpoints.assemble import PLACES, experts_of
from cumo_model.checkpoints.upcycle import scratch_experts
from tests.rounding import assert_same_formula, assert_spread


def layers(model) -> dict[str, MoELayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


@pytest.fixture
def dense(tiny_model):
    return tiny_model(vision_experts=1, projector_num_experts=1)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(
    "options, changed",
    [
        pytest.param({}, {"vision_tower": 3, "multi_modal_projector": 1}, id="7b"),
        pytest.param(
            {"vision_experts": 8, "projector_experts": 0, "top_k": 3}, {"vision_tower": 3}, id="tower-only"
        ),
        pytest.param({"vision_experts": 1, "top_k": 1}, {"multi_modal_projector": 1}, id="connector-only"),
        pytest.param(
            {"text_experts": 8},
            {"vision_tower": 3, "multi_modal_projector": 1, "language_model": 2},
            id="everything",
        ),
    ],
)
def test_step_0_equals_the_dense_model(dense, tiny_batch, options, changed):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    moe = upcycle(dense, **options)
    batch = tiny_batch()
    ours, theirs = (model.eval()(**batch).logits.detach() for model in (moe, dense))
    assert_same_formula(ours, theirs)
    assert step0_difference(dense, moe, batch) == (ours - theirs).abs().max()
    assert not torch.equal(ours, torch.zeros_like(ours))
    counts = {part: sum(part in name for name in layers(moe)) for part in changed}
    assert counts == changed and sum(counts.values()) == len(layers(moe))
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_each_place_has_its_own_number_of_choices(dense):
    moe = upcycle(dense, 4, 3, 5, top_k=3)
    assert experts_of(moe.config) == dict(zip(PLACES, [(4, 3), (3, 3), (5, 3)], strict=True))
    moe = upcycle(dense, 4, 3, 5, top_k=2, vision_top_k=1, projector_top_k=3, text_top_k=4)
    assert experts_of(moe.config) == dict(zip(PLACES, [(4, 1), (3, 3), (5, 4)], strict=True))
    found = {
        name.split(".")[1]: (layer.gate.out_features, layer.top_k) for name, layer in layers(moe).items()
    }
    assert found == {"vision_tower": (4, 1), "multi_modal_projector": (3, 3), "language_model": (5, 4)}


def test_noise_is_that_of_each_weight_and_leaves_biases_and_gates(dense):
    """Standard deviations of 1, 2 and 4 times another's, so that none is taken for another's."""
    with torch.no_grad():
        for layer in (*dense.model.vision_tower.encoder.layers, dense.model.multi_modal_projector):
            layer.mlp.fc2.weight.mul_(2)
        for layer in dense.model.language_model.layers:
            layer.mlp.down_proj.weight.mul_(4)
    plain, noisy, same = (upcycle(dense, text_experts=3, seed=5, noise=n) for n in (0, 0.25, 0.25))
    for name, value in noisy.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    drawn, gates = {}, 0
    for name, value in plain.named_parameters():
        other = noisy.get_parameter(name)
        if ".experts." not in name or "bias" in name:
            gates += name.endswith("gate.weight") and torch.equal(value, other)
            assert torch.equal(value, other) or name.endswith("gate.weight"), name
            continue
        noise = other - value
        assert_spread(noise, 0.25 * value[0].std())
        assert all(not torch.equal(noise[0], other) for other in noise[1:])
        drawn[name] = noise.flatten()[:100] / value[0].std()
    assert gates  # that of the first layer, which is drawn before any noise
    values = list(drawn.values())
    assert all(not torch.equal(values[0], other) for other in values[1:]) and len(values) == 2 * 6


def test_experts_from_scratch_are_seeded_and_only_in_new_places(tiny_model):
    dense = tiny_model(projector_num_experts=1)  # its tower has experts
    moe = upcycle(dense, vision_experts=0)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    results, states = [], []
    for seed in (1, 1, 2):
        moe.load_state_dict(before)
        torch.manual_seed(9)
        scratch_experts(dense, moe, seed)
        states.append(torch.random.get_rng_state())
        results.append({name: value.clone() for name, value in moe.state_dict().items()})
    torch.manual_seed(9)
    assert all(torch.equal(torch.random.get_rng_state(), state) for state in states)
    new = "model.multi_modal_projector.mlp.experts."
    for name, value in before.items():
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], value) != name.startswith(new), name
        assert torch.equal(results[0][name], results[2][name]) != name.startswith(new), name
    up = results[0][f"{new}up_proj"]
    assert up.abs().max() <= up.shape[2] ** -0.5  # as nn.Linear draws


def test_what_is_no_weight_is_kept(dense, tiny_batch):
    dense.generation_config.max_new_tokens = 7
    dense.config.text_config.sliding_window, dense.config.text_config.rope_theta = 5, 123.0
    dense.set_attn_implementation("eager")
    moe = upcycle(dense.eval(), text_experts=4)
    assert moe.generation_config.max_new_tokens == 7 and not moe.training
    moe.generation_config.max_new_tokens = 8
    assert dense.generation_config.max_new_tokens == 7
    for config in (moe.config, moe.config.text_config, moe.config.vision_config):
        assert config._attn_implementation == "eager"
    text = moe.config.text_config
    old = dense.config.text_config.to_dict()
    changed = {"model_type", "architectures", "dtype", "num_local_experts", "num_experts_per_tok"}
    for name in (old.keys() & text.to_dict().keys()) - changed:
        assert text.to_dict()[name] == old[name], name
    assert text.sliding_window == 5


def test_the_step_0_difference_is_the_largest_of_both_signs_in_evaluation_mode(dense, tiny_batch):
    moe, batch = upcycle(dense), tiny_batch()
    with torch.no_grad():
        moe.lm_head.weight[3].mul_(-5)
        dense.lm_head.weight[4].mul_(7)
    for model in (dense.train(), moe.train()):
        model.model.language_model.config.attention_dropout = 0.5
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.5
    difference, other = step0_difference(dense, moe, batch), step0_difference(moe, dense, batch)
    assert dense.training and moe.training and difference == other
    ours, theirs = (model.eval()(**batch).logits.detach() for model in (moe, dense))
    assert difference == (ours - theirs).abs().max()
    assert (ours - theirs).max() != (theirs - ours).max()  # one of both orders has the largest below zero
    step0_difference(dense.train(), moe.eval(), batch)
    assert dense.training and not moe.training


def test_every_expert_is_the_dense_mlp(dense):
    moe = upcycle(dense, text_experts=3)
    sources = dict(dense.named_parameters())
    for name, layer in layers(moe).items():
        parts = (("fc1", "up_proj"), ("fc2", "down_proj"))
        if "language_model" in name:
            E = 3
            gate_up = torch.cat([sources[f"{name}.gate_proj.weight"], sources[f"{name}.up_proj.weight"]])
            for e in range(E):
                assert torch.equal(layer.experts.gate_up_proj[e], gate_up)
                assert torch.equal(layer.experts.down_proj[e], sources[f"{name}.down_proj.weight"])
            continue
        for source, target in parts:
            for e in range(4):
                assert torch.equal(getattr(layer.experts, target)[e], sources[f"{name}.{source}.weight"])
                assert torch.equal(
                    getattr(layer.experts, f"{target}_bias")[e], sources[f"{name}.{source}.bias"]
                )
    shared = set(sources) & {name for name, _ in moe.named_parameters()}
    assert shared and all(torch.equal(sources[name], moe.get_parameter(name)) for name in shared)


def test_gates_are_seeded_uniform_and_all_different(dense):
    first, same, other = (upcycle(dense, seed=seed) for seed in (1, 1, 2))
    for name, layer in layers(first).items():
        gate, bound = layer.gate.weight, layer.hidden_size**-0.5
        # one of at least 96 draws is in the last tenth, except with probability 0.9 ** 96
        assert gate.abs().max() <= bound and gate.abs().max() > 0.9 * bound
        assert torch.equal(gate, layers(same)[name].gate.weight)
        assert not torch.equal(gate, layers(other)[name].gate.weight)
    gates = [layer.gate.weight for name, layer in layers(first).items() if "vision_tower" in name]
    assert not torch.equal(gates[0], gates[1])


def test_the_global_generator_plays_no_part(dense):
    torch.manual_seed(1)
    first = upcycle(dense)
    torch.manual_seed(2)
    second = upcycle(dense)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_model_is_new_configured_and_trains(dense, tiny_batch):
    moe = upcycle(dense.train(), text_experts=4)
    assert moe.training and moe.config.text_config.model_type == "mixtral"
    assert (moe.config.vision_config.num_experts, moe.config.projector_num_experts) == (4, 4)
    assert (dense.config.vision_config.num_experts, dense.config.text_config.model_type) == (1, "mistral")
    before = copy.deepcopy(dense.state_dict())
    output = moe(**tiny_batch())
    output.loss.backward()
    assert set(output.loss_parts) > {"clip_balance", "mlp_balance", "llm_balance"}
    torch.optim.SGD(moe.parameters(), lr=1.0).step()
    for name, value in before.items():
        assert torch.equal(value, dense.state_dict()[name]), name


def test_upcycled_model_survives_saving(dense, tiny_batch, tmp_path):
    moe = upcycle(dense, text_experts=4).eval()
    moe.save_pretrained(tmp_path)
    again = CumoForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = tiny_batch()
    assert torch.equal(again(**batch).logits, moe(**batch).logits)


def test_tied_head_and_bf16_are_kept(tiny_model):
    dense = tiny_model(
        vision_experts=1, projector_num_experts=1, text_options={"tie_word_embeddings": True}
    ).bfloat16()
    moe = upcycle(dense)
    assert moe.lm_head.weight is moe.get_input_embeddings().weight
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}


def test_mixtral_keeps_its_experts(tiny_model, tiny_batch):
    dense = tiny_model(text="mixtral", vision_experts=1, projector_num_experts=1).eval()
    moe = upcycle(dense)
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(moe.get_parameter(name), dense.get_parameter(name))


def units_of(experts):
    """Each matrix by inner unit: (E, I, H) of up, or of gate and of up, and (E, I, O) of down."""
    up, down = experts.up[0].detach(), experts.down_proj.detach()
    return [*up.split(down.shape[2], 1), down.transpose(1, 2)]


@pytest.mark.parametrize("drop, text_experts", [(0.33, 3), (0.5, 3), (1.0, 2)])
def test_drop_upcycling_draws_whole_units_of_each_expert_anew(tiny_model, drop, text_experts):
    """floor(drop * I) of the inner units, in all matrices at once, others in each expert; no bias.

    The new values are normal, with the mean and the standard deviation of those they replace.
    """
    dense = tiny_model(vision_experts=1, projector_num_experts=1)
    with torch.no_grad():  # means and spreads that differ between matrices
        for name, weight in dense.named_parameters():
            if name.endswith(("fc1.weight", "gate_proj.weight")):
                weight.mul_(3).add_(2)
            elif name.endswith(("fc2.weight", "down_proj.weight")):
                weight.mul_(0.1).sub_(5)
    plain, dropped = (upcycle(dense, text_experts=text_experts, drop=d) for d in (0.0, drop))
    found = []
    for name, layer in layers(dropped).items():
        before, after = units_of(layers(plain)[name].experts), units_of(layer.experts)
        changed = [(a != b).any(2) for a, b in zip(before, after, strict=True)]
        count = int(drop * changed[0].shape[1])
        assert all(torch.equal(units, changed[0]) for units in changed), name
        assert changed[0].sum(1).tolist() == [count] * len(changed[0]) and count > 0
        assert drop == 1.0 or len(set(map(tuple, changed[0].tolist()))) == len(changed[0])
        for a, b in zip(before, after, strict=True):
            for e, units in enumerate(changed[0]):
                old, new = a[e, units], b[e, units]
                assert (old != new).any(0).all()
                z = (new - old.mean()) / old.std()
                assert z.mean().abs() < 4 / z.numel() ** 0.5  # standard errors
                found.append(z.flatten())
        for key in ("up_proj_bias", "down_proj_bias"):
            if (bias := getattr(layer.experts, key, None)) is not None:
                assert torch.equal(bias, getattr(layers(plain)[name].experts, key))
    assert_spread(torch.cat(found), 1.0)
    for key, value in plain.state_dict().items():
        if "experts" not in key and "gate.weight" not in key:
            assert torch.equal(value, dropped.state_dict()[key])


@pytest.mark.parametrize(
    "model, options, message",
    [
        ({}, {}, r"vision_experts must be 0 for a place that has experts already, got 4"),
        (
            {"vision_experts": 1},
            {},
            r"projector_experts must be 0 for a place that has experts already, got 4",
        ),
        (
            {"text": "mixtral"},
            {"vision_experts": 0, "projector_experts": 0, "text_experts": 8},
            r"text_experts must be 0 for a place that has experts already, got 8",
        ),
        (
            {"text": "llama"},
            {"vision_experts": 0, "projector_experts": 0, "text_experts": 8},
            r"text_experts must be 0 unless the language model is a mistral, got a llama",
        ),
        (
            {"vision_experts": 1, "projector_num_experts": 1},
            {"top_k": 5},
            r"top_k must be between 1 and the 4 experts, got 5",
        ),
        ({"vision_experts": 1}, {"vision_experts": -3}, r"vision_experts must not be negative .*, got -3"),
        ({"vision_experts": 1}, {"noise": float("nan")}, r"noise must be finite and not negative"),
    ],
)
def test_what_cannot_be_upcycled_is_named(tiny_model, model, options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_model(**model), **options)
