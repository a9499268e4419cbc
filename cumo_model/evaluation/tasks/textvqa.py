"""TextVQA: questions about text in pictures, validation split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import folder_of, found, read_json, value_of
from cumo_model.evaluation.scorers.vqa import vqa_accuracy
from cumo_model.evaluation.task import Data, Item, Row, percent
from cumo_model.evaluation.tasks.common import SHORT_ANSWER, OneByOne, ask, first_file, read_list, told_apart
from cumo_model.serving.questions import Question

LIST = "llava_textvqa_val_v051_ocr.jsonl"
OFFICIAL = "TextVQA_0.5.1_val.json"
OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
OCR_LINE = "Reference OCR token:"
PEOPLE = 10


class TextVqa(OneByOne):
    """TextVQA (arXiv 1904.08920): VQA accuracy over ten references, normalised as on EvalAI.

    The prompt holds the words that an OCR program has read in the picture. They are in LLaVA's file; without
    it they are taken from the official file of Rosetta, in the same form.
    """

    name, title = "textvqa", "TextVQA"
    metric = "VQA accuracy, %"
    folders = ("textvqa",)
    mean_of = "accuracy"

    def read(self, folder: Path) -> Data:
        path = found(folder, OFFICIAL)
        records: dict[tuple[str, str], dict[str, Any]] = {}
        content = value_of(read_json(path, dict), "data", list, str(path))
        for number, record in enumerate(content, 1):
            place = f"{path}, question {number}"
            if not isinstance(record, dict):
                raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
            # of equal questions about one picture the last is meant, as in the official script
            text = value_of(record, "question", str, place)
            records[value_of(record, "image_id", str, place), text.lower()] = {**record, "place": place}
        pictures = [folder_of(folder, "train_images")]
        if listed := first_file(folder, LIST):
            questions = read_list(listed)
        elif tokens := first_file(folder, OCR):
            questions = _questions(content, _read_ocr(tokens), path)
        else:
            raise ValueError(
                f"{folder} must hold {LIST} or {OCR}: the prompt has the words of an OCR program, which "
                f"{OFFICIAL} does not have"
            )
        items = []
        for question in questions:
            key = str(question.id), _asked(question)
            if key not in records:
                raise ValueError(f"{question.place}: {path} has no question {key[1]!r:.80} about {key[0]}")
            record = records[key]
            number = value_of(record, "question_id", (int, str), record["place"])
            items.append(Item(question, _answers(record), unit=str(number)))
        return Data(told_apart(items), pictures, {"source": str(listed or f"{path} and {OCR}")}, len(content))

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        return {"accuracy": vqa_accuracy(answer, item.reference)}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": percent([row.values["accuracy"] for row in rows])}


def _asked(question: Question) -> str:
    """The question in a prompt, in lower case: its first line, or the second after a line of OCR tokens."""
    lines = question.text.split("\n")
    if len(lines) == 3 and lines[0].startswith(OCR_LINE):
        return lines[1].lower()
    if len(lines) == 2 or (len(lines) == 3 and any(line.startswith(OCR_LINE) for line in lines)):
        return lines[0].lower()
    raise ValueError(
        f"{question.place}: text must be lines with a question, {OCR_LINE!r} and an instruction, "
        f"got {len(lines)} lines"
    )


def _answers(record: dict[str, Any]) -> list[str]:
    answers = value_of(record, "answers", list, record["place"])
    if len(answers) != PEOPLE or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{record['place']}: answers must be {PEOPLE} texts, got {answers!r:.80}")
    return answers


def _read_ocr(path: Path) -> dict[str, list[str]]:
    tokens = {}
    for number, record in enumerate(value_of(read_json(path, dict), "data", list, str(path)), 1):
        place = f"{path}, picture {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
        words = value_of(record, "ocr_tokens", list, place)
        tokens[value_of(record, "image_id", str, place)] = [" ".join(str(word).split()) for word in words]
    return tokens


def _questions(records: list[dict[str, Any]], tokens: dict[str, list[str]], path: Path) -> list[Question]:
    questions = []
    for number, record in enumerate(records, 1):
        place, image = f"{path}, question {number}", record["image_id"]
        if image not in tokens:
            raise ValueError(f"{place}: {OCR} has no picture {image}")
        text = f"{record['question']}\n{OCR_LINE} {', '.join(tokens[image])}\n{SHORT_ANSWER}"
        questions.append(ask(image, text, f"{image}.jpg", place))
    return questions
