"""SEED-Bench: multiple choice about pictures, by dimension; the questions about videos are left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import found, read_json, value_of
from cumo_model.evaluation.scorers.letters import letter_by_pattern
from cumo_model.evaluation.task import Data, Item, Row, by_group, percent
from cumo_model.evaluation.tasks.common import OneByOne, ask, first_file, letter_prompt, read_list, told_apart
from cumo_model.serving.questions import Question

LISTS = ("llava-seed-bench-new.jsonl", "llava-seed-bench.jsonl")  # the first one is that of CuMo's script
OFFICIAL = "SEED-Bench.json"
FOLDER = "SEED-Bench-image"
LETTERS = "abcd"


class Seed(OneByOne):
    """SEED-Bench (arXiv 2307.16125), image part: accuracy of the letter.

    As in LLaVA's scripts/convert_seed_for_submission.py the whole answer must be the letter. The second
    figure also takes a letter with words around it.
    """

    name, title = "seed", "SEED-Bench (image)"
    folders = ("seed_bench", "seed")
    mean_of = "right"

    def read(self, folder: Path) -> Data:
        path = found(folder, OFFICIAL)
        content = read_json(path, dict)
        types = value_of(content, "question_type", dict, str(path))
        names = {number: name for name, number in types.items()}
        records: dict[str, list[dict[str, Any]]] = {}  # an id is that of two questions
        for index, record in enumerate(value_of(content, "questions", list, str(path)), 1):
            place = f"{path}, question {index}"
            if not isinstance(record, dict):
                raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
            number = str(value_of(record, "question_id", (int, str), place))
            records.setdefault(number, []).append({**record, "place": place})
        images = [record for some in records.values() for record in some if _is_image(record)]
        asked: list[tuple[Question, dict[str, Any]]] = []
        if listed := first_file(folder, *LISTS):
            for question in read_list(listed):
                record = _record(question, records, path)
                if _is_image(record):
                    asked.append((question, record))
        else:
            for record in images:
                place = record["place"]
                picture = f"{FOLDER}/{value_of(record, 'data_id', str, place)}"
                text = letter_prompt(value_of(record, "question", str, place), _choices(record))
                asked.append((ask(record["question_id"], text, picture, place), record))
        if not asked:
            raise ValueError(f"{listed or path} must hold at least one question about a picture, got none")
        items = []
        for question, record in asked:
            kind = value_of(record, "question_type_id", int, record["place"])
            reference = {
                "letter": value_of(record, "answer", str, record["place"]),
                "choices": len(_choices(record)),
            }
            items.append(Item(question, reference, names.get(kind, str(kind))))
        return Data(told_apart(items), [folder], {"source": str(listed or path)}, len(images))

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        letter = item.reference["letter"]
        by_pattern = letter_by_pattern(answer, item.reference["choices"])
        return {"right": int(answer == letter), "by pattern": int(by_pattern == letter)}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return {
            "accuracy": percent([row.values["right"] for row in rows]),
            "accuracy, letter by pattern": percent([row.values["by pattern"] for row in rows]),
            **{f"category: {name}": value for name, value in by_group(rows, "right").items()},
        }


def _record(question: Question, records: dict[str, list[dict[str, Any]]], path: Path) -> dict[str, Any]:
    """The record of a question of LLaVA's list: that with its id, and of two the one with its text."""
    some = records.get(str(question.id), [])
    fits = [record for record in some if question.text.startswith(str(record.get("question")))]
    if not some or (len(some) > 1 and not fits):
        raise ValueError(f"{question.place}: {path} has no question {question.id!r:.80}")
    return (fits or some)[0]


def _is_image(record: dict[str, Any]) -> bool:
    return value_of(record, "data_type", str, record["place"]) == "image"


def _choices(record: dict[str, Any]) -> list[str]:
    return [
        str(value_of(record, f"choice_{letter}", (str, int, float), record["place"])) for letter in LETTERS
    ]
