"""CumoForConditionalGeneration with the interface of transformers: options, later turns, labels on images."""

import pytest
import torch
from transformers import DynamicCache

from cumo_model import CumoForConditionalGeneration
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula


def compats(model):
    model = model.model
    tower, llm = model.vision_tower.encoder.layers[0].mlp, model.language_model.layers[0].mlp
    return [tower.compat, model.multi_modal_projector.mlp.compat, llm.compat]


def test_compat_reaches_every_place_however_it_is_set(tiny_config, tiny_model, tmp_path):
    tiny_model(text="mixtral").save_pretrained(tmp_path)
    wanted = ["cumo", "cumo", "cumo_llm"]
    model = CumoForConditionalGeneration.from_pretrained(tmp_path, compat="cumo")
    assert compats(model) == wanted
    config = tiny_config(text="mixtral")
    config.compat = "cumo"
    assert compats(CumoForConditionalGeneration(config)) == wanted
    model.save_pretrained(tmp_path / "again")
    assert compats(CumoForConditionalGeneration.from_pretrained(tmp_path / "again")) == wanted
    assert (
        compats(CumoForConditionalGeneration.from_pretrained(tmp_path / "again", compat=None)) == [None] * 3
    )


@pytest.mark.parametrize("skip_logits", [False, True])
def test_image_tokens_in_labels_count_for_nothing(tiny_model, tiny_batch, skip_logits):
    model, batch = tiny_model().eval(), tiny_batch()
    labels = batch["input_ids"].clone()
    careful = labels.masked_fill(labels == model.config.image_token_index, -100)
    losses = [model(**batch | {"labels": x}, skip_logits=skip_logits).loss for x in (labels, careful)]
    assert torch.equal(*losses) and losses[0] > 0


def test_pixels_forgotten_in_a_further_turn_are_missed(tiny_model, tiny_batch):
    batch = tiny_batch()
    model = tiny_model(image_token_index=2).eval()  # inside the vocabulary, so it has an embedding
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 60, 2)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    first = model.generate(ids, pixel_values=batch["pixel_values"], return_dict_in_generate=True, **options)
    turn = torch.cat([first.sequences, ids], 1)
    with pytest.raises(ValueError, match=r"pixel_values must come with .* got none for 18"):
        model.generate(turn, past_key_values=first.past_key_values, **options)


def test_the_cache_goes_by_either_name(tiny_model, tiny_batch):
    model, batch = tiny_model().eval(), tiny_batch()
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    logits = []
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config.text_config)
        model(ids, pixel_values=pixels, use_cache=True, **{name: cache})
        assert cache.get_seq_length() == ids.shape[1]
        logits.append(model(ids[:, -1:], use_cache=True, **{name: cache}).logits)
        assert cache.get_seq_length() == ids.shape[1] + 1
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="one argument under two names, got both"):
        model(ids, pixel_values=pixels, cache=cache, past_key_values=cache)


def test_generate_takes_the_cache_by_either_name(tiny_model, tiny_batch):
    model, batch = tiny_model().eval(), tiny_batch()
    options = {"pixel_values": batch["pixel_values"], "max_new_tokens": 3, "do_sample": False}
    options["eos_token_id"] = None
    wanted, found = model.generate(batch["input_ids"], **options), []
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config.text_config)
        found.append(model.generate(batch["input_ids"], **options, **{name: cache}))
        assert cache.get_seq_length() == batch["input_ids"].shape[1] + 2
    assert all(torch.equal(tokens, wanted) for tokens in found)
    with pytest.raises(ValueError, match="one argument under two names, got both"):
        model.generate(batch["input_ids"], cache=cache, past_key_values=cache)


def test_missing_pixels_are_named(tiny_model, tiny_batch):
    model, batch = tiny_model().eval(), tiny_batch()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match=r"pixel_values must come with .*\(id 60\) .* got none for 18"):
        model(**batch)


@pytest.mark.usefixtures("fp64")
def test_skipping_logits_changes_no_gradient(tiny_model, tiny_batch):
    model, batch = tiny_model().train(), tiny_batch()
    grads = []
    for skip in (False, True):
        model.zero_grad()
        output = model(**batch, skip_logits=skip)
        output.loss.backward()
        grads.append({"loss": output.loss, **gradients(model)})
    assert output.logits is None
    assert_same_formula(*grads)
    batch["labels"].fill_(-100)
    assert model.eval()(**batch, skip_logits=True).loss == 0
