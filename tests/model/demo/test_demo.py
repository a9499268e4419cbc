"""Tests of the demo's evaluation, plots and settings; CI runs the whole `make demo ARGS=--quick`."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cumo_model import CumoForConditionalGeneration
from cumo_model.analysis.experts import patch_experts
from cumo_model.analysis.plots import plot_expert_load, plot_patches
from cumo_model.demo import processes, task
from cumo_model.demo import run as demo_run
from cumo_model.demo.evaluate import Examiner
from cumo_model.demo.folder import RECIPES, load_model, read_json, stage_recipe
from cumo_model.demo.plots import plot_losses
from cumo_model.demo.report import _accuracy_table, _fell, _headline, _slowdown
from cumo_model.demo.settings import Settings
from cumo_model.demo.stages import TASKS
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.model.moe import record_routing
from cumo_model.processing.conversation import tokenize_prompt
from cumo_model.processing.processor import build_processor
from cumo_model.training.recipe import PARTS, load_recipe, plain
from tests.rounding import assert_close_after, assert_same_formula

WORDS = ["red", "green", "blue", "dark red"]


@pytest.fixture
def make_examiner(tiny_config, tmp_path):
    """Three pictures, each with a question for its name and one for its kind, both with four choices."""
    records = []
    for i, name in enumerate(("red", "green", "dark red")):
        Image.new("RGB", (12, 12), (60 * i, 90, 10)).save(tmp_path / f"{i}.png")
        for kind in ("name", "kind"):
            turns = [{"from": "human", "value": f"<image>\nwhat {kind}?"}, {"from": "gpt", "value": name}]
            record = {"id": i, "image": f"{i}.png", "conversations": turns, "kind": kind, "answer": name}
            records.append(record | {"choices": WORDS})
    (tmp_path / "test.json").write_text(json.dumps(records))
    tokenizer = train_tokenizer([f"what name? {' '.join(WORDS)} what kind?"] * 4, 300)
    config = tiny_config(
        text_options={"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        scales=(1,),
    )
    model = CumoForConditionalGeneration(config)
    processor = build_processor(tokenizer, 12, 4)
    return lambda limit=None: Examiner(model, processor, tmp_path / "test.json", "mistral_instruct", limit)


@pytest.fixture
def examiner(make_examiner):
    return make_examiner()


def test_choice_is_the_likeliest_answer(examiner):
    """Compared with likelihoods that are computed token by token, one sequence at a time."""
    picked = examiner.choices("choices")
    assert picked.keys() == set(range(6))
    tokenizer, model = examiner.tokenizer, examiner.model
    for row, choice in picked.items():
        scores = []
        for word in WORDS:
            turns = examiner.dataset.records[row]["conversations"][:1]
            ids = tokenize_prompt(turns, tokenizer, "mistral_instruct", 9).tolist()
            start, total = len(ids), 0.0
            ids += tokenizer(f" {word} </s>", add_special_tokens=False)["input_ids"]
            pixels = examiner.dataset[row]["pixel_values"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
            for position in range(start, len(ids)):
                total += float(logits[position - 1].log_softmax(-1)[ids[position]])
            scores.append(total)
        assert choice == scores.index(max(scores))
    # only names and kinds have enough answers; only records with the field have choices
    examiner.rows, records = [3, 4, 5], examiner.dataset.records
    records[5]["kind"] = "colour"
    del records[3]["choices"]
    assert examiner.choices("choices") == {4: picked[4]}


@pytest.mark.usefixtures("fp64")
def test_a_likelihood_is_the_sum_over_the_tokens_of_the_answer(examiner):
    """Not the mean, which would favour long answers. The end of the answer counts; the question does not."""
    answers = ["red", "dark red", "green dark red blue"]
    samples = [examiner._answered(row, answer) for row, answer in zip((0, 2, 4), answers, strict=True)]
    found, lengths = examiner._likelihood([0, 2, 4], samples), []
    for row, answer, (ids, _), likelihood in zip((0, 2, 4), answers, samples, found, strict=True):
        turns = examiner.dataset.records[row]["conversations"][:1]
        prompt = tokenize_prompt(turns, examiner.tokenizer, "mistral_instruct", 9)
        said = examiner.tokenizer(f" {answer} </s>", add_special_tokens=False)["input_ids"]
        assert ids.tolist() == prompt.tolist() + said
        with torch.no_grad():
            pixels = examiner.dataset[row]["pixel_values"].double()
            logits = examiner.model(input_ids=ids[None], pixel_values=pixels).logits[0]
        each = logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(said)), said]
        assert_same_formula(likelihood, float(each.sum()))
        lengths.append(len(said))
    assert len(set(lengths)) == 3


def test_likelihoods_of_a_batch_are_those_of_each_row(examiner):
    with torch.no_grad():
        for name, parameter in examiner.model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    samples = [examiner._answered(row, "red") for row in (4, 0, 2)]
    several = examiner._likelihood([4, 0, 2], samples)
    alone = [examiner._likelihood([row], [sample])[0] for row, sample in zip((4, 0, 2), samples, strict=True)]
    assert sorted(range(3), key=several.__getitem__) == sorted(range(3), key=alone.__getitem__)
    assert torch.equal(examiner._pixels([4, 0]), torch.cat([examiner._pixels([4]), examiner._pixels([0])]))


def test_an_exam_asks_the_first_questions_of_each_kind(make_examiner):
    for limit, rows in ((None, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 2, 3]), (1, [0, 1])):
        assert make_examiner(limit).rows == rows


def test_choices_are_counted_by_kind(examiner, monkeypatch):
    picked = {"choices": {0: 0, 2: 0, 4: 3}, "choices_same_kind": {2: 1}}
    monkeypatch.setattr(examiner, "choices", picked.get)
    examiner.dataset.records[2]["choices_same_kind"] = ["red", "green", "blue", "dark red"]
    assert examiner.choice() == {"name": [2, 3], "name, same kind": [1, 1]}


def test_expert_load_is_a_share_per_layer_and_ignores_padding(examiner):
    load = examiner.expert_load()
    assert load.keys() == {"clip", "mlp"} and load["clip"].keys() == {"name", "kind"}
    assert (
        len(load["clip"]["name"]) == 2 and len(load["mlp"]["kind"]) == 1
    )  # the last tower layer does not run
    for kinds in load.values():
        for layers in kinds.values():
            assert all(len(shares) == 4 for shares in layers)
            # each share is rounded once, the sums are Python's
            assert_close_after(1, [sum(shares) for shares in layers], [1] * len(layers))


def test_the_exam_looks_at_the_picture(examiner):
    """With random weights in the tower, two pictures must give different likelihoods."""
    with torch.no_grad():
        for name, parameter in examiner.model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    samples = [examiner._answered(0, "red")] * 2
    likelihoods = examiner._likelihood([0, 2], samples)
    assert likelihoods[0] != likelihoods[1]
    assert torch.equal(examiner._pixels([0]), examiner.dataset[0]["pixel_values"])


def test_expert_load_of_the_language_model_leaves_padding_out(examiner, tiny_config):
    """Padding tokens are routed to experts too; if they were counted, the shares would differ."""
    config = tiny_config(
        text="mixtral",
        text_options={"vocab_size": len(examiner.tokenizer), "eos_token_id": 2, "pad_token_id": 0},
        image_token_index=examiner.model.config.image_token_index,
        scales=(1,),
    )
    examiner.model = CumoForConditionalGeneration(config).eval()
    found = examiner.expert_load()["llm"]
    for kind in ("name", "kind"):
        counts = 0
        for row in [row for row in examiner.rows if examiner.dataset.records[row]["kind"] == kind]:
            sample = examiner.dataset[row]
            with torch.no_grad(), record_routing() as records:
                examiner.model.model(input_ids=sample["input_ids"][None], pixel_values=sample["pixel_values"])
            counts = counts + torch.stack(
                [r.routing.topk_indices.flatten().bincount(minlength=4) for r in records if r.place == "llm"]
            )
        assert found[kind] == (counts / counts.sum(1, keepdim=True)).tolist()


def test_the_table_has_each_model_in_its_column():
    part = lambda right: {
        "exact": {"name": [right, 10], "kind": [right - 2, 10]},
        "majority": {"name": [1, 10], "kind": [2, 10]},
        "choice": {"name": [right, 10]},
        "figures": {"POPE": {"mean F1": 10.0 * right, "mean accuracy": 50.0, "category: random, f1": 1.0}},
    }
    scores = {"sft": {"test_a": part(9)}, "sft_dense": {"test_a": part(4)}}
    table = _accuracy_table(scores, "test_a", "", {"FLOPs per step": 1.376})
    cells = {column.header: list(column.cells) for column in table.columns}
    # with one standard error: sqrt(p (1 - p) / n)
    moe = [" 90.0% ± 9.5%", " 70.0% ±14.5%", " 80.0% ± 8.9%", " 90.0% ± 9.5%", "90.0%", "50.0%"]
    dense = [" 40.0% ±15.5%", " 20.0% ±12.6%", " 30.0% ±10.2%", " 40.0% ±15.5%", "40.0%", "50.0%"]
    assert (cells["MoE"][:-1], cells["dense"][:-1]) == (moe, dense)
    assert cells["number"] == ["10", "10", "20", "10", "-", "-", "-"]
    assert cells["majority answer"] == ["10.0%", "20.0%", "15.0%", "-", "-", "-", "-"]
    assert cells["chance"][3:] == ["25.0%", "66.7%", "50.0%", "-"]
    assert [cells[name][-1] for name in ("question", "MoE", "dense")] == ["FLOPs per step", "1.38x", "1.00x"]
    said = "choice 90.0% with experts, 40.0% dense (chance 25%); exact match 80.0% and 30.0% (majority 15.0%)"
    assert said in _headline(scores)


def test_cpu_time_is_compared_per_step():
    histories = {"sft": {"cpu_seconds": 30.0, "steps": 10}, "sft_dense": {"cpu_seconds": 30.0, "steps": 20}}
    assert _slowdown(histories) == 2.0


def test_one_demo_at_a_time_and_a_task_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOCK_SECONDS", 0)
    with processes.locked(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        wanted = rf"another demo is running in \S+, process {os.getpid()} on \S+, since 20"
        with pytest.raises(ValueError, match=wanted), processes.locked(tmp_path):
            pass
    with pytest.raises(ValueError, match="another demo is running in"), processes.locked(tmp_path):
        pass
    child.kill()
    child.wait()
    with processes.locked(tmp_path):
        pass


def test_tasks_end_when_the_demo_is_killed(tmp_path):
    """The parent is killed by SIGKILL as soon as the task exists, long before the task has imported torch."""
    code = (
        "import os, signal, subprocess, sys; from cumo_model.demo.processes import _end_with_parent\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True, preexec_fn=_end_with_parent)\n"
        "print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    task = Path("/proc", done.stdout.strip(), "cmdline")
    deadline = time.monotonic() + 10
    while task.exists() and task.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done.returncode == -signal.SIGKILL and not (task.exists() and task.read_bytes())


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, content):
    (tmp_path / "compute.json").write_text(content)
    with pytest.raises(ValueError, match=r"compute.json is damaged .*: delete it, then the same command"):
        read_json(tmp_path / "compute.json", "flops_ratio")


def test_a_damaged_checkpoint_of_a_run_is_named(examiner, tmp_path):
    folder = tmp_path / "pft"
    examiner.model.save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"pft is damaged .*: delete it, then the same command makes it again"
    ):
        load_model(CumoForConditionalGeneration, folder)


def test_time_adds_up_over_calls(tmp_path):
    for _ in range(2):
        with demo_run._timed(tmp_path):
            time.sleep(0.06)
    assert 0.1 <= demo_run._seconds(tmp_path) < 5


def test_a_loss_that_does_not_fall_is_seen():
    falling, flat = [3.0, 2.5, 2.0, 1.5, 1.0], [2.0, 1.0, 3.0, 1.0, 2.0]
    assert _fell({"series": {"loss": falling}}) and not _fell({"series": {"loss": flat}})
    assert not _fell({"series": {"loss": falling, "language": flat}})
    assert not _fell({"series": {"loss": [1.0, math.nan]}})


def test_settings_are_those_of_the_docs():
    """Sizes of the models, which the results in the docs are of; a quick demo asks fewer questions."""
    assert Settings().eval_limit is None and Settings(quick=True).eval_limit == 32
    vision, text = Settings().vision_config(), Settings().text_config(train_tokenizer(WORDS * 9, 300))
    assert (vision.image_size, vision.patch_size, vision.num_experts) == (48, 8, 1)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [getattr(vision, name) for name in sizes] == [128, 512, 5, 4]
    assert [getattr(text, name) for name in sizes] == [128, 384, 2, 4]
    assert (text.num_key_value_heads, text.head_dim, text.max_position_embeddings) == (2, 32, 512)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 0)
    assert Settings(sft_steps=7).changes("sft")["trainer.max_steps"] == 7
    assert Settings(sft_steps=7, quick=True).changes("sft_dense")["trainer.max_steps"] == 7
    assert "trainer.max_steps" not in Settings(sft_steps=7).changes("pft")


def test_pictures_are_drawn(examiner, tmp_path):
    history = {
        "series": {"loss": [3.0, 2.0, 1.0], "language": [3.0, 2.0, 1.0], "clip_balance": [1.0, 1.1, 1.0]}
    }
    plot_losses({"stage": history}, tmp_path / "losses.png")
    plot_expert_load(examiner.expert_load(), tmp_path / "load.png")
    pixels = examiner.dataset[0]["pixel_values"]
    experts = {key: value.numpy() for key, value in patch_experts(examiner.model, pixels).items()}
    assert {value.shape for value in experts.values()} == {(3, 3)}
    plot_patches(np.zeros((12, 12, 3), np.uint8), experts, tmp_path / "patches.png")
    for name in ("losses", "load", "patches"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 300 and len(np.unique(image.convert("L"))) > 5


def test_the_recipes_are_three_stages_and_one_of_the_same_steps_without_experts():
    trains = {"pretrain": ("projector",), "pft": tuple(PARTS), "sft": tuple(PARTS), "sft_dense": tuple(PARTS)}
    recipes = {name: load_recipe(f"demo/{name}") for name in trains}
    assert {name: recipe.stage.trains for name, recipe in recipes.items()} == trains
    moe, dense = recipes["sft"], recipes["sft_dense"]
    # CuMo-7B: experts in tower and connector
    assert (moe.model.vision_experts, moe.model.projector_experts, moe.model.text_experts) == (4, 4, 0)
    assert (moe.stage.balance_loss_coef, moe.stage.router_z_loss_coef, moe.model.top_k) == (0.1, 0.01, 2)
    bare = {"vision_experts": 0, "projector_experts": 0}
    assert dense.model == dataclasses.replace(moe.model, **bare)
    assert dense.stage == dataclasses.replace(moe.stage, balance_loss_coef=0.0, router_z_loss_coef=0.0)
    assert (dense.data, dense.trainer) == (moe.data, moe.trainer)
    for recipe in (load_recipe(config) for config in RECIPES.values()):
        assert recipe.trainer["logging_steps"] == 1 and recipe.trainer["save_steps"] <= 50
        assert recipe.trainer["per_device_train_batch_size"] == recipe.stage.batch_size


@pytest.mark.parametrize("name", RECIPES)
def test_a_demo_runs_the_shipped_recipes_in_its_own_folder(name, tmp_path):
    """In runs/demo they are the same recipes as with `train --config`; in other folders only paths differ."""
    settings, shipped = Settings(), load_recipe(RECIPES[name])
    assert stage_recipe(Path("runs/demo"), settings, name).identity() == shipped.identity()
    folder = tmp_path / "a: [b]"
    moved = json.dumps(plain(stage_recipe(folder, settings, name)))
    wanted = json.dumps(plain(shipped)).replace("runs/demo", str(folder))
    assert json.loads(moved) == json.loads(wanted) | {"trainer": json.loads(moved)["trainer"]}
    quick = stage_recipe(folder, Settings(seed=5, quick=True), name, data__template="plain")
    assert quick.trainer["max_steps"] < shipped.trainer["max_steps"]
    assert (quick.trainer["seed"], quick.model.seed, quick.data.template) == (5, 5, "plain")


def test_files_of_the_working_directory_do_not_replace_the_demos_recipes(tmp_path, monkeypatch):
    """`--out demo` makes folders that have the names of the recipes."""
    wanted = stage_recipe(Path("demo"), Settings(), "sft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "sft").mkdir(parents=True)
    assert load_recipe("demo/sft").stage == wanted.stage
    (tmp_path / "demo" / "sft").rmdir()
    (tmp_path / "demo" / "sft").write_text("output_dir: mine")
    assert stage_recipe(Path("demo"), Settings(), "sft") == wanted


def test_a_folder_is_named_the_same_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["runs/x", "./runs/x", tmp_path / "runs" / "x", "runs/y/../x"]
    assert {str(processes.named(out)) for out in given} == {"runs/x"}
    assert processes.named(tmp_path.parent / "z") == tmp_path.parent / "z"


def test_a_task_names_its_folder_the_same_from_every_working_directory(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(task, "Run", lambda folder, position: (str(folder), os.getcwd()))
    monkeypatch.setitem(TASKS, "text", seen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for here, given in ((".", "runs/demo"), ("runs", "demo"), ("runs/demo", "."), ("runs", "../runs/demo")):
        monkeypatch.chdir(tmp_path / here)
        assert task.main(["text", given]) == 0
    assert set(seen) == {("runs/demo", str(tmp_path.resolve()))}


def test_every_task_of_a_phase_exists_and_has_a_result():
    tasks = [task for phase in demo_run.PHASES for task in phase]
    assert sorted(tasks) == sorted(demo_run.DONE_BY) == sorted(TASKS)


@pytest.mark.parametrize("phase, threads", [(1, "4"), (2, "2"), (33, "1")])
def test_a_task_that_is_resumed_alone_has_the_same_threads(tmp_path, monkeypatch, phase, threads):
    """Another number of threads changes the order of sums, and so the bits of the result."""
    started = []

    class Done:
        def __init__(self, command, env, **options):
            started.append((command[command.index("--threads") + 1], env["OMP_NUM_THREADS"]))
            self.returncode = 0

        poll = wait = lambda self: 0

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes.subprocess, "Popen", Done)
    processes.run_tasks(tmp_path, ["vision"], 4, phase)
    assert started == [(threads, threads)]
