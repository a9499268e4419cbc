"""VQAv2: open questions on pictures of COCO; test-dev for the server, or validation, scored here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.checkpoints.folders import write_whole
from cumo_model.evaluation.files import folder_of, found, read_json, read_lines, value_of
from cumo_model.evaluation.scorers.vqa import normalised, vqa_accuracy_of_server
from cumo_model.evaluation.task import Data, Item, Judge, Row, by_group, percent
from cumo_model.evaluation.tasks.common import OneByOne, ask, first_file, read_list, short_prompt, told_apart
from cumo_model.serving.questions import Question

LIST, LIST_OF_ALL = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
OFFICIAL = "v2_OpenEnded_mscoco_{}_questions.json"
NOT_ALL = f"the server wants entries for all of test2015, and there is no {LIST_OF_ALL}"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class Vqav2(OneByOne):
    """VQAv2 (arXiv 1612.00837): VQA accuracy over ten references.

    The answers to test-dev are not public: a file for the server is written. If the annotations of the
    validation split are in the folder, that split is asked and scored here instead.
    """

    name, title = "vqav2", "VQAv2"
    metric = "VQA accuracy, %"
    folders = ("vqav2",)
    mean_of = "accuracy"
    server = "https://eval.ai/web/challenges/challenge-page/830"

    def read(self, folder: Path) -> Data:
        if annotations := first_file(folder, ANNOTATIONS):
            return self._read_validation(folder, annotations)
        if listed := first_file(folder, LIST):
            questions = read_list(listed)
        else:
            listed = found(folder, OFFICIAL.format("test-dev2015"), LIST)
            questions = _read_official(listed, "test2015")
        note = ""
        if of_all := first_file(folder, LIST_OF_ALL):
            lines = read_lines(of_all)
            numbers = [value_of(line, "question_id", (int, str), place) for place, line in lines]
        elif of_all := first_file(folder, OFFICIAL.format("test2015")):
            numbers = [question.id for question in _read_official(of_all, "test2015")]
        else:
            numbers, note = [question.id for question in questions], NOT_ALL
        more = {"source": str(listed), "all": numbers}
        items = told_apart(Item(question) for question in questions)
        return Data(items, [folder_of(folder, "test2015")], more, note=note)

    def _read_validation(self, folder: Path, path: Path) -> Data:
        annotations: dict[Any, tuple[list[str], str]] = {}
        for number, record in enumerate(_records(path, "annotations"), 1):
            place = f"{path}, annotation {number}"
            answers = value_of(record, "answers", list, place)
            if not answers or not all(isinstance(one, dict) for one in answers):
                raise ValueError(f"{place}: answers must be objects, got {answers!r:.80}")
            texts = [value_of(one, "answer", str, place) for one in answers]
            annotations[value_of(record, "question_id", int, place)] = texts, record.get("answer_type", "")
        listed = found(folder, OFFICIAL.format("val2014"))
        items = []
        for question in _read_official(listed, "val2014"):
            if question.id not in annotations:
                raise ValueError(f"{question.place}: {path} has no answers to question {question.id}")
            items.append(Item(question, *annotations[question.id]))
        note = "the validation split, not test-dev"
        return Data(told_apart(items), [folder_of(folder, "val2014")], {"source": str(listed)}, note=note)

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        return None if "all" in data.more else super().rows(data, answers, judge)

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        return {"accuracy": vqa_accuracy_of_server(answer, item.reference)}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        groups = {f"category: {name}": value for name, value in by_group(rows, "accuracy").items()}
        return {"accuracy": percent([row.values["accuracy"] for row in rows]), **groups}

    def submission(self, data: Data, answers: Sequence[str], path: Path) -> Path | None:
        """The server's file, with an entry for every question of its split: "" where it was not asked."""
        if "all" not in data.more:
            return None
        pairs = zip(data.items, answers, strict=True)
        texts = {item.question.id: normalised(answer) for item, answer in pairs}
        content = [{"question_id": number, "answer": texts.get(number, "")} for number in data.more["all"]]
        path = path.parent / f"{path.name}.json"
        write_whole(path, json.dumps(content))
        return path


def _records(path: Path, name: str) -> list[dict[str, Any]]:
    records = value_of(read_json(path, dict), name, list, str(path))
    if wrong := next((record for record in records if not isinstance(record, dict)), None):
        raise ValueError(f"{path}: {name} must be objects, got {wrong!r:.80}")
    return records


def _read_official(path: Path, pictures: str) -> list[Question]:
    questions = []
    for number, record in enumerate(_records(path, "questions"), 1):
        place = f"{path}, question {number}"
        text = short_prompt(value_of(record, "question", str, place))
        image = f"COCO_{pictures}_{value_of(record, 'image_id', int, place):012d}.jpg"
        questions.append(ask(value_of(record, "question_id", int, place), text, image, place))
    if not questions:
        raise ValueError(f"{path} must hold at least one question, got none")
    return questions
