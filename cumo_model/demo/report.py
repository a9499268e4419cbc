"""The report of the demo: tables, plots, some answers, and a check of the saved checkpoint."""

import dataclasses
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cumo_model.analysis.experts import patch_experts
from cumo_model.analysis.plots import PLACES, plot_expert_load, plot_patches
from cumo_model.checkpoints.folders import write_whole
from cumo_model.demo.benchmarks import FOLDER, EmojiExact, benchmarks, run_benchmarks
from cumo_model.demo.folder import RESULT, read_json
from cumo_model.demo.plots import plot_losses
from cumo_model.demo.questions import QUESTIONS
from cumo_model.demo.resume import command
from cumo_model.demo.settings import TEMPLATE, Settings
from cumo_model.evaluation.compare import Difference, difference, scores_of
from cumo_model.evaluation.run import ANSWERS, given_answers
from cumo_model.evaluation.task import Item
from cumo_model.processing.pictures import load_image
from cumo_model.serving.local import Local, load
from cumo_model.serving.messages import user_message
from cumo_model.serving.sampling import Sampling
from cumo_model.training.stage import read_history

STAGES = {  # folder of the stage -> title of its curve
    "vision": "stage 0: vision tower (contrastive)",
    "text": "stage 0: language model",
    "pretrain": "stage 1: connector",
    "pft": "stage 2: all parts",
    "sft": "stage 3: MoE",
    "sft_dense": "stage 3: dense",
}
CHANCE = 0.25
PICTURES = 5  # best pictures about which the model is asked again, as in a chat
NEW_TOKENS = 64  # of an answer: without training a model ends none
EQUAL_FLOPS = (
    "Both models were trained for the same number of steps on the same data, so the model with experts "
    "needed {ratio:.2f}x the FLOPs. At equal FLOPs the dense model makes {ratio:.2f}x as many steps. "
    "This is not measured here; in the one run with equal FLOPs the dense model was better "
    "(benchmarks/results/ablation.md)."
)


def report(out: Path, settings: Settings, seconds: float) -> None:
    """Print and save the report of a finished demo.

    Args:
        out: folder of the demo.
        settings: settings of the demo.
        seconds: total time of all calls.

    Raises:
        RuntimeError: the loss of a stage did not decrease. It is raised after the report is saved.
    """
    histories = {name: read_history(out / name / RESULT) for name in STAGES}
    scores = {
        name: read_json(out / f"scores-{name}.json", "test_a", "test_b") for name in ("sft", "sft_dense")
    }
    compute = read_json(out / "compute.json", "flops_ratio", "step0_difference", "parameters")

    pictures = out / "plots"
    pictures.mkdir(exist_ok=True)
    plot_losses({STAGES[name]: history for name, history in histories.items()}, pictures / "losses.png")
    plot_expert_load(scores["sft"]["expert_load"], pictures / "expert_load.png")

    checkpoint = out / "sft" / RESULT
    model, processor = load(checkpoint)
    shown = show(out, model, processor)
    _plot_patches(out / "data" / shown[0].image, model, processor, pictures / "patches.png")

    console = Console(record=True, width=100)
    ratios = {"FLOPs per step": compute["flops_ratio"], "CPU time per step": _slowdown(histories)}
    console.print(_accuracy_table(scores, "test_a", "unseen drawings of known concepts (test A)", ratios))
    console.print(_accuracy_table(scores, "test_b", "unseen concepts (test B)", ratios))
    console.print(_differences_table(out))
    console.print(EQUAL_FLOPS.format(ratio=compute["flops_ratio"]))
    console.print(_expert_table(histories["sft"], scores["sft"]))
    console.print(_compute_table(histories, compute, ratios))
    console.print(_questions_table(out, shown, scores["sft"]["test_a"]))
    console.print(_answers_table(out, model, processor, settings.seed))
    again = scores["sft"]["reload_difference"]
    found = "not measured, because the run was interrupted" if again is None else f"{again:.0e}"
    console.print(
        f"step-0 difference of upcycling: {compute['step0_difference']:.1e}; difference of the logits after "
        f"reloading {checkpoint}: {found}"
    )
    console.print(_headline(scores) + f"; {seconds / 60:.1f} minutes")
    console.print(f"plots are in {pictures}")
    console.print(_invitation(out, checkpoint, shown), soft_wrap=True)
    write_whole(out / "report.txt", console.export_text())
    if flat := [title for name, title in STAGES.items() if not _fell(histories[name])]:
        raise RuntimeError(f"the loss did not decrease in {', '.join(flat)}: see {pictures / 'losses.png'}")


