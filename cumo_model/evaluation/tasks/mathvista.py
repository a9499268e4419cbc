"""MathVista: questions about mathematics in pictures; a judge extracts values from longer answers."""

import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cumo_model.data.pictures import Pictures
from cumo_model.evaluation.files import InlinePictures, found, read_json, value_of
from cumo_model.evaluation.scorers.mathvista import MULTIPLE, by_rules, is_right
from cumo_model.evaluation.tables import read_parquet
from cumo_model.evaluation.task import LONG, Data, Item, Judge, Row, Task, by_group, percent
from cumo_model.serving.questions import Question

FILES = ("data/testmini.json", "testmini.json")
QUERIES = "query.json"  # beside them: the official texts for the judge
PARQUET = "testmini-*.parquet"
COLUMNS = ("pid", "question", "choices", "unit", "precision", "answer", "question_type", "answer_type")
COLUMNS = (*COLUMNS, "metadata", "query", "decoded_image")
ANSWER_TYPES = ("text", "integer", "float", "list")
WANTED = {
    "text": "the letter of the right choice, such as A",
    "integer": "an integer, such as 4",
    "float": "a decimal number, such as 2.5",
    "list": "a Python list, such as [3, 5]",
}
SYSTEM = "You find the final answer in a text and write nothing else."
SHOWN = """\
Below are questions, replies to them, and the final answer that each reply gives. Write the final answer of \
the last reply in the form that is wanted.

Wanted: an integer, such as 4
Question: How many windows does the house have?
Reply: Counting both floors, I can see seven windows.
Final answer: 7

Wanted: a decimal number, such as 2.5
Question: How long is the shorter side? (Unit: cm)
Reply: It measures about 3.25 cm.
Final answer: 3.25

Wanted: a Python list, such as [3, 5]
Question: In which two months did it rain most?
Reply: Most rain fell in months 4 and 11.
Final answer: [4, 11]

Wanted: the letter of the right choice, such as A
Question: Which figure is a square?
Choices:
(A) the red one
(B) the blue one
Reply: All sides of the blue one are equal, so it is that.
Final answer: B
"""


class MathVista(Task):
    """MathVista's testmini set, as CuMo asks it: the bare question, without hint and choices.

    Read is the official testmini.json with its folder `images`, or the hub's testmini-*.parquet. Where rules
    find no value in an answer a judge extracts it (the paper used gpt-3.5-turbo), with a prompt in this
    project's words and the official query of the question, if query.json is there: small differences to the
    official script are possible.
    """

    name, title = "mathvista", "MathVista (testmini)"
    folders = ("mathvista", "MathVista")
    mean_of = "right"
    max_new_tokens = LONG
    judged = True

    def read(self, folder: Path) -> Data:
        folder = Path(folder)
        parquet = sorted([*folder.glob(PARQUET), *folder.glob(f"data/{PARQUET}")])
        if parquet and not any((folder / name).is_file() for name in FILES):
            places = [row for path in parquet for row in read_parquet(path, COLUMNS)]
            pictures, source = _taken(places), "parquet files"
        else:
            path = found(folder, *FILES, PARQUET)
            places = []
            for pid, record in read_json(path, dict).items():
                place = f"{path}, problem {pid}"
                if not isinstance(record, dict):
                    raise ValueError(f"{place}: must be an object, got {type(record).__name__}")
                places.append((place, {"pid": pid, **record}))
            pictures, source = Pictures([folder, folder / "data"]), path.name
            if (queries := path.parent / QUERIES).is_file():
                texts = read_json(queries, dict)
                places = [(place, {"query": texts.get(record["pid"]), **record}) for place, record in places]
                source += f", {QUERIES}"
        items, seen = [], set()
        for place, record in places:
            items.append(_item(record, place))
            if (pid := items[-1].unit) in seen:
                raise ValueError(f"{place}: pid must be that of no other problem, got {pid!r}")
            seen.add(pid)
        if not items:
            raise ValueError(f"{folder} must hold at least one problem, got none")
        return Data(items, pictures, {"source": source})

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        """As `Task.rows`; without a judge None, unless the rules suffice for all answers."""
        if any(item.reference["answer"] is None for item in data.items):
            return None
        found_values: list[str | None] = []
        for item, answer in zip(data.items, answers, strict=True):
            kind = item.reference
            value = by_rules(answer, kind["question_type"], kind["answer_type"], kind["choices"])
            found_values.append(value)
        places = [place for place, value in enumerate(found_values) if value is None]
        if places and judge is None:
            return None
        if places:
            prompts = [_prompt(data.items[place], answers[place]) for place in places]
            replies = judge.all(prompts, system=SYSTEM, max_tokens=256)
            for place, reply in zip(places, replies, strict=True):
                found_values[place] = reply.strip()
        rows, judged = [], set(places)
        for place, (item, value) in enumerate(zip(data.items, found_values, strict=True)):
            kind = item.reference
            rules = (kind["question_type"], kind["answer_type"], kind["choices"], kind["precision"])
            values = {
                "right": is_right(value, kind["answer"], *rules),
                "extracted": value,
                "judged": place in judged,
                "skills": kind["skills"],
            }
            rows.append(Row(item.unit, item.group, values))
        return rows

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        figures = {
            self.metric: percent([row.values["right"] for row in rows]),
            "values extracted by the judge, %": percent([row.values["judged"] for row in rows]),
        }
        figures |= {f"category: {name}": value for name, value in by_group(rows, "right").items()}
        skills = dict.fromkeys(skill for row in rows for skill in row.values["skills"])
        for skill in skills:
            own = [row.values["right"] for row in rows if skill in row.values["skills"]]
            figures[f"skill: {skill}"] = percent(own)
        return figures


