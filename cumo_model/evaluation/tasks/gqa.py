"""GQA: compositional questions about real pictures, balanced test-dev split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import folder_of, found, read_json, value_of
from cumo_model.evaluation.scorers.exact import exact_match
from cumo_model.evaluation.task import Data, Item, Row, by_group, percent
from cumo_model.evaluation.tasks.common import OneByOne, ask, first_file, read_list, short_prompt, told_apart

LIST = "llava_gqa_testdev_balanced.jsonl"
OFFICIAL = "testdev_balanced_questions.json"


class Gqa(OneByOne):
    """GQA (arXiv 1902.09506): exact match with the answer."""

    name, title = "gqa", "GQA"
    folders = ("gqa",)
    mean_of = "right"

    def read(self, folder: Path) -> Data:
        path = found(
            folder, *(f"{part}{OFFICIAL}" for part in ("data/", "data/questions1.2/", "questions/", ""))
        )
        records = read_json(path, dict)
        pictures = [folder_of(folder, "data/images", "images")]
        if listed := first_file(folder, LIST):
            questions = read_list(listed)
        else:
            questions = []
            for number, record in records.items():
                place = f"{path}, question {number}"
                record = value_of(records, number, dict, place)
                text = short_prompt(value_of(record, "question", str, place))
                questions.append(ask(number, text, value_of(record, "imageId", str, place) + ".jpg", place))
        items = []
        for question in questions:
            record = value_of(records, str(question.id), dict, f"{path}, for {question.place}")
            answer = value_of(record, "answer", str, f"{path}, question {question.id}")
            items.append(Item(question, answer, _kind(record)))
        return Data(told_apart(items), pictures, {"source": str(listed or path)}, len(records))

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        return {"right": int(exact_match(answer, item.reference))}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        groups = {f"category: {name}": value for name, value in by_group(rows, "right").items()}
        return {"accuracy": percent([row.values["right"] for row in rows]), **groups}


def _kind(record: dict[str, Any]) -> str:
    """The official script's two kinds: "open" for structural type "query", or "binary"."""
    types = record.get("types")
    structural = types.get("structural") if isinstance(types, dict) else None
    return "" if structural is None else "open" if structural == "query" else "binary"