def _fell(history: dict) -> bool:
    """Whether the loss is lower in the last fifth of a stage's steps than in the first fifth."""
    values = history["series"].get("language", history["series"]["loss"])
    window = max(1, len(values) // 5)
    return sum(values[-window:]) < sum(values[:window])


def _share(row: list[int]) -> float:
    return row[0] / max(row[1], 1)


def _total(rows: dict[str, list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows.values(), strict=True)]


def _cell(row: list[int]) -> str:
    share, asked = _share(row), max(row[1], 1)
    spread = math.sqrt(share * (1 - share) / asked)  # one standard error of a share
    return f"{share:6.1%} ±{spread:5.1%}"


def _headline(scores: dict) -> str:
    """Results of both models on unseen drawings, in one line."""
    found = {name: scores[name]["test_a"] for name in ("sft", "sft_dense")}
    choice = [f"{_share(part['choice']['name']):.1%}" for part in found.values()]
    exact = [f"{_share(_total(part['exact'])):.1%}" for part in found.values()]
    majority = _share(_total(found["sft"]["majority"]))
    return (
        f"summary, on unseen drawings after the same number of steps: "
        f"4-way choice {choice[0]} with experts, {choice[1]} dense (chance {CHANCE:.0%}); "
        f"exact match {exact[0]} and {exact[1]} (majority {majority:.1%})"
    )


BASELINES = {"mean F1": 2 / 3, "mean accuracy": 0.5, "right in the first order": CHANCE,
             "right in all four orders": CHANCE**4}  # fmt: skip
# of always yes, of half the questions, and of guessing


def _accuracy_table(scores: dict, part: str, title: str, ratios: dict[str, float]) -> Table:
    """Results of both models of stage 3 on one test set. `ratios`: kind of cost -> MoE relative to dense."""
    table = Table(title=title, title_justify="left")
    for column in ("question", "number", "MoE", "dense", "majority answer", "chance"):
        table.add_column(column, justify="left" if column == "question" else "right")
    moe, dense = scores["sft"][part], scores["sft_dense"][part]
    for kind, row in moe["exact"].items():
        majority = f"{_share(moe['majority'][kind]):.1%}"
        table.add_row(f"exact: {kind}", str(row[1]), _cell(row), _cell(dense["exact"][kind]), majority, "-")
    total, total_dense = _total(moe["exact"]), _total(dense["exact"])
    majority = f"{_share(_total(moe['majority'])):.1%}"
    table.add_row("exact: all", str(total[1]), _cell(total), _cell(total_dense), majority, "-", style="bold")
    table.add_section()
    for kind, row in moe["choice"].items():
        style = "bold" if kind == "name" else None
        table.add_row(
            f"likelihood of 4: {kind}", str(row[1]), _cell(row), _cell(dense["choice"][kind]),
            "-", f"{CHANCE:.1%}", style=style,
        )  # fmt: skip
    table.add_section()
    for benchmark, figures in moe["figures"].items():
        for name, value in figures.items():
            if name in BASELINES:
                other = dense["figures"][benchmark][name]
                table.add_row(
                    f"{benchmark}: {name}",
                    "-",
                    f"{value:.1f}%",
                    f"{other:.1f}%",
                    "-",
                    f"{BASELINES[name]:.1%}",
                )
    table.add_section()
    for what, ratio in ratios.items():
        table.add_row(what, "-", f"{ratio:.2f}x", "1.00x", "-", "-")
    return table


def _differences_table(out: Path) -> Table:
    """The difference of the two models in each benchmark, with the interval of a paired bootstrap."""
    table = Table(title="experts compared with dense, on the same questions", title_justify="left")
    for column in ("benchmark", "questions", "difference", "95% interval", "verdict"):
        table.add_column(column, justify="left" if column in ("benchmark", "verdict") else "right")
    for part, name in (("test_a", "test A"), ("test_b", "test B")):
        tasks = {task.name: task for task in benchmarks(part)}
        dense, moe = (scores_of(out / FOLDER / stage, tasks) for stage in ("sft_dense", "sft"))
        for key, task in tasks.items():
            one: Difference = difference(task, "sft", dense[key], moe[key])
            table.add_row(
                f"{name}: {task.title}", str(one.units), f"{one.difference:+.1f}",
                f"{one.low:+.1f} to {one.high:+.1f}", one.verdict,
            )  # fmt: skip
    return table


def _expert_table(history: dict, scores: dict) -> Table:
    table = Table(title="experts in stage 3", title_justify="left")
    for column in (
        "place",
        "balance loss: first",
        "last",
        "z-loss: first",
        "last",
        "load entropy (1 = uniform)",
    ):
        table.add_column(column, justify="left" if column == "place" else "right")
    for place, entropy in scores["load_entropy"].items():
        cells = []
        for kind in ("balance", "z"):
            values = history["series"][f"{place}_{kind}"]
            window = max(1, len(values) // 20)
            cells += [f"{sum(v) / len(v):.3f}" for v in (values[:window], values[-window:])]
        table.add_row(PLACES[place], *cells, f"{entropy:.3f}")
    return table


def _slowdown(histories: dict) -> float:
    """CPU time of a step of stage 3 with experts, relative to that of a dense step."""
    moe, dense = (histories[name]["cpu_seconds"] / histories[name]["steps"] for name in ("sft", "sft_dense"))
    return moe / dense


def _compute_table(histories: dict, compute: dict, ratios: dict[str, float]) -> Table:
    table = Table(title="compute", title_justify="left")
    for column in ("stage", "steps", "tokens", "CPU s", "tokens per s (wall)"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, title in STAGES.items():
        history = histories[name]
        tokens = history["tokens"]
        table.add_row(
            title, str(history["steps"]), f"{tokens:,.0f}", f"{history['cpu_seconds']:.0f}",
            f"{tokens / history['wall_seconds']:,.0f}",
        )  # fmt: skip
    flops, time = ratios.values()
    table.caption = (
        f"an MoE step has {flops:.2f}x the FLOPs of a dense step and takes {time:.2f}x its CPU time, "
        f"{time / flops:.2f}x per FLOP; parameters: {compute['parameters']['dense']:,} dense, "
        f"{compute['parameters']['moe']:,} MoE"
    )
    return table


def _answers_table(out: Path, model, processor, seed: int) -> Table:
    records = json.loads((out / "data" / "test_a.json").read_text())
    by_picture: dict[str, list[dict]] = {}
    for record in records:
        by_picture.setdefault(record["image"], []).append(record)
    chosen = random.Random(seed).sample(sorted(by_picture), 3)
    table = Table(title="some questions about other unseen drawings, not chosen", title_justify="left")
    for column in ("picture", "question", "answer", "reference answer"):
        table.add_column(column)
    for image in chosen:
        picture = load_image(out / "data" / image)
        for record in by_picture[image]:
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            said = _answer(model, processor, picture, question)
            table.add_row(Path(image).name, question, said, record["answer"])
        table.add_section()
    return table


@dataclass(frozen=True)
class Asked:
    """A question about a picture, as the model answered it."""

    image: str  # path in the data set
    kind: str
    question: str
    said: str
    reference: str

    @property
    def is_right(self) -> bool:
        return self.said == self.reference


def answers(out: Path, model, processor) -> list[tuple[Item, str]]:
    """All questions of test A, with the answers of the model with experts."""
    task = EmojiExact("test_a")
    run_benchmarks(out, "sft", model, processor, [task])
    items = task.read(out / "data").items
    said = given_answers(out / FOLDER / "sft" / task.name / ANSWERS, [item.question for item in items])
    return list(zip(items, said, strict=True))


def show(out: Path, model, processor) -> list[Asked]:
    """The unseen drawing about which the model gives the most right answers, with all questions.

    The answers are those of the evaluation, and the model is asked about the best pictures again as `chat`
    asks. Of equally good pictures, one whose name the model knows is preferred.
    """
    by_picture = defaultdict(list)
    for item, said in answers(out, model, processor):
        image, question = item.question.images[0], item.question.text
        by_picture[image].append(Asked(image, item.group, question, said, item.reference))
    ranked = sorted(by_picture.values(), key=_merit, reverse=True)
    found = [[_ask(out, model, processor, asked) for asked in picture] for picture in ranked[:PICTURES]]
    best = max(found, key=_merit)
    return sorted(best, key=lambda asked: list(QUESTIONS).index(asked.kind))


def _merit(asked: list[Asked]) -> tuple[int, int, int]:
    right = {question.kind for question in asked if question.is_right}
    return -len(asked) + len(right), len(right), "name" in right


def _ask(out: Path, model, processor, asked: Asked) -> Asked:
    picture = load_image(out / "data" / asked.image)
    return dataclasses.replace(asked, said=_answer(model, processor, picture, asked.question))


def _answer(model, processor, picture, question: str) -> str:
    """The answer that `chat` gives."""
    talk = [user_message(question, [picture])]
    return Local(model, processor, TEMPLATE).stream(talk, Sampling(NEW_TOKENS)).read().text


def _questions_table(out: Path, shown: list[Asked], scores: dict) -> Table:
    """The five kinds of question, each with the model's answer about the picture `shown`."""
    known = read_json(out / "data" / "baselines.json", *QUESTIONS)
    table = Table(title=f"what it can be asked, and its answers about {shown[0].image}", title_justify="left")
    for column in ("question", "possible answers", "right in test A", "answer", "reference answer"):
        table.add_column(column, justify="right" if column.startswith(("possible", "right")) else "left")
    answered = {asked.kind: asked for asked in shown}
    for kind, question in QUESTIONS.items():
        asked = answered.get(kind)
        said = (asked.said, asked.reference) if asked else ("not asked: no clear answer", "-")
        share = f"{_share(scores['exact'][kind]):.0%}" if kind in scores["exact"] else "-"
        table.add_row(question, str(known[kind]["train_answers"]), share, *said)
    return table


def _invitation(out: Path, checkpoint: Path, shown: list[Asked]) -> str:
    """A command to chat about the picture, with a question that the model answers right, if there is one."""
    right = [asked for asked in shown if asked.is_right]
    chosen = (right or shown)[0]
    picture = out / "data" / chosen.image
    words = ("chat", "--checkpoint", checkpoint, "--image", picture, "--question", chosen.question)
    if right:
        how = f"{len(right)} of its {len(shown)} answers about this picture are right, as {chosen.said!r}"
    else:
        how = "none of its answers is right, which is usual after so few steps"
    return f"to chat with the model ({how}):\n  {command(*words)}"


def _plot_patches(image: Path, model, processor, path: Path) -> None:
    picture = load_image(image)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    experts = {key: value.numpy() for key, value in patch_experts(model, pixels).items()}
    plot_patches(np.asarray(picture), experts, path)
