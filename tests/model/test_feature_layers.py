"""Features of several layers of the tower: the connector's input, the losses, checkpoints and errors."""

import pytest
import torch

from cumo_model import CumoForConditionalGeneration, record_routing
from cumo_model.checkpoints.original_config import to_original
from cumo_model.model.pyramid import image_pyramid, merge_scales
from cumo_model.training.flops import vision_flops

LAYERS = [-3, 1, 0]


@pytest.mark.parametrize("scales", [(1,), (1, 2)])
def test_features_of_several_layers_enter_the_connector(tiny_model, scales, tmp_path):
    """At each scale the layers are concatenated; all routers count in the losses, also later ones."""
    model = tiny_model(vision_feature_layer=LAYERS, scales=scales).eval()
    assert model.model.multi_modal_projector.input_size == 32 * 3 * len(scales)
    pixels, tower = torch.randn(2, 3, 12, 12), model.model.vision_tower
    entered = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with record_routing() as records:
        model.model.get_image_features(pixels, all_routers=True)
    assert [(r.place, r.layer) for r in records] == [("clip", 0), ("clip", 1), ("clip", 2), ("mlp", 0)]
    states = tower(image_pyramid(pixels, scales), output_hidden_states=True).hidden_states
    picked = [merge_scales(states[i][:, 1:], scales, 3).split(32, -1) for i in LAYERS]
    wanted = torch.cat([part for scale in zip(*picked, strict=True) for part in scale], -1)
    assert torch.equal(entered[0], wanted)
    model.save_pretrained(tmp_path)
    again = CumoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.vision_feature_layer == LAYERS
    again.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    again.model.get_image_features(pixels)
    assert torch.equal(entered[1], wanted)


def test_a_model_with_several_layers_trains(tiny_model, tiny_batch):
    model = tiny_model(vision_feature_layer=LAYERS).train()
    output = model(**tiny_batch())
    assert {"clip_balance", "clip_z"} <= output.loss_parts.keys()
    output.loss.backward()
    layers = model.model.vision_tower.encoder.layers
    assert all(layer.mlp.gate.weight.grad.any() for layer in layers)
    assert layers[0].mlp.experts.up_proj.grad.any() and layers[2].mlp.experts.up_proj.grad is None


def test_one_index_in_a_list_is_that_index(tiny_config, tiny_model, tiny_batch):
    one, listed = (tiny_model(vision_feature_layer=layer).eval() for layer in (-2, [-2]))
    listed.load_state_dict(one.state_dict())
    assert torch.equal(one(**tiny_batch()).logits, listed(**tiny_batch()).logits)
    several = tiny_config(vision_feature_layer=[0, -2, 1])  # the deepest decides how many layers run
    assert vision_flops(one.config, True) == vision_flops(several, True)


@pytest.mark.parametrize(
    "layers, got", [([1, 4], r"\[1, 4\]"), ([], r"\[\]"), ((0, -5), r"\(0, -5\)"), (-5, "-5")]
)
def test_a_layer_that_does_not_exist_is_named(tiny_config, layers, got):
    with pytest.raises(ValueError, match=f"vision_feature_layer must index .* 4 hidden states, got {got}"):
        tiny_config(vision_feature_layer=layers)


def test_the_original_layout_holds_one_layer(tiny_config):
    with pytest.raises(ValueError, match=r"vision_feature_layer must be -2 for .* layout, got \[-2, -3\]"):
        to_original(tiny_config(vision_feature_layer=[-2, -3]))


def test_pictures_of_another_size_on_request(tiny_config):
    """interpolate_pos_encoding for pictures of 16 x 16 pixels, so 16 tokens; not with several scales."""
    model = CumoForConditionalGeneration(tiny_config(scales=(1,))).eval()
    pixels = torch.randn(2, 3, 16, 16)
    found = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    states = model.model.vision_tower(pixels, feature_layer=-2, interpolate_pos_encoding=True)
    wanted = model.model.multi_modal_projector(states.last_hidden_state[:, 1:])
    assert [x.shape for x in found] == [(16, 24)] * 2 and torch.equal(torch.stack(found), wanted)
    with pytest.raises(ValueError, match=r"pixel_values must be \(B, 3, 12, 12\)"):
        model.get_image_features(pixels)
    with pytest.raises(ValueError, match=r"pixel_values must be \(B, 3, 12, 12\), got \(3, 16, 16\)"):
        model.get_image_features(pixels[0], interpolate_pos_encoding=True)
    scaled = CumoForConditionalGeneration(tiny_config(scales=(1, 2))).eval()
    with pytest.raises(ValueError, match=r"interpolate_pos_encoding must be False unless scales is \[1\]"):
        scaled.get_image_features(pixels, interpolate_pos_encoding=True)


@pytest.mark.parametrize("layer", [4, -5, [], [1, 9]])
def test_a_layer_of_one_call_that_does_not_exist_is_named(tiny_config, layer):
    model = CumoForConditionalGeneration(tiny_config(scales=(1,)))
    with pytest.raises(ValueError, match=r"feature_layer must index the tower's 4 hidden states, got"):
        model.get_image_features(torch.randn(1, 3, 12, 12), vision_feature_layer=layer)


def test_a_text_model_that_transformers_does_not_know_is_named(tiny_config):
    with pytest.raises(ValueError, match=r"text_config.model_type must be known .*, got 'nonsense'"):
        tiny_config(text="nonsense")
