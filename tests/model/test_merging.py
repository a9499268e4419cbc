"""Which features take which places: dummy pictures, cut pictures, newlines, and the class token."""

import pytest
import torch

from tests.model.conftest import IMAGE_TOKEN
from tests.rounding import assert_same_formula

pytestmark = pytest.mark.usefixtures("fp64")


def rows(counts, tokens):
    """A row for each count: so many pictures of `tokens` placeholders, in the middle of words."""
    ids = torch.randint(3, 50, (len(counts), 4 + 2 * max(counts) * tokens))
    for row, count in enumerate(counts):
        ids[row, 2 : 2 + count * tokens] = IMAGE_TOKEN
    return ids


def all_different(number):
    """Pictures with a colour each, so that features of different pictures differ much."""
    return torch.randn(number, 3, 12, 12) + torch.arange(number).view(-1, 1, 1, 1)


@pytest.mark.parametrize("merge, tokens", [("flat", 9), ("spatial_unpad", 10)])
@pytest.mark.parametrize("cut", [False, True])
def test_dummy_pictures_are_the_last_and_have_no_place(tiny_model, merge, tokens, cut):
    """A batch of pictures and text: the features of the real pictures are at the placeholders, in order."""
    model = tiny_model(patch_merge_type=merge).eval()
    ids = rows([1, 0, 2], tokens)
    lengths = [tokens] * 3
    if cut:
        lengths = [5, tokens, 4]  # the first and the last are cut
        ids[0, 2 + 5 :] = ids[2, 2 + tokens + 4 :] = 7
    pixels = all_different(3)
    given = torch.cat([pixels, torch.zeros(2, 3, 12, 12)])
    pictures = model.get_image_features(pixels).pooler_output
    embeds = model.get_input_embeddings()(ids.masked_fill(ids == IMAGE_TOKEN, 0))
    embeds[ids == IMAGE_TOKEN] = torch.cat([p[:n] for p, n in zip(pictures, lengths, strict=True)])
    options = {"image_lengths": torch.tensor(lengths)} if cut else {}
    out = model.model(ids, given, num_dummy_images=2, embed_only=True, **options)
    assert_same_formula(out.last_hidden_state, embeds)
    logits = model(ids, given, num_dummy_images=2, **options).logits
    assert_same_formula(logits, model(inputs_embeds=embeds).logits)


def test_dummy_pictures_count_in_the_router_losses_and_learn_nothing_else(tiny_model):
    model = tiny_model().train()
    ids, given = rows([1, 0], 9), all_different(2).requires_grad_()
    out = model(ids, given, num_dummy_images=1, labels=ids, output_router_stats=True)
    assert out.router_stats["clip"]["mean_probs"].shape[1] == 2 * 10  # crops
    assert out.router_stats["mlp"]["mean_probs"].shape[1] == 2
    language, aux = (
        torch.autograd.grad(loss, given, retain_graph=True)[0]
        for loss in (out.loss - out.aux_loss, out.aux_loss)
    )
    assert language[0].any() and not language[1].any() and aux[0].any() and aux[1].any()


@pytest.mark.parametrize("token", [0, 7, 49])
def test_a_place_is_where_the_whole_embedding_is_that_of_the_image_token(tiny_model, token):
    """Also without ids: words that share some of its coordinates are words."""
    model = tiny_model(image_token_index=token).eval().model
    words = model.get_input_embeddings().weight
    embeds = torch.randn(2, 3, 24)
    embeds[0, 0, :23] = words[token, :23]
    embeds[0, 1] = embeds[1, 2] = words[token]
    assert model.is_image(None, embeds).tolist() == [[False, True, False], [False, False, True]]
    ids = torch.tensor([[token, 5, token], [token, token, 5]])
    assert torch.equal(model.is_image(ids, embeds), ids == token)  # ids tell where both are given


@pytest.mark.parametrize("token", [-1, 50])
def test_places_of_a_token_that_is_no_word_need_ids(tiny_model, token):
    with pytest.raises(ValueError, match=f"their id {token} has no embedding in a vocabulary of 50"):
        tiny_model(image_token_index=token).model.is_image(None, torch.randn(2, 3, 24))


@pytest.mark.parametrize("layer", [0, 2, [1, 0], None])
@pytest.mark.parametrize("strategy", ["default", "full", None])
def test_the_options_of_a_call_come_before_those_of_the_config(tiny_model, layer, strategy):
    """The hidden states of the layers, with or without the class token, which is the first of ten."""
    model = tiny_model(scales=(1,), vision_feature_layer=[3, 1] if layer == [1, 0] else -2).eval()
    pixels = all_different(2)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = [-2] if layer is None else layer if isinstance(layer, list) else [layer]
    wanted = torch.cat([states[i] for i in layers], -1)
    given = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    found = model.get_image_features(pixels, **given)
    wanted = wanted if strategy == "full" else wanted[:, 1:]
    assert_same_formula(torch.stack(found.pooler_output), model.model.multi_modal_projector(wanted))


def test_ids_are_ignored_where_they_mark_nothing(tiny_model):
    """As generate gives them: empty beside embeddings, and without a picture."""
    model = tiny_model(image_token_index=7).eval().model
    ids = rows([1, 2], 9)
    ids = ids.masked_fill(ids == 7, 8).masked_fill(ids == IMAGE_TOKEN, 7)
    embeds, pixels = model.get_input_embeddings()(ids), all_different(3)
    wanted = model.embed(ids, None, pixels)
    assert torch.equal(model.embed(ids, embeds, pixels), wanted)
    for other in (None, ids[:, :0], ids[:, :3]):
        assert torch.equal(model.embed(other, embeds, pixels), wanted)
    for none in (None, []):
        assert torch.equal(model.embed(ids, embeds, none), embeds)


def test_a_batch_of_text_has_dummies_alone(tiny_model):
    model = tiny_model().eval()
    ids = rows([0, 0], 9)
    found = model(ids, torch.zeros(2, 3, 12, 12), num_dummy_images=2).logits
    assert_same_formula(found, model(ids).logits)
