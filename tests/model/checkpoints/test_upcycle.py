"""Co-upcycling: same function at step 0, identical experts, seeded gates, unchanged source model."""

import copy

import pytest
import torch

from cumo_model import CumoForConditionalGeneration, MoELayer, step0_difference, upcycle
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


def test_noise_is_in_units_of_the_spread_of_each_weight(tiny_model):
    """Drawn for each expert; not added to biases."""
    dense = tiny_model(vision_experts=1, projector_num_experts=1)
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if name.endswith("fc2.weight"):
                weight.mul_(0.1).sub_(5)
    plain, noisy = (upcycle(dense, text_experts=3, noise=noise) for noise in (0.0, 0.25))
    added = []
    for name, layer in layers(noisy).items():
        ours, theirs = layer.experts, layers(plain)[name].experts
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            if a.ndim == 2:  # a bias
                assert torch.equal(a, b)
            else:
                added += [((x - y) / y.std()).flatten() for x, y in zip(a, b, strict=True)]
                assert not torch.equal(a[0] - b[0], a[1] - b[1])
    assert_spread(torch.cat(added), 0.25)


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
