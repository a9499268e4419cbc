"""Answers to a file of questions, the command `python -m cumo_model answer`."""

import concurrent.futures
import datetime
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cumo_model.data.pictures import Pictures, is_system_failure
from cumo_model.processing.pictures import load_image
from cumo_model.serving.answer_file import AnswerFile
from cumo_model.serving.endpoint import Endpoint, RefusedError, at_once
from cumo_model.serving.engines import Engine, Source
from cumo_model.serving.messages import Message
from cumo_model.serving.questions import Question, pictures_of_questions, read_questions
from cumo_model.serving.replies import Reply
from cumo_model.serving.sampling import GREEDY, Sampling

BATCH = 8
WAIT = datetime.timedelta(days=7)  # of a process for the others, whose answers may be longer
Images = Pictures | str | os.PathLike | Sequence[str | os.PathLike] | None


@dataclass(frozen=True)
class Answered:
    """What `answer_questions` has done.

    Attributes:
        path: the file of answers; there is none if no question has an answer.
        answers: number of questions that have an answer.
        new: how many of them were answered now, by this process.
        failures: why others have none, by the `key` of the question; in the first process those of all.
    """

    path: Path
    answers: int
    new: int
    failures: dict[tuple[int | str, str], str]


def answer_questions(
    engine: Engine | Callable[[], Engine],
    questions: Sequence[Question],
    images: Images,
    out: str | os.PathLike,
    sampling: Sampling = GREEDY,
    batch_size: int = BATCH,
    system: str | None = None,
    settings: dict[str, Any] | None = None,
    model_id: str | None = None,
    progress: bool = True,
    title: str = "answers",
) -> Answered:
    """Answer questions and write the answers to a file, in the order of the questions.

    An interrupted call goes on where it was stopped, and a finished one does nothing. With greedy decoding or
    a seed the file is the same however often it was interrupted. If torch.distributed is initialised, each
    process answers a share of the batches, and all return when the file is complete; processes need one file
    system.

    A question that cannot be answered (a damaged picture, a conversation longer than the context) has no line
    in the file; the next call tries it again. A batch that needs too much memory is halved.

    Args:
        engine: a `Local`, an `Endpoint`, or a function that makes one where there is something to answer.
        questions: the questions, as from `read_questions`.
        images: as in `pictures_of_questions`.
        out: path of the file.
        sampling: options of generation; the seed is that of each batch together with its first question.
        batch_size: questions per batch of a `Local`; an `Endpoint` is asked one by one, several at once.
        system: a text for the system's place in each conversation.
        settings: what else the answers depend on, as JSON: an interrupted run goes on only with the same. By
            default name and template of the engine.
        model_id: name of the model in the answers; by default that of the engine.
        progress: whether to show a progress bar and the questions that fail.
        title: of the progress bar.

    Raises:
        ValueError: a picture is missing; `out` has answers to other questions or with other settings; or
            the engine fails for a reason that concerns all questions, such as an endpoint that is gone.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pictures = pictures_of_questions(questions, images)
    if model_id is None and hasattr(engine, "name"):
        model_id = engine.name
    if settings is None:
        settings = {"model": engine.name, "template": engine.template}
    settings = {
        **settings,
        "model_id": model_id,
        "system": system,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    rank, ranks = this_process()
    with AnswerFile(out, questions, settings, rank) as file:
        _wait()  # until all have dropped what a killed process has left behind
        file.read()
        _wait()  # until all have read, so that they share the same rest
        if file.is_finished:
            if rank == 0:
                file.finish()
            _wait()
            return Answered(file.out, len(questions), 0, {})
        batches = _batches(questions, batch_size)
        rest = [[question for question in batch if question.key not in file.answers] for batch in batches]
        rest = [batch for batch in rest if batch][rank::ranks]
        file.begin()
        if rest and not hasattr(engine, "answers"):
            engine = engine()
        shown = progress and rank == 0
        bar = tqdm(
            total=len(questions),
            initial=len(file.answers),
            desc=title,
            unit=" questions",
            disable=not (shown and sys.stderr.isatty()),
        )
        failures, new = {}, 0
        with bar:
            for question, reply in _answered(engine, rest, pictures, system, sampling, file, model_id):
                bar.update()
                if isinstance(reply, Reply):
                    new += 1
                    continue
                failures[question.key] = reply
                if progress:
                    tqdm.write(f"cumo: question {question.id!r}: {reply}", file=sys.stderr)
        failures = _gathered(failures)
        if rank == 0:
            file.finish()
        _wait()
        return Answered(file.out, len(questions) - len(failures), new, failures)


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions of about the same length together, the longest first: what does not fit fails at once."""
    order = sorted(
        range(len(questions)),
        key=lambda i: (-len(questions[i].images), -len(questions[i].text), i),
    )
    return [[questions[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def _answered(
    engine: Any,
    batches: list[list[Question]],
    pictures: Pictures,
    system: str | None,
    sampling: Sampling,
    file: AnswerFile,
    model_id: str | None,
) -> Iterator[tuple[Question, Reply | str]]:
    """Answer batches and add them to the file; yields each question with its answer, or why it has none."""
    talk = lambda question: _talk(question, pictures, system)
    if isinstance(engine, Endpoint):
        questions = [question for batch in batches for question in batch]
        found = ([(question, reply)] for question, reply in _asked_at_once(engine, questions, talk, sampling))
    else:
        found = _in_batches(engine, batches, talk, sampling)
    for batch in found:
        file.add(
            [file.answer(q, reply, model_id or engine.name) for q, reply in batch if isinstance(reply, Reply)]
        )
        yield from batch


def _talk(question: Question, pictures: Pictures, system: str | None) -> list[Message] | str:
    """The conversation of a question, or why it has none."""
    try:
        images = [load_image(pictures.load(name), name) for name in question.images]
    except ValueError as error:
        if is_system_failure(error):
            raise
        return str(error)
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, question.message(images)]


def _in_batches(
    engine: Any, batches: Iterable[list[Question]], talk: Callable, sampling: Sampling
) -> Iterator[list[tuple[Question, Reply | str]]]:
    read = lambda batch: (batch, [talk(question) for question in batch])
    for batch, talks in _ahead(read, batches):
        held = [found for found in talks if not isinstance(found, str)]
        replies = iter(_replies(engine, held, _seeded(sampling, batch[0])))
        yield [
            (question, found if isinstance(found, str) else next(replies))
            for question, found in zip(batch, talks, strict=True)
        ]


def _ahead(function: Callable, items: Iterable) -> Iterator:
    """The results of a function; the next one is computed while the last one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            before, coming = coming, pool.submit(function, item)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _seeded(sampling: Sampling, question: Question) -> Sampling:
    """Options with a seed of their own for each batch, whichever process answers it."""
    if sampling.seed is None:
        return sampling
    digest = hashlib.sha256(json.dumps([sampling.seed, question.id]).encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:4]))


def _replies(engine: Any, talks: list[list[Message]], sampling: Sampling) -> list[Reply | str]:
    """The answers to conversations, or why there is none."""
    if not talks:
        return []
    full, refused = None, []
    try:
        return list(engine.answers(talks, sampling))
    except (ValueError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            full = " ".join(str(error).split()) or "not enough memory"
        else:
            refused = [_refusal(engine, talk) for talk in talks]
            if not any(refused):  # it concerns all questions
                raise
    # here the error no longer holds the tensors
    if full is None:
        accepted = [talk for talk, reason in zip(talks, refused, strict=True) if reason is None]
        found = iter(_replies(engine, accepted, sampling))
        return [next(found) if reason is None else reason for reason in refused]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(talks) == 1:
        return [full]
    half = (len(talks) + 1) // 2
    return [
        *_replies(engine, talks[:half], sampling),
        *_replies(engine, talks[half:], sampling),
    ]


def _refusal(engine: Any, talk: list[Message]) -> str | None:
    try:
        engine.check(talk)
    except ValueError as error:
        return str(error)
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of memory on any device."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch on a CPU
            return True
        error = error.__cause__
    return False


def _asked_at_once(
    engine: Endpoint, questions: list[Question], talk: Callable, sampling: Sampling
) -> Iterator[tuple[Question, Reply | str]]:
    """Ask an endpoint several questions at the same time; yields them as they are answered."""
    is_left = threading.Event()

    def ask(question: Question) -> Reply | str:
        found = talk(question)
        if isinstance(found, str):
            return found
        try:
            with engine.stream(found, _seeded(sampling, question)) as stream:
                for _ in stream:
                    if is_left.is_set():
                        break
            return stream.reply
        except RefusedError as error:
            return str(error)

    try:
        yield from at_once(ask, questions, engine.at_once)
    finally:  # also after Ctrl-C: those that run end with their next piece
        is_left.set()


def this_process() -> tuple[int, int]:
    """Number of this process, and of all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _wait() -> None:
    if this_process()[1] > 1:
        torch.distributed.barrier()


def _gathered(failures: dict[tuple[int | str, str], str]) -> dict[int | str, str]:
    """The failures of all processes; the processes have then answered all questions."""
    ranks = this_process()[1]
    if ranks == 1:
        return failures
    found: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(found, failures)
    return {number: reason for part in found for number, reason in part.items()}


def answer(
    checkpoint: str | os.PathLike | None,
    questions: str | os.PathLike,
    images: Images,
    out: str | os.PathLike,
    sampling: Sampling = GREEDY,
    batch_size: int = BATCH,
    system: str | None = None,
    template: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    endpoint: str | None = None,
    at_once: int = 16,
) -> int:
    """The command `python -m cumo_model answer`; torchrun may start it in several processes.

    Args:
        checkpoint: folder of the checkpoint; None: ask an endpoint.
        questions: path of the file of questions.
        images: as in `answer_questions`.
        out: path of the file of answers.
        sampling: options of generation.
        batch_size: questions per batch.
        system: text for the system's place.
        template: name of an instruct template; by default that of the checkpoint.
        limit: answer the first questions only.
        device: of the model; by default the GPU of this process, if there is one.
        dtype: name of the dtype of the weights; by default that of the files.
        bits: 4 or 8 to quantise the weights.
        endpoint: address of a running server.
        at_once: requests to the endpoint at the same time.

    Returns:
        0.

    Raises:
        ValueError: as `answer_questions`; also if a question has no answer, after the file is written.
    """
    join_group(endpoint)
    asked = read_questions(questions, limit)
    if Path(out).exists() and os.path.samefile(out, questions):
        raise ValueError(f"out must be another file than the questions, got {str(out)!r}")
    source = Source.of(checkpoint, endpoint, template, device, dtype, bits, at_once)
    done = answer_questions(
        source.engine, asked, images, out, sampling, batch_size, system, source.settings, source.name
    )
    rank, ranks = this_process()
    if ranks > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return 0
    if done.failures:
        raise ValueError(
            f"{len(done.failures)} of {len(asked)} questions have no answer, see above; "
            f"{done.answers} answers are in {done.path}, and the same command tries the others again"
            if done.answers
            else f"none of {len(asked)} questions has an answer, see above"
        )
    if ranks == 1 and not done.new:
        print(f"already finished: answers to {done.answers} questions are in {done.path}")
    else:
        print(f"answers to {done.answers} of {len(asked)} questions: {done.path}")
    return 0


def join_group(endpoint: str | None) -> None:
    """Join the other processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    if endpoint is not None:
        raise ValueError(
            f"--endpoint must be used in one process, got {os.environ['WORLD_SIZE']}: give --at-once"
        )
    torch.distributed.init_process_group("gloo", timeout=WAIT)  # the processes exchange a few words only
