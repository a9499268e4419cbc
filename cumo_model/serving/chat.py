"""Talk to a checkpoint about a picture."""

import os
import sys

import torch
from PIL import Image
from transformers import TextStreamer

from cumo_model.checkpoints.assemble import assemble
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.processing.conversation import chat_template, reserved_marker, tokenize_prompt
from cumo_model.processing.processor import load_image
from cumo_model.processing.templates import IMAGE_MARKER, TEMPLATES, get_template

NEW_TOKENS = 64
DEFAULT = "mistral_instruct"


def load(checkpoint: str | os.PathLike, device: torch.device | None = None):
    """(model, processor) from a folder in our layout or in that of the released checkpoints.

    Raises:
        ValueError: the folder is missing or not a whole checkpoint; the message says what is wrong with it.
    """
    try:
        model, processor = assemble(checkpoint)
    except Exception as error:  # whatever a damaged file makes the loaders raise, the user needs one line
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(f"checkpoint {str(checkpoint)!r} cannot be loaded: {reason}") from error
    if processor is None:
        raise ValueError(f"checkpoint {str(checkpoint)!r} cannot be loaded: it has no tokenizer")
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
    inputs, tokens = {}, 0
    if picture is not None:
        inputs = processor(images=picture, text=IMAGE_MARKER, return_tensors="pt")
        tokens = int((inputs.pop("input_ids") == processor.image_token_id).sum())
    ids = tokenize_prompt(turns, processor.tokenizer, template, tokens)[None]
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if picture is not None:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
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
    template: str | None = None,
    max_new_tokens: int = NEW_TOKENS,
) -> None:
    """Ask one question, or read questions from the terminal until an empty line; the conversation is kept.

    `template` is that of the checkpoint's processor unless given.
    """
    if template is not None and not get_template(template).instruct:
        raise ValueError(f"template must be an instruct template, got {template!r}")
    if question is not None and (reason := _unaskable(question, template or DEFAULT)):
        raise ValueError(f"question {reason}")
    picture = load_image(image) if image is not None else None
    model, processor = load(checkpoint)
    template = template or own_template(processor)
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


def own_template(processor) -> str:
    """The instruct template whose chat template the processor has; `DEFAULT` if it has none of ours."""
    known = (name for name, form in TEMPLATES.items() if form.instruct)
    return next((name for name in known if chat_template(name) == processor.chat_template), DEFAULT)


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
