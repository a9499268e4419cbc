"""LLaVA-Bench (in the wild): answers that a judge compares with those of GPT-4."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.data.pictures import Pictures
from cumo_model.evaluation.files import found, read_json, read_lines, value_of
from cumo_model.evaluation.scorers.reviews import pair_of, relative_score
from cumo_model.evaluation.task import LONG, Data, Item, Judge, Row, Task, percent
from cumo_model.evaluation.tasks.common import unreadable
from cumo_model.serving.questions import read_questions

RULE = "rule.json"  # LLaVA's llava/eval/table/rule.json, where a person has put it into the folder
ROLE = "Assistant"
FAILED = (-1.0, -1.0)  # the scores of a review without any, as in the official script
SYSTEM = "You compare answers of assistants fairly and precisely."
TASK = """\
The assistants above have answered a question about a picture, which the context describes. Grade each \
answer from 1 to 10 for how helpful, relevant, accurate and detailed it is; 10 is best. Write both grades in \
the first line, that of {role} 1 first, with one space between them and nothing else. Give your reasons in \
the next lines. Do not let the order of the answers count."""


class LlavaBench(Task):
    """LLaVA-Bench (in the wild), judged in the paper by gpt-4-0613 against answers_gpt4.jsonl.

    With LLaVA's rule.json in the folder its instructions go to the judge, else instructions in this project's
    words, whose scores are not those of the official script. A review whose first line is no pair of numbers
    counts -1 for both answers, as there.
    """

    name, title = "llava_bench", "LLaVA-Bench (wild)"
    metric = "relative score, %"
    folders = ("llava-bench-in-the-wild", "llava_bench")
    max_new_tokens = LONG
    judged = True

    def read(self, folder: Path) -> Data:
        folder = Path(folder)
        questions = read_questions(found(folder, "questions.jsonl"))
        captions: dict[str, str] = {}
        for place, line in read_lines(found(folder, "context.jsonl")):
            caption = value_of(line, "caption", (str, list), place)
            captions[value_of(line, "image", str, place)] = (
                caption if isinstance(caption, str) else "\n".join(map(str, caption))
            )
        others: dict[Any, str] = {}
        for place, line in read_lines(answers := found(folder, "answers_gpt4.jsonl")):
            others[value_of(line, "question_id", (int, str), place)] = value_of(line, "text", str, place)
        rules, source = {}, "questions.jsonl"
        if (folder / RULE).is_file():
            rules, source = read_json(folder / RULE, dict), f"questions.jsonl, {RULE}"
        items, seen = [], set()
        for question in questions:
            if question.id in seen:
                raise ValueError(f"{question.place}: question_id must be that of no other question")
            seen.add(question.id)
            if len(question.images) != 1 or question.images[0] not in captions:
                raise ValueError(
                    f"{question.place}: image must be one of context.jsonl, got {question.images!r:.80}"
                )
            if question.id not in others:
                raise ValueError(f"{answers} must have an answer to question {question.id!r}")
            group = "" if question.category is None else str(question.category)
            role, task = _rule(rules, group, question.place)
            context = f"[Context]\n{captions[question.images[0]]}\n\n[Question]\n{question.text}\n\n"
            reference = {
                "before": f"{context}[{role} 1]\n{others[question.id]}\n\n[End of {role} 1]\n\n[{role} 2]\n",
                "after": f"\n\n[End of {role} 2]\n\n[System]\n{task}\n\n",
            }
            items.append(Item(question, reference, group, str(question.id)))
        return Data(items, Pictures([folder / "images"]), {"source": source})

    def rows(self, data: Data, answers: Sequence[str], judge: Judge | None = None) -> list[Row] | None:
        if judge is None:
            return None
        prompts = [
            item.reference["before"] + answer + item.reference["after"]
            for item, answer in zip(data.items, answers, strict=True)
        ]
        # temperature and length of the official script
        reviews = judge.all(
            prompts,
            SYSTEM,
            temperature=0.2,
            max_tokens=1024,
            is_usable=lambda reply: pair_of(reply) is not None,
        )
        rows = []
        for item, review in zip(data.items, reviews, strict=True):
            pair = pair_of(review)
            first, second = pair or FAILED
            values = {"reference": first, "answer": second, "unreadable": pair is None}
            rows.append(Row(item.unit, item.group, values))
        return rows

    def note(self, rows: Sequence[Row]) -> str:
        return unreadable(rows)

    def figures(self, rows: Sequence[Row]) -> dict[str, float]:
        figures = {
            self.metric: _relative(rows),
            "own score, %": percent([row.values["answer"] / 10 for row in rows]),
            "score of GPT-4's answers, %": percent([row.values["reference"] / 10 for row in rows]),
            "reviews without scores, %": percent([row.values["unreadable"] for row in rows]),
        }
        for group in dict.fromkeys(row.group for row in rows if row.group):
            figures[f"category: {group}"] = _relative([row for row in rows if row.group == group])
        return figures


def _relative(rows: Sequence[Row]) -> float:
    return relative_score([(row.values["reference"], row.values["answer"]) for row in rows])


def _rule(rules: dict[str, Any], category: str, place: str) -> tuple[str, str]:
    """The role and the instructions for a category."""
    if not rules:
        return ROLE, TASK.format(role=ROLE)
    name = f"llava_bench_{category}"
    rule = value_of(rules, name, dict, f"{place}: {RULE}")
    return value_of(rule, "role", str, f"{RULE}, {name}"), value_of(rule, "prompt", str, f"{RULE}, {name}")
