"""The processor compared with the preprocessing of the original code; errors for unreadable pictures."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cumo_model import CumoConfig
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import chat_template, render, tokenize_conversation, tokenize_prompt
from cumo_model.processing.image_processor import CumoImageProcessor
from cumo_model.processing.pictures import load_image
from cumo_model.processing.processor import (
    CumoProcessor,
    aspect_of,
    build_processor,
    image_seq_length,
    load_tokenizer,
    processor_for,
    processor_from,
)
from cumo_model.processing.templates import TEMPLATES
from tests.model import original

PICTURES = Path(__file__).parents[2] / "fixtures" / "emoji"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
# roundings of an fp32 pixel: 1 / 255 and its product, the mean and the difference, the deviation and the
# quotient; no value is larger than 1 / STD
ROUNDING = 6 * np.finfo(np.float32).eps / 2 / STD.min()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it?", "a red apple", "\nwhat colour?", "red"] * 20, 320)


def _by_hand(image: Image.Image, size: int) -> np.ndarray:
    """Pad with (122, 116, 104), offset rounded down, resize bicubic, scale and normalise: (3, s, s)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("name", ["red-apple-wide.png", "banana-tall.png", "penguin-square.png"])
@pytest.mark.parametrize("size", [48, 56])
def test_pixels_match_the_original_steps(tokenizer, name, size):
    image = load_image(PICTURES / name)
    got = build_processor(tokenizer, size, 8).image_processor(image, return_tensors="np")["pixel_values"][0]
    expected = _by_hand(image, size)
    assert got.shape == (3, size, size)
    assert np.abs(got - expected).max() <= ROUNDING  # both use the same uint8 values


@pytest.mark.parametrize("template", ["mistral_instruct", "mistral_instruct_system"])
def test_chat_template_gives_the_training_ids(tokenizer, template):
    processor = build_processor(tokenizer, 48, 8, template=template)
    image = load_image(PICTURES / "penguin-square.png")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a red apple"}]},
        {"role": "user", "content": "what colour?"},
    ]
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a red apple"},
        {"from": "human", "value": "what colour?"},
    ]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(
        batch["input_ids"][0], tokenize_prompt(turns, tokenizer, template, image_seq_length(processor))
    )
    assert batch["pixel_values"].shape == (1, 3, 48, 48)


