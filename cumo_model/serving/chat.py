"""Chat with a checkpoint about a picture, the command `python -m cumo_model chat`."""

import os
import signal
import sys
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from cumo_model.checkpoints.assemble import assemble
from cumo_model.checkpoints.folders import first_line
from cumo_model.checkpoints.processors import template_for
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.processing.conversation import reserved_marker, tokenize_prompt
from cumo_model.processing.pictures import load_image
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.templates import IMAGE_MARKER, get_template
from cumo_model.processing.tokenizer_files import no_tokenizer

NEW_TOKENS = 64
# what values in config.json that no check knows can make of generation
UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError)


class Printer(TextStreamer):
    """Prints an answer as it is generated, without the blanks before its first word.

    Attributes:
        said: the text printed so far.
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.said else text.lstrip()
        self.said += text
        super().on_finalized_text(text, stream_end)


def load(checkpoint: str | os.PathLike, device: torch.device | None = None):
    """Load (model, processor) from a checkpoint in this project's or the released layout.

    Args:
        checkpoint: folder of the checkpoint, with a tokenizer.
        device: device of the model; by default the GPU if there is one.

    Raises:
        ValueError: the folder is missing or not a complete checkpoint; the message gives the reason.
    """
    try:
        model, processor = assemble(checkpoint)
    except Exception as error:  # a damaged file can raise any exception; report it in one line
        raise ValueError(f"checkpoint {str(checkpoint)!r} cannot be loaded: {first_line(error)}") from error
    if processor is None:
        raise ValueError(f"checkpoint {str(checkpoint)!r} cannot be loaded: it {no_tokenizer(checkpoint)}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), processor


@torch.no_grad()
def answer(
    model: CumoForConditionalGeneration,
    processor: CumoProcessor,
    picture: Image.Image | None,
    turns: list[dict[str, str]],
    template: str,
    max_new_tokens: int = NEW_TOKENS,
    streamer: TextStreamer | None = None,
) -> str:
    """Generate the answer to the last turn by greedy decoding.

    Args:
        model: the model, in evaluation mode.
        processor: the processor of the model.
        picture: the picture of the `<image>` marker in `turns`, or None.
        turns: [{"from": "human" | "gpt", "value": str}, ...]; the last turn is a question.
        template: name of the conversation template.
        max_new_tokens: maximum length of the answer in tokens.
        streamer: receives the tokens as they are generated.
    """
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
    return _bare(processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), template)


def _bare(said: str, template: str) -> str:
    """An answer without the mark that ends it."""
    return said.strip().removesuffix(get_template(template).end.strip()).strip()


def chat(
    checkpoint: str | os.PathLike,
    image: Any,
    question: str | None = None,
    template: str | None = None,
    max_new_tokens: int = NEW_TOKENS,
) -> None:
    """Answer one question, or questions from standard input until an empty line, as one conversation.

    Ctrl-C in an answer to a question from standard input stops the answer; what was printed of it stays in
    the conversation. Anywhere else it ends the conversation.

    Args:
        checkpoint: folder of the checkpoint.
        image: the picture as in `load_image`, such as a path or a URL; None for a conversation about text
            only.
        question: the question; None: read questions from standard input.
        template: name of an instruct template; by default that of the checkpoint's processor.
        max_new_tokens: maximum length of each answer in tokens.

    Raises:
        ValueError: the checkpoint, the picture, the template or the question cannot be used.
    """
    if question is not None and (reason := _unaskable(question)):
        raise ValueError(f"question {reason}")
    if template is not None and not get_template(template).instruct:
        raise ValueError(f"template must be an instruct template, got {template!r}")
    picture = load_image(image) if image is not None else None
    model, processor = load(checkpoint)
    template = template or own_template(processor)
    if question is not None and (reason := _unaskable(question, template)):
        raise ValueError(f"question {reason}")
    turns: list[dict[str, str]] = []
    asked = iter([question]) if question is not None else _typed()
    for text in asked:
        if reason := _unaskable(text, template):
            print(f"the question {reason}", file=sys.stderr)
            continue
        first = picture is not None and not turns
        turns.append({"from": "human", "value": f"{IMAGE_MARKER}\n{text}" if first else text})
        printer = Printer(processor.tokenizer)
        try:
            said = answer(model, processor, picture, turns, template, max_new_tokens, printer)
        except ValueError as error:  # such as a conversation that has become too long
            if question is not None:
                raise
            print(f"no answer: {error} (an empty line ends this conversation)", file=sys.stderr)
            turns.pop()
            continue
        except UNFORESEEN as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ValueError(f"checkpoint {str(checkpoint)!r} cannot answer: {what}") from error
        except KeyboardInterrupt as stop:
            if question is not None or signal.SIGTERM in stop.args:
                raise
            printer.end()
            said = _bare(printer.said, template)
            print(
                "the answer was stopped; Ctrl-C again, or an empty line, ends the conversation",
                file=sys.stderr,
            )
            if not said:  # as if the question had not been asked
                turns.pop()
                continue
        turns.append({"from": "gpt", "value": said})


def own_template(processor: CumoProcessor) -> str:
    """Name of the template that is the processor's chat template.

    Raises:
        ValueError: it is none of this project's instruct templates.
    """
    name = template_for(processor, option="template")
    if not get_template(name).instruct:
        raise ValueError(
            f"template must be given, as the checkpoint's own is for captions only, got {name!r}"
        )
    return name


def _unaskable(text: str, template: str | None = None) -> str | None:
    """The reason why `text` cannot be a turn of a template, or of any template, or None."""
    if not text.strip():
        return "must not be empty"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "must be text in UTF-8, got bytes that are not"
    if IMAGE_MARKER in text:
        return f"must not hold {IMAGE_MARKER}: --image gives the picture"
    if template and (found := reserved_marker([{"value": text}], template)):
        return f"must not hold {found}, which separates turns"
    return None


def _typed():
    if sys.stdin.isatty():
        print("ask about the picture; an empty line ends the conversation")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        yield text
