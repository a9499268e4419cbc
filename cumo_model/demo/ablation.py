"""The paper's ablations on the demo's data, and routers beyond it: python -m cumo_model ablate.

Stages 0 to 2 are trained once. Every row is a separate stage 3, repeated with several seeds. A seed
determines the gates, other new weights and the order of the data, so the spread is that of stage 3 only.
"""

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumo_model.analysis.experts import load_entropy
from cumo_model.checkpoints.folders import write_json, write_whole
from cumo_model.demo.evaluate import Examiner, examine
from cumo_model.demo.folder import RESULT, Run, load_model, stage_recipe
from cumo_model.demo.processes import claim, cores, locked, named, run_tasks
from cumo_model.demo.questions import make_dataset
from cumo_model.demo.settings import QUICK, TEMPLATE, Settings, load_settings
from cumo_model.demo.stages import flops_of_step
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.training.recipe import Recipe
from cumo_model.training.stage import read_history
from cumo_model.training.start import start_model

STEPS = 300  # number of steps of stage 3


@dataclass(frozen=True)
class Row:
    """One configuration of stage 3. Numbers are numbers of experts; 0 means dense."""

    title: str
    vision: int = 0
    projector: int = 0
    text: int = 0
    top_k: int = 2
    scratch: bool = False
    losses: bool = True
    stage2: bool = True
    router: dict[str, Any] | None = None  # options of the routers that differ from CuMo's


ROWS = {
    "dense": Row("dense"),
    "mlp": Row("+ MLP-MoE, 2 of 4", projector=4),
    "clip": Row("+ CLIP-MoE, 2 of 4 (CuMo 7B)", 4, 4),
    "llm": Row("+ LLM-MoE, 2 of 4", 4, 4, 4),
    "mlp-scratch": Row("MLP-MoE from scratch", projector=4, scratch=True),
    "clip-scratch": Row("MLP- and CLIP-MoE from scratch", 4, 4, scratch=True),
    "no-losses": Row("MLP- and CLIP-MoE, no balance or z loss", 4, 4, losses=False),
    "top1": Row("MLP- and CLIP-MoE, 1 of 4", 4, 4, top_k=1),
    "e8": Row("MLP- and CLIP-MoE, 2 of 8", 8, 8),
    "no-stage2": Row("MLP- and CLIP-MoE, no stage 2", 4, 4, stage2=False),
    "dense-no-stage2": Row("dense, no stage 2", stage2=False),
    # beyond the paper: other ways to balance the experts of "clip"
    "noisy": Row("MLP- and CLIP-MoE, noisy top-k, its losses and the z loss", 4, 4, router={"noisy": True}),
    "sigmoid": Row(
        "MLP- and CLIP-MoE, sigmoid with a bias, no balance or z loss",
        4,
        4,
        losses=False,
        router={"score": "sigmoid", "selection_bias": True},
    ),
}

CLAIMS = (  # tables 3 to 6 of the paper: the first row is better than the second
    ("MLP-MoE, upcycled, is better than the dense connector", "mlp", "dense"),
    ("adding CLIP-MoE improves it further", "clip", "mlp"),
    ("MLP-MoE: upcycled is better than from scratch", "mlp", "mlp-scratch"),
    ("CLIP-MoE: upcycled is better than from scratch", "clip", "clip-scratch"),
    ("the auxiliary losses help", "clip", "no-losses"),
    ("8 experts are no better than 4", "clip", "e8"),
    ("stage 2 helps", "clip", "no-stage2"),
    ("an upcycled language model helps on some tasks", "llm", "clip"),
)
BEYOND = (  # questions that the paper does not ask: is the first row better than the second
    ("noisy top-k (arXiv 1701.06538) is better than a softmax with balance and z loss", "noisy", "clip"),
    ("a sigmoid, balanced without a loss (arXiv 2408.15664), is better than the losses", "sigmoid", "clip"),
    (
        "a sigmoid, balanced without a loss, is better than a softmax not balanced",
        "sigmoid",
        "no-losses",
    ),
)


