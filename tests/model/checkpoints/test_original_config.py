"""Translation of each key of a released config.json, and back, against values written out by hand."""

import pytest

from cumo_model import CumoConfig
from cumo_model.checkpoints.original_config import (
    MULTIMODAL,
    TOWER_FOLDER,
    differing,
    from_original,
    to_original,
)
from tests.model import original

TOWER = "openai/clip-vit-large-patch14-336"


def read(change: dict, kind: str = "mistral", **options) -> CumoConfig:
    """The CumoConfig of a released config.json with changed keys; None removes a key."""
    values = original.config(kind=kind, tower=TOWER, **options) | change
    return CumoConfig(**from_original({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    "change, wanted",
    [
        pytest.param({"scales": [2, 5]}, {"scales": (1, 5)}, id="the original never applies its first scale"),
        pytest.param({"scales": "1,4"}, {"scales": (1, 4)}, id="scales as text"),
        pytest.param({"scales": None}, {"scales": (1,)}, id="no scales"),
        pytest.param({"mm_vision_select_layer": -3}, {"vision_feature_layer": -2}, id="a key it never reads"),
        pytest.param({}, {"vision_feature_select_strategy": "default"}, id="patches"),
        pytest.param(
            {"mm_vision_select_feature": "cls_patch", "scales": [1]},
            {"vision_feature_select_strategy": "full"},
            id="class token",
        ),
        pytest.param({"balance_loss_coef": 0.25}, {"balance_loss_coef": 0.25}, id="balance loss"),
        pytest.param({"balance_loss_coef": None}, {"balance_loss_coef": 0.0}, id="no balance loss"),
        pytest.param({"router_z_loss_coef": 0.75}, {"router_z_loss_coef": 0.75}, id="z-loss"),
        pytest.param({"router_z_loss_coef": None}, {"router_z_loss_coef": 0.0}, id="no z-loss"),
        pytest.param({"image_token_index": 77}, {"image_token_index": 77}, id="image token"),
        pytest.param({}, {"image_token_index": original.VOCAB}, id="image token after the vocabulary"),
        pytest.param(
            {"num_experts": 6, "num_selected": 3},
            {"projector_num_experts": 6, "projector_num_experts_per_tok": 3},
            id="experts",
        ),
        pytest.param(
            {"mm_projector_type": "mlp2x_gelu", "num_experts": 6}, {"projector_num_experts": 1}, id="dense"
        ),
        pytest.param({"mm_patch_merge_type": None}, {"patch_merge_type": "flat"}, id="no merge"),
        pytest.param(
            {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
             "image_grid_pinpoints": [[336, 672], [1008, 336]]},
            {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[672, 336], [336, 1008]]},
            id="(width, height) to [height, width]",
        ),
        pytest.param(
            {"image_grid_pinpoints": "[(336, 672)]", "image_aspect_ratio": "pad"},
            {"image_grid_pinpoints": None},
            id="a grid that is not used",
        ),
        pytest.param(
            {"image_grid_pinpoints": "[(336, 672)]", "image_aspect_ratio": "anyres",
             "mm_patch_merge_type": "spatial"},
            {"image_grid_pinpoints": [[672, 336]]},
            id="a grid as text",
        ),
    ],
)  # fmt: skip
def test_each_key_means_what_the_original_makes_of_it(change, wanted):
    found = read(change)
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_experts_of_the_tower_and_the_sizes_of_the_parts():
    config = read({"num_experts": 6, "num_selected": 3, "clip_smoe": True})
    vision, text = config.vision_config, config.text_config
    assert (vision.num_experts, vision.num_experts_per_tok) == (6, 3)
    assert read({"num_experts": 6, "clip_smoe": False}).vision_config.num_experts == 1
    # CLIP ViT-L/14 at 336 pixels
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (
        1024, 24, 336, 14,
    )  # fmt: skip
    smaller = read({"mm_vision_tower": "openai/clip-vit-large-patch14"}).vision_config
    assert (smaller.hidden_size, smaller.image_size) == (1024, 224)
    released = original.config()
    assert text.model_type == "mistral"
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"):
        assert getattr(text, key) == released[key], key
    assert not [key for key in MULTIMODAL if key in text.to_dict()]
    assert read({}, kind="mixtral").text_config.num_local_experts == original.TEXT_E


def test_what_a_written_config_says():
    """A model made here: all keys that the original code reads."""
    config = read({"num_experts": 6, "num_selected": 3, "scales": [1, 3]}, dtype="bfloat16")
    config.original = None
    config.balance_loss_coef, config.router_z_loss_coef = 0.25, 0.5
    wanted = {
        "model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"],
        "mm_vision_tower": TOWER, "mm_hidden_size": 1024, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat", "mm_projector_type": "smoe_mlp",
        "num_experts": 6, "num_selected": 3, "num_layers": 3, "dropout": False, "mlp_smoe": True,
        "clip_smoe": True, "scales": [1, 3], "balance_loss_coef": 0.25, "router_z_loss_coef": 0.5,
        "image_aspect_ratio": "pad", "tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "training": False,
        "torch_dtype": "bfloat16", "rope_theta": original.THETA, "tie_word_embeddings": False,
    }  # fmt: skip
    found = to_original(config)
    assert {key: found.get(key) for key in wanted} == wanted
    pictures = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[672, 336]]}
    config.patch_merge_type, config.image_grid_pinpoints = "spatial_unpad", [[672, 336]]
    tiled = to_original(config, pictures)
    assert (tiled["image_aspect_ratio"], tiled["image_grid_pinpoints"]) == ("anyres", [[336, 672]])
    assert tiled["mm_patch_merge_type"] == "spatial_unpad"
    dense = read({"mm_projector_type": "mlp2x_gelu", "clip_smoe": False, "mlp_smoe": False})
    dense.original = None
    found = to_original(dense)
    assert (found["mm_projector_type"], found["mlp_smoe"], found["clip_smoe"]) == ("mlp2x_gelu", False, False)
    assert "num_experts" not in found and "num_selected" not in found
    dense.vision_config.num_hidden_layers = 7  # no CLIP that the original knows by name
    dense.vision_config.vision_feature_layer = -2
    assert to_original(dense)["mm_vision_tower"] == TOWER_FOLDER


@pytest.mark.parametrize("theta, scaling", [(5e5, None), (1e4, {"rope_type": "linear", "factor": 4.0})])
def test_rotary_positions_are_kept(theta, scaling):
    config = read({"rope_theta": theta, "rope_scaling": scaling})
    rope = config.text_config.rope_parameters
    assert rope["rope_theta"] == theta and rope["rope_type"] == (scaling or {}).get("rope_type", "default")
    config.original = None
    found = to_original(config)
    assert found["rope_theta"] == theta
    assert {key: (found.get("rope_scaling") or {}).get(key) for key in scaling or {}} == (scaling or {})


@pytest.mark.parametrize(
    "field, value",
    [
        ("balance_loss_coef", 0.5),
        ("projector_hidden_act", "relu"),
        ("image_token_index", 7),
        ("scales", (1, 9)),
    ],
)
def test_configs_that_differ_are_told_by_their_fields(field, value):
    one, other = read({}), read({})
    assert differing(one, other) == []
    setattr(other, field, value)
    assert differing(one, other) == [field]
    other = read({"training": True, "local_rank": 3})
    assert differing(one, other) in ([], ["original"])
