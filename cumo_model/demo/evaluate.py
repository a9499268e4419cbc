"""Evaluation of a trained model on held-out pictures: benchmarks, choice by likelihood, and expert load.

Choice: the model's answer is the one of four with the highest likelihood (summed log-probability of its
tokens and the end of the answer); chance is 25 %.
"""

import shutil
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from cumo_model.analysis.experts import Load, expert_load
from cumo_model.data import ConversationDataset
from cumo_model.demo.benchmarks import FOLDER, benchmarks, run_benchmarks
from cumo_model.demo.settings import TEMPLATE
from cumo_model.evaluation.run import SCORES, read_scores
from cumo_model.evaluation.task import Row
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.processing.conversation import tokenize_conversation
from cumo_model.processing.processor import CumoProcessor

BATCH = 64
CHOICE_KINDS = ("name", "kind")  # also evaluated as a choice; other kinds have too few possible answers


class Examiner:
    """Evaluates a model on the questions of one test file.

    Args:
        model: the model; set to evaluation mode.
        processor: its processor.
        test_path: JSON file with test records; paths of pictures are relative to its folder.
        template: name of the conversation template.
        limit: number of questions of each kind; None for all.
    """

    def __init__(
        self,
        model: CumoForConditionalGeneration,
        processor: CumoProcessor,
        test_path: Path,
        template: str,
        limit: int | None = None,
    ):
        self.model, self.template = model.eval(), template
        self.tokenizer = processor.tokenizer
        self.dataset = ConversationDataset(test_path, test_path.parent, processor, template)
        seen: dict[str, int] = defaultdict(int)
        self.rows = []
        for i, record in enumerate(self.dataset.records):
            seen[record["kind"]] += 1
            if limit is None or seen[record["kind"]] <= limit:
                self.rows.append(i)

    def _pixels(self, rows: list[int]) -> Tensor:
        pixels = torch.cat([self.dataset.pixels(i) for i in rows])
        return self.dataset.normalise(pixels).to(self.model.device)

    @torch.no_grad()
    def choices(self, field: str) -> dict[int, int]:
        """The most likely choice, as row -> index in record[field], for rows whose record has the field."""
        records = self.dataset.records
        rows = [r for r in self.rows if records[r]["kind"] in CHOICE_KINDS and field in records[r]]
        tasks = [(row, c) for row in rows for c in range(len(self.dataset.records[row][field]))]
        scores: dict[int, dict[int, float]] = defaultdict(dict)
        for part in _batches(tasks):
            samples = [self._answered(row, self.dataset.records[row][field][c]) for row, c in part]
            for (row, c), score in zip(part, self._likelihood([r for r, _ in part], samples), strict=True):
                scores[row][c] = score
        return {row: max(found, key=found.get) for row, found in scores.items()}

    def _answered(self, row: int, answer: str) -> tuple[Tensor, Tensor]:
        question = self.dataset.records[row]["conversations"][0]
        turns = [question, {"from": "gpt", "value": answer}]
        return tokenize_conversation(turns, self.tokenizer, self.template, self.model.config.image_seq_length)

    def _likelihood(self, rows: list[int], samples: list[tuple[Tensor, Tensor]]) -> list[float]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([ids for ids, _ in samples], True, self.tokenizer.pad_token_id).to(self.model.device)
        labels = pad([labels for _, labels in samples], True, -100).to(self.model.device)
        mask = pad([torch.ones_like(ids) for ids, _ in samples], True, 0).to(self.model.device)
        logits = self.model(
            input_ids=ids, attention_mask=mask, pixel_values=self._pixels(rows), use_cache=False
        ).logits
        targets = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        return (-losses.view(targets.shape).sum(1)).tolist()

    def choice(self) -> dict[str, list[int]]:
        """Choices by likelihood: kind of question -> [number correct, number of questions].

        There is also "name, same kind".
        """
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        records = self.dataset.records
        for field, suffix in (("choices", ""), ("choices_same_kind", ", same kind")):
            for row, picked in self.choices(field).items():
                record = records[row]
                _count(found[record["kind"] + suffix], record[field][picked] == record["answer"])
        return dict(found)

    def expert_load(self) -> Load:
        """Share of the routed slots of each expert, as place -> kind of question -> list of layers."""
        by_kind = defaultdict(list)
        for row in self.rows:
            by_kind[self.dataset.records[row]["kind"]].append(row)
        parts = ((kind, part) for kind, rows in by_kind.items() for part in _batches(rows))
        return expert_load(self.model, ((kind, self.dataset.batch(part)) for kind, part in parts))


def _count(row: list[int], right: bool) -> None:
    row[0] += int(right)
    row[1] += 1


def _batches(items: list) -> list[list]:
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def exact_match(rows: list[Row], majority: dict[str, str | None]) -> dict[str, dict[str, list[int]]]:
    """Exact match of the model and of the majority answer.

    Args:
        rows: of `EmojiExact`.
        majority: the most frequent training answer for each kind of question, a baseline on the same
            questions.

    Returns:
        {"exact", "majority": {kind of question: [number correct, number of questions]}}.
    """
    exact, commonest = (defaultdict(lambda: [0, 0]) for _ in range(2))
    for row in rows:
        _count(exact[row.group], row.values["right"])
        _count(commonest[row.group], majority[row.group] == row.values["reference"])
    return {"exact": dict(exact), "majority": dict(commonest)}


def examine(
    folder: Path,
    name: str,
    model: CumoForConditionalGeneration,
    processor: CumoProcessor,
    part: str,
    majority: dict[str, str | None],
    limit: int | None = None,
) -> dict:
    """All scores of a model on one test file.

    Args:
        folder: of the demo.
        name: path in it of the stage, whose answers go to eval/.
        model: the model.
        processor: its processor.
        part: name of the test file.
        majority: as of `exact_match`.
        limit: number of questions of each benchmark but exact match, and of each kind for the choice by
            likelihood; None for all.

    Returns:
        {"exact", "majority", "choice", "figures": {title of a benchmark: its figures}}.
    """
    tasks = benchmarks(part)
    for task in tasks:  # perhaps with answers of a model that was there before
        shutil.rmtree(folder / FOLDER / name / task.name, ignore_errors=True)
    outcomes = run_benchmarks(folder, name, model, processor, tasks[:1])  # all, as the report shows some
    outcomes += run_benchmarks(folder, name, model, processor, tasks[1:], limit)
    rows = read_scores(folder / FOLDER / name / tasks[0].name / SCORES).rows
    examiner = Examiner(model, processor, folder / "data" / f"{part}.json", TEMPLATE, limit)
    figures = {outcome.task.title: outcome.figures for outcome in outcomes}
    return {**exact_match(rows, majority), "choice": examiner.choice(), "figures": figures}
