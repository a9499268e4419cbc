"""Tests of the ablation's table and verdicts; the command itself is run manually (docs/analysis.md)."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from cumo_model import CumoConfig
from cumo_model.checkpoints.folders import write_json
from cumo_model.demo import ablation
from cumo_model.demo.ablation import (
    BEYOND,
    CLAIMS,
    ROWS,
    row_recipe,
    run_ablation,
    run_row,
    scores_path,
    table,
    verdict,
)
from cumo_model.demo.folder import Run
from cumo_model.demo.processes import claim
from cumo_model.demo.settings import Settings
from cumo_model.demo.stages import TASKS, measure_flops
from cumo_model.training.stage import read_history
from cumo_model.training.start import start_model
from tests.model.training.small_runs import COLOURS, write_data, write_model


def _row(choice, exact, flops=100, loss=0.5):
    return {
        "choice": choice,
        "exact": exact,
        "loss": [loss, loss + 0.1],
        "flops": flops,
        "parameters": 1_000_000,
        "load_entropy": {"clip": 0.9} if flops > 100 else {},
    }


def test_rows_are_the_papers_ablations():
    assert {name for claim in (*CLAIMS, *BEYOND) for name in claim[1:]} <= set(ROWS)
    assert not any(ROWS[name].router for claim in CLAIMS for name in claim[1:])
    assert ROWS["noisy"].router == {"noisy": True} and ROWS["noisy"].losses
    assert ROWS["sigmoid"].router == {"score": "sigmoid", "selection_bias": True}
    assert not ROWS["sigmoid"].losses
    assert ROWS["clip"].vision == ROWS["clip"].projector == 4 and ROWS["clip"].top_k == 2
    assert ROWS["top1"].top_k == 1 and ROWS["e8"].vision == 8 and not ROWS["no-stage2"].stage2
    assert ROWS["clip-scratch"].scratch and not ROWS["no-losses"].losses


def test_a_verdict_needs_a_t_test():
    # differences of 4, 5 and 3 thirty-seconds, which are exact in floating point
    mean, error, word = verdict([0.75, 0.8125, 0.78125], [0.625, 0.65625, 0.6875])
    assert (mean, error, word) == (4 / 32, 1 / 32 / math.sqrt(3), "confirmed")
    assert verdict([0.6, 0.61, 0.62], [0.7, 0.72, 0.71])[2] == "opposite result"
    assert verdict([0.7, 0.5], [0.6, 0.6])[2] == "not significant"
    assert verdict([0.64, 0.60, 0.62], [0.6, 0.6, 0.6])[2] == "not significant"  # 1.7 errors, t is 4.3
    # 3.5 errors are enough for four seeds, where t is 3.2, and not for three
    assert verdict([0.66, 0.62, 0.64], [0.6] * 3)[2] == "not significant"
    assert verdict([0.75, 0.5, 0.5, 0.375], [0.25] * 4)[2] == "confirmed"
    assert math.isnan(verdict([0.7], [0.6])[1]) and verdict([0.7], [0.6])[2] == "not significant"


def test_the_table_has_mean_spread_cost_and_claims():
    text = table({"dense": _row([0.5, 0.7], [0.4, 0.4]), "mlp": _row([0.6, 0.8], [0.5, 0.5], 120, 0.4)})
    assert "| dense | 60.0 ± 14.1 | 40.0 ± 0.0 | 0.550 ± 0.071 | 1.00x | 1.0 M | - |" in text
    assert "| + MLP-MoE, 2 of 4 | 70.0 ± 14.1 |" in text and "1.20x" in text and "clip 0.90" in text
    assert "+10.0 ± 0.0: confirmed" in text and "-0.100 ± 0.000: confirmed" in text
    assert len([line for line in text.splitlines() if "confirmed" in line]) == 1


def test_routers_beyond_the_paper_have_a_table_of_their_own():
    """The question about no balancing has no row to compare with."""
    rows = {"clip": _row([0.5, 0.5], [0.5, 0.5]), "noisy": _row([0.5, 0.6], [0.5, 0.5])}
    assert "beyond the paper" not in table({"dense": rows["clip"], "clip": rows["clip"]})
    rows["sigmoid"] = _row([0.25, 0.25], [0.5, 0.5], loss=0.75)
    claims, beyond = table(rows).split("| beyond the paper: is it so that |")
    assert "| claim of the paper |" in claims and "noisy top-k (" not in claims
    assert "| noisy top-k (arXiv 1701.06538)" in beyond and "+5.0 ± 5.0: not significant" in beyond
    assert "-25.0 ± 0.0: opposite result" in beyond and "+0.250 ± 0.000: opposite result" in beyond
    assert "not balanced" not in beyond


def test_the_summary_adds_up_kinds_of_questions(tmp_path):
    """Exact match over all questions; choice for names only; the first run's sizes, mean entropies."""
    (tmp_path / "rows").mkdir()
    for seed, (right, entropy) in enumerate(((1, 0.5), (2, 1.0))):
        scores = {
            "exact": {"name": [right, 4], "kind": [3, 6]},
            "choice": {"name": [right, 8], "kind": [0, 8], "name, same kind": [0, 8]},
            "language_loss": 0.5 + seed,
            "cpu_seconds": 3.0 + seed,
            "parameters": 1000 + seed,
            "flops_per_step": 100 + seed,
            "load_entropy": {"clip": entropy},
        }
        write_json(scores_path(tmp_path, "clip", seed), scores)
    assert ablation.summary(tmp_path, 3) == {}
    assert ablation.summary(tmp_path, 2) == {
        "clip": {
            "choice": [1 / 8, 2 / 8],
            "exact": [4 / 10, 5 / 10],
            "loss": [0.5, 1.5],
            "cpu_seconds": [3.0, 4.0],
            "parameters": 1000,
            "flops": 100,
            "load_entropy": {"clip": 0.75},
        }
    }


