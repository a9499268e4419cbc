"""Tests of DeepSpeed's ZeRO-2 and ZeRO-3 with the shipped configs: real steps on two processes, if installed.

On CPUs DeepSpeed compiles a small operator at first use, which takes minutes and needs `ninja` and a C++
compiler.
"""

import importlib.util
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cumo_model.training import arguments, trainer
from cumo_model.training.deepspeed import complete_config
from cumo_model.training.recipe import SHIPPED, Recipe, StageSection, load_recipe
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.start import start_model
from cumo_model.training.trainer import run_recipe, training_arguments
from tests.model.training.small_runs import write_data, write_model, write_recipe
from tests.model.training.test_recover import losses, start
from tests.processes import finish
from tests.rounding import assert_same_sums, rounding_of

HERE = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HERE, reason="the package deepspeed is not installed")
OPTIONS = {"trainer__per_device_train_batch_size": 1, "trainer__max_steps": 4}
SECONDS = 900  # the first run compiles


@pytest.fixture
def folder(tmp_path, tiny_config):
    write_model(tmp_path, tiny_config)
    return tmp_path


@pytest.mark.parametrize("name, stage", [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_the_configs_are_what_transformers_fills_in(name, stage):
    config = json.loads((SHIPPED / "engines" / f"{name}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage and config["gradient_clipping"] == "auto"
    assert ("offload_param" in config["zero_optimization"]) == (name == "zero3_offload")
    deepspeed = pytest.importorskip("deepspeed.runtime.zero.config")
    zero = {k: v for k, v in config["zero_optimization"].items() if v != "auto"}
    assert deepspeed.DeepSpeedZeroConfig(**zero).stage == stage


@pytest.mark.skipif(HERE, reason="the package deepspeed is installed")
def test_a_missing_deepspeed_is_named(folder):
    recipe = load_recipe(write_recipe(folder, trainer__deepspeed="engines/zero3.json"))
    with pytest.raises(ValueError, match=r"trainer\.deepspeed needs the package deepspeed, which is not"):
        training_arguments(recipe)


FOLLOWS = {"train_batch_size": 8, "gradient_clipping": 1.0, "bf16.enabled": True}


def test_a_config_follows_the_recipe():
    given = {"train_batch_size": 8, "bf16": {"other": 1}, "zero_optimization": {"stage": 2}}
    made = complete_config(given, FOLLOWS)
    assert made == {**given, "gradient_clipping": "auto", "bf16": {"other": 1, "enabled": "auto"}}
    assert given["bf16"] == {"other": 1}
    for name in ("zero2", "zero3", "zero3_offload"):
        shipped = json.loads((SHIPPED / "engines" / f"{name}.json").read_text())
        assert complete_config(shipped, FOLLOWS) == shipped
    for config, message in (
        ({"train_batch_size": 9}, "train_batch_size must be auto or 8, as it follows from the recipe, got 9"),
        ({"gradient_clipping": 0}, "gradient_clipping must be auto or 1.0, .*, got 0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled must be auto or True, .*, got False"),
        ({"bf16": True}, "bf16 must contain keys and values, got True"),
    ):
        with pytest.raises(ValueError, match=rf"^trainer\.deepspeed\.{message}"):
            complete_config(config, FOLLOWS)
    for name in ("optimizer", "scheduler"):
        with pytest.raises(ValueError, match=rf"^trainer\.deepspeed must have no {name}, .*, got {{'type"):
            complete_config({name: {"type": "AdamW"}}, FOLLOWS)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_ddp_does_and_resumes(folder, stage):
    """Compares losses, norms and weights of a stage that adds experts; then resumes bit for bit.

    Every step has pictures: DeepSpeed moves a parameter without gradient by its momentum, DDP does not.
    """
    write_data(folder, text_rows=0)
    # with an epsilon of 1e-8, Adam moves a weight with a gradient near 0 by the sign of its rounding error
    options, names = {**OPTIONS, "trainer__adam_epsilon": 1e-3}, itertools.count()
    engine = {**options, "trainer__deepspeed": f"engines/zero{stage}.json"}
    finish(start(write_recipe(folder, "ddp", **options), 2), seconds=SECONDS)
    finish(start(write_recipe(folder, "zero", **engine), 2), seconds=SECONDS)

    def result(name):
        # each series has one metric for all steps
        series = torch.tensor(losses(folder / name), dtype=torch.float64).unbind(1)
        return series, load_file(folder / name / "model" / "model.safetensors")

    def alone():
        run_recipe(load_recipe(write_recipe(folder, name := f"alone-{next(names)}", **options)))
        return result(name)

    found = losses(folder / "zero")
    assert len(found) == 4
    assert_same_sums(result("zero"), result("ddp"), rounding_of(alone))
    assert not (folder / "zero" / ".start").exists()

    recipe, run = write_recipe(folder, "again", **engine), folder / "again"
    run.mkdir()
    shutil.copytree(folder / "zero" / "checkpoint-2", run / "checkpoint-2")
    finish(start(recipe, 2), seconds=SECONDS)
    assert losses(run) == found and len(checkpoints(run)) == 2


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
def test_idle_experts_do_not_block_zero3(folder):
    """With gates that never choose the last experts, and with steps without pictures, all steps complete.

    If each expert were a separate module, ranks that route differently would wait for each other's weights.
    """
    write_data(folder)
    model, processor = start_model(*(lambda r: (r.model, r.data))(load_recipe(write_recipe(folder, "moe"))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter[1:] = 0
    for part in (model, processor):
        part.save_pretrained(folder / "idle")
    options = {**OPTIONS, "model__start": str(folder / "idle"), "trainer__deepspeed": "engines/zero3.json"}
    finish(start(write_recipe(folder, "zero", **options, stage__learning_rate=0.0), 2), seconds=SECONDS)
    entries = json.loads((folder / "zero" / "model" / "trainer_state.json").read_text())["log_history"]
    idle = [entry["mlp_zero_experts"] for entry in entries if "mlp_zero_experts" in entry]
    assert len(losses(folder / "zero")) == 4 and idle and min(idle) >= 1


def test_a_config_has_the_values_of_the_recipe(monkeypatch):
    """All that follow, on two processes; each other value is refused with the one that holds."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(trainer, "require_deepspeed", lambda: None)
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **given: given)
    follows = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 24,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }

    def made(config, **options):
        options = {"per_device_train_batch_size": 4, "max_grad_norm": 0.5, "bf16": True, **options}
        given = {name: value for name, value in options.items() if value is not None}
        stage = StageSection(batch_size=24)
        return training_arguments(Recipe("out", stage=stage, trainer={**given, "deepspeed": config}))

    assert made(follows)["deepspeed"] == follows
    assert made({"zero_optimization": {"stage": 2}})["deepspeed"] == {
        "zero_optimization": {"stage": 2},
        **{k: {"enabled": "auto"} if isinstance(v, dict) else "auto" for k, v in follows.items()},
    }
    for key, value in follows.items():
        other = {"enabled": not value["enabled"]} if isinstance(value, dict) else value + 1
        wanted = value["enabled"] if isinstance(value, dict) else value
        with pytest.raises(ValueError, match=rf"deepspeed\.{key}\S* must be auto or {wanted}, as it follows"):
            made({**follows, key: other})
    with pytest.raises(ValueError, match=r"gradient_clipping must be auto or 1\.0, "):  # of transformers
        made(follows, max_grad_norm=None)