@pytest.mark.parametrize("strategy, tokens", [("default", 36), ("full", 37)])
def test_image_tokens(tokenizer, strategy, tokens):
    processor = build_processor(tokenizer, 48, 8, strategy)
    assert image_seq_length(processor) == tokens
    batch = processor(images=load_image(PICTURES / "penguin-square.png"), text="<image>", return_tensors="pt")
    assert (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum() == tokens


def test_save_and_auto_load(tokenizer, tmp_path):
    processor = build_processor(tokenizer, 48, 8)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is CumoProcessor and type(again.image_processor) is CumoImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CumoImageProcessor
    assert again.image_processor.image_aspect_ratio == "pad"
    image = load_image(PICTURES / "red-apple-wide.png")
    text = "<s>[INST] <image>\nwhat is it? [/INST]"
    first, second = (p(images=image, text=text, return_tensors="pt") for p in (processor, again))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert again.chat_template == processor.chat_template


def test_pictures_of_different_sizes_and_several_in_one_prompt(tokenizer):
    processor = build_processor(tokenizer, 48, 8)
    names = ["red-apple-wide.png", "banana-tall.png", "penguin-square.png"]
    pictures = [load_image(PICTURES / name) for name in names]
    assert len({picture.size for picture in pictures}) == 3
    text = ["<image>what <image>colour?", "red", "<image>"]
    batch = processor(images=pictures, text=text, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [72, 0, 36]
    alone = [processor.image_processor(p, return_tensors="pt")["pixel_values"] for p in pictures]
    assert torch.equal(batch["pixel_values"], torch.cat(alone))


def test_anyres_is_the_whole_picture_and_its_tiles(tokenizer):
    """As in LLaVA's anyres: the whole picture, then the tiles of the best grid on black, row by row."""
    processor = build_processor(
        tokenizer, 48, 8, image_aspect_ratio="anyres", image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]]
    )
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 120, 3), dtype=np.uint8))
    batch = processor(images=[wide, wide], text=["<image><image>"], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * 3 * 36
    pixels = batch["pixel_values"]
    assert pixels.shape == (6, 3, 48, 48) and torch.equal(pixels[:3], pixels[3:])

    def normalised(image):
        return ((np.asarray(image, np.float64) / 255 - MEAN) / STD).transpose(2, 0, 1)

    fitted = wide.resize((96, 48), Image.Resampling.BICUBIC)
    parts = [wide.resize((48, 48), Image.Resampling.BICUBIC)]
    parts += [fitted.crop((0, 0, 48, 48)), fitted.crop((48, 0, 96, 48))]
    for got, part in zip(pixels[:3], parts, strict=True):
        assert np.abs(got.numpy() - normalised(part)).max() <= ROUNDING


def test_square_cuts_and_other_words_are_refused(tokenizer):
    processor = build_processor(tokenizer, 48, 8, image_aspect_ratio="square")
    image = Image.new("RGB", (96, 48), (255, 0, 0))
    image.paste((0, 0, 255), (24, 0, 72, 48))
    pixels = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
    blue = ((np.array([0, 0, 1.0]) - MEAN) / STD)[:, None, None]
    assert np.abs(pixels[:, :, 4:-4] - blue).max() <= ROUNDING  # the red sides are cropped
    with pytest.raises(ValueError, match=r"image_aspect_ratio must be one of .* got 'stretch'"):
        build_processor(tokenizer, 48, 8, image_aspect_ratio="stretch")
    with pytest.raises(ValueError, match=r"image_aspect_ratio must be one of .* got 'stretch'"):
        processor.image_processor(image, image_aspect_ratio="stretch")


def test_processor_of_an_original_checkpoint(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    processor = processor_from(tmp_path, CumoConfig(original={"image_aspect_ratio": "square"}))
    assert processor.image_processor.image_aspect_ratio == "square"
    assert processor.tokenizer.pad_token_id == processor.tokenizer.unk_token_id == 0
    text = processor.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.startswith("<s><s>[INST] <<SYS>>\nA chat between") and image_seq_length(processor) == 576


def test_pictures_are_padded_where_nothing_is_said(tokenizer, tmp_path):
    """A processor, an image processor and a config without an aspect pad; any other word crops, as LLaVA."""
    wide = Image.new("RGB", (96, 48), (255, 0, 0))
    wide.paste((0, 0, 255), (24, 0, 72, 48))
    kinds = {
        ratio: build_processor(tokenizer, 48, 8, image_aspect_ratio=ratio) for ratio in ("pad", "square")
    }
    wanted = {
        ratio: processor.image_processor(wide, return_tensors="pt")["pixel_values"]
        for ratio, processor in kinds.items()
    }
    assert not torch.equal(wanted["pad"], wanted["square"])
    sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    for images in (build_processor(tokenizer, 48, 8).image_processor, CumoImageProcessor(**sizes)):
        assert images.image_aspect_ratio == "pad"
        assert torch.equal(images(wide, return_tensors="pt")["pixel_values"], wanted["pad"])
    tokenizer.save_pretrained(tmp_path)
    vision = {"image_size": 48, "patch_size": 8}
    for original_config, ratio in (
        (None, "pad"),
        ({}, "pad"),
        ({"image_aspect_ratio": "pad"}, "pad"),
        ({"image_aspect_ratio": "square"}, "square"),
        ({"image_aspect_ratio": None}, "square"),
        ({"image_aspect_ratio": "crop"}, "square"),
    ):
        config = CumoConfig(vision_config=vision, original=original_config)
        assert aspect_of(config) == ratio, original_config
        for processor in (processor_for(config, tokenizer), processor_from(tmp_path, config)):
            got = processor.image_processor(wide, return_tensors="pt")["pixel_values"]
            assert torch.equal(got, wanted[ratio]), original_config


def test_a_tokenizer_keeps_its_tokens_and_pads_on_the_right(tmp_path):
    """Without a padding token with that of unknown words, else with EOS."""
    given = train_tokenizer(["what is it?"] * 20, 300)
    given.padding_side = "left"
    for pad, unk, wanted in (("[INST]", "<unk>", "[INST]"), (None, "<unk>", "<unk>"), (None, None, "</s>")):
        given.pad_token, given.unk_token = pad, unk
        given.save_pretrained(tmp_path)
        found = load_tokenizer(tmp_path)
        assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", wanted)
        assert found.unk_token == unk and found.padding_side == "right"


def test_an_image_processor_beside_a_tokenizer_is_used(tokenizer, tmp_path):
    """If it is this project's, not that of a CLIP."""
    tokenizer.save_pretrained(tmp_path)
    own = CumoImageProcessor(image_mean=[0.1, 0.2, 0.3], crop_size={"height": 48, "width": 48})
    config = CumoConfig(vision_config={"image_size": 48, "patch_size": 8})
    own.save_pretrained(tmp_path)
    assert list(processor_from(tmp_path, config).image_processor.image_mean) == [0.1, 0.2, 0.3]
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    found = processor_from(tmp_path, config).image_processor
    assert type(found) is CumoImageProcessor and list(found.image_mean) == list(CumoImageProcessor.image_mean)


def test_tokens_of_a_processor_of_transformers(tokenizer):
    """48 / 8 squared; LLaVA's own processors count the class token where it is kept."""
    images = CumoImageProcessor(crop_size={"height": 48, "width": 48})
    for strategy, tokens in (("default", 36), ("full", 37)):
        processor = LlavaProcessor(images, tokenizer, 8, strategy, num_additional_image_tokens=1)
        assert image_seq_length(processor) == tokens


@pytest.mark.parametrize(
    "option", [{"vision_feature_select_strategy": "all"}, {"patch_merge_type": "mean"}], ids=str
)
def test_unknown_options_are_refused(tokenizer, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be "):
        build_processor(tokenizer, 48, 8, **option)


def test_what_a_processor_is_where_nothing_is_said(tokenizer):
    images, processor = CumoImageProcessor(), build_processor(tokenizer, 48, 8)
    assert (images.size.shortest_edge, images.crop_size.height, images.crop_size.width) == (336, 336, 336)
    noise = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    pixels = images(noise, return_tensors="np")["pixel_values"][0]
    assert np.abs(pixels - _by_hand(Image.fromarray(noise), 336)).max() <= ROUNDING
    assert processor.patch_merge_type == "flat" and processor.vision_feature_select_strategy == "default"
    assert processor.chat_template == chat_template("mistral_instruct")
    assert image_seq_length(processor) == 36
    config = CumoConfig(vision_config={"image_size": 48, "patch_size": 8})
    assert processor_for(config, tokenizer).chat_template == chat_template("mistral_instruct_system")
    with pytest.raises(ValueError, match="image_grid_pinpoints must be in config"):
        processor_for(CumoConfig(original={"image_aspect_ratio": "anyres"}), tokenizer)


def test_a_processor_has_the_settings_of_its_config(tokenizer):
    vision = {"image_size": 48, "patch_size": 6}
    more = {"patch_merge_type": "spatial", "image_grid_pinpoints": [[48, 96]]}
    processor = processor_for(CumoConfig(vision_config=vision, **more), tokenizer, "vicuna_v1")
    images = processor.image_processor
    assert (images.image_aspect_ratio, images.image_grid_pinpoints) == ("anyres", [[48, 96]])
    assert (images.crop_size.height, images.size.shortest_edge, processor.patch_size) == (48, 48, 6)
    assert processor.vision_feature_select_strategy == "default"
    assert processor.patch_merge_type == "spatial"
    assert processor.chat_template == chat_template("vicuna_v1")
    full = CumoConfig(vision_config=vision, vision_feature_select_strategy="full", scales=(1,))
    assert image_seq_length(processor_for(full, tokenizer)) == 8 * 8 + 1


def test_demo_tokenizer_ids_and_round_trip(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<image>", "[INST]", "[/INST]"])
    assert ids == list(range(6))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "Zwölf Boxkämpfer, 3 ☕!"
    encoded = tokenizer(text)["input_ids"]
    assert encoded[0] == 1 and 0 not in encoded
    assert tokenizer.decode(encoded, skip_special_tokens=True).strip() == text.lower()


@pytest.mark.parametrize("size, patch", [(48, 7), (0, 8), (48, 0)])
def test_sizes_must_fit(tokenizer, size, patch):
    with pytest.raises(
        ValueError, match=f"image_size must be a positive multiple of patch_size, got {size} and {patch}"
    ):
        build_processor(tokenizer, size, patch)


def test_load_image_converts_to_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(tmp_path / "a.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "l.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)
    assert load_image(tmp_path / "l.png").getpixel((0, 0)) == (7, 7, 7)


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "jpeg")
    return buffer.getvalue()


BAD_PICTURES = [
    pytest.param(None, "does not exist", id="missing"),
    pytest.param(b"", "is not a picture", id="empty"),
    pytest.param(b"<html>not found</html>", "is not a picture", id="html"),
    pytest.param(_cut((PICTURES / "red-apple-wide.png").read_bytes()), "cannot be read", id="cut-off-png"),
    pytest.param(_cut(_jpeg()), "cannot be read", id="cut-off-jpeg"),
    pytest.param(
        (PICTURES / "red-apple-wide.png").read_bytes()[:30],
        "cannot be read|is not a picture",
        id="header-only",
    ),
]


@pytest.mark.parametrize("data, reason", BAD_PICTURES)
def test_unreadable_pictures_are_named(tmp_path, data, reason):
    path = tmp_path / "pear.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"image '.*pear\.png' ({reason})"):
        load_image(path)


def test_a_folder_is_not_a_picture(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(tmp_path)


@pytest.mark.parametrize("template", ["mistral_instruct", "mistral_instruct_system"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_system_message_takes_the_place_of_the_system_text(tokenizer, template, parts):
    processor = build_processor(tokenizer, 48, 8, template=template)
    content = [{"type": "text", "text": "be brief"}] if parts else "be brief"
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "hi"}]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text == "<s><s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST]"
    system = TEMPLATES[template].system
    own = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    assert processor.apply_chat_template(messages[1:], tokenize=False) == f"<s><s>[INST] {own}hi [/INST]"


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "system"], ["system", "system", "user"], ["tool"]]
)
def test_messages_out_of_order_are_refused(tokenizer, roles):
    processor = build_processor(tokenizer, 48, 8)
    with pytest.raises(TemplateError, match="messages must alternate user and assistant, user first"):
        processor.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


def test_plain_chats_are_captions(tokenizer):
    """The format of stage 1: image, caption, newline; without text of the user and other roles."""
    processor = build_processor(tokenizer, 48, 8, template="plain")
    image = load_image(PICTURES / "penguin-square.png")
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a red apple"}]
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red apple"}]
    ids = {}
    for count in (1, 2):
        batch = processor.apply_chat_template(
            messages[:count], tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids[count] = batch["input_ids"][0]
        assert batch["pixel_values"].shape[0] == 1
    n = image_seq_length(processor)
    assert torch.equal(ids[2], tokenize_conversation(turns, tokenizer, "plain", n)[0])
    assert torch.equal(ids[1], tokenize_prompt(turns[:1], tokenizer, "plain", n))
    text = processor.apply_chat_template([{"role": "user", "content": "what <image>?"}], tokenize=False)
    assert text == "<s><image>"
    for roles in (["system", "user"], ["assistant"], ["user", "user"], ["user", "assistant", "user"]):
        with pytest.raises(TemplateError, match="at most one of assistant, its caption, for plain"):
            processor.apply_chat_template(
                [{"role": r, "content": "<image>" if r == "user" else "x"} for r in roles], tokenize=False
            )
    for content, count in (("hi", 0), ("<image> or <image>", 2)):
        with pytest.raises(TemplateError, match=f"must have exactly one image for plain, got {count}"):
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_a_marker_inside_a_text_moves_to_its_front(tokenizer):
    processor = build_processor(tokenizer, 48, 8)
    for value in ("what <image> is it?", "what is it?\n<image>", "<image>\nwhat is it?", "<image>"):
        turns = [{"from": "human", "value": value}]
        text = processor.apply_chat_template([{"role": "user", "content": value}], tokenize=False)
        assert text == "<s>" + render(turns, "mistral_instruct")[0]


def test_the_original_layout_has_a_processor_of_its_own(tokenizer, tmp_path):
    original.write(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanted = processor_from(tmp_path, CumoConfig.from_pretrained(tmp_path))
    text = "<s>[INST] <image>\nwhat is it? [/INST]"
    image = load_image(PICTURES / "red-apple-wide.png")
    for kind in (AutoProcessor, CumoProcessor):
        found = kind.from_pretrained(tmp_path)
        assert type(found) is CumoProcessor and found.chat_template == wanted.chat_template
        first, second = (p(images=image, text=text, return_tensors="pt") for p in (found, wanted))
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_markers_and_pictures_of_different_number_are_named(tokenizer):
    processor = build_processor(tokenizer, 48, 8)
    image = load_image(PICTURES / "red-apple-wide.png")
    for images, count in ((None, 0), ([image], 1), ([image] * 3, 3)):
        with pytest.raises(ValueError, match=f"each of the 2 <image> in text, got {count}"):
            processor(images=images, text="<image> or <image>?", return_tensors="pt")


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("ratio", ["pad", "square", "anyres"])
def test_every_tensor_has_its_name_in_model_input_names(tokenizer, ratio, merge):
    grid = {"image_grid_pinpoints": [[48, 96]]} if ratio == "anyres" else {}
    processor = build_processor(tokenizer, 48, 8, image_aspect_ratio=ratio, patch_merge_type=merge, **grid)
    batch = processor(images=load_image(PICTURES / "banana-tall.png"), text="<image>", return_tensors="pt")
    assert set(batch) == set(processor.model_input_names)
    assert ("image_sizes" in batch) == (ratio == "anyres" and merge != "flat")
    pictures = processor.image_processor(load_image(PICTURES / "banana-tall.png"), return_tensors="pt")
    assert set(pictures) == set(processor.image_processor.model_input_names)


@pytest.mark.parametrize("none", [None, [], [[], []]])
def test_no_pictures_give_no_pixels(tokenizer, none):
    processor = build_processor(tokenizer, 48, 8)
    wanted = processor(text=["what colour?", "red"], padding=True, return_tensors="pt")
    got = processor(text=["what colour?", "red"], images=none, padding=True, return_tensors="pt")
    assert set(got) == set(wanted) == {"input_ids", "attention_mask"}
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"each of the 1 <image> in text, got 0"):
        processor(text="<image>", images=none)


def test_a_row_without_pictures_takes_none(tokenizer):
    processor = build_processor(tokenizer, 48, 8)
    image = load_image(PICTURES / "penguin-square.png")
    batch = processor(text=["red", "<image>"], images=[[], [image]], padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 48, 48)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 36]
