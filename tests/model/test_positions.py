"""Prompts and rows beyond the positions of the language model."""

import warnings

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from cumo_model.model.compat import CACHE
from cumo_model.model.positions import longest_prompt, position_limit, positions_of
from cumo_model.training.recipe import load_recipe
from cumo_model.training.trainer import build_trainer
from tests.model.training.small_runs import write_data, write_model, write_recipe

LIMIT = 128  # of the tiny model


def rope(kind, **options):
    return LlamaConfig(
        max_position_embeddings=100, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **options}
    )


def sliding(window, **options):
    return Qwen2Config(max_position_embeddings=100, use_sliding_window=True, sliding_window=window, **options)


def two_ropes(full):
    """Local layers with plain rotary embeddings, and others."""
    ropes = {"sliding_attention": {"rope_type": "default"}, "full_attention": full}
    ropes = {kind: {"rope_theta": 1e4, **rope} for kind, rope in ropes.items()}
    return Gemma3TextConfig(max_position_embeddings=100, sliding_window=64, rope_parameters=ropes)


LIMITS = [
    (LlamaConfig(max_position_embeddings=100), 100),
    (GPT2Config(n_positions=100), 100),
    (OPTConfig(max_position_embeddings=100), 100),
    (FalconConfig(max_position_embeddings=100), 100),
    (FalconConfig(max_position_embeddings=100, alibi=True), None),
    (BloomConfig(), None),
    (rope("default"), 100),
    (rope("dynamic", factor=2.0, original_max_position_embeddings=100), None),
    (rope("linear", factor=4.0), 400),
    (rope("yarn", factor=4.0, original_max_position_embeddings=50), 200),
    (rope("yarn", factor=2.0, original_max_position_embeddings=50), 100),
    (MistralConfig(max_position_embeddings=100, sliding_window=None), 100),
    (MistralConfig(max_position_embeddings=100, sliding_window=4096), 100),
    (MistralConfig(max_position_embeddings=100, sliding_window=64), None),
    (MistralConfig(max_position_embeddings=100, sliding_window=100), None),
    (MistralConfig(max_position_embeddings=100, sliding_window=101), 100),
    (sliding(64, num_hidden_layers=2, max_window_layers=0), None),
    (sliding(64, num_hidden_layers=2, max_window_layers=1), 100),
    (Qwen2Config(max_position_embeddings=100, sliding_window=64), 100),
    (Gemma3TextConfig(max_position_embeddings=100, sliding_window=64), 100),
    (two_ropes({"rope_type": "linear", "factor": 8.0}), 800),  # that of the layers that see everything
]


@pytest.mark.parametrize(("config", "limit"), LIMITS)
def test_the_limit_of_a_decoder(config, limit):
    assert position_limit(config) == limit


def test_a_prompt_is_as_long_as_its_longest_row_or_its_largest_position():
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for prompt in (torch.zeros(3, 5), torch.zeros(3, 5, 8)):
        assert longest_prompt(prompt, mask) == 4
        assert longest_prompt(prompt, None) == longest_prompt(prompt, mask[:, :4]) == 5
    assert longest_prompt(torch.zeros(0, 5), mask[:0]) == 5
    assert positions_of(torch.tensor([[3, 127, 0]])) == 128  # positions begin at 0
    assert positions_of(torch.zeros(1, 0, dtype=torch.long)) == 0


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_longer_rows_are_warned_of(tiny_model, text):
    model = tiny_model(text=text)
    ids = torch.full((1, LIMIT + 1), 5)
    told = r"^a row has 129 tokens, more than text_config.max_position_embeddings 128"
    for mode in (model.train(), model.eval()):
        with pytest.warns(UserWarning, match=told):
            mode(input_ids=ids, labels=ids)
        with pytest.warns(UserWarning, match=told):
            mode(inputs_embeds=model.get_input_embeddings()(ids))
    cached = model(input_ids=ids[:, :120], use_cache=True)
    with pytest.warns(UserWarning, match=told):
        model(input_ids=ids[:, :9], past_key_values=getattr(cached, CACHE))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_position_embeddings")
        cached = model(input_ids=ids[:, :120], use_cache=True)
        model(input_ids=ids[:, :8], past_key_values=getattr(cached, CACHE))
        positions = torch.cat([torch.arange(100), torch.arange(29)])[None]
        assert model.train()(input_ids=ids, labels=ids, position_ids=positions).loss.isfinite()


