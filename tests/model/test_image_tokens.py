"""Anyres: pictures of several tiles, merged as in LLaVA-1.6, from the processor to generation."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from cumo_model import (
    CumoConfig,
    CumoForConditionalGeneration,
    build_processor,
    convert,
    step0_difference,
    upcycle,
)
from cumo_model.checkpoints.shards import Shards
from cumo_model.checkpoints.upcycle_checkpoint import probe
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.model.image_tokens import MERGES, PictureLayout, as_tiles
from cumo_model.processing.processor import image_seq_length
from tests.model import original
from tests.rounding import assert_same_formula, assert_spread

PINPOINTS = [
    [12, 24],
    [24, 12],
    [24, 24],
    [36, 12],
    [12, 36],
]  # tiles have 12 pixels, 3 x 3 patches
SIZES = [(12, 12), (20, 31), (31, 20), (7, 60), (60, 7), (24, 24), (13, 12), (100, 99)]


def layout(merge, pinpoints=PINPOINTS):
    return PictureLayout(side=12, grid=3, tile_tokens=9, merge=merge, pinpoints=pinpoints)


def literal_spatial(features, rows, columns):
    """llava_arch.py of LLaVA-1.6, without unpad: [tile row, patch row, tile column, patch column]."""
    tiles = features[1:].view(rows, columns, 3, 3, -1)
    return torch.cat([features[0], tiles.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 3)])


def tokens_of_llava_next(size, pinpoints, side, patch):
    counter = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=patch,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *args: LlavaNextProcessor._get_unpadded_features(None, *args),
    )
    return LlavaNextProcessor._get_number_of_features(counter, *size, side, side)


@pytest.mark.parametrize("pinpoint, size", [([336, 672], (88, 55)), ([672, 336], (55, 88))])
def test_a_side_of_whole_patches_is_not_rounded_down(pinpoint, size):
    """55 * (24 / 88) is 15, but less in fp64."""
    found = PictureLayout(336, 24, 576, "spatial_unpad", [pinpoint])
    assert found.tokens(size) == tokens_of_llava_next(size, [pinpoint], 336, 14)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_of_llava_next_and_in_its_order(size):
    own = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=CLIPVisionConfig(image_size=12, patch_size=4), image_grid_pinpoints=PINPOINTS
        )
    )
    spatial, unpadded = layout("spatial"), layout("spatial_unpad")
    features, newline = torch.randn(unpadded.tiles(size), 9, 5), torch.randn(5)
    (wanted,), (count,) = LlavaNextModel.pack_image_features(
        own, [features], torch.tensor([size]), "default", newline
    )
    assert torch.equal(unpadded.arrange(features, size, newline), wanted)
    assert unpadded.tokens(size) == count == len(wanted)
    assert unpadded.tokens(size) == tokens_of_llava_next(size, PINPOINTS, 12, 4)

    rows, columns = spatial._shape(size)
    assert torch.equal(spatial.arrange(features, size, None), literal_spatial(features, rows, columns))
    assert torch.equal(layout("flat").arrange(features, size, None), features.flatten(0, 1))
    assert spatial.tokens(size) == layout("flat").tokens(size) == 9 * len(features)


def test_a_picture_of_one_tile_ends_with_a_newline_if_any():
    features, newline = torch.randn(1, 9, 5), torch.randn(5)
    (wanted,), _ = LlavaNextModel.pack_image_features(
        None, [features], torch.tensor([[9, 9]]), "default", newline
    )
    assert torch.equal(layout("spatial_unpad").arrange(features, None, newline), wanted)
    assert layout("spatial_unpad").tokens(None) == 10
    assert torch.equal(layout("spatial").arrange(features, None, None), features[0])


@pytest.mark.parametrize("size", [None, (20, 31)])
def test_tokens_have_the_dtype_of_the_features(size):
    places = layout("spatial_unpad")
    features, newline = torch.randn(places.tiles(size), 9, 5).bfloat16(), torch.randn(5)
    tokens = places.arrange(features, size, newline)
    assert tokens.dtype == torch.bfloat16
    assert any(torch.equal(row, newline.bfloat16()) for row in tokens)
    if size is None:
        assert torch.equal(places.arrange_single(features, newline), tokens[None])


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it?", "a red apple", "which is larger?"] * 20, 320)


@pytest.fixture
def anyres(tiny_model, tokenizer):
    """Factory: merge -> a model and its processor."""

    def make(merge, **options):
        model = tiny_model(
            text_options={"vocab_size": 320, "pad_token_id": 0, "eos_token_id": None,
                          "max_position_embeddings": 512},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            patch_merge_type=merge,
            image_grid_pinpoints=PINPOINTS,
            **options,
        )  # fmt: skip
        processor = build_processor(
            tokenizer,
            12,
            4,
            image_aspect_ratio="anyres",
            patch_merge_type=merge,
            image_grid_pinpoints=PINPOINTS,
        )
        return model.eval(), processor

    return make


@pytest.mark.parametrize("merge", MERGES)
def test_pictures_of_any_sizes_several_to_a_prompt_reach_their_places(anyres, merge):
    """The model on the processor's batch equals the language model on manually merged features."""
    model, processor = anyres(merge)
    pictures = [picture(size, i) for i, size in enumerate([(20, 31), (60, 7), (12, 12)])]
    text = ["<image>what <image>is it?", "a <image>red apple"]
    batch = processor(images=pictures, text=text, padding=True, padding_side="left", return_tensors="pt")
    assert ("image_sizes" in batch) == (merge != "flat")
    places, token = layout(merge), processor.image_token_id
    tiles = [places.tiles(p.size[::-1]) for p in pictures]
    told = processor._get_num_multimodal_tokens(image_sizes=[p.size[::-1] for p in pictures])
    assert told["num_image_patches"] == tiles
    assert batch["pixel_values"].shape == (sum(tiles), 3, 12, 12)
    features = model.model._encode_tiles(batch["pixel_values"]).pooler_output.split(tiles)
    arranged = [
        places.arrange(part, p.size[::-1], model.model.image_newline)
        for part, p in zip(features, pictures, strict=True)
    ]
    counts = (batch["input_ids"] == token).sum(1).tolist()
    assert counts == [len(arranged[0]) + len(arranged[1]), len(arranged[2])]
    assert told["num_image_tokens"] == [len(p) for p in arranged]
    embeds = model.get_input_embeddings()(batch["input_ids"]).clone()
    embeds[batch["input_ids"] == token] = torch.cat(arranged)
    wanted = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(model(**batch).logits[real], wanted[real])


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_from_tiles_is_the_same_alone_and_in_a_batch(anyres, merge, beams):
    model, processor = anyres(merge)
    sizes = [[(20, 31), (60, 7)], [(12, 12)], []]
    rows = [[picture(size, i) for i, size in enumerate(row)] for row in sizes]
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": p} for p in row),
                    {"type": "text", "text": "what is it?"},
                ],
            }
        ]
        for row in rows
    ]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}

    def inputs(conversations):
        return processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    batch = inputs(conversations)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, conversation in enumerate(conversations):
        single = inputs([conversation])
        alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert torch.equal(alone, together[row]), row


