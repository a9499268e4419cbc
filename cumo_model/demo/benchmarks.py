"""Benchmarks on the data of the demo: exact match as in GQA, POPE on kinds, and a choice in all orders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.checkpoints.folders import fingerprint
from cumo_model.demo.folder import RESULT
from cumo_model.demo.questions import IS_KIND, which
from cumo_model.demo.settings import TEMPLATE
from cumo_model.evaluation.files import read_json
from cumo_model.evaluation.run import Outcome, evaluate
from cumo_model.evaluation.scorers.circular import is_right_in_all
from cumo_model.evaluation.scorers.exact import exact_match, gqa_prediction
from cumo_model.evaluation.task import Data, Item, Row, Task, by_group, percent
from cumo_model.evaluation.tasks.common import OneByOne
from cumo_model.evaluation.tasks.objects import ObjectsPope, pope_items
from cumo_model.serving.local import Local
from cumo_model.serving.questions import Question

BATCH = 64
LONGEST = 16  # tokens of an answer
FOLDER = "eval"  # of the results, in the folder of a demo
POPE_KINDS = ("random", "popular")  # each picture has one kind, so that no other one occurs with it


class _OfPart:
    """What the three have in common: the questions of one test file."""

    folders = ("data",)
    max_new_tokens = LONGEST
    form: str

    def __init__(self, part: str):
        self.part, self.name = part, f"{self.form}_{part}"

    def records(self, folder: Path) -> list[dict[str, Any]]:
        """The records of the test file."""
        return read_json(folder / f"{self.part}.json", list)


class EmojiExact(_OfPart, OneByOne):
    """All kinds of question, scored as GQA's: the whole answer must be the reference."""

    form, title, metric, mean_of = "exact", "exact match", "accuracy, %", "right"

    def read(self, folder: Path) -> Data:
        items = []
        for record in self.records(folder):
            text = record["conversations"][0]["value"].removeprefix("<image>\n")
            question = Question(f"{record['id']}", text, (record["image"],), place=f"record {record['id']}")
            items.append(Item(question, record["answer"], record["kind"]))
        return Data(items, folder)

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        return {"right": exact_match(answer, item.reference), "reference": item.reference}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": percent([row.values["right"] for row in rows]), **by_group(rows, "right")}


class EmojiPope(_OfPart, ObjectsPope):
    """Is it of a certain kind: as many questions with the answer yes as with no."""

    form, title, metric = "pope", "POPE on kinds", "F1, %"

    def read(self, folder: Path) -> Data:
        labels = {r["image"]: [r["answer"]] for r in self.records(folder) if r["kind"] == "kind"}
        return Data(pope_items(labels, IS_KIND, POPE_KINDS, each=1), folder)


class EmojiChoice(_OfPart, Task):
    """One of four names; right is a question that is right in all orders of the names, as in MMBench."""

    form, title, metric, mean_of = "choice", "choice of four, circular", "circular accuracy, %", "right"

    def read(self, folder: Path) -> Data:
        items = []
        for record in self.records(folder):
            for field, group in (("choices", "name"), ("choices_same_kind", "name, same kind")):
                if record["kind"] != "name" or field not in record:
                    continue
                choices = record[field]
                for turn in range(len(choices)):
                    text = which(choices[turn:] + choices[:turn])
                    number = f"{record['id']}/{field}/{turn}"
                    question = Question(number, text, (record["image"],), place=f"record {record['id']}")
                    items.append(Item(question, record["answer"], group, f"{record['id']}/{field}"))
        return Data(items, folder)

    def rows(self, data: Data, answers: Sequence[str], judge=None) -> list[Row]:
        units: dict[str, list[tuple[Item, str]]] = {}
        for item, answer in zip(data.items, answers, strict=True):
            units.setdefault(item.unit, []).append((item, gqa_prediction(answer)))
        rows = []
        for unit, said in units.items():
            references = [item.reference for item, _ in said]
            is_right = is_right_in_all([answer for _, answer in said], references)
            rows.append(
                Row(
                    unit,
                    said[0][0].group,
                    {"right": is_right, "first": said[0][1] == references[0]},
                    said[0][0].question.images[0],
                )
            )
        return rows

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return {
            "right in all four orders": percent([row.values["right"] for row in rows]),
            "right in the first order": percent([row.values["first"] for row in rows]),
        }


def benchmarks(part: str) -> list[Task]:
    """The benchmarks on one test file."""
    return [EmojiExact(part), EmojiPope(part), EmojiChoice(part)]


def run_benchmarks(
    folder: Path, name: str, model, processor, tasks: Sequence[Task], limit: int | None = None
) -> list[Outcome]:
    """Ask the model of one stage of a demo, and score it; what is answered already is not asked again.

    Args:
        folder: of the demo.
        name: of the stage.
        model: the trained model.
        processor: its processor.
        tasks: of `benchmarks`.
        limit: as of `evaluate`.

    Raises:
        RuntimeError: a benchmark could not be run.
    """
    settings = {"model": fingerprint(folder / name / RESULT), "template": TEMPLATE}
    engine = Local(model.eval(), processor, TEMPLATE, name=name)
    out = folder / FOLDER / name
    found = evaluate(engine, tasks, folder, out, limit, BATCH, settings=settings, progress=False)
    if failed := next((outcome for outcome in found if outcome.error), None):
        raise RuntimeError(f"{failed.task.name}: {failed.error}")
    return found
