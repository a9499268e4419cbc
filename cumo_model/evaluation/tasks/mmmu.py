"""MMMU: questions of 30 subjects, multiple choice and open, from parquet files or JSON."""

import ast
import contextlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cumo_model.data.pictures import Pictures
from cumo_model.evaluation.files import InlinePictures, found, read_json, value_of
from cumo_model.evaluation.scorers.mmmu import is_open_right, letter_of
from cumo_model.evaluation.tables import read_parquet
from cumo_model.evaluation.task import LONG, Data, Item, Judge, Row, Task, by_group, percent
from cumo_model.serving.questions import Question

SUBJECTS = {  # of each discipline, in the order of the official script
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
DISCIPLINES = {subject: name for name, subjects in SUBJECTS.items() for subject in subjects}
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
MULTIPLE = "multiple-choice"
QUESTIONS = "validation.json"
REFERENCES = ("eval/answer_dict_val.json", "answer_dict_val.json")  # in CuMo's layout, and beside the data
SEED = 42  # of the official guesses


class Mmmu(Task):
    """MMMU's validation set, as CuMo asks it: the first picture of a question only.

    Read are `SUBJECT/validation-*.parquet` of all 30 subjects, as on the hub, or `validation.json`: a list of
    objects with the same fields, where `image_1` is the path of a picture in this folder. The references are
    those of the official answer_dict_val.json where it is there, else of the questions.

    The official script draws a letter at random where an answer has none, with seed 42. So does this one, in
    the order of the questions; how many there were, and the accuracy without them, is given too.
    """

    name, title = "mmmu", "MMMU (val)"
    folders = ("MMMU", "mmmu")
    mean_of = "right"
    max_new_tokens = LONG

    def read(self, folder: Path) -> Data:
        folder = Path(folder)
        if (folder / QUESTIONS).is_file():
            path = folder / QUESTIONS
            places = [
                (f"{path}, question {number}", record)
                for number, record in enumerate(read_json(path, list), 1)
            ]
            pictures, source = Pictures([folder]), QUESTIONS
        else:
            places = list(_of_parquet(folder))
            pictures, source = _taken(places), "parquet files of 30 subjects"
        official: dict[str, Any] = {}
        if path := next((folder / name for name in REFERENCES if (folder / name).is_file()), None):
            official = read_json(path, dict)
            source += f", references of {path.name}"
        items, seen = [], set()
        for place, record in places:
            item = _item(record, official, place)
            if (number := item.question.id) in seen:
                raise ValueError(f"{place}: id must be that of no other question, got {number!r}")
            seen.add(number)
            items.append(item)
        if not items:
            raise ValueError(f"{folder / QUESTIONS} must hold at least one question, got none")
        return Data(items, pictures, {"source": source})

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        if any(item.reference["answer"] is None for item in data.items):
            return None
        rows, guess = [], random.Random(SEED)
        for item, answer in zip(data.items, answers, strict=True):
            options, right = item.reference["options"], item.reference["answer"]
            is_guessed = False
            if options is None:
                is_right = is_open_right(answer, right)
            else:
                letters = [chr(ord("A") + number) for number in range(len(options))]
                letter = letter_of(answer, options)
                is_guessed = not letter
                said = letter or guess.choice(letters)
                is_right = said in right if isinstance(right, list) else said == right
            values = {"right": is_right, "guessed": is_guessed, "open": options is None}
            rows.append(Row(item.unit, item.group, values))
        return rows

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        figures = {
            self.metric: percent([row.values["right"] for row in rows]),
            "guessed letters, %": percent([row.values["guessed"] for row in rows]),
            "accuracy without guesses, %": percent(
                [row.values["right"] and not row.values["guessed"] for row in rows]
            ),
        }
        for name, is_open in (("multiple choice", False), ("open", True)):
            if kind := [row.values["right"] for row in rows if row.values["open"] == is_open]:
                figures[f"accuracy of {name}, %"] = percent(kind)
        wide = by_group([Row(row.unit, DISCIPLINES[row.group], row.values) for row in rows], "right")
        figures |= {f"discipline: {name}": wide[name] for name in SUBJECTS if name in wide}
        return figures | {f"category: {name}": value for name, value in by_group(rows, "right").items()}


def _of_parquet(folder: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    subjects = sorted(DISCIPLINES)
    missing = [name for name in subjects if not list((folder / name).glob("validation-*.parquet"))]
    if len(missing) == len(subjects):
        found(folder, QUESTIONS, f"{subjects[0]}/validation-00000-of-00001.parquet")
    if missing:
        raise ValueError(
            f"{folder} must hold validation-*.parquet of all {len(subjects)} subjects, "
            f"got none of {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" * (len(missing) > 3))
        )
    for name in subjects:
        for path in sorted((folder / name).glob("validation-*.parquet")):
            yield from read_parquet(path, COLUMNS)


def _taken(places: Iterable[tuple[str, dict[str, Any]]]) -> InlinePictures:
    """The pictures of rows; a row keeps the name of its own."""
    pictures: dict[str, str | bytes] = {}
    for place, row in places:
        picture = row.get("image_1")
        if picture is None:
            continue
        name = f"{value_of(row, 'id', str, place)}, image_1"
        pictures[name] = value_of(value_of(row, "image_1", dict, place), "bytes", bytes, place)
        row["image_1"] = name
    return InlinePictures(pictures)


def _item(record: Any, official: dict[str, Any], place: str) -> Item:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
    number, text = value_of(record, "id", str, place), value_of(record, "question", str, place)
    subject = "_".join(number.split("_")[1:-1])
    if subject not in DISCIPLINES:
        raise ValueError(f"{place}: id must be like validation_Accounting_1, got {number!r:.80}")
    options = None
    if value_of(record, "question_type", str, place) == MULTIPLE:
        options = _listed(value_of(record, "options", (str, list), place), "options", place)
        if not 1 <= len(options) <= 26:
            raise ValueError(f"{place}: options must be 1 to 26 texts, got {len(options)}")
        choices = "".join(f"({chr(ord('A') + i)}) {option}\n" for i, option in enumerate(options))
        text = f"{text}\n{choices}\nAnswer with the option's letter from the given choices directly"
    else:
        text = f"{text}\nAnswer the question using a single word or phrase."
    text = text.replace("<image 1>", "").strip()
    picture = record.get("image_1")
    if picture is not None:
        picture = value_of(record, "image_1", str, place)
    if number in official:
        entry = value_of(official, number, dict, "answer_dict_val.json")
        right = value_of(entry, "ground_truth", (str, list), f"answer_dict_val.json, {number}")
    else:
        right = record.get("answer")
        right = None if right in (None, "", "?") else value_of(record, "answer", (str, list), place)
    # the hub writes several answers to an open question as the text of a list
    if options is None and isinstance(right, str) and right.startswith("["):
        with contextlib.suppress(ValueError):  # else it is the answer, such as "[Ar] 3d5"
            right = _listed(right, "answer", place)
    question = Question(number, text, () if picture is None else (picture,), place=place)
    return Item(question, {"answer": right, "options": options}, subject, number)


def _listed(value: str | list, name: str, place: str) -> list[str]:
    """A list of texts, given as such or as the text of a Python list, which is not executed."""
    wanted = f"{place}: {name} must be a list of texts, or such a list as text, got {value!r:.80}"
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(wanted) from None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(wanted)
    return value