@pytest.mark.usefixtures("fp64")
def test_the_newline_learns_and_is_kept(anyres, tmp_path):
    model, processor = anyres("spatial_unpad", vision_experts=1, projector_num_experts=1)
    batch = processor(images=[picture((20, 31))], text="<image>a red apple", return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    model.train()(**batch).loss.backward()
    assert model.model.image_newline.grad.abs().sum() > 0
    moe = upcycle(model)
    assert torch.equal(moe.model.image_newline, model.model.image_newline)
    largest = model(**probe(model)).logits.abs().max()
    assert_same_formula(largest + step0_difference(model, moe, probe(model)), largest)
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    second = AutoProcessor.from_pretrained(tmp_path)(
        images=[picture((20, 31))], text="<image>a red apple", return_tensors="pt"
    )
    assert all(torch.equal(second[name], batch[name]) for name in second)
    batch.pop("labels")
    assert torch.equal(again.eval()(**second).logits, model(**batch).logits)


def test_training_data_have_one_tile_a_picture(anyres, tokenizer):
    """Data sets need the same number of tokens for each picture."""
    with pytest.raises(ValueError, match=r"image_aspect_ratio must be pad or square .* got 'anyres'"):
        image_seq_length(anyres("flat")[1])
    assert image_seq_length(build_processor(tokenizer, 12, 4, patch_merge_type="spatial_unpad")) == 10
    assert image_seq_length(build_processor(tokenizer, 12, 4)) == 9


def test_a_new_newline_has_the_size_of_a_token(tiny_config):
    model = CumoForConditionalGeneration(
        tiny_config(patch_merge_type="spatial_unpad", text_options={"hidden_size": 512, "vocab_size": 8})
    )
    assert_spread(model.model.image_newline, 512**-0.5)
    for merge in ("flat", "spatial"):
        model = CumoForConditionalGeneration(tiny_config(patch_merge_type=merge))
        assert model.model.image_newline is None


@pytest.mark.parametrize("written", ["text", "list"])
def test_the_original_layout_keeps_anyres_both_ways(tmp_path, tokenizer, written):
    """Released pinpoints are (width, height); a wide picture must use a wide grid."""
    values = original.tensors() | {"model.image_newline": torch.randn(24)}
    original.write(tmp_path / "theirs", values)
    path = tmp_path / "theirs/config.json"
    theirs = json.loads(path.read_text()) | {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "[(24, 12), (36, 12)]" if written == "text" else [[24, 12], [36, 12]],
    }
    path.write_text(json.dumps(theirs))
    tokenizer.save_pretrained(tmp_path / "theirs")
    model = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert torch.equal(model.model.image_newline, values["model.image_newline"])
    assert model.config.image_grid_pinpoints == [[12, 24], [12, 36]]
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    batch = processor(images=[picture((14, 40))], text="<image>", return_tensors="pt")
    assert batch["pixel_values"].shape[0] == 4 and batch["image_sizes"].tolist() == [[14, 40]]
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", progress=False)
    found = Shards(tmp_path / "back")
    assert found.shapes.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert (back["mm_patch_merge_type"], back["image_aspect_ratio"]) == ("spatial_unpad", "anyres")
    assert back["image_grid_pinpoints"] == [[24, 12], [36, 12]]


def test_lists_and_stacks_of_tiles_are_tiles(tiny_model, tiny_batch):
    model, batch = tiny_model().eval(), tiny_batch()
    pixels = batch.pop("pixel_values")
    wanted = model(**batch, pixel_values=pixels)
    for form in (list(pixels), [pixels[:1], pixels[1]], [pixels], pixels[:, None]):
        found = model(**batch, pixel_values=form)
        assert torch.equal(found.logits, wanted.logits)
    ids = batch["input_ids"]
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, pixel_values=list(pixels), **options),
        model.generate(ids, pixel_values=pixels, **options),
    )
    for bad, message in (
        ([pixels[0], "a.png"], r"list of \(3, s, s\) or \(tiles, 3, s, s\), got \[\(3, 12, 12\), 'str'\]"),
        ([pixels[0], torch.zeros(3, 12, 16)], r"tiles of one size .*got \[\(3, 12, 12\), \(3, 12, 16\)\]"),
    ):
        with pytest.raises(ValueError, match=message):
            as_tiles(bad)


