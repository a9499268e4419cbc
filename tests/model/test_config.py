"""The configurations: defaults, derived values and errors."""

from dataclasses import fields

import pytest

from cumo_model import CumoConfig
from cumo_model.model import layouts
from cumo_model.model.outputs import CumoOutput


def test_config_knows_its_derived_values(tmp_path):
    config = CumoConfig()
    assert config.image_seq_length == 576 and config.image_token_id == config.image_token_index
    assert config.scales == (1, 3) and config.vision_feature_layer == -2 and config.image_token_index == 32000
    assert (config.balance_loss_coef, config.router_z_loss_coef) == (0.1, 0.01)
    assert (config.projector_num_experts, config.projector_num_experts_per_tok) == (4, 2)
    assert (config.average_loss_over, config.patch_merge_type, config.compat) == ("tokens", "flat", None)
    tower, text = config.vision_config, config.text_config  # ViT-L/14-336 and Mistral-7B-Instruct-v0.2
    assert (tower.image_size, tower.patch_size) == (336, 14)
    assert (tower.hidden_size, tower.intermediate_size) == (1024, 4096)
    assert (tower.num_hidden_layers, tower.num_attention_heads, tower.hidden_act) == (24, 16, "quick_gelu")
    assert (tower.num_experts, tower.num_experts_per_tok, tower.layer_norm_eps) == (4, 2, 1e-5)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 14336, 32)
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (32, 8, 32000)
    assert (text.rms_norm_eps, text.sliding_window, text.max_position_embeddings) == (1e-5, None, 32768)
    assert text.rope_parameters["rope_theta"] == 1e6 and not text.tie_word_embeddings
    config = CumoConfig(compat="cumo", scales=[1, 2])
    assert config.vision_config.compat == "cumo"
    config.save_pretrained(tmp_path)
    assert CumoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_config_is_read_from_its_subfolder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/config.json").write_text('{"model_type": "some", "value": 3}')
    assert layouts.read_config(tmp_path, subfolder="inner", device_map="cpu")["value"] == 3
    assert layouts.read_config(tmp_path) == layouts.read_config(None, subfolder="inner") == {}


def test_the_image_token_is_that_of_the_first_reader_that_knows_it(tmp_path, monkeypatch):
    """Also if it is the first word; inside known_image_token nothing is read."""
    monkeypatch.setattr(layouts, "TOKEN_READERS", [lambda _: None, lambda _: 0, lambda _: 5])
    assert layouts.image_token_of(tmp_path) == 0
    assert layouts.image_token_of(None) is layouts.image_token_of(tmp_path, "none") is None
    with layouts.known_image_token(0):
        with layouts.known_image_token(7):
            assert layouts.image_token_of(tmp_path) == layouts.image_token_of(None) == 7
        assert layouts.image_token_of(None) == 0
    assert layouts.image_token_of(None) is None


def test_evaluation_of_the_trainer_keeps_loss_and_logits_alone():
    """It gathers every other output of the model, in memory, unless the config names it."""
    kept = {field.name for field in fields(CumoOutput)} - set(CumoConfig().keys_to_ignore_at_inference)
    assert kept == {"loss", "logits"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": ()}, r"scales must be one or more positive integers, got \[\]"),
        ({"scales": (1, 0)}, r"scales must be one or more positive integers, got \[1, 0\]"),
        ({"image_grid_pinpoints": [[0, 12]]}, r"multiples of the image_size 12, got \[\[0, 12\]\]"),
        (
            {"image_grid_pinpoints": [[12, 24, 12]]},
            r"must be \[height, width\] pairs, .* got \[\[12, 24, 12\]\]",
        ),
        (
            {"image_grid_pinpoints": [[12, 24], 24]},
            r"must be \[height, width\] pairs, .* got \[\[12, 24\], 24\]",
        ),
        ({"balance_loss_coef": -0.1}, "balance_loss_coef must be finite and not negative, got -0.1"),
        ({"router_z_loss_coef": float("inf")}, "router_z_loss_coef must be finite and not .*, got inf"),
        (
            {"vision_feature_layer": -5},
            r"vision_feature_layer must index the tower's 4 hidden states, got -5",
        ),
        (
            {"vision_feature_select_strategy": "full"},
            r"vision_feature_select_strategy must be 'default' unless",
        ),
    ],
)
def test_bad_config_is_named(tiny_config, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)
