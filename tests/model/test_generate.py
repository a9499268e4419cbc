"""Generation with the interface of transformers: batches, several images, caches, beams, streaming."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, MixtralForCausalLM, TextIteratorStreamer
from transformers.generation import configuration_utils as caches

from cumo_kernels.hostsync import no_host_sync
from cumo_model.demo.tokenizer import train_tokenizer
from tests.rounding import assert_close_after

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
    options = {**OPTIONS, "disable_compile": True}
    options |= {} if cache == "dynamic" else {"cache_implementation": "static"}
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
    lengths, each = {}, [{}, {}]
    if with_lengths:  # the picture of row 0 is cut to its first four tokens
        for row in (ids, alone[0]):
            row[0, (row[0] == 60).nonzero()[4:, 0]] = 7
        lengths = {"image_lengths": torch.tensor([4, 9, 9])}
        each = [{"image_lengths": lengths["image_lengths"][part]} for part in (slice(1), slice(1, 3))]
    together = model.generate(ids, attention_mask=mask, pixel_values=torch.cat(pixels), **lengths, **options)
    assert together.shape[0] == 4
    for i, row in enumerate(alone):
        single = model.generate(row, pixel_values=pixels[i], **each[i], **options)
        assert torch.equal(together[2 * i : 2 * i + 2, ids.shape[1] :], single[:, row.shape[1] :]), i


def test_streaming_gives_the_text_piece_by_piece(tiny_model):
    tokenizer = train_tokenizer(["what is it?", "a red apple"] * 20, 320)
    model = tiny_model(text_options={"vocab_size": 320}, image_token_index=3).eval()
    ids = tokenizer("what is it?", return_tensors="pt")["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(ids, streamer=streamer, **{**OPTIONS, "bad_words_ids": [[3]]})
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])


# the released language models: all layers attend to all tokens
RELEASED = {"sliding_window": None, "pad_token_id": 0, "max_position_embeddings": 64}


def compiled_as_on_a_gpu(counter):
    """With this transformers compiles decoding with a static cache on a CPU too, as one graph."""
    backend = lambda graph, inputs: counter(graph, inputs)  # generate copies an object, but not a function
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("vision_experts", [4, 1])
@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_compiled_decoding_gives_the_tokens_of_the_dynamic_cache(tiny_model, text, vision_experts):
    """One graph for all tokens and all calls; left-padded rows with zero to two images."""
    torch._dynamo.reset()
    model = tiny_model(text=text, vision_experts=vision_experts, text_options=RELEASED).eval()
    ids, mask, _, pixels = rows([1, 2, 0], [3, 1, 8])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels)}
    counter = CompileCounterWithBackend("aot_eager")
    options = {"cache_implementation": "static", "compile_config": compiled_as_on_a_gpu(counter)}
    options |= {"max_cache_len": 64}
    wanted = model.generate(**inputs, **OPTIONS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **options, **OPTIONS), wanted)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def result(call):
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", caches.ALL_CACHE_IMPLEMENTATIONS)
def test_every_cache_of_transformers(tiny_model, cache, beams):
    """Mixtral of transformers has the same errors: some caches need streams of a GPU or another package."""
    torch._dynamo.reset()
    model = tiny_model(text="mixtral", text_options=RELEASED).eval()
    ids, mask, _, pixels = rows([1, 2], [3, 1])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(pixels), "num_beams": beams}
    counter = CompileCounterWithBackend("eager")
    options = {"cache_implementation": cache, "compile_config": compiled_as_on_a_gpu(counter), **OPTIONS}
    found, frames = result(lambda: model.generate(**inputs, **options)), counter.frame_count
    plain = MixtralForCausalLM(model.config.text_config).eval()
    del options["compile_config"]  # it would compile experts of transformers
    if isinstance(error := result(lambda: plain.generate(torch.tensor([[5, 6]]), **options)), Exception):
        assert type(found) is type(error) and str(found) == str(error)
        return
    assert torch.equal(found, model.generate(**inputs, **OPTIONS))
    # "hybrid" stands for the dynamic cache, and transformers does not compile beam search
    is_static = cache in caches.ALL_STATIC_CACHE_IMPLEMENTATIONS and cache != "hybrid"
    assert frames == (beams == 1 and is_static)
    torch._dynamo.reset()


def test_embedding_a_decoded_token_needs_no_host_sync(tiny_model):
    """Neither the id nor the length of a static cache, which is a tensor, is read."""
    model = tiny_model().eval().model
    with torch.no_grad(), no_host_sync():
        model._embed(torch.tensor([[7]]), None, None, None, None, True, False, 0)


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
