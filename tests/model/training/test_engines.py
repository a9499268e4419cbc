"""Tests of engines: the same recipe on two processes with DDP, FSDP2 and expert parallelism; LoRA."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cumo_model import CumoForConditionalGeneration
from cumo_model.training import arguments, expert_checkpoints, trainer
from cumo_model.training.plan import planned_config
from cumo_model.training.recipe import load_recipe
from cumo_model.training.recover import Interrupted
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.trainer import build_trainer, run_recipe, training_arguments
from tests.model.gradients import beside_weights
from tests.model.training.small_runs import write_data, write_model, write_recipe
from tests.model.training.test_recover import CLOSELY, LOGGED, STEP, StopAt, losses, same_result, start
from tests.model.training.test_trainer import history
from tests.processes import finish
from tests.rounding import assert_close_after, assert_same_formula, in_fp64

OPTIONS = {"trainer__per_device_train_batch_size": 1, "trainer__max_steps": 4, "model__text_experts": 0}
ENGINES = {
    "fsdp": {"trainer__fsdp_config": "engines/fsdp2.json"},
    "experts": {"stage__expert_parallel": 2},
    "padded": {"stage__expert_parallel": 2, "stage__expert_exchange": "padded"},
    "both": {"stage__expert_parallel": 2, "trainer__fsdp_config": "engines/fsdp2.json"},
}


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_engines_train_alike(folder):
    """Losses and weights after four steps with two checkpoints; some steps have no pictures.

    Expert parallelism is tested with both exchanges, which differ only in the order of sums.
    """
    options = OPTIONS | CLOSELY
    finish(start(write_recipe(folder, "ddp", **options), 2))
    wanted, weights = losses(folder / "ddp"), load_file(folder / "ddp" / "model" / "model.safetensors")
    for name, engine in ENGINES.items():
        finish(start(write_recipe(folder, name, **options, **engine), 2))
        assert_close_after(LOGGED, losses(folder / name), wanted)
        found = load_file(folder / name / "model" / "model.safetensors")
        assert_close_after(STEP, beside_weights(found), beside_weights(weights))
        assert len(checkpoints(folder / name)) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_experts_over_two_of_four_processes_train_alike(folder):
    """Each expert is on two processes, in addition to DDP, so gradient norms are summed over both axes.

    The first step has pictures: it is the one by which the Trainer would choose how to compute the norm.
    """
    options = {**OPTIONS, **CLOSELY, "trainer__max_steps": 2, "trainer__seed": 4}
    run_recipe(load_recipe(write_recipe(folder, "one", **options)))
    assert "grad_norm_vision" in history(folder / "one" / "model")[0]
    finish(start(write_recipe(folder, "four", **options, stage__expert_parallel=2), 4), seconds=250)
    assert_close_after(LOGGED, losses(folder / "four"), losses(folder / "one"))


def test_the_exchange_of_a_recipe_reaches_the_layers(folder, monkeypatch):
    """With a GPU, the padded exchange requests a process group for CPU and GPU."""
    options = {"stage__expert_parallel": 2, "trainer__per_device_train_batch_size": 1}
    recipe = load_recipe(write_recipe(folder, **options, stage__expert_exchange="padded"))
    seen = []
    mesh = {"experts": "of two", "data": SimpleNamespace(size=lambda: 1)}
    # one process stands for two
    monkeypatch.setattr(trainer, "check_plan", lambda recipe, args: planned_config(recipe.model))
    monkeypatch.setattr(expert_checkpoints, "expert_mesh", lambda number, kind: mesh)
    monkeypatch.setattr(expert_checkpoints, "expert_parallel", lambda model, *given: seen.append(given))
    build_trainer(recipe)
    assert seen == [("of two", "padded")]
    exact = load_recipe(write_recipe(folder, "exact", **options, trainer__use_cpu=False))
    assert load_recipe(write_recipe(folder, **options)).identity() == recipe.identity()
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **given: given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "ddp_backend" not in training_arguments(exact) and "ddp_backend" not in training_arguments(recipe)
    padded = load_recipe(folder / "exact.yaml", ["stage.expert_exchange=padded"])
    assert training_arguments(padded)["ddp_backend"] == "cpu:gloo,cuda:nccl"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [0, 6, 12])
def test_a_run_with_spread_experts_goes_on(folder, tiny_config, seed):
    """From a checkpoint of unsharded tensors, with as many processes: the same losses and norms, bit for bit.

    The first step of the run has no pictures, so no expert has a gradient; the first one after the checkpoint
    has some.
    """
    write_model(folder, tiny_config, seed=seed)
    options = {**OPTIONS, **ENGINES["experts"], "trainer__save_steps": 2}
    finish(start(write_recipe(folder, "whole", **options), 2))
    recipe = write_recipe(folder, "again", **options)
    run = folder / "again"
    run.mkdir()
    (folder / "whole" / "checkpoint-2").rename(run / "checkpoint-2")
    finish(start(recipe, 2))
    assert losses(folder / "whole") == losses(run)
    first, _, third, _ = (entry for entry in history(run / "model") if "loss" in entry)
    assert "grad_norm_vision" not in first and "grad_norm_vision" in third


def test_frozen_weights_with_lora_have_no_weight_gradients(folder):
    """Compares the FLOPs with torch's counter, with adapters of rank 1 on the queries of the first layer."""
    from torch.utils.flop_counter import FlopCounterMode

    pytest.importorskip("peft")
    write_data(folder, text_rows=0)
    lora = {"r": 1, "alpha": 1, "dropout": 0.0, "targets": r".*language_model\.layers\.0\..*q_proj"}
    places = {f"model__{place}_experts": 0 for place in ("vision", "projector", "text")}
    recipe = write_recipe(
        folder, model__attn_implementation="eager", stage__lora=lora, stage__trains=["language"], **places
    )
    made = build_trainer(load_recipe(recipe))
    batch = made.data_collator([made.train_dataset[0], made.train_dataset[1]])
    made.monitor.reset()
    with FlopCounterMode(display=False) as counter:
        made.compute_loss(made.model.train(), batch).backward()
    text, (rows, width) = made.model.config.text_config, batch["input_ids"].shape
    tokens, hidden = rows * width, text.hidden_size
    unpredicted = tokens - int((batch["labels"][:, 1:] != -100).sum())
    # forward and backward of the head: it runs only for predicted tokens, and the monitor counts all tokens
    wanted = made.monitor.flops - 2 * 2 * unpredicted * hidden * text.vocab_size
    # the two products of attention have no weights and therefore two gradients each. In the first layer keys
    # and values need no gradient, and neither do the inputs of its projections (one head of keys and values).
    wanted += 2 * 2 * tokens * width * hidden - 2 * tokens * hidden * (hidden + 2 * hidden // 2)
    # not counted by the monitor: the adapter (its first matrix has a weight gradient only) and rotary angles
    wanted += 2 * tokens * hidden * (2 + 3)
    wanted += sum(n for name, found in counter.get_flop_counts().items() if name.endswith("rotary_emb")
                  for n in found.values())  # fmt: skip
    assert counter.get_total_flops() == wanted


def test_spread_experts_are_not_trained_in_fp16(folder, monkeypatch):
    recipe = load_recipe(write_recipe(folder, stage__expert_parallel=2))
    real = training_arguments

    def fp16(recipe):
        args = real(recipe)
        object.__setattr__(args, "fp16", True)
        return args

    monkeypatch.setattr(trainer, "training_arguments", fp16)
    with pytest.raises(ValueError, match=r"expert_parallel must be 1 with trainer\.fp16"):
        build_trainer(recipe)


def test_lora_trains_adapters_and_the_connector(folder):
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "alpha": 12, "dropout": 0.0, "target_parameters": ["experts.gate_up_proj"]}
    recipe = write_recipe(
        folder, trainer__max_steps=2, stage__lora=lora, stage__trains=["projector", "language"]
    )
    made = build_trainer(load_recipe(recipe))
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n and "self_attn.q_proj" in n for n in trained)
    assert any("lora_A" in n and "experts" in n for n in trained)
    whole = {n for n, _ in made.model.named_parameters() if "multi_modal_projector" in n}
    assert {
        n for n in trained if "lora_" not in n
    } == whole  # and not the head, which is of the language model
    assert isinstance(made.model, peft.PeftModel)