def run_ablation(
    out_dir: str | os.PathLike,
    seeds: int = 3,
    rows: list[str] | None = None,
    is_quick: bool = False,
    steps: int | None = None,
) -> int:
    """Run all unfinished runs in `out_dir`, then write and print the table.

    Args:
        out_dir: folder of the ablation.
        seeds: number of runs of each row.
        rows: names of the rows to run, from ROWS; by default all. The table contains all finished rows.
        is_quick: use the quick settings of the demo, which test the whole path but train too little.
        steps: number of steps of stage 3; by default 300.

    Raises:
        ValueError: a row is unknown, or `out_dir` contains something else.
        Interrupted: the run was stopped by a signal; the same call resumes.
    """
    out, start = named(out_dir), time.monotonic()
    names = list(rows or ROWS)
    unknown = sorted(set(names) - set(ROWS))
    if unknown or seeds < 1:
        raise ValueError(
            f"rows must be some of {', '.join(ROWS)}, and seeds must be at least 1, got {names}, {seeds}"
        )
    usual = QUICK["sft"][0] if is_quick else STEPS
    settings = Settings(quick=is_quick, sft_steps=usual if steps is None else steps)
    claim(out, settings)
    jobs = {f"ablate:{name}:{seed}": scores_path(out, name, seed) for seed in range(seeds) for name in names}
    print(f"{len(jobs)} runs of stage 3 in {out}; Ctrl-C stops them, the same command resumes", flush=True)
    with locked(out):
        make_dataset(out / "data", settings.image_size, seed=settings.seed, quick=is_quick)
        for phase in (("vision", "text"), ("dense",)):
            done = {"vision": "vision/model", "text": "text/model", "dense": "compute.json"}
            left = [task for task in phase if not (out / done[task]).exists()]
            run_tasks(out, left, cores(), len(phase))
        left = [job for job, path in jobs.items() if not path.exists()]
        run_tasks(out, left, cores(), len(jobs))
    result = summary(out, seeds)
    write_table(out, result, time.monotonic() - start)
    return 0


def scores_path(out: Path, row: str, seed: int) -> Path:
    """Path of the scores of one run."""
    return out / "rows" / f"{row}-{seed}.json"


def row_recipe(run: Run, name: str, seed: int) -> Recipe:
    """The recipe of stage 3 for one row and seed: the demo's recipe with the changes of the row."""
    row = ROWS[name]
    changes = {
        "model__start": str(run.result("pft" if row.stage2 else "pretrain")),
        "model__vision_experts": row.vision,
        "model__projector_experts": row.projector,
        "model__text_experts": row.text,
        "model__top_k": row.top_k,
        "model__scratch": row.scratch,
        "model__seed": seed,
        "trainer__seed": seed,
    }
    if row.router is not None:
        changes["model__router"] = row.router
    if not row.losses:
        changes |= {"stage__balance_loss_coef": 0.0, "stage__router_z_loss_coef": 0.0}
    return run.recipe("sft", output_dir=str(run.folder / "rows" / f"{name}-{seed}"), **changes)


def run_row(run: Run, name: str, seed: int) -> None:
    """Train stage 3 of one row and seed, and save its scores; a task of demo.task."""
    recipe = row_recipe(run, name, seed)
    flops = flops_of_step(start_model(recipe.model, recipe.data)[0].to(run.device), run.batch("sft"))
    run.train(recipe, f"{name} {seed}")
    result = Path(recipe.output_dir) / RESULT
    trained = load_model(CumoForConditionalGeneration, result).to(run.device)
    limit = run.settings.eval_limit
    examiner = Examiner(trained, run.processor, run.data / "test_a.json", TEMPLATE, limit)
    scores = examine(
        run.folder, f"rows/{name}-{seed}", trained, run.processor, "test_a", run.majority(), limit
    )
    history = read_history(result)
    language = history["series"]["language"][-20:]
    scores |= {
        "flops_per_step": flops,
        "parameters": trained.num_parameters(),
        "cpu_seconds": history["cpu_seconds"],
        "language_loss": sum(language) / len(language),
        "load_entropy": {place: load_entropy(load) for place, load in examiner.expert_load().items()},
    }
    write_json(scores_path(run.folder, name, seed), scores)


def summary(out: Path, seeds: int) -> dict:
    """Collect results as row -> metric -> values by seed.

    Rows with at least `seeds` finished runs are included, with all their runs, also those of earlier calls.
    """
    found: dict = {}
    for name in ROWS:
        paths = itertools.takewhile(Path.exists, (scores_path(out, name, seed) for seed in itertools.count()))
        runs = [json.loads(path.read_text()) for path in paths]
        if len(runs) < seeds:
            continue
        exact = [[sum(part) for part in zip(*run["exact"].values(), strict=True)] for run in runs]
        found[name] = {
            "choice": [run["choice"]["name"][0] / run["choice"]["name"][1] for run in runs],
            "exact": [right / asked for right, asked in exact],
            "loss": [run["language_loss"] for run in runs],
            "cpu_seconds": [run["cpu_seconds"] for run in runs],
            "parameters": runs[0]["parameters"],
            "flops": runs[0]["flops_per_step"],
            "load_entropy": {
                place: statistics.mean(run["load_entropy"][place] for run in runs)
                for place in runs[0]["load_entropy"]
            },
        }
    return found


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


