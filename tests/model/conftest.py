"""The tiny model of the model tests: every part of the big ones, a few thousand parameters."""

import json
import multiprocessing.forkserver
import sys
from pathlib import Path

import pytest
import torch

from cumo_model import CumoConfig, CumoForConditionalGeneration
from tests.rounding import in_fp64

IMAGE_TOKEN = 60  # outside the vocabulary of 50, as in the released checkpoints


@pytest.fixture(scope="session")
def mistral_model() -> Path:
    """Mistral-7B-v0.1's SentencePiece model, from the wheel mistral-common that `make setup` lays beside
    the environment: inside it transformers would import the package and want its dependencies."""
    model = Path(sys.prefix) / "mistral-common" / "mistral_common" / "data" / "tokenizer.model.v1"
    if not model.is_file():
        pytest.skip(f"no Mistral tokenizer at {model}: `make setup` brings it")
    return model


@pytest.fixture(scope="session")
def mistral(mistral_model, tmp_path_factory):
    """Mistral's tokenizer as a folder with its tokenizer.model gives it, and that model in SentencePiece."""
    import sentencepiece

    from cumo_model.processing.processor import load_tokenizer

    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(mistral_model.read_bytes())
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **own}))
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(mistral_model))


@pytest.fixture
def fp64():
    """The test computes in fp64, all that asks for fp32 included: for `assert_same_formula`."""
    with in_fp64():
        yield


@pytest.fixture(autouse=True, scope="session")
def fork_server():
    """Before a test changes the environment, which imports of the server read."""
    if "tests.processes" in sys.modules:
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def no_process_left():
    """A test that fails between the start and the end of a process takes it along."""
    yield
    if processes := sys.modules.get("tests.processes"):
        processes.leave_none_behind()


@pytest.fixture
def tiny_config():
    """Factory: `text` is a model_type, other keywords go to CumoConfig; images are 12 x 12, 9 tokens each."""

    def make(text="mistral", vision_experts=4, vision=(), text_options=(), **options) -> CumoConfig:
        vision_config = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
            "num_experts": vision_experts,
            **dict(vision),
        }
        text_config = {
            "model_type": text,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 50,
            "max_position_embeddings": 128,
            **({"num_local_experts": 4} if text == "mixtral" else {}),
            **dict(text_options),
        }
        options = {"image_token_index": IMAGE_TOKEN, **options}
        return CumoConfig(vision_config=vision_config, text_config=text_config, **options)

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Factory with the keywords of `tiny_config`; weights are large, so that routers have opinions."""

    def make(**options) -> CumoForConditionalGeneration:
        model = CumoForConditionalGeneration(tiny_config(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.3)
        return model

    return make


@pytest.fixture
def tiny_batch():
    """Factory: two rows of 20 tokens with one image each, the last six tokens to be predicted."""

    def make(images=2, dtype=torch.float32) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        input_ids = torch.randint(3, 50, (2, 20), generator=generator)
        for row in range(images):
            input_ids[row, 3:12] = IMAGE_TOKEN
        labels = input_ids.clone()
        labels[:, :14] = -100
        batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
        if images:
            batch["pixel_values"] = torch.randn(images, 3, 12, 12, generator=generator, dtype=dtype)
        return batch

    return make