def test_what_does_not_fit_is_named(anyres, tiny_config, tiny_model, tiny_batch):
    model, processor = anyres("spatial_unpad")
    pictures = [picture((20, 31)), picture((60, 7))]
    text, options = ["<image>a", "<image>b"], {"padding": True, "padding_side": "left"}
    batch = processor(images=pictures, text=text, return_tensors="pt", **options)
    tiles, tokens = (
        [getattr(layout("spatial_unpad"), what)(p.size[::-1]) for p in pictures]
        for what in ("tiles", "tokens")
    )
    total = sum(tokens)
    words = rf"pixel_values must have {sum(tiles)} tiles for the 2 image_sizes, got {sum(tiles) + 1}"
    with pytest.raises(ValueError, match=words):
        model(**{**batch, "pixel_values": torch.zeros(sum(tiles) + 1, 3, 12, 12)})
    assert tokens[0] != tokens[1]
    with pytest.raises(
        ValueError, match=r"must have whole pictures, of \[27, 37\] image tokens, .* got 37 in row 0"
    ):
        model(**{**batch, "image_sizes": batch["image_sizes"].flip(0)})
    short = copy.deepcopy(dict(batch))
    place = (short["input_ids"] == processor.image_token_id).nonzero()[0]
    short["input_ids"][tuple(place)] = 9
    with pytest.raises(ValueError, match=rf"must have {total} image tokens .* got {total - 1}"):
        model(**short)
    plain = tiny_model(patch_merge_type="spatial").eval()
    with pytest.raises(ValueError, match="image_sizes must come with a config that has image_grid_pinpoints"):
        plain(**tiny_batch(), image_sizes=torch.tensor([[12, 12], [12, 12]]))
    for options, message in (
        ({"image_grid_pinpoints": [[12, 30]]}, r"multiples of the image_size 12, got \[\[12, 30\]\]"),
        ({"image_grid_pinpoints": []}, r"got \[\]"),
        (
            {
                "scales": (1,),
                "vision_feature_select_strategy": "full",
                "patch_merge_type": "spatial",
            },
            "unless patch_merge_type is 'flat'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(**options)


@pytest.mark.usefixtures("fp64")
def test_lengths_cut_a_picture_of_tiles(anyres):
    """The original code also truncates rows after the pictures are inserted."""
    model, processor = anyres("spatial_unpad")
    batch = processor(images=[picture((20, 31))], text="<image>", return_tensors="pt")
    full = model(**batch).logits
    keep = batch["input_ids"].shape[1] - 5
    cut = model(
        input_ids=batch["input_ids"][:, :keep],
        pixel_values=batch["pixel_values"],
        image_sizes=batch["image_sizes"],
        image_lengths=torch.tensor([int((batch["input_ids"][:, :keep] == processor.image_token_id).sum())]),
    ).logits
    assert_same_formula(cut, full[:, :keep])


def test_config_survives(tmp_path):
    config = CumoConfig(patch_merge_type="spatial", image_grid_pinpoints=[[336, 672]])
    config.save_pretrained(tmp_path)
    assert CumoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.picture_layout.tokens((336, 672)) == 3 * 576