def _write_scores(out, row, seed):
    write_json(
        scores_path(out, row, seed),
        {
            "exact": {"name": [seed, 4]},
            "choice": {"name": [2, 4]},
            "language_loss": 0.5,
            "cpu_seconds": 1.0,
            "parameters": 1_000_000,
            "flops_per_step": 100,
            "load_entropy": {},
        },
    )


def test_the_table_keeps_the_rows_of_earlier_calls(tmp_path, monkeypatch, capsys):
    """`--rows clip --seeds 1` after all runs of dense and mlp; one run of clip-scratch is missing."""
    out = tmp_path / "out"
    claim(out, Settings(quick=True, sft_steps=30))
    (out / "rows").mkdir()
    runs = [("dense", 0), ("dense", 1), ("mlp", 0), ("mlp", 1), ("clip", 0), ("clip-scratch", 1)]
    for row, seed in runs:
        _write_scores(out, row, seed)
    asked = []
    monkeypatch.setattr(ablation, "make_dataset", lambda *given, **options: None)
    monkeypatch.setattr(ablation, "run_tasks", lambda out, tasks, width, phase: asked.extend(tasks))
    assert run_ablation(out, 1, ["clip"], is_quick=True) == 0
    assert not any(task.startswith("ablate") for task in asked)
    result = json.loads((out / "results.json").read_text())
    assert {name: len(row["choice"]) for name, row in result.items()} == {"dense": 2, "mlp": 2, "clip": 1}
    text = (out / "table.md").read_text()
    assert "1 to 2 seeds per row" in text and "adding CLIP-MoE" in text
    run_ablation(out, 2, ["mlp"], is_quick=True)
    assert set(json.loads((out / "results.json").read_text())) == {"dense", "mlp"}


@pytest.fixture
def run(tmp_path, tiny_config):
    """The folder of an ablation after stage 2, with a tiny model and pictures of plain colours."""
    claim(tmp_path / "run", Settings(image_size=12, patch_size=4, quick=True, sft_steps=3))
    data = tmp_path / "run" / "data"
    data.mkdir()
    write_data(data, text_rows=0)
    records = [json.loads(line) for line in (data / "colours.jsonl").read_text().splitlines()]
    for record in records:
        answer = record["id"]
        record["conversations"][1]["value"] = answer
        record |= {"kind": "name", "answer": answer, "choices": COLOURS[:4], "choices_same_kind": COLOURS[4:]}
    kinds = [dict(record) for record in records]
    for number, record in enumerate(kinds):
        record |= {"id": f"{record['id']}-kind", "kind": "kind", "answer": ("warm", "cold")[number % 2]}
        record["conversations"] = [
            {"from": "human", "value": "<image>\nwhat kind?"},
            *record["conversations"][1:],
        ]
    records += kinds
    for name in ("test_a.json", "stage3_vqa.json"):
        (data / name).write_text(json.dumps(records))
    write_json(data / "baselines.json", {"name": {"answer": "red"}, "kind": {"answer": "warm"}})
    start = write_model(tmp_path, tiny_config)
    AutoProcessor.from_pretrained(start).tokenizer.save_pretrained(data / "tokenizer")
    for stage in ("pretrain", "pft"):
        (tmp_path / "run" / stage).mkdir()
        shutil.copytree(start, tmp_path / "run" / stage / "model")
    (tmp_path / "run" / "rows").mkdir()
    return Run(tmp_path / "run")


