"""Tiny checkpoints for the tests of serving, of sizes that vLLM's attention and experts have kernels for."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cumo_model import CumoConfig, CumoForConditionalGeneration, build_processor
from cumo_model.demo.tokenizer import train_tokenizer

WORDS = (
    "what is in the picture", "a red square left of a blue circle", "how many dots are there",
    "one two three", "describe both pictures in one sentence", "which of them is larger",
    "the first the second", "yes no",
)  # fmt: skip
SIDE = 24


def tokenizer(marker_last: bool = False):
    """The demo's tokenizer; with `marker_last` the image token is beyond the model's vocabulary."""
    found = train_tokenizer(WORDS, 330)
    if not marker_last:
        return found
    text = found.backend_tokenizer.to_str().replace("<image>", "<former>")
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>", padding_side="right",
    )  # fmt: skip
    found.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return found


def config(words: int, text: str = "mixtral", text_config=(), **options) -> CumoConfig:
    """Experts in tower, connector and, for mixtral, language model; 4 x 4 tokens a tile."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 6, "num_experts": 4,
    }  # fmt: skip
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if text == "mixtral" else {}
    sizes = {
        "model_type": text, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": words,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "sliding_window": None,
    }  # fmt: skip
    sizes = sizes | experts | dict(text_config)
    return CumoConfig(vision_config=vision, text_config=sizes, **options)


def write(
    folder: Path, text: str = "mixtral", marker_last: bool = False, seed: int = 0, std: float = 0.3, **options
) -> Path:
    """A checkpoint in fp32 whose greedy answers differ by prompt and picture; `options` of the config."""
    words = tokenizer(marker_last)
    token = words.convert_tokens_to_ids("<image>")
    made = config(len(words) - marker_last, text, image_token_index=token, **options)
    torch.manual_seed(seed)
    model = CumoForConditionalGeneration(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=std)
    grids = made.image_grid_pinpoints
    processor = build_processor(
        words, SIDE, 6, template="mistral_instruct", image_aspect_ratio="anyres" if grids else "pad",
        patch_merge_type=made.patch_merge_type, **({"image_grid_pinpoints": grids} if grids else {}),
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of random blocks, which are still there after it has been made smaller."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.NEAREST)
