"""Answers of a model in this process: streamed one at a time, or in batches."""

import os
import queue
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from cumo_model.checkpoints.assemble import assemble
from cumo_model.checkpoints.folders import first_line
from cumo_model.checkpoints.processors import template_for
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.positions import position_limit
from cumo_model.processing.conversation import chat_template
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.templates import get_template
from cumo_model.processing.tokenizer_files import no_tokenizer
from cumo_model.serving.messages import Message, check_conversation
from cumo_model.serving.replies import CONTEXT, LENGTH, STOP, Reply, Stream
from cumo_model.serving.sampling import GREEDY, Sampling

# what values in config.json that no check knows can make of generation
UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError)

WAIT = 0.1  # seconds after which a reader who waits can leave


class BrokenModelError(ValueError):
    """The model cannot run at all, whatever it is asked."""


def load(
    checkpoint: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> tuple[CumoForConditionalGeneration, CumoProcessor]:
    """Load (model, processor) from a checkpoint in this project's or the released layout.

    Args:
        checkpoint: folder of the checkpoint, with a tokenizer.
        device: device of the model; by default the GPU if there is one.
        dtype: dtype of the weights; by default that of the files.
        bits: 4 or 8 to quantise the weights with bitsandbytes.

    Raises:
        ValueError: the device is not there, or the folder is missing or not a complete checkpoint; the
            message gives the reason.
    """
    device = _device(device)
    try:
        model, processor = assemble(checkpoint, dtype=dtype, quantize=bits)
    except Exception as error:  # a damaged file can raise any exception; report it in one line
        raise ValueError(f"checkpoint {str(checkpoint)!r} cannot be loaded: {first_line(error)}") from error
    if processor is None:
        raise ValueError(f"checkpoint {str(checkpoint)!r} cannot be loaded: it {no_tokenizer(checkpoint)}")
    if bits is None:  # otherwise bitsandbytes has chosen the device of its weights
        model = model.to(device)
    return model.eval(), processor


def _device(given: str | torch.device | None) -> torch.device:
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
        torch.empty(1, device=device).item()
    except Exception as error:  # torch raises several kinds, by device
        raise ValueError(
            f"device must be one of this machine, got {str(given)!r}: {first_line(error)}"
        ) from None
    return device


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


class Local:
    """A model in this process.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        template: name of an instruct template; by default that of the processor.
        name: of the model, for messages.

    Raises:
        ValueError: the template is not an instruct template, or must be given.
    """

    def __init__(
        self,
        model: CumoForConditionalGeneration,
        processor: CumoProcessor,
        template: str | None = None,
        name: str = "the model",
    ):
        if template is not None and not get_template(template).instruct:
            raise ValueError(f"template must be an instruct template, got {template!r}")
        self.model, self.processor, self.name = model, processor, name
        self.template = template or own_template(processor)
        end = get_template(self.template).end.strip()
        self._chat = chat_template(template) if template else processor.chat_template_for()
        self._end = end
        self._stops = (
            {"stop_strings": [end], "tokenizer": processor.tokenizer} if end not in ("", "</s>") else {}
        )
        self._turn = threading.Lock()  # one generation at a time: the others wait

    def check(self, messages: Sequence[Message]) -> None:
        """
        Raises:
            ValueError: as `check_conversation`, or the conversation is longer than the model's context.
        """
        check_conversation(messages, self.template)
        self._longest(self._prompt([messages])["input_ids"].shape[1], GREEDY)

    def stream(self, messages: Sequence[Message], sampling: Sampling = GREEDY) -> Stream:
        """Generate the answer to a conversation; the generation runs in a thread of its own.

        Args:
            messages: the conversation, as in `check_conversation`.
            sampling: options of generation.

        Raises:
            ValueError: as `check`; while it is read also if the model cannot run.
        """
        check_conversation(messages, self.template)
        inputs = self._prompt([messages])
        new_tokens = self._longest(inputs["input_ids"].shape[1], sampling)
        return Stream(self._pieces(inputs, new_tokens, sampling), self._end)

    def answers(self, talks: Sequence[Sequence[Message]], sampling: Sampling = GREEDY) -> list[Reply]:
        """Generate the answers to several conversations as one batch.

        A batch has one length for all. Where the context ends the answer of one, the others that are not
        complete are answered again without it.

        Raises:
            ValueError: as `check`; the number of the conversation is named.
        """
        for number, messages in enumerate(talks, 1):
            try:
                check_conversation(messages, self.template)
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from None
        if not talks:
            return []
        inputs = self._prompt(talks)
        longest = []
        for number, length in enumerate(inputs["attention_mask"].sum(1).tolist(), 1):
            try:
                longest.append(self._longest(length, sampling))
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from None
        found: dict[int, Reply] = {}
        while rest := [i for i in range(len(talks)) if i not in found]:
            inputs = self._prompt([talks[i] for i in rest]) if found else inputs
            new_tokens, width = min(longest[i] for i in rest), inputs["input_ids"].shape[1]
            with self._turn:
                out = self._generate(inputs, new_tokens, sampling)
            lengths = inputs["attention_mask"].sum(1).tolist()
            for i, row, length in zip(rest, out[:, width:].tolist(), lengths, strict=True):
                reply = self._reply(row, length, new_tokens)
                if reply.finish != LENGTH or longest[i] == new_tokens:
                    found[i] = self._as_cut(reply, new_tokens, sampling)
        return [found[i] for i in range(len(talks))]

    def inputs(self, messages: Sequence[Message]) -> dict[str, torch.Tensor]:
        """Tensors of a conversation, on the CPU, as `generate` takes them.

        Raises:
            ValueError: as `check`.
        """
        self.check(messages)
        return self._prompt([messages])

    def alone(self) -> AbstractContextManager:
        """A `with` block in which no answer is generated, for other uses of the model."""
        return self._turn

    def _as_cut(self, reply: Reply, new_tokens: int, sampling: Sampling) -> Reply:
        """The answer; it was cut by the context if it could have fewer tokens than asked for."""
        is_context = reply.finish == LENGTH and new_tokens < sampling.max_new_tokens
        return replace(reply, finish=CONTEXT) if is_context else reply

    def _reply(self, ids: list[int], prompt_tokens: int, new_tokens: int) -> Reply:
        """The answer in one row of a batch, which is padded after its end."""
        config, tokenizer = self.model.generation_config, self.processor.tokenizer
        ends = config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        tokens = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
        finish = STOP
        if tokens is None:  # by a stop string, after which the row is padded, or not at all
            padding = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
            tokens = len(ids)
            while self._stops and tokens and ids[tokens - 1] == padding:
                tokens -= 1
            text = tokenizer.decode(ids[:tokens], skip_special_tokens=True)
            is_ended = bool(self._stops) and text.strip().endswith(self._end)
            finish = STOP if is_ended or len(ids) < new_tokens else LENGTH
        text = tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        return Reply(text.strip().removesuffix(self._end).strip(), finish, tokens, prompt_tokens)

    def _prompt(self, talks: Sequence[Sequence[Message]]) -> dict[str, torch.Tensor]:
        """Tensors of conversations, padded on the left."""
        found = self.processor.apply_chat_template(
            [list(messages) for messages in talks],
            chat_template=self._chat,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return dict(found)

    def _longest(self, prompt: int, sampling: Sampling) -> int:
        """Tokens of the longest answer to a prompt of so many tokens, for which the context has room."""
        limit = position_limit(self.model.config.text_config)
        if limit is None:
            return sampling.max_new_tokens
        if prompt >= limit:
            raise ValueError(
                f"the conversation must have fewer than {limit} tokens, the model's context, got {prompt}: "
                "it must be shorter, or have fewer pictures"
            )
        return min(limit - prompt, sampling.max_new_tokens)

    @torch.no_grad()
    def _generate(self, inputs: dict, new_tokens: int, sampling: Sampling, **more: Any) -> torch.Tensor:
        model = self.model
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        options = {"max_new_tokens": new_tokens, **sampling.for_generate(), **self._stops, **more}
        try:
            return model.generate(**inputs, **options)
        except UNFORESEEN as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise BrokenModelError(f"{self.name} cannot answer: {what}") from error
        except RuntimeError as error:  # such as a lack of memory
            raise ValueError(f"{self.name} cannot answer: {first_line(error)}") from error

    def _pieces(self, inputs: dict, new_tokens: int, sampling: Sampling):
        found: queue.SimpleQueue = queue.SimpleQueue()
        left = threading.Event()
        streamer = _Pieces(self.processor.tokenizer, found)

        def run():
            try:
                criteria = StoppingCriteriaList([_Left(left)])
                out = self._generate(
                    inputs, new_tokens, sampling, streamer=streamer, stopping_criteria=criteria
                )
                found.put(out[0, inputs["input_ids"].shape[1] :].tolist())
            except BaseException as error:
                found.put(error)

        while not self._turn.acquire(timeout=WAIT):
            yield ""  # so that a stream can be stopped before its turn
        try:
            thread = threading.Thread(target=run, name="cumo-generate", daemon=True)
            thread.start()
            try:
                while isinstance(piece := _next(found), str):
                    yield piece
            finally:  # also where the reader leaves: the next generation must find the model idle
                left.set()
                thread.join()
        finally:
            self._turn.release()
        if isinstance(piece, BaseException):
            raise piece
        prompt_tokens = inputs["input_ids"].shape[1]
        reply = self._as_cut(self._reply(piece, prompt_tokens, new_tokens), new_tokens, sampling)
        return reply.finish, reply.tokens, prompt_tokens


def _next(found: queue.SimpleQueue) -> Any:
    try:
        return found.get(timeout=WAIT)
    except queue.Empty:
        return ""


class _Pieces(TextStreamer):
    """Puts the pieces of an answer into a queue."""

    def __init__(self, tokenizer, found: queue.SimpleQueue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.found = found

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.found.put(text)  # also an empty one, which means that a token has been generated


class _Left(StoppingCriteria):
    """Ends a generation whose reader has left."""

    def __init__(self, left: threading.Event):
        self.left = left

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.left.is_set(), device=input_ids.device)
