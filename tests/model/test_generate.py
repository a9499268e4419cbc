"""Generation with the interface of transformers: batches, several images, caches, beams, streaming."""

import pytest
import torch
from transformers import TextIteratorStreamer

from cumo_model.demo.tokenizer import train_tokenizer
from tests.rounding import assert_close_after, assert_same_sums, rounding_of

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def rows(images, lengths):
    """Rows with the given numbers of images: left-padded ids, mask, each row separately, and its pixels."""
    generator = torch.Generator().manual_seed(4)
    alone, pixels = [], []
    for count, length in zip(images, lengths, strict=True):
        pieces = [torch.randint(3, 50, (2,), generator=generator)]
        for _ in range(count):
            pieces += [torch.full((9,), 60), torch.randint(3, 50, (1,), generator=generator)]
        pieces.append(torch.randint(3, 50, (length,), generator=generator))
        alone.append(torch.cat(pieces)[None])
        pixels.append(torch.randn(count, 3, 12, 12, generator=generator))
    width = max(row.shape[1] for row in alone)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(row, (width - row.shape[1], 0)) for row in alone])
    mask = torch.cat([pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in alone])
    return ids, mask, alone, pixels


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch_with_zero_to_two_images_a_row(tiny_model, text, cache):
    model = tiny_model(text=text, text_options={"pad_token_id": 0, "max_position_embeddings": 64}).eval()
    ids, mask, alone, pixels = rows([1, 2, 0], [3, 1, 8])
    options = OPTIONS if cache == "dynamic" else {**OPTIONS, "cache_implementation": "static"}
    options["disable_compile"] = True
    together = model.generate(ids, attention_mask=mask, pixel_values=torch.cat(pixels), **options)
    for i, row in enumerate(alone):
        inputs = {"pixel_values": pixels[i]} if len(pixels[i]) else {}
        single = model.generate(row, **inputs, **OPTIONS)
        assert torch.equal(together[i, ids.shape[1] :], single[0, row.shape[1] :]), i


@pytest.mark.parametrize("with_lengths", [False, True])
def test_beams_take_all_images_of_their_row_along(tiny_model, with_lengths):
    model = tiny_model(text_options={"pad_token_id": 0}).eval()
    ids, mask, alone, pixels = rows([1, 2], [3, 3])
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2}
    lengths = {"image_lengths": torch.tensor([9, 9, 9])} if with_lengths else {}
    together = model.generate(ids, attention_mask=mask, pixel_values=torch.cat(pixels), **lengths, **options)
    assert together.shape[0] == 4
    for i, row in enumerate(alone):
        single = model.generate(row, pixel_values=pixels[i], **options)
        assert torch.equal(together[2 * i : 2 * i + 2, ids.shape[1] :], single[:, row.shape[1] :]), i


def test_streaming_gives_the_text_piece_by_piece(tiny_model):
    tokenizer = train_tokenizer(["what is it?", "a red apple"] * 20, 320)
    model = tiny_model(text_options={"vocab_size": 320}, image_token_index=3).eval()
    ids = tokenizer("what is it?", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(ids, streamer=streamer, **{**OPTIONS, "bad_words_ids": [[3]]})
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])


def test_static_cache_step_compiles_without_a_break(tiny_model):
    """generate compiles this on a GPU: one decoding step with a static cache."""
    from transformers import StaticCache

    model = tiny_model(text="mixtral", text_options={"num_hidden_layers": 1, "max_position_embeddings": 64})
    model.eval()
    ids, _, _, pixels = rows([1], [3])
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    with torch.no_grad():
        first = model(input_ids=ids, pixel_values=pixels[0], past_key_values=cache, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        step = torch.compile(model.model.language_model, backend="aot_eager", fullgraph=True)
        position = torch.tensor([[ids.shape[1]]])
        embeds = model.get_input_embeddings()(token)
        compiled = step(inputs_embeds=embeds, past_key_values=cache, position_ids=position, use_cache=True)
        again = lambda: model(input_ids=torch.cat([ids, token], 1), pixel_values=pixels[0]).logits[:, -1]
        assert_same_sums(model.lm_head(compiled.last_hidden_state)[:, -1], again(), rounding_of(again))
    torch._dynamo.reset()


def test_router_statistics_on_request(tiny_model, tiny_batch):
    model = tiny_model(text="mixtral").eval()
    batch = tiny_batch()
    assert model(**batch).router_stats is None
    stats = model(**batch, output_router_stats=True).router_stats
    layers = {
        "mlp": (1, 2),
        "clip": (2, 20),
        "llm": (2, 1),
    }  # layers that ran, groups; 2 images at 1 + 9 crops
    assert stats.keys() == layers.keys()
    tokens = {"mlp": 2 * 9, "clip": 20 * 10, "llm": 40}
    for place, (L, G) in layers.items():
        found = stats[place]
        assert found["mean_probs"].shape == found["top1_density"].shape == (L, G, 4)
        assert found["mean_squared_logsumexp"].shape == (L, G)
        assert found["tokens_per_expert"].sum(1).tolist() == [2 * tokens[place]] * L
        # four rounded shares and three rounded additions
        assert_close_after(4, found["top1_density"].sum(-1), torch.ones(L, G))
        assert not found["mean_probs"].requires_grad