def test_adapters_have_the_rank_the_scale_and_the_dropout_of_the_recipe(folder):
    """The update is alpha / r times the product; no value is a default, of peft or of the recipe."""
    pytest.importorskip("peft")
    lora = {"r": 4, "alpha": 12, "dropout": 0.25, "targets": ["q_proj"]}
    lora["target_parameters"] = ["experts.down_proj"]
    recipe = load_recipe(write_recipe(folder, stage__lora=lora, stage__trains=["projector", "language"]))
    made = build_trainer(recipe).model
    layers = {name: module for name, module in made.named_modules() if hasattr(module, "lora_A")}
    experts = {name for name in layers if name.endswith("experts")}
    assert len(layers) - len(experts) == 2 + 3  # of the language model and of the tower
    assert len(experts) == 3 + 1 + 2  # of the tower, the connector and the language model
    for name, layer in layers.items():
        each = layer.get_base_layer().down_proj.shape[0] if name in experts else 1
        assert (layer.r, layer.scaling, layer.lora_A["default"].out_features) == (
            {"default": 4},
            {"default": 12 / 4},
            4 * each,
        )
        assert layer.lora_dropout["default"].p == 0.25


def test_a_lora_stage_stops_resumes_and_saves_a_merged_model(folder):
    """Checkpoints and the result contain the connector, which is trained fully in addition to the adapters.

    The next stage starts from a model with the same outputs.
    """
    pytest.importorskip("peft")
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_parameters": ["experts.gate_up_proj"]}
    options = {"stage__lora": lora, "stage__trains": ["projector", "language"], "trainer__max_steps": 4}
    options["model__dtype"] = "float64"
    whole = run_recipe(load_recipe(write_recipe(folder, "whole", **options)))
    recipe = load_recipe(write_recipe(folder, "cut", **options, trainer__save_steps=100))
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run_recipe(recipe, [StopAt(1).callback])
    run_recipe(recipe)
    same_result(folder / "whole", folder / "cut")

    made = build_trainer(load_recipe(write_recipe(folder, "whole", **options)))
    made._load_from_checkpoint(str(folder / "whole" / "checkpoint-4"))
    batch = made.data_collator([made.train_dataset[0]])
    model = CumoForConditionalGeneration.from_pretrained(whole).eval()
    batch["pixel_values"] = batch["pixel_values"].double()
    with in_fp64():
        trained, merged = (one.eval()(**batch).logits for one in (made.model, model))
    assert_same_formula(merged, trained)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (whole / "tokenizer.json").is_file() and (whole / "processor_config.json").is_file()
    following = write_recipe(folder, "next", model__start=str(whole), trainer__max_steps=1)
    assert run_recipe(load_recipe(following)).is_dir()


def test_stacked_experts_are_one_parameter(folder):
    """Engines synchronise by parameter; no parameter of the model belongs to a single expert."""
    made = build_trainer(load_recipe(write_recipe(folder)))
    names = [name for name, p in made.model.named_parameters() if "experts" in name]
    assert names and all(p.shape[0] == 4 for n, p in made.model.named_parameters() if "experts" in n)
    assert torch.nn.ModuleList not in {type(m) for n, m in made.model.named_modules() if "experts" in n}