def test_prompts_are_refused_and_long_answers_are_warned_of(tiny_model):
    model = tiny_model(scales=(1,)).eval()
    ids, options = torch.full((2, LIMIT + 1), 5), {"max_new_tokens": 3, "do_sample": False}
    embeds = model.get_input_embeddings()(ids)
    for prompt in ({"input_ids": ids}, {"inputs": ids}, {"inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"^a prompt must have at most 128 tokens, text_.*, got 129$"):
            model.generate(**prompt, **options)
    with pytest.raises(ValueError, match="a prompt must have"):
        model.generate(ids, **options)
    with pytest.raises(ValueError, match="a prompt must have at most 128 tokens"):
        model.generate(ids[:, :60], position_ids=torch.arange(100, 160)[None].expand(2, -1), **options)
    warned = r"may have 129 tokens \(126 \+ 3\), more than text_config.max_position_embeddings 128"
    for prompt in ({"input_ids": ids[:, :126]}, {"inputs_embeds": embeds[:, :126]}):
        with pytest.warns(UserWarning, match=warned):
            model.generate(**prompt, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_position_embeddings")
        model.generate(ids[:, :125], **options)
        model.generate(inputs_embeds=embeds[:, :125], **options)


def test_padding_is_not_part_of_a_prompt(tiny_model):
    model = tiny_model().eval()
    ids = torch.randint(3, 50, (2, 140), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(140) >= 30).int().expand(2, 140)
    options = {"max_new_tokens": 4, "do_sample": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_position_embeddings")
        found = model.generate(ids, attention_mask=mask, **options)[:, 140:]
    assert torch.equal(found, model.generate(ids[:, 30:], **options)[:, 110:])
    with pytest.raises(ValueError, match="got 139"):
        model.generate(ids, attention_mask=(torch.arange(140) >= 1).int().expand(2, 140), **options)


def test_a_decoder_without_limit_takes_any_length(tiny_model):
    model = tiny_model(text_options={"sliding_window": 16}).eval()
    ids = torch.full((1, LIMIT + 10), 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_position_embeddings")
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, LIMIT + 12)
        model(input_ids=ids)


def test_a_run_names_what_is_longer(tmp_path, tiny_config):
    data = write_data(tmp_path)
    write_model(tmp_path, tiny_config)
    with pytest.raises(ValueError, match=r"data.max_length must be at most 128, text_config.max_.*, got 129"):
        build_trainer(load_recipe(write_recipe(tmp_path, "a", data__max_length=129)))
    lines = data.read_text().splitlines()
    lines[9] = lines[9].replace('"red red "', '"' + "red " * 200 + '"')
    data.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"data.max_length must be given, at most 128, .*, got \d+ tokens in record 9"
    ):
        build_trainer(load_recipe(write_recipe(tmp_path, "b")))
    trainer = build_trainer(load_recipe(write_recipe(tmp_path, "c", data__max_length=128)))
    assert trainer.lengths.max() == 128
    with pytest.raises(ValueError, match=r"records of packed rows must have at most 128, .*in record 9"):
        build_trainer(load_recipe(write_recipe(tmp_path, "d", data__max_length=512, data__packing=True)))
    data.write_text("\n".join(lines[:9]))
    packed = build_trainer(load_recipe(write_recipe(tmp_path, "e", data__max_length=512, data__packing=True)))
    assert packed.lengths.max() > 128
    packed.compute_loss(packed.model.train(), packed.data_collator([packed.train_dataset[0]]))
