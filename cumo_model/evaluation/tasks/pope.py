"""POPE: is there a certain object in a picture, three files of COCO's validation pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.evaluation.files import folder_of, found, read_lines, value_of
from cumo_model.evaluation.scorers.yes_no import five_figures, pope_says_yes
from cumo_model.evaluation.task import Data, Item, Row
from cumo_model.evaluation.tasks.common import (
    OneByOne,
    ask,
    first_file,
    read_list,
    short_prompt,
    told_apart,
)

LIST = "llava_pope_test.jsonl"
KINDS = ("random", "popular", "adversarial")


class Pope(OneByOne):
    """POPE (arXiv 2305.10355): F1 of "yes", the mean over random, popular and adversarial objects."""

    name, title = "pope", "POPE"
    metric = "F1, %, mean of three files"
    folders = ("pope",)

    def read(self, folder: Path) -> Data:
        official = {
            kind: _read_official(found(folder / "coco", f"coco_pope_{kind}.json"), kind) for kind in KINDS
        }
        pictures = [folder_of(folder, "val2014")]
        if listed := first_file(folder, LIST):
            items = _labelled(listed, official)
        else:
            items = [item for kind in KINDS for item in official[kind]]
        return Data(told_apart(items), pictures, {"source": str(listed or folder / "coco")})

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        return {"said": pope_says_yes(answer), "label": item.reference}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return pope_figures(rows)


def pope_figures(rows: Sequence[Row]) -> dict[str, float]:
    """The mean F1 and accuracy over the groups of rows, and the five figures of each group, in percent.

    Args:
        rows: with the values "said" and "label".
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    each = {
        group: five_figures([row.values["said"] for row in some], [row.values["label"] for row in some])
        for group, some in groups.items()
    }
    mean = lambda name: 100 * sum(five[name] for five in each.values()) / len(each) if each else float("nan")
    details = {
        f"category: {group}, {name}": 100 * value
        for group, five in each.items()
        for name, value in five.items()
    }
    return {"mean F1": mean("f1"), "mean accuracy": mean("accuracy"), **details}


def _read_official(path: Path, kind: str) -> list[Item]:
    items = []
    for place, line in read_lines(path):
        label = value_of(line, "label", str, place)
        if label not in ("yes", "no"):
            raise ValueError(f"{place}: label must be yes or no, got {label!r:.80}")
        number = f"{kind}/{value_of(line, 'question_id', (int, str), place)}"
        text = short_prompt(value_of(line, "text", str, place))
        question = ask(number, text, value_of(line, "image", str, place), place, kind)
        items.append(Item(question, label == "yes", kind))
    if not items:
        raise ValueError(f"{path} must hold at least one question, got none")
    return items


def _labelled(path: Path, official: dict[str, list[Item]]) -> list[Item]:
    """LLaVA's questions; their labels are those at the same places of the official files, as its scorer takes
    them."""
    place_of = dict.fromkeys(KINDS, 0)
    items = []
    for question in read_list(path):
        kind = question.category
        if kind not in place_of:
            raise ValueError(
                f"{question.place}: category must be one of {', '.join(KINDS)}, got {kind!r:.80}"
            )
        at, place_of[kind] = place_of[kind], place_of[kind] + 1
        if at >= len(official[kind]) or official[kind][at].question.images != question.images:
            raise ValueError(
                f"{question.place}: image must be that of question {at + 1} of coco_pope_{kind}.json, "
                f"got {question.images[0]!r:.80}; LLaVA's list belongs to the files of POPE's commit e3e3926"
            )
        items.append(Item(question, official[kind][at].reference, kind, unit=f"{kind}/{question.id}"))
    if short := next((kind for kind in KINDS if place_of[kind] < len(official[kind])), None):
        raise ValueError(
            f"{path} must have all {len(official[short])} questions of coco_pope_{short}.json, "
            f"got {place_of[short]}"
        )
    return items