# two-sided 95 % quantiles of Student's t by degrees of freedom; for three seeds, two standard errors would be
# too few
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def verdict(better: list[float], worse: list[float]) -> tuple[float, float, str]:
    """Mean difference of paired seeds, its standard error, and the result of a two-sided t-test at 5 %.

    Seeds that only one of the two rows has are left out.
    """
    differences = [a - b for a, b in zip(better, worse, strict=False)]
    mean = statistics.mean(differences)
    error = _spread(differences) / math.sqrt(len(differences))
    if math.isnan(error) or abs(mean) <= STUDENT.get(len(differences) - 1, 2.2) * error:
        return mean, error, "not significant"
    return mean, error, "confirmed" if mean > 0 else "opposite result"


def table(result: dict) -> str:
    """Tables in Markdown: all rows with mean and spread, the claims of the paper, the questions beyond it."""
    base = result.get("dense", next(iter(result.values())))["flops"]
    lines = [
        "| stage 3 | 4-way choice | exact match | loss | FLOPs | parameters | load entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        cells = [
            f"{100 * statistics.mean(row[key]):.1f} ± {100 * _spread(row[key]):.1f}"
            for key in ("choice", "exact")
        ]
        cells.append(f"{statistics.mean(row['loss']):.3f} ± {_spread(row['loss']):.3f}")
        cells += [f"{row['flops'] / base:.2f}x", f"{row['parameters'] / 1e6:.1f} M"]
        cells.append(", ".join(f"{place} {value:.2f}" for place, value in row["load_entropy"].items()) or "-")
        lines.append(f"| {ROWS[name].title} | {' | '.join(cells)} |")
    lines += _compared("claim of the paper", CLAIMS, result)
    if set(result) & {row for _, row, _ in BEYOND}:
        lines += _compared("beyond the paper: is it so that", BEYOND, result)
    return "\n".join(lines) + "\n"


def _compared(head: str, claims: Sequence[tuple[str, str, str]], result: dict) -> list[str]:
    """Lines of a table with a row for each claim of which both rows have results."""
    lines = ["", f"| {head} | choice here | exact match here | loss here |", "|---|---|---|---|"]
    for text, better, worse in claims:
        if better in result and worse in result:
            cells = []
            for key in ("choice", "exact"):
                mean, error, word = verdict(result[better][key], result[worse][key])
                cells.append(f"{100 * mean:+.1f} ± {100 * error:.1f}: {word}")
            mean, error, word = verdict(result[worse]["loss"], result[better]["loss"])  # lower is better
            cells.append(f"{-mean:+.3f} ± {error:.3f}: {word}")
            lines.append(f"| {text} | {' | '.join(cells)} |")
    return lines


def write_table(out: Path, result: dict, seconds: float) -> None:
    """Write results.json and table.md into `out`, and print the table."""
    numbers = sorted({len(row["choice"]) for row in result.values()})
    seeds = " to ".join(str(number) for number in (numbers[:1] + numbers[-1:] if numbers[1:] else numbers))
    stage3 = stage_recipe(out, load_settings(out / "settings.json"), "sft")
    steps, batch = stage3.trainer["max_steps"], stage3.stage.batch_size
    head = (
        "# Ablation of CuMo's stage 3 on the demo's data\n\n"
        f"{seeds} seeds per row, {steps} steps with batch size {batch}; "
        "mean ± standard deviation over seeds, per cent, on unseen drawings.\n"
        "All rows have the same number of steps, so rows with experts cost more. "
        "Stages 0 to 2 are shared,\nso the spread is that of stage 3 "
        "only. Loss: training loss of the language model, mean of the last 20 steps.\nClaims: paired "
        "difference ± standard error, with the result of a t-test at 5 %.\n\n"
    )
    text = head + table(result) + f"\nThe last call took {seconds / 60:.1f} minutes.\n"
    for name, content in (("results.json", json.dumps(result, indent=1)), ("table.md", text)):
        write_whole(out / name, content)
    print(text)
