"""What a vision-language model of transformers promises its users, on small models with pictures.

The common tests of transformers (`make test-transformers`) check more, but need a checkout.
"""

import pytest
import torch
from transformers.utils import ModelOutput

IMAGE = 3  # within the vocabulary, so that it has an embedding


@pytest.fixture
def contract(tiny_model, tiny_batch):
    """Factory: a model in evaluation mode, and a batch without labels; the image tokens have the id IMAGE."""

    def make(text="mistral", **options):
        options = {"image_token_index": IMAGE, "text_options": {"eos_token_id": None}, **options}
        model, batch = tiny_model(text=text, **options).eval(), tiny_batch()
        del batch["labels"]
        ids = batch["input_ids"]
        batch["input_ids"] = torch.where(ids >= 50, IMAGE, ids.masked_fill(ids == IMAGE, 4))
        return model, batch

    return make


TEXTS = pytest.mark.parametrize("text", ["mistral", "mixtral"])


@TEXTS
def test_embeddings_take_the_place_of_ids(contract, text):
    model, batch = contract(text)
    wanted = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **batch).logits, wanted)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch)


@TEXTS
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_from_embeddings_is_generation_from_ids(contract, text, beams):
    model, batch = contract(text)
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    wanted = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **batch, **options), wanted)


@pytest.mark.parametrize("same", [True, False])
def test_assisted_decoding_gives_the_greedy_answer(contract, same):
    model, batch = contract()
    row = {name: value[:1] for name, value in batch.items()}
    assistant = model if same else contract(vision_experts=1)[0]
    wanted = model.generate(**row, max_new_tokens=6, do_sample=False)
    got = model.generate(**row, max_new_tokens=6, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, wanted)


def test_image_features_are_an_output(contract):
    """One tensor per picture in pooler_output; the tower's states and attentions; a tuple on request."""
    model, batch = contract(scales=(1,))
    model.set_attn_implementation("eager")
    found = model.get_image_features(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    assert isinstance(found, ModelOutput) and [part.shape for part in found.pooler_output] == [(9, 24)] * 2
    assert torch.equal(torch.stack(list(found.pooler_output)), model(**batch).image_hidden_states)
    tower = model.model.vision_tower(
        batch["pixel_values"], feature_layer=-2, output_hidden_states=True, output_attentions=True
    )
    assert torch.equal(found.last_hidden_state, tower.last_hidden_state)
    assert len(found.hidden_states) == 4 and len(found.attentions) == 3
    assert all(map(torch.equal, found.hidden_states, tower.hidden_states))
    assert all(map(torch.equal, found.attentions, tower.attentions))
    first, pictures = model.get_image_features(batch["pixel_values"], return_dict=False)
    assert torch.equal(first, found.last_hidden_state)
    assert all(map(torch.equal, pictures, found.pooler_output))


@TEXTS
@pytest.mark.parametrize("by_config", [True, False])
def test_a_tuple_has_the_fields_of_the_output_in_order(contract, text, by_config):
    model, batch = contract(text)
    options = {"output_hidden_states": True}
    wanted = model(**batch, **options)
    if by_config:
        model.config.return_dict = False
    else:
        options["return_dict"] = False
    got = model(**batch, **options)
    assert isinstance(got, tuple) and torch.equal(got[0], wanted.logits)
    assert len(got) == len(wanted.to_tuple())
    hidden = got[list(wanted.keys()).index("hidden_states")]
    assert all(map(torch.equal, hidden, wanted.hidden_states))