def _taken(places: Iterable[tuple[str, dict[str, Any]]]) -> InlinePictures:
    """The pictures of rows; a row gets the name of its own as `image`."""
    pictures: dict[str, str | bytes] = {}
    for place, row in places:
        name = f"{value_of(row, 'pid', str, place)}, decoded_image"
        pictures[name] = value_of(value_of(row, "decoded_image", dict, place), "bytes", bytes, place)
        row["image"] = name
    return InlinePictures(pictures)


def _item(record: dict[str, Any], place: str) -> Item:
    pid = value_of(record, "pid", str, place)
    question_type = value_of(record, "question_type", str, place)
    answer_type = value_of(record, "answer_type", str, place)
    if question_type not in (MULTIPLE, "free_form"):
        raise ValueError(f"{place}: question_type must be {MULTIPLE} or free_form, got {question_type!r:.80}")
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"{place}: answer_type must be one of {ANSWER_TYPES}, got {answer_type!r:.80}")
    choices = record.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{place}: choices must be a list of texts, got {choices!r:.80}")
    if question_type == MULTIPLE and not 1 <= len(choices) <= 26:
        raise ValueError(f"{place}: choices must be 1 to 26 texts, got {len(choices)}")
    precision = record.get("precision")
    if answer_type == "float":
        precision = value_of(record, "precision", (int, float), place)
        if precision not in range(20):
            raise ValueError(f"{place}: precision must be a number of decimals, got {precision!r}")
    answer = record.get("answer")
    if answer is not None:
        answer = value_of(record, "answer", str, place)
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{place}: metadata must be an object, got {type(metadata).__name__}")
    skills = metadata.get("skills") or []
    text = value_of(record, "question", str, place)
    reference = {
        "answer": answer or None,
        "question_type": question_type,
        "answer_type": answer_type,
        "choices": choices,
        "precision": precision,
        "skills": [str(skill) for skill in skills],
        "query": record.get("query") or _query(text, answer_type, choices, record.get("unit")),
    }
    question = Question(pid, text, (value_of(record, "image", str, place),), place=place)
    return Item(question, reference, str(metadata.get("task", "")), pid)


def _query(question: str, answer_type: str, choices: Sequence[str], unit: str | None) -> str:
    lines = [f"Wanted: {WANTED[answer_type]}", f"Question: {question}" + (f" (Unit: {unit})" if unit else "")]
    if choices:
        lettered = zip(string.ascii_uppercase, choices, strict=False)
        lines += ["Choices:", *(f"({letter}) {choice}" for letter, choice in lettered)]
    return "\n".join(lines)


def _prompt(item: Item, answer: str) -> str:
    asked = item.reference["query"]
    if not asked.startswith("Wanted: "):  # an official query
        asked = f"Wanted: {WANTED[item.reference['answer_type']]}\n{asked}"
    return f"{SHOWN}\n{asked}\nReply: {answer}\nFinal answer:"
