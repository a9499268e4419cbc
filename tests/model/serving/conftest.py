"""Checkpoints to talk with, and a picture."""

import pytest
import torch
from PIL import Image

from cumo_model import CumoForConditionalGeneration
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor
from cumo_model.serving.local import Local, load

WORDS = "what is it? a red apple, two green pears or the blue door near some old house"


def write_checkpoint(folder, tiny_config, template="mistral_instruct", positions=128, std=None, **options):
    """A tiny CuMo with a tokenizer of the demo; with `std` its weights are wide enough for varied answers."""
    tokenizer = train_tokenizer([WORDS] * 4, 400)
    text = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0}
    config = tiny_config(
        text_options={**text, "max_position_embeddings": positions},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **options,
    )
    model = CumoForConditionalGeneration(config)
    if std is not None:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    build_processor(tokenizer, 12, 4, template=template).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", tiny_config, scales=(1, 3))


@pytest.fixture(scope="module")
def talker_folder(tmp_path_factory):
    from tests.model.conftest import tiny_config

    make = tiny_config.__wrapped__() if hasattr(tiny_config, "__wrapped__") else tiny_config
    return write_checkpoint(tmp_path_factory.mktemp("talker") / "model", make, positions=512, std=0.3)


@pytest.fixture
def talker(talker_folder):
    """An engine whose answers differ from question to question."""
    return Local(*load(talker_folder), name="talker")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 14), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"
