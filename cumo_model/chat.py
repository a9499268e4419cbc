"""Talk to a checkpoint about a picture."""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, TextStreamer
from transformers.utils import logging

from cumo_model.conversation import IMAGE_MARKER, reserved_marker, tokenize_prompt
from cumo_model.cumo import CumoForConditionalGeneration
from cumo_model.processing import load_image
from cumo_model.templates import get_template

NEW_TOKENS = 64


def load(checkpoint: str | os.PathLike, device: torch.device | None = None):
    """(model, processor) from a folder that `train` or `save_pretrained` wrote.

    Raises:
        ValueError: the folder is missing or not a whole checkpoint; the message says what is wrong with it.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {str(folder)!r} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint {str(folder)!r} has no config.json")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what the loader would report in a page is one line below
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != CumoForConditionalGeneration.config_class.model_type:
            raise ValueError(f"its config.json describes a {kind!r} model")
        model, info = CumoForConditionalGeneration.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = AutoProcessor.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes the loaders raise, the user needs one line
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"checkpoint {str(folder)!r} cannot be loaded: {reason[0] if reason else error!r}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"checkpoint {str(folder)!r} lacks {len(info['missing_keys'])} tensors: {some}, ...")
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise ValueError(
            f"checkpoint {str(folder)!r} has {len(info['mismatched_keys'])} tensors of another shape than "
            f"its config.json says: {name} must be {tuple(wanted)}, got {tuple(found)}"
        )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), processor


@torch.no_grad()
def answer(
    model: CumoForConditionalGeneration,
    processor,
    picture: Image.Image | None,
    turns: list[dict[str, str]],
    template: str,
    max_new_tokens: int = NEW_TOKENS,
    streamer: TextStreamer | None = None,
) -> str:
    """Greedy answer to the last of `turns` ([{"from": "human" | "gpt", "value": str}, ...])."""
    ids = tokenize_prompt(turns, processor.tokenizer, template, model.config.image_seq_length)[None]
    inputs = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    if picture is not None:
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.device, model.dtype)
    end = get_template(template).end.strip()
    if end and end != "</s>":
        inputs |= {"stop_strings": [end], "tokenizer": processor.tokenizer}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    said = processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return said.strip().removesuffix(end).strip()


def chat(
    checkpoint: str | os.PathLike,
    image: str | os.PathLike | None,
    question: str | None = None,
    template: str = "mistral_instruct",
    max_new_tokens: int = NEW_TOKENS,
) -> None:
    """Ask one question, or read questions from the terminal until an empty line; the conversation is kept."""
    if not get_template(template).instruct:
        raise ValueError(f"template must be an instruct template, got {template!r}")
    if question is not None and (reason := _unaskable(question, template)):
        raise ValueError(f"question {reason}")
    picture = load_image(image) if image is not None else None
    model, processor = load(checkpoint)
    turns: list[dict[str, str]] = []
    asked = iter([question]) if question is not None else _typed()
    for text in asked:
        if reason := _unaskable(text, template):
            print(f"the question {reason}", file=sys.stderr)
            continue
        first = picture is not None and not turns
        turns.append({"from": "human", "value": f"{IMAGE_MARKER}\n{text}" if first else text})
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        said = answer(model, processor, picture, turns, template, max_new_tokens, streamer)
        turns.append({"from": "gpt", "value": said})


def _unaskable(text: str, template: str) -> str | None:
    """Why `text` cannot be a turn, or None."""
    if IMAGE_MARKER in text:
        return f"must not hold {IMAGE_MARKER}: --image gives the picture"
    if found := reserved_marker([{"value": text}], template):
        return f"must not hold {found}, which separates turns"
    return None


def _typed():
    if sys.stdin.isatty():
        print("ask about the picture; an empty line ends")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        yield text