def test_a_row_is_the_demos_recipe_with_what_it_changes(run):
    for name, row in ROWS.items():
        recipe = row_recipe(run, name, 7)
        model, stage = recipe.model, recipe.stage
        experts = (model.vision_experts, model.projector_experts, model.text_experts)
        assert experts == (row.vision, row.projector, row.text)
        assert (model.top_k, model.scratch, model.router) == (row.top_k, row.scratch, row.router)
        assert (model.seed, recipe.trainer["seed"]) == (7, 7)
        assert (stage.balance_loss_coef, stage.router_z_loss_coef) == ((0.1, 0.01) if row.losses else (0, 0))
        assert model.start == str(run.result("pft" if row.stage2 else "pretrain"))
        assert recipe.output_dir == str(run.folder / "rows" / f"{name}-7")
        assert recipe.data == run.recipe("sft").data and recipe.trainer["max_steps"] == 3


def test_a_row_killed_between_its_model_and_its_scores_gets_the_same_scores(run, monkeypatch):
    """The saved model is loaded and not trained again. Its loss is the mean of the last twenty steps."""
    run_row(run, "clip", 1)
    result = run.folder / "rows" / "clip-1" / "model"
    found, config = (
        json.loads(scores_path(run.folder, "clip", 1).read_text()),
        CumoConfig.from_pretrained(result),
    )
    losses = read_history(result)["series"]["language"]
    assert len(losses) == 3 and found["language_loss"] == sum(losses) / 3
    assert found["exact"]["name"][1] == 8 and config.vision_config.num_experts == 4
    path = scores_path(run.folder, "clip", 1)
    first, model = path.read_text(), run.folder / "rows" / "clip-1" / "model" / "model.safetensors"
    assert json.loads(first)["load_entropy"].keys() == {"clip", "mlp"}
    stamp = model.stat().st_mtime_ns
    path.unlink()
    run_row(run, "clip", 1)
    assert path.read_text() == first and model.stat().st_mtime_ns == stamp
    history = {"series": {"language": [float(n) for n in range(50)], "loss": [9.0] * 50}, "cpu_seconds": 2.0}
    monkeypatch.setattr(ablation, "read_history", lambda result: history)
    run_row(run, "clip", 1)
    found = json.loads(path.read_text())
    assert (found["language_loss"], found["cpu_seconds"]) == (sum(range(30, 50)) / 20, 2.0)


@pytest.mark.parametrize("name", ["noisy", "sigmoid"])
def test_a_row_beyond_the_paper_trains_its_routers(run, name):
    run_row(run, name, 0)
    result = run.folder / "rows" / f"{name}-0" / "model"
    state, part = (
        load_file(result / "model.safetensors"),
        {"noisy": "noise_gate", "sigmoid": "selection_bias"},
    )
    found = [value for key, value in state.items() if part[name] in key]
    assert CumoConfig.from_pretrained(result).router == ROWS[name].router
    assert len(found) == 4 and all(value.any() for value in found)
    scores = json.loads(scores_path(run.folder, name, 0).read_text())
    assert scores["load_entropy"].keys() == {"clip", "mlp"}


def test_stage_3_is_scored_and_reloads_to_the_logits_of_what_was_trained(run):
    """No checkpoints are left; if the run was killed before the scores, reloading is not measured."""
    shutil.copy(run.data / "test_a.json", run.data / "test_b.json")
    for name in ("sft", "sft_dense"):
        TASKS[name](run)
        scores = json.loads((run.folder / f"scores-{name}.json").read_text())
        assert scores["reload_difference"] == 0.0 and scores["test_b"]["exact"]["name"][1] == 8
        assert ("expert_load" in scores) == (name == "sft")
        left = {path.name for path in (run.folder / name).iterdir()}
        assert left == {".lock", "data.json", "model", "recipe.json", "start.json"}
    TASKS["sft"](run)
    assert json.loads((run.folder / "scores-sft.json").read_text())["reload_difference"] is None
    found = measure_flops(run)
    assert found["flops_ratio"] > 1 and found["parameters"]["moe"] > found["parameters"]["dense"]
    recipe, flops = run.recipe("sft"), found["flops_per_step"]
    model = start_model(recipe.model, recipe.data)[0].train()
    with FlopCounterMode(display=False) as counter:
        model(**run.batch("sft"), use_cache=False, skip_logits=True)
    # every product has two gradients, but for the pixels and the positions
    assert 2 * counter.get_total_flops() < flops["moe"] < 3 * counter.get_total_flops()
    assert found["flops_ratio"] == flops["moe"] / flops["dense"]


def test_unknown_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"rows must be some of dense, mlp, .*, got \['x'\], 3"):
        run_ablation(tmp_path / "out", rows=["x"])
    assert not (tmp_path / "out").exists()
