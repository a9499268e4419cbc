"""The report of the demo: tables, plots, some answers, and a check of the saved checkpoint."""

import json
import math
import random
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from cumo_model.analysis.experts import patch_experts
from cumo_model.analysis.plots import PLACES, plot_expert_load, plot_patches
from cumo_model.checkpoints.folders import write_whole
from cumo_model.demo.folder import RESULT, read_json
from cumo_model.demo.plots import plot_losses
from cumo_model.demo.settings import TEMPLATE, Settings
from cumo_model.processing.pictures import load_image
from cumo_model.serving.chat import answer, load
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
    _plot_patches(out, model, processor, pictures / "patches.png")

    console = Console(record=True, width=100)
    ratios = {"FLOPs per step": compute["flops_ratio"], "CPU time per step": _slowdown(histories)}
    console.print(_accuracy_table(scores, "test_a", "unseen drawings of known concepts (test A)", ratios))
    console.print(_accuracy_table(scores, "test_b", "unseen concepts (test B)", ratios))
    console.print(EQUAL_FLOPS.format(ratio=compute["flops_ratio"]))
    console.print(_expert_table(histories["sft"], scores["sft"]))
    console.print(_compute_table(histories, compute, ratios))
    console.print(_answers_table(out, model, processor, settings.seed))
    again = scores["sft"]["reload_difference"]
    found = "not measured, because the run was interrupted" if again is None else f"{again:.0e}"
    console.print(
        f"step-0 difference of upcycling: {compute['step0_difference']:.1e}; difference of the logits after "
        f"reloading {checkpoint}: {found}"
    )
    console.print(_headline(scores) + f"; {seconds / 60:.1f} minutes")
    console.print(
        f"plots are in {pictures}; to chat with the model:\n"
        f"  python -m cumo_model chat --checkpoint {checkpoint} --image {_some_picture(out)}",
        soft_wrap=True,
    )
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
            f"4-way choice: {kind}", str(row[1]), _cell(row), _cell(dense["choice"][kind]),
            "-", f"{CHANCE:.1%}", style=style,
        )  # fmt: skip
    table.add_section()
    for what, ratio in ratios.items():
        table.add_row(what, "-", f"{ratio:.2f}x", "1.00x", "-", "-")
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
    table = Table(title="some questions about unseen drawings", title_justify="left")
    for column in ("picture", "question", "answer", "reference answer"):
        table.add_column(column)
    for image in chosen:
        picture = load_image(out / "data" / image)
        for record in by_picture[image]:
            question = record["conversations"][0]["value"].removeprefix("<image>\n")
            turns = [{"from": "human", "value": f"<image>\n{question}"}]
            table.add_row(
                Path(image).name,
                question,
                answer(model, processor, picture, turns, TEMPLATE),
                record["answer"],
            )
        table.add_section()
    return table


def _some_picture(out: Path) -> Path:
    return min((out / "data" / "images" / "test_a").glob("*.png"))


def _plot_patches(out: Path, model, processor, path: Path) -> None:
    picture = load_image(_some_picture(out))
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    experts = {key: value.numpy() for key, value in patch_experts(model, pixels).items()}
    plot_patches(np.asarray(picture), experts, path)
