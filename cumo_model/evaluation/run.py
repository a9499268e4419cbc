"""Run benchmarks: ask, score, and keep what was found in a folder.

OUT/TASK/answers.jsonl has the answers in LLaVA's format, OUT/TASK/scores.json the figures and a row for each
question, OUT/TASK/submission.* what the benchmark's server takes. Everything is written whole, so that a run
that is killed at any moment is resumed by the same call.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cumo_model.checkpoints.folders import write_json
from cumo_model.evaluation.files import read_json, read_lines
from cumo_model.evaluation.task import Data, Item, Judge, Row, Task, unit_of
from cumo_model.serving.answer import BATCH, answer_questions, this_process
from cumo_model.serving.answer_file import OtherAnswersError
from cumo_model.serving.engines import Engine
from cumo_model.serving.questions import Question, pictures_of_questions
from cumo_model.serving.sampling import Sampling

ANSWERS, SCORES = "answers.jsonl", "scores.json"
NEEDS_JUDGE = "needs a judge"


@dataclass(frozen=True)
class Outcome:
    """What a benchmark has given.

    Attributes:
        task: the benchmark.
        figures: as of `Task.figures`; None where there is no score.
        questions: number of questions asked.
        of: number of questions that the benchmark has.
        note: why there is no score, or what must be known about it, or "".
        error: why the benchmark could not be run, or "".
        submission: the file for the benchmark's server, if there is one.
    """

    task: Task
    figures: dict[str, float] | None = None
    questions: int = 0
    of: int = 0
    note: str = ""
    error: str = ""
    submission: Path | None = None

    @property
    def score(self) -> float | None:
        """The first of the figures."""
        return None if self.figures is None else next(iter(self.figures.values()))


@dataclass(frozen=True)
class Scores:
    """The content of a file of scores.

    Attributes:
        task: name of the benchmark.
        model: name of the model.
        source: names of the files of questions.
        judge: name of the model that judged, or "".
        rows: a row for each question that was scored.
    """

    task: str
    model: str
    source: str
    judge: str
    rows: list[Row]


def evaluate(
    engine: Engine | Callable[[], Engine] | None,
    tasks: Sequence[Task],
    data: str | os.PathLike,
    out: str | os.PathLike,
    limit: int | None = None,
    batch_size: int = BATCH,
    judge: Judge | None = None,
    settings: dict[str, Any] | None = None,
    model_id: str | None = None,
    answers: str | os.PathLike | None = None,
    progress: bool = True,
    each: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run benchmarks with CuMo's prompts and settings: greedy decoding, and each benchmark's longest answer.

    A benchmark whose files are missing or damaged, or a question of which cannot be answered, has an `error`,
    and the others are run. If torch.distributed is initialised, all processes share the questions, and the
    first one scores.

    Args:
        engine: what answers, or a function that makes it where there is something to answer; None with
            `answers`.
        tasks: the benchmarks.
        data: folder of all data, with a folder for each benchmark.
        out: folder of the results.
        limit: ask only so many units (questions, or sets of questions that are scored as one) of each
            benchmark, spread evenly over all; None: all.
        batch_size: questions per batch.
        judge: is asked where a benchmark needs a judge; None: these benchmarks have answers and no score.
        settings: what the answers depend on, as of `answer_questions`.
        model_id: name of the model.
        answers: a file of answers in LLaVA's format, to be scored in place of asking; for one benchmark.
        progress: whether to show progress.
        each: is called with each outcome as soon as it is there, in the first process.

    Returns:
        The outcomes, in the order of the benchmarks; in the first process those with scores.

    Raises:
        ValueError: `data` is no folder; the engine cannot be made; or in one of several processes it fails,
            which would leave the others waiting.
    """
    data, out = Path(data), Path(out)
    if not data.is_dir():
        got = "is not a folder" if data.exists() else "does not exist"
        raise ValueError(f"data must be a folder, got {str(data)!r}, which {got}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if answers is not None and len(tasks) != 1:
        raise ValueError(f"answers must be those of one benchmark, got {len(tasks)} benchmarks")
    if engine is not None and not hasattr(engine, "answers"):
        engine = functools.partial(_opened, engine)
    outcomes = []
    for task in tasks:
        outcome = Outcome(task)
        try:
            if this_process()[0] == 0:  # else a run that fails would leave those of an earlier one
                (out / task.name / SCORES).unlink(missing_ok=True)
            found = read(task, data)
            asked = limited(found, limit)
            of = max(found.of, len(found.items))
            outcome = replace(outcome, questions=len(asked.items), of=of, note=found.note)
            if answers is None:
                said = _asked(task, asked, engine, out, batch_size, settings, model_id, progress)
            else:
                said = given_answers(answers, [item.question for item in asked.items])
            if this_process()[0] == 0:
                name = model_id or getattr(engine, "name", None) or str(answers)
                outcome = _scored(outcome, asked, said, judge, out / task.name, name)
        except ValueError as error:
            if isinstance(error, _EngineError):
                raise ValueError(str(error)) from error.__cause__
            outcome = replace(outcome, error=str(error))
        if this_process()[0] == 0:
            each(outcome)
        outcomes.append(outcome)
    return outcomes


class _EngineError(ValueError):
    """An error that concerns all benchmarks."""


def _opened(engine: Callable[[], Engine]) -> Engine:
    try:
        return engine()
    except ValueError as error:
        raise _EngineError(str(error)) from error


def read(task: Task, data: Path) -> Data:
    """The questions of a benchmark, from the folder of all data.

    Raises:
        ValueError: its folder is missing, or as `Task.read`; also if it has no question, or two with the same
            id and text.
    """
    folder = next((data / name for name in task.folders if (data / name).is_dir()), None)
    if folder is None:
        raise ValueError(
            f"{data} has no folder {' or '.join(task.folders)}, so the data of {task.title} are absent"
        )
    found = task.read(folder)
    if not found.items:
        raise ValueError(f"{folder} must hold at least one question, got none")
    seen: dict[Any, Item] = {}
    for item in found.items:
        if item.question.key in seen:
            raise ValueError(
                f"{item.question.place}: the question {item.question.id!r} is also at "
                f"{seen[item.question.key].question.place}"
            )
        seen[item.question.key] = item
    return found


def limited(data: Data, limit: int | None) -> Data:
    """The first items of `limit` units, spread evenly over all units."""
    units = list(dict.fromkeys(unit_of(item) for item in data.items))
    if limit is None or limit >= len(units):
        return data
    kept = {units[number * len(units) // limit] for number in range(limit)}
    return replace(data, items=[item for item in data.items if unit_of(item) in kept])


def _asked(task, data: Data, engine, out: Path, batch_size, settings, model_id, progress) -> list[str]:
    """The answers to the questions of a benchmark; an error where one has none."""
    questions = [item.question for item in data.items]
    pictures = pictures_of_questions(questions, data.pictures)
    path = out / task.name / ANSWERS
    try:
        done = answer_questions(
            engine,
            questions,
            pictures,
            path,
            Sampling(task.max_new_tokens),
            batch_size,
            settings=settings,
            model_id=model_id,
            progress=progress,
            title=task.name,
        )
    except ValueError as error:
        is_alone = this_process()[1] == 1 or isinstance(error, OtherAnswersError)
        if not is_alone and not isinstance(error, _EngineError):  # the other processes wait for this one
            raise _EngineError(str(error)) from error
        raise
    if done.failures:
        first = next(question for question in questions if question.key in done.failures)
        raise ValueError(
            f"{len(done.failures)} of {len(questions)} questions have no answer, such as {first.id!r}: "
            f"{done.failures[first.key]}"
        )
    return given_answers(path, questions)


def given_answers(path: str | os.PathLike, questions: Sequence[Question]) -> list[str]:
    """The texts of a file of answers, in the order of questions.

    Args:
        path: JSON lines with question_id and text, and prompt where several questions have one id. Lines of
            other questions are passed over; a prompt may lack the last lines of the question, as in answers
            of LLaVA's scripts.
        questions: the questions.

    Raises:
        ValueError: the file cannot be read, or a question has no answer or two.
    """
    path, found = Path(path), {}
    asked: dict[str, list[Question]] = {}
    for question in questions:
        asked.setdefault(str(question.id), []).append(question)
    for place, line in read_lines(path):
        if "question_id" not in line or not isinstance(line.get("text"), str):
            raise ValueError(f"{place}: must have question_id, and text that is text")
        question = _meant(line, asked.get(str(line["question_id"]), []))
        if question is None:
            continue  # of another question
        if question.key in found:
            raise ValueError(f"{place}: the question {line['question_id']!r} has two answers")
        found[question.key] = line["text"]
    missing = [question for question in questions if question.key not in found]
    if missing:
        raise ValueError(
            f"{path} has answers to {len(questions) - len(missing)} of {len(questions)} questions; the first "
            f"without one is {missing[0].id!r}"
        )
    return [found[question.key] for question in questions]


def _meant(line: dict[str, Any], questions: Sequence[Question]) -> Question | None:
    """The question of a line, of those with its id: by the prompt, which may lack the last lines."""
    prompt = str(line.get("prompt") or "").replace("<image>", "").strip()
    if not prompt:
        return questions[0] if len(questions) == 1 else None
    same = [question for question in questions if question.text.strip() == prompt]
    begun = [question for question in questions if question.text.strip().startswith(f"{prompt}\n")]
    return next(iter(same or begun), None)


def _scored(outcome: Outcome, data: Data, said: list[str], judge, folder: Path, model: str) -> Outcome:
    """The outcome with figures and submission, which are also written."""
    task = outcome.task
    folder.mkdir(parents=True, exist_ok=True)
    notes = [outcome.note, "a part of the questions" * (outcome.questions < outcome.of)]
    if (rows := task.rows(data, said, judge)) is None:
        elsewhere = f"scored by {task.server or 'its authors'}"
        notes.append(NEEDS_JUDGE if task.judged and judge is None else elsewhere)
    else:
        notes.append(task.note(rows))
        figures = task.figures(rows)
        outcome = replace(outcome, figures=figures)
        content = {
            "task": task.name,
            "model": model,
            "judge": judge.model if task.judged and judge is not None else "",
            "metric": task.metric,
            "questions": outcome.questions,
            "of": outcome.of,
            "source": str(data.more.get("source", "")),
            "note": "; ".join(filter(None, notes)),
            "figures": {name: value if math.isfinite(value) else None for name, value in figures.items()},
            "rows": [asdict(row) for row in rows],
        }
        write_json(folder / SCORES, content)
    outcome = replace(outcome, note="; ".join(filter(None, notes)))
    try:  # after the scores, which need no spreadsheet
        return replace(outcome, submission=task.submission(data, said, folder / "submission"))
    except ValueError as error:
        return replace(outcome, error=str(error))


def earlier(task: Task, folder: Path, model: str) -> Outcome | None:
    """The outcome of an earlier run of the same model in a folder of results, if it has scores."""
    path = folder / task.name / SCORES
    try:
        content = read_json(path, dict)
        if content["model"] != model:
            return None
        figures = {name: math.nan if value is None else value for name, value in content["figures"].items()}
        return Outcome(task, figures, content["questions"], content["of"], content["note"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_scores(path: Path) -> Scores:
    """Read a file of scores.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    content = read_json(path, dict)
    try:
        rows = [
            Row(row["unit"], row["group"], dict(row["values"]), row["picture"]) for row in content["rows"]
        ]
        names = ("task", "model", "source", "judge")
        return Scores(*(str(content[name]) for name in names), rows)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} must be a file of scores as `eval` writes it; delete it") from None
