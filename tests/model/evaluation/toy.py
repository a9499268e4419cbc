"""A small benchmark in a format of its own, for the tests of what all benchmarks have in common."""

import json
from pathlib import Path

from PIL import Image

from cumo_model.evaluation.files import read_json
from cumo_model.evaluation.task import Data, Item, Row, Task, by_group, percent, unit_of
from cumo_model.serving.questions import Question
from tests.model.serving.conftest import WORDS

COLOURS = ("red", "green", "blue")


class Colours(Task):
    """The answer must have the word; two questions about one picture are a unit."""

    name, title, folders = "colours", "Colours", ("colours", "Colours")
    max_new_tokens = 6
    mean_of = "right"

    def read(self, folder: Path) -> Data:
        values = read_json(folder / "questions.json", list)
        items = [
            Item(
                Question(v["id"], v["text"], (v["image"],), place=f"question {n}"),
                v["word"],
                v["image"][0],
                v["image"] if v.get("paired", True) else "",
            )
            for n, v in enumerate(values, 1)
        ]
        return Data(items, folder / "images", {"source": "questions.json"})

    def rows(self, data, answers, judge=None):
        units = {}
        for item, answer in zip(data.items, answers, strict=True):
            said = answer if judge is None else judge(answer)
            unit = units.setdefault(unit_of(item), (item.group, []))
            unit[1].append(item.reference in said.split())
        return [Row(name, group, {"right": sum(found)}) for name, (group, found) in units.items()]

    def figures(self, rows):
        groups = {f"category: {name}": value for name, value in by_group(rows, "right").items()}
        return {"words per picture": percent([row.values["right"] for row in rows]), **groups}

    def submission(self, data, answers, path):
        path = path.with_suffix(".txt")
        path.write_text("\n".join(answers))
        return path


class Judged(Colours):
    """The same, where a judge reads the answers."""

    name, folders, judged = "judged", ("colours",), True

    def rows(self, data, answers, judge=None):
        return None if judge is None else super().rows(data, answers, judge)


class Elsewhere(Colours):
    """The same, where the references are not public."""

    name, folders, server = "elsewhere", ("colours",), "example.org"

    def rows(self, data, answers, judge=None):
        return None


def write_colours(root: Path, pictures: int = 6) -> Path:
    """The data of the benchmark: two questions about each picture."""
    (root / "colours" / "images").mkdir(parents=True)
    words, values = WORDS.replace("?", "").replace(",", "").split(), []
    for number in range(pictures):
        name = f"{COLOURS[number % 3]}{number}.png"
        Image.new("RGB", (20 + number, 14), COLOURS[number % 3]).save(root / "colours" / "images" / name)
        for half, text in enumerate(("what is it?", "a red apple or the blue door?")):
            word = words[(number + half) % len(words)]
            values.append({"id": 2 * number + half, "text": text, "image": name, "word": word})
    (root / "colours" / "questions.json").write_text(json.dumps(values))
    return root
