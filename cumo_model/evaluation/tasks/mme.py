"""MME: two questions with yes or no about each picture, in fourteen tasks."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cumo_model.evaluation.files import found, read_text
from cumo_model.evaluation.scorers.mme import COGNITION, PERCEPTION, mme_points, mme_sum, mme_verdict
from cumo_model.evaluation.task import Data, Item, Judge, Row, Task, percent, unit_of
from cumo_model.evaluation.tasks.common import (
    SHORT_ANSWER,
    ask,
    first_file,
    read_list,
    short_prompt,
    told_apart,
)

LIST = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
YES_OR_NO = "Please answer yes or no."  # at the end of the official questions; LLaVA's file has no such end
SUFFIXES = (".jpg", ".png", ".jpeg")
Key = tuple[str, str, str]  # task, name of the picture without its suffix, question without instruction


class Mme(Task):
    """MME (arXiv 2306.13394): the sum of accuracy and accuracy+ over the ten tasks of perception.

    A unit is a picture with its two questions.
    """

    name, title = "mme", "MME"
    metric = "points of perception, of 2000"
    folders = ("MME", "mme")

    def read(self, folder: Path) -> Data:
        release = found(folder, f"{RELEASE}/{RELEASE}", RELEASE)
        official: dict[Key, tuple[bool, str, str]] = {}
        for task in (*PERCEPTION, *COGNITION):
            for key, value in _read_task(found(release, task), task).items():
                official[key] = value
        items = []
        if listed := first_file(folder, LIST):
            for question in read_list(listed):
                image = question.images[0]
                names = str(question.id).split("/")
                key = names[0], Path(names[-1]).stem, _without_instruction(question.text)
                if key not in official:
                    raise ValueError(
                        f"{question.place}: {release} has no question {key[2]!r:.80} about {image}"
                    )
                items.append(Item(question, official[key][0], key[0], f"{key[0]}/{key[1]}"))
        else:
            for (task, stem, text), (is_yes, image, place) in official.items():
                question = ask(image, short_prompt(text), image, place, task)
                items.append(Item(question, is_yes, task, f"{task}/{stem}"))
        counts = Counter(item.unit for item in items)
        if wrong := next((unit for unit in counts if counts[unit] != 2), None):
            raise ValueError(
                f"{listed or release} must have two questions about {wrong}, got {counts[wrong]}"
            )
        return Data(
            told_apart(items, alone=False), [release], {"source": str(listed or release)}, len(official)
        )

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        rows: dict[str, Row] = {}
        for item, answer in zip(data.items, answers, strict=True):
            row = rows.setdefault(unit_of(item), Row(unit_of(item), item.group, {"right": [], "other": 0}))
            verdict = mme_verdict(answer)
            row.values["right"].append(verdict == ("yes" if item.reference else "no"))
            row.values["other"] += verdict == "other"
        return list(rows.values())

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        tasks: dict[str, list[list[bool]]] = {}
        for row in rows:
            tasks.setdefault(row.group, []).append(row.values["right"])
        points = {task: sum(mme_points(tasks[task])) for task in (*PERCEPTION, *COGNITION) if task in tasks}
        accuracy, plus = mme_points([row.values["right"] for row in rows]) if rows else (float("nan"),) * 2
        return {
            "perception": mme_sum(points, PERCEPTION),
            "cognition": mme_sum(points, COGNITION),
            "accuracy": accuracy,
            "accuracy+": plus,
            "answers that are neither yes nor no": percent([row.values["other"] / 2 for row in rows]),
            **{f"category: {task}": value for task, value in points.items()},
        }


def _without_instruction(text: str) -> str:
    return text.replace(SHORT_ANSWER, "").replace(YES_OR_NO, "").strip()


def _read_task(folder: Path, task: str) -> dict[Key, tuple[bool, str, str]]:
    """The questions of one task: what is right, the picture, and the place.

    Some tasks have their pictures in a folder of their own; others beside the texts."""
    inner = "images/" if (folder / "images").is_dir() else ""
    texts = found(folder, "questions_answers_YN") if inner else folder
    pictures = {
        path.stem: path.name for path in sorted((folder / inner).iterdir()) if path.suffix.lower() in SUFFIXES
    }
    questions: dict[Key, tuple[bool, str, str]] = {}
    for path in sorted(texts.glob("*.txt")):
        if path.name.startswith("."):  # of another file system
            continue
        stem = path.stem
        if stem not in pictures:
            raise ValueError(f"{path}: its picture {stem} must be in {folder / inner}")
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            cells = line.strip().split("\t")
            if len(cells) != 2 or cells[1].lower() not in ("yes", "no"):
                raise ValueError(
                    f"{place}: must be a question, a tab, and Yes or No, got {line.strip()!r:.80}"
                )
            key = task, stem, _without_instruction(cells[0])
            if key in questions:
                raise ValueError(f"{place}: no two questions about a picture may be the same")
            questions[key] = cells[1].lower() == "yes", f"{task}/{inner}{pictures[stem]}", place
    if not questions:
        raise ValueError(f"{texts} must hold texts with questions, got none")
    return questions
