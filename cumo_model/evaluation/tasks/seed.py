"""SEED-Bench: multiple choice about pictures, by dimension; the questions about videos are left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import found, read_json, value_of
from cumo_model.evaluation.scorers.letters import letter_by_pattern
from cumo_model.evaluation.task import Data, Item, Row, by_group, percent
from cumo_model.evaluation.tasks.common import OneByOne, ask, first_file, letter_prompt, read_list, told_apart

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
        found(folder, FOLDER)
        records: dict[str, dict[str, Any]] = {}
        for index, record in enumerate(value_of(content, "questions", list, str(path)), 1):
            place = f"{path}, question {index}"
            if not isinstance(record, dict):
                raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
            records[str(value_of(record, "question_id", (int, str), place))] = {**record, "place": place}
        images = {key: record for key, record in records.items() if _is_image(record)}
        if listed := first_file(folder, *LISTS):
            questions = read_list(listed)
            if unknown := next((one for one in questions if str(one.id) not in records), None):
                raise ValueError(f"{unknown.place}: {path} has no question {unknown.id!r:.80}")
            questions = [question for question in questions if str(question.id) in images]
        else:
            questions = []
            for record in images.values():
                place = record["place"]
                picture = f"{FOLDER}/{value_of(record, 'data_id', str, place)}"
                text = letter_prompt(value_of(record, "question", str, place), _choices(record))
                questions.append(ask(record["question_id"], text, picture, place))
        if not questions:
            raise ValueError(f"{listed or path} must hold at least one question about a picture, got none")
        items = []
        for question in questions:
            record = images[str(question.id)]
            kind = value_of(record, "question_type_id", int, record["place"])
            reference = {
                "letter": value_of(record, "answer", str, record["place"]),
                "choices": len(_choices(record)),
            }
            items.append(Item(question, reference, names.get(kind, str(kind))))
        return Data(told_apart(items), [folder], {"source": str(listed or path)})

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


def _is_image(record: dict[str, Any]) -> bool:
    return value_of(record, "data_type", str, record["place"]) == "image"


def _choices(record: dict[str, Any]) -> list[str]:
    return [
        str(value_of(record, f"choice_{letter}", (str, int, float), record["place"])) for letter in LETTERS
    ]
