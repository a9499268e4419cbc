"""CuMo as a model of lmms-eval, found by its entry point:

    python -m lmms_eval --model cumo --model_args pretrained=DIR --tasks mme,gqa --batch_size 8

Tasks that compare probabilities (`output_type: multiple_choice` or `loglikelihood`) have no messages; they
need `--force_simple`, as with every model of lmms-eval that takes messages.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import eval_logger
from tqdm import tqdm

from cumo_model.data.pictures import is_system_failure
from cumo_model.evaluation.likelihood import log_likelihoods
from cumo_model.evaluation.lmms.requests import (
    MediaError,
    Wanted,
    conversation,
    from_messages,
    halved,
    in_batches,
    wanted,
)
from cumo_model.serving.engines import open_engine
from cumo_model.serving.local import BrokenModelError
from cumo_model.serving.messages import Message
from cumo_model.serving.replies import Reply

NAMED = 5  # questions without an answer that messages name one by one


class CumoMessages(lmms):
    """A checkpoint of CuMo, for tasks that give messages (`doc_to_messages`).

    Args:
        pretrained: folder of the checkpoint, in either layout.
        batch_size: questions per batch, or choices per batch.
        device: such as cuda:1; by default the GPU if there is one. With several processes "cuda" or "cpu".
        dtype: float32, bfloat16 or float16; by default, or with "auto", that of the files.
        template: name of an instruct template; by default that of the checkpoint.
        bits: 4 or 8 to quantise the weights.
        system_prompt: text for the system's place, or the path of a file with it; by default that of the
            template.
        max_batch_size: must be None; lmms-eval passes it.

    Raises:
        ValueError: an argument is unknown or out of its range, or the checkpoint cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
        bits: int | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = "pretrained, device, dtype, template, bits, system_prompt"
            raise ValueError(f"model_args must be of {known}, got {', '.join(unknown)}")
        if pretrained is None:
            raise ValueError("model_args must give the folder of a checkpoint: pretrained=DIR")
        if max_batch_size is not None:
            raise ValueError(f"max_batch_size must be left out, got {max_batch_size}: give --batch_size")
        if not str(batch_size).isascii() or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        self._batch_size = int(batch_size)
        self._rank, self._world_size = (
            int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE"))
        )
        self._system = self._resolve_system_prompt(system_prompt)
        self.engine = open_engine(
            str(pretrained), None, template, _own_device(device, self._world_size),
            None if dtype == "auto" else dtype, bits,
        )  # fmt: skip
        self._device = self.engine.model.device
        self._told: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The device of the model, on which lmms-eval also gathers the results of several processes."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Questions per batch."""
        return self._batch_size

    def clean(self) -> None:
        """Drop the model, before lmms-eval starts a judge on the same device."""
        del self.engine
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers to questions.

        A question that cannot be answered, such as one longer than the model's context, has the answer "",
        and a warning names it.

        Args:
            requests: of lmms-eval.

        Raises:
            ValueError: a task shows something other than pictures, wants options of generation that there
                are not, or no question can be answered.
        """
        options = [self._wanted(request) for request in requests]
        batches = in_batches([len(str(request.args[0])) for request in requests], options, self.batch_size)
        replies: dict[int, Reply | str] = {}
        with self._bar(len(requests)) as bar:
            for batch in batches:
                replies |= self._answers({i: requests[i] for i in batch}, options[batch[0]])
                bar.update(len(batch))
        self._tell(requests, replies)
        return [_result(replies[i], options[i]) for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Log-probabilities of given answers, and whether greedy decoding would generate them.

        A multiple choice gets minus the log-probability of each choice, because lmms-eval takes the one with
        the smallest value. The pairs are wrapped, because lmms-eval 0.7.3 makes a text of a bare pair.

        Args:
            requests: of lmms-eval.

        Raises:
            ValueError: a question or an answer cannot be used; it is named.
        """
        if short := next((request for request in requests if len(request.args) < 6), None):
            raise ValueError(
                f"task {short.task_name} must ask for answers to questions; the model cumo gives no "
                "probabilities without a question (acc_mutual_info)"
            )
        sizes = [len(str(request.args[0])) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        with self._bar(len(requests)) as bar:
            for batch in in_batches(sizes, [0] * len(requests), self.batch_size):
                values = halved(
                    self._likelihoods, [requests[i] for i in batch], (BrokenModelError, MediaError)
                )
                for i, value in zip(batch, values, strict=True):
                    if isinstance(value, str):
                        raise ValueError(f"{_place(requests[i])}: {value}")
                    found[i] = value
                bar.update(len(batch))
        is_choice = [isinstance(request.args[1], str) for request in requests]
        return [
            GenerationResult((-found[i][0] if is_choice[i] else found[i][0], found[i][1]))
            for i in range(len(requests))
        ]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """
        Raises:
            NotImplementedError: always. The tasks of this kind search the web or show parts of a video.
        """
        raise NotImplementedError("the model cumo answers single questions, it has no rounds with a task")

    def _talk(self, request: Any) -> list[Message]:
        _, messages, _, number, task, split = request.args
        return from_messages(messages(self.task_dict[task][split][number]), self._system)

    def _options(self, request: Any) -> dict[str, Any]:
        return request.args[2]

    def _wanted(self, request: Any) -> Wanted:
        try:
            found = wanted(self._options(request))
        except ValueError as error:
            raise ValueError(f"task {request.task_name}: {error}") from None
        for name in found.unused:
            if self.rank == 0 and name not in self._told:
                eval_logger.warning(f"task {request.task_name}: {name} has no effect on the model cumo")
            self._told.add(name)
        return found

    def _answers(self, requests: dict[int, Any], options: Wanted) -> dict[int, Reply | str]:
        """The answers to a batch, or why there is none, by the number of the request."""
        found: dict[int, Reply | str] = {}
        talks = {}
        for number, request in requests.items():
            try:
                talks[number] = self._talk(request)
            except MediaError as error:
                raise MediaError(f"task {request.task_name}: {error}") from None
            except ValueError as error:
                if is_system_failure(error):
                    raise
                found[number] = str(error)
        ask = lambda numbers: self.engine.answers([talks[i] for i in numbers], options.sampling)
        replies = halved(ask, list(talks), (BrokenModelError,)) if talks else []
        return found | dict(zip(talks, replies, strict=True))

    def _likelihoods(self, requests: list[Any]) -> list[tuple[float, bool]]:
        talks, answers = [], []
        for request in requests:
            text, answer, visuals, number, task, split = request.args
            record = self.task_dict[task][split][number]
            try:
                talks.append(conversation(text, visuals(record) if visuals else None, self._system))
            except MediaError as error:
                raise MediaError(f"task {request.task_name}: {error}") from None
            answers.append(answer if isinstance(answer, str) else str(answer(record)))
        return log_likelihoods(self.engine, talks, answers)

    def _bar(self, total: int) -> tqdm:
        return tqdm(total=total, desc="cumo", unit=" questions", disable=self.rank != 0)

    def _tell(self, requests: Sequence[Any], replies: dict[int, Reply | str]) -> None:
        """Warn about questions without an answer."""
        failures = {i: reply for i, reply in replies.items() if isinstance(reply, str)}
        for i in sorted(failures)[:NAMED]:
            eval_logger.warning(f"{_place(requests[i])} has no answer: {failures[i]}")
        if failures and len(failures) == len(replies):
            raise ValueError(f"none of {len(replies)} questions has an answer: {failures[min(failures)]}")
        if failures:
            eval_logger.warning(
                f"{len(failures)} of {len(replies)} questions have no answer, they are scored as ''"
            )


class CumoSimple(CumoMessages):
    """A checkpoint of CuMo, for tasks that give a text and pictures; all of lmms-eval's do."""

    is_simple = True

    def _talk(self, request: Any) -> list[Message]:
        text, _, visuals, number, task, split = request.args
        record = self.task_dict[task][split][number]
        return conversation(text, visuals(record) if visuals else None, self._system)

    def _options(self, request: Any) -> dict[str, Any]:
        return request.args[1]


def _place(request: Any) -> str:
    return f"task {request.task_name}, question {request.doc_id}"


def _result(reply: Reply | str, options: Wanted) -> GenerationResult:
    if isinstance(reply, str):
        return GenerationResult("")
    counts = TokenCounts(input_tokens=reply.prompt_tokens, output_tokens=reply.tokens)
    return GenerationResult(options.cut(reply.text), counts)


def _own_device(given: str | None, processes: int) -> str | None:
    """The device of this process: each of several has a GPU of its own."""
    if processes < 2:
        return given
    if given not in (None, "cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu with {processes} processes, got {given!r}")
    if given == "cpu" or not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(rank)  # also for bitsandbytes, which takes the current one
    return f"cuda:{rank}"
