"""ScienceQA-IMG: multiple choice from school books, the questions of the test split that have a picture."""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from cumo_model.evaluation.files import folder_of, found, read_json, value_of
from cumo_model.evaluation.scorers.letters import scienceqa_letter
from cumo_model.evaluation.task import LONG, Data, Item, Row, by_group, percent
from cumo_model.evaluation.tasks.common import LETTER, OneByOne, ask, first_file, letter_prompt, told_apart

LIST = "llava_test_CQM-A.json"
LETTERS = 5  # choices that have a letter in the official script


class ScienceQa(OneByOne):
    """ScienceQA (arXiv 2209.09513), questions with a picture: accuracy of the letter.

    Questions without a picture are not asked: the paper's figure leaves them out.
    """

    name, title = "scienceqa", "ScienceQA-IMG"
    folders = ("scienceqa",)
    mean_of = "right"
    max_new_tokens = LONG

    def read(self, folder: Path) -> Data:
        path = found(folder, "problems.json")
        problems = read_json(path, dict)
        pictures = [folder_of(folder, "images/test", "images")]
        if listed := first_file(folder, LIST):
            asked = _listed(listed)
        else:
            listed = found(folder, "pid_splits.json")
            asked = _built(value_of(read_json(listed, dict), "test", list, str(listed)), problems, path)
        items = []
        for number, text, image, place in asked:
            problem = value_of(problems, number, dict, f"{path}, for {place}")
            place = f"{path}, problem {number}"
            choices = value_of(problem, "choices", list, place)
            answer = value_of(problem, "answer", int, place)
            if not 0 <= answer < len(choices):
                raise ValueError(f"{place}: answer must be from 0 to {len(choices) - 1}, got {answer}")
            reference = {"letter": ascii_uppercase[answer], "choices": len(choices)}
            items.append(Item(ask(number, text, image, place), reference, str(problem.get("subject", ""))))
        if not items:
            raise ValueError(f"{listed} must hold at least one question with a picture, got none")
        of = 0
        if splits := first_file(folder, "pid_splits.json"):
            numbers = value_of(read_json(splits, dict), "test", list, str(splits))
            of = sum(problems.get(str(number), {}).get("image") is not None for number in numbers)
        return Data(told_apart(items), pictures, {"source": str(listed)}, of)

    def score(self, item: Item, answer: str) -> dict[str, Any]:
        letter = scienceqa_letter(answer)
        known = ascii_uppercase[: min(LETTERS, item.reference["choices"])]
        is_known = letter is not None and letter in known
        return {"right": int(is_known and letter == item.reference["letter"]), "no letter": int(not is_known)}

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        return {
            "accuracy": percent([row.values["right"] for row in rows]),
            "answers without a letter": percent([row.values["no letter"] for row in rows]),
            **{f"category: {name}": value for name, value in by_group(rows, "right").items()},
        }


Asked = tuple[str, str, str, str]  # number, prompt, picture, place


def _listed(path: Path) -> list[Asked]:
    asked = []
    for index, line in enumerate(read_json(path, list), 1):
        place = f"{path}, question {index}"
        if not isinstance(line, dict):
            raise ValueError(f"{place}: must be an object, got {type(line).__name__}")
        if line.get("image") is None:
            continue
        turns = value_of(line, "conversations", list, place)
        if not turns or not isinstance(turns[0], dict):
            raise ValueError(f"{place}: conversations must begin with an object, got {turns!r:.80}")
        text = value_of(turns[0], "value", str, place).replace("<image>", "").strip()
        image = value_of(line, "image", str, place)
        asked.append((value_of(line, "id", str, place), f"{text}\n{LETTER}", image, place))
    return asked


def _built(numbers: list[Any], problems: dict[str, Any], path: Path) -> list[Asked]:
    """The same prompts from the official files: context, if there is any, question and lettered choices."""
    asked = []
    for number in map(str, numbers):
        problem = value_of(problems, number, dict, str(path))
        place = f"{path}, problem {number}"
        if problem.get("image") is None:
            continue
        image = value_of(problem, "image", str, place)
        question, choices = (
            value_of(problem, "question", str, place),
            value_of(problem, "choices", list, place),
        )
        if hint := str(problem.get("hint") or "").strip():
            question = f"Context: {hint}\n{question}"
        # as the official prompts are made, of which LLaVA's list is
        text = letter_prompt(question, choices).replace("  ", " ")
        asked.append((number, text, f"{number}/{image}", place))
    return asked
