"""MM-Vet: open questions, whose answers a judge scores from 0 to 1."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.checkpoints.folders import write_whole
from cumo_model.data.pictures import Pictures
from cumo_model.evaluation.files import folder_of, found, read_json, value_of
from cumo_model.evaluation.scorers.reviews import correctness_of
from cumo_model.evaluation.task import LONG, Data, Item, Judge, Row, Task, percent
from cumo_model.evaluation.tasks.common import unreadable
from cumo_model.serving.questions import Question, read_questions

ASKED = "llava-mm-vet.jsonl"  # LLaVA's file of questions
FILES = ("mm-vet/mm-vet.json", "mm-vet.json")
IMAGES = ("mm-vet/images", "images")
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
SYSTEM = "You grade answers and write a number only."
PROMPT = """\
Grade an answer by comparing it with the reference. Write one number from 0.0 (wrong) to 1.0 (right), in \
steps of 0.1, and nothing else. If parts of the reference are joined by <AND>, all are needed and each gives \
its share; if they are joined by <OR>, any one of them suffices. Other wording is no mistake.

Question: Which two fruits are on the table?
Reference: an apple <AND> a pear
Answer: I see an apple.
Grade: 0.5

Question: What is the sign's colour?
Reference: red <OR> dark red
Answer: The sign is dark red.
Grade: 1.0

Question: What is 3 + 4?
Reference: 7
Answer: 8
Grade: 0.0
"""


class MmVet(Task):
    """MM-Vet: the questions of LLaVA's llava-mm-vet.jsonl, or else of mm-vet.json, which has the references.

    The submission is the file that the official notebook and its server grade with gpt-4-0613. The grades of
    the judge here come from a prompt in this project's words and are not those of the official evaluator. A
    reply that begins with no number counts 0.
    """

    name, title = "mmvet", "MM-Vet"
    metric = "score of the judge, %"
    folders = ("mmvet", "mm-vet")
    max_new_tokens = LONG
    judged = True
    mean_of = "score"
    server = "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator"

    def read(self, folder: Path) -> Data:
        folder = Path(folder)
        official = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if not (folder / ASKED).is_file() and official is None:
            found(folder, ASKED, *FILES)
        records = {} if official is None else read_json(official, dict)
        entries = {_number(key, str(official)): record for key, record in records.items()}
        for number, record in entries.items():
            if not isinstance(record, dict):
                raise ValueError(f"{official}, v1_{number}: must be an object, got {type(record).__name__}")
        if (folder / ASKED).is_file():
            questions, source = read_questions(folder / ASKED), ASKED
        else:
            questions, source = [], official.name
            for number, record in entries.items():
                place = f"{official}, v1_{number}"
                picture = value_of(record, "imagename", str, place)
                text = value_of(record, "question", str, place)
                questions.append(Question(number, text, (picture,), place=place))
        items, seen = [], set()
        for question in questions:
            if question.id in seen or not isinstance(question.id, int):
                raise ValueError(
                    f"{question.place}: question_id must be an int of its own, got {question.id!r}"
                )
            seen.add(question.id)
            items.append(Item(question, _reference(question, entries, official), "", f"v1_{question.id}"))
        if not items:
            raise ValueError(f"{official} must hold at least one question, got none")
        return Data(items, Pictures([folder_of(folder, *IMAGES)]), {"source": source})

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        if judge is None or any(item.reference is None for item in data.items):
            return None
        prompts = []
        for item, answer in zip(data.items, answers, strict=True):
            asked = f"Question: {item.question.text}\nReference: {item.reference['answer']}"
            prompts.append(f"{PROMPT}\n{asked}\nAnswer: {answer}\nGrade:")
        is_grade = lambda reply: correctness_of(reply) is not None
        replies = judge.all(prompts, SYSTEM, max_tokens=256, is_usable=is_grade)
        rows = []
        for item, reply in zip(data.items, replies, strict=True):
            score = correctness_of(reply)
            values = {
                "score": score or 0.0,
                "unreadable": score is None,
                "capabilities": item.reference["capabilities"],
            }
            rows.append(Row(item.unit, item.group, values))
        return rows

    def note(self, rows: Sequence[Row]) -> str:
        return unreadable(rows)

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        figures = {
            self.metric: percent([row.values["score"] for row in rows]),
            "replies without a grade, %": percent([row.values["unreadable"] for row in rows]),
        }
        for name in CAPABILITIES:
            own = [row.values["score"] for row in rows if name in row.values["capabilities"]]
            if own:
                figures[f"category: {name}"] = percent(own)
        return figures

    def submission(self, data: Data, answers: Sequence[str], path: Path) -> Path | None:
        """Write {"v1_0": answer, ...}, as LLaVA's converter does."""
        said = {item.unit: answer for item, answer in zip(data.items, answers, strict=True)}
        target = path.with_name(f"{path.name}.json")
        write_whole(target, json.dumps(said, indent=2))
        return target


def _number(key: str, place: str) -> int:
    number = key.removeprefix("v1_")
    if number == key or not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{place}: names must be like v1_0, got {key!r:.80}")
    return int(number)


def _reference(question: Question, entries: dict[int, Any], official: Path | None) -> dict[str, Any] | None:
    """The answer and the capabilities of a question; None without the official file."""
    if official is None:
        return None
    if question.id not in entries:
        raise ValueError(f"{official} must have v1_{question.id}, a question of {ASKED}")
    place = f"{official}, v1_{question.id}"
    record = entries[question.id]
    capabilities = value_of(record, "capability", list, place)
    answer = value_of(record, "answer", str, place).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return {"answer": answer, "capabilities": [str(name) for name in capabilities]}
