"""CumoForConditionalGeneration with the interface of transformers: options, later turns, labels on images."""

import pytest
import torch
from transformers import DynamicCache

from cumo_model import CumoForConditionalGeneration, record_routing
from cumo_model.model.compat import CACHE, cache_of
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


def test_the_cache_is_returned_in_evaluation_or_on_request(tiny_model, tiny_batch):
    batch = tiny_batch()
    for training in (True, False):
        model = tiny_model().train(training)
        for asked, wanted in ((None, not training), (True, True), (False, False)):
            assert (cache_of(model(**batch, use_cache=asked))[CACHE] is not None) == wanted


def test_only_the_kept_positions_get_logits(tiny_model, tiny_batch):
    """A number of last positions, or their indices; 0 is all."""
    model, batch = tiny_model().eval(), tiny_batch()
    del batch["labels"]
    runs = []
    model.lm_head.register_forward_pre_hook(lambda module, args: runs.append(args[0]))
    for kept, places in (
        (0, range(20)),
        (3, (17, 18, 19)),
        (1, (19,)),
        (torch.tensor([2, 11, 5]), (2, 11, 5)),
    ):
        out = model(**batch, logits_to_keep=kept, output_hidden_states=True)
        assert torch.equal(runs[-1], out.hidden_states[-1][:, list(places)])
        assert torch.equal(out.logits, model._head.logits(model.lm_head, runs[-1]))


def test_the_loss_of_evaluation_has_no_router_losses_also_when_they_are_returned(tiny_model, tiny_batch):
    model = tiny_model(text="mixtral").eval()
    out = model(**tiny_batch(), output_router_logits=True)
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    assert model(**batch).loss_parts is None and model(**batch).loss is None
    assert out.aux_loss > 0 and out.loss == out.loss_parts["language"] == model(**tiny_batch()).loss


def test_the_terms_of_the_loss_are_in_the_order_of_the_original(tiny_model, tiny_batch):
    """Sums depend on it: connector, tower, language model."""
    parts = tiny_model(text="mixtral").train()(**tiny_batch()).loss_parts
    terms = [f"{place}_{name}" for place in ("mlp", "clip", "llm") for name in ("balance", "z")]
    assert list(parts) == ["language", *terms]


def test_every_place_has_its_own_numbers_of_experts(tiny_model, tiny_batch):
    model = tiny_model(
        text="mixtral",
        vision_experts=5,
        vision={"num_experts_per_tok": 3},
        projector_num_experts=6,
        projector_num_experts_per_tok=1,
        text_options={"num_local_experts": 7, "num_experts_per_tok": 4},
    )
    with record_routing(logits=True) as records:
        model(**tiny_batch(), use_cache=False)
    found = {(r.place, r.layer): (r.logits.shape[1], r.routing.topk_indices.shape[1]) for r in records}
    tower, text = {("clip", i): (5, 3) for i in range(3)}, {("llm", i): (7, 4) for i in range(2)}
    assert found == tower | {("mlp", 0): (6, 1)} | text


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": True}, {"text_options": {"tie_word_embeddings": True}}]
)
def test_either_config_ties_the_embeddings(tiny_config, options):
    for given, tied in ((options, True), ({}, False)):
        model = CumoForConditionalGeneration(tiny_config(**given))
        assert model.config.tie_word_embeddings == tied
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_tower_and_decoder_may_have_different_dtypes(tiny_model, tiny_batch):
    model, batch = tiny_model().eval(), tiny_batch()
    for part in (model.model.language_model, model.lm_head):
        part.bfloat16()
    pictures = model.get_image_features(batch["pixel_values"]).pooler_output
    assert pictures[0].dtype == torch.float32
    embeds = model.model.embed(batch["input_ids"], None, batch["pixel_values"])
    assert torch.equal(embeds[batch["input_ids"] == 60], torch.cat(pictures).bfloat16())
    assert model(**batch).logits.dtype == torch.bfloat16
