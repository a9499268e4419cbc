"""processing: the stock processor does what CuMo's preprocessing does, and pictures that cannot be read are
named."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from cumo_model.conversation import tokenize_prompt
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor, image_seq_length, load_image

PICTURES = Path(__file__).parents[1] / "fixtures" / "emoji"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it?", "a red apple", "\nwhat colour?", "red"] * 20, 320)


def _by_hand(image: Image.Image, size: int) -> np.ndarray:
    """Pad with (122, 116, 104) at the floor of half the difference, bicubic, scale, normalise: (3, s, s)."""
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
    truth = _by_hand(image, size)
    # both start from the same bytes, so they differ by fp32 rounding only
    ulp = np.finfo(np.float32).eps * np.abs(truth).max()
    assert got.shape == (3, size, size)
    assert np.abs(got - truth).max() <= 4 * ulp


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
    assert type(again) is LlavaProcessor
    image = load_image(PICTURES / "red-apple-wide.png")
    text = "<s>[INST] <image>\nwhat is it? [/INST]"
    first, second = (p(images=image, text=text, return_tensors="pt") for p in (processor, again))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert again.chat_template == processor.chat_template


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
