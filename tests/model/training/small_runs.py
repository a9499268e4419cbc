"""A data set of plain colours, a tiny model on disk and a recipe for it, for all tests of training."""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image

from cumo_model import CumoForConditionalGeneration
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]


def write_data(folder: Path, text_rows: int = 4) -> Path:
    """Write colours.jsonl, with eight pictures and some rows without a picture."""
    records = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (12, 12), colour).save(folder / f"{colour}.png")
        answer = " ".join([colour] * (1 + number % 3))
        turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": answer}]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    for number in range(text_rows):
        turns = [{"from": "human", "value": "what colour?"}, {"from": "gpt", "value": "red " * (number + 1)}]
        records.append({"id": number, "conversations": turns})
    path = folder / "colours.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def write_model(folder: Path, make_config, seed: int = 0, text_options=(), **options) -> Path:
    """Save a tiny dense CuMo with its processor."""
    tokenizer = train_tokenizer([f"what colour? {colour}" for colour in COLOURS], 300)
    options = {"vision_experts": 1, "projector_num_experts": 1, "scales": (1,), **options}
    config = make_config(
        text_options={"vocab_size": len(tokenizer), **dict(text_options)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **options,
    )
    torch.manual_seed(seed)
    CumoForConditionalGeneration(config).save_pretrained(folder / "start")
    build_processor(tokenizer, 12, 4).save_pretrained(folder / "start")
    return folder / "start"


def write_recipe(folder: Path, name: str = "run", **changes) -> Path:
    """Write a recipe of stage 3 with six steps: all parts are trained, and all places have experts."""
    recipe = {
        "output_dir": str(folder / name),
        "model": {
            "start": str(folder / "start"),
            "vision_experts": 4,
            "projector_experts": 4,
            "text_experts": 4,
        },
        "data": {
            "files": [str(folder / "colours.jsonl")],
            "images": [str(folder)],
            "template": "mistral_instruct",
        },
        "stage": {
            "batch_size": 4,
            "learning_rate": 1e-3,
            "balance_loss_coef": 0.1,
            "router_z_loss_coef": 0.01,
        },
        "trainer": {
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "save_steps": 2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
        },
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            recipe[section][field] = value
        else:
            recipe[section] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
