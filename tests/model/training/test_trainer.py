"""Tests of recipes and the Trainer: hyperparameters, trained parts, losses by name, consecutive stages."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from cumo_model import CumoForConditionalGeneration
from cumo_model.__main__ import main
from cumo_model.data.sampling import plan_packs
from cumo_model.model.compat import checkpointing_arguments
from cumo_model.training import arguments
from cumo_model.training.flops import step_flops
from cumo_model.training.recipe import DataSection, Recipe, StageSection, load_recipe
from cumo_model.training.recipe_files import shipped_recipes
from cumo_model.training.start import start_model
from cumo_model.training.trainer import build_trainer, check_positions, run_recipe, training_arguments
from tests.model.training.small_runs import write_data, write_model, write_recipe
from tests.rounding import assert_close_after, assert_same_formula


def history(path):
    return json.loads((path / "trainer_state.json").read_text())["log_history"]


PAPER = {  # cumo_spec.md section 4: batch, rate, longest row, template, trained parts, coefficients, experts
    "mistral-7b/pretrain": (256, 1e-3, 2048, "plain", ["projector"], 0, 0, 0),
    "mistral-7b/pft": (128, 2e-6, 4096, "mistral_instruct_system", None, 0, 0, 0),
    "mistral-7b/sft": (256, 4e-6, 4096, "mistral_instruct_system", None, 0.1, 0.01, 4),
    "mixtral-8x7b/pretrain": (256, 1e-3, 2048, "plain", ["projector"], 0, 0, 0),
    "mixtral-8x7b/pft": (128, 2e-6, 4096, "mistral_instruct_system", None, 0, 0, 0),
    "mixtral-8x7b/sft": (256, 2e-6, 4096, "mistral_instruct_system", None, 0.1, 0.01, 4),
}
DEMO = {f"demo/{stage}" for stage in ("pretrain", "pft", "sft", "sft_dense")}
SCRIPTS = {  # batch on 8 GPUs
    "mistral-7b/pft": (64, 2e-6),
    "mistral-7b/sft": (64, 4e-6),
    "mixtral-8x7b/pft": (64, 2e-6),
    "mixtral-8x7b/sft": (32, 2e-6),
}


def test_the_recipes_have_the_papers_figures():
    assert set(shipped_recipes()) == set(PAPER) | DEMO
    for name, (batch, rate, length, template, trains, balance, z, experts) in PAPER.items():
        recipe = load_recipe(name)
        stage, data = recipe.stage, recipe.data
        assert (stage.batch_size, stage.learning_rate, data.max_length) == (batch, rate, length), name
        assert (data.template, stage.balance_loss_coef, stage.router_z_loss_coef) == (template, balance, z)
        assert list(stage.trains) == (trains or ["vision", "projector", "language"])
        assert (recipe.model.vision_experts, recipe.model.projector_experts) == (experts, experts)
        assert recipe.model.text_experts == 0
        common = recipe.trainer
        assert (common["num_train_epochs"], common["warmup_steps"], common["weight_decay"]) == (1, 0.03, 0)
        assert (common["lr_scheduler_type"], common["adam_beta2"], common["bf16"]) == ("cosine", 0.999, True)
        assert ("ddp_timeout" in common) == name.startswith("mixtral")
        assert data.grouping == ("none" if trains else "modality_length")
        assert data.aspect == ("square" if trains else "pad")
        assert (common["adam_beta1"], common["adam_epsilon"], common["seed"]) == (0.9, 1e-8, 42)
        assert (recipe.model.top_k or 2, stage.average_loss_over) == (2, "micro_batches")
        assert trains is None or recipe.model.scales == (1, 3)
        # the configs of DeepSpeed in the original scripts clip in these stages only
        clips = name.endswith("sft") or name == "mixtral-8x7b/pft"
        assert common["max_grad_norm"] == (1.0 if clips else 0.0)
    for name, figures in SCRIPTS.items():
        stage = load_recipe(name, ["variant=script"]).stage
        assert (stage.batch_size, stage.learning_rate) == figures
    assert load_recipe("mistral-7b/sft", ["variant=paper_text"]).stage.learning_rate == 2e-6


BAD_RECIPES = [
    (["stage.learning_rte=1"], "stage.learning_rte is not a key: did you mean stage.learning_rate"),
    (["stage.learning_rate=fast"], "stage.learning_rate must be of type float, got 'fast'"),
    (["stage.gate=1"], "stage.gate is not a key; the keys are trains, batch_size"),
    (["stage.trains=[gate]"], "stage.trains must be one of vision, projector, language, got 'gate'"),
    (["stage.trains=[]"], r"stage.trains must name some of .*, got \[\]"),
    (["data=5"], "data must contain keys and values, got 5"),
    (["variant=none"], "variant must be one of paper, paper_text, script, got 'none'"),
    (["stage.expert_exchange=some"], "stage.expert_exchange must be exact or padded, got 'some'"),
    (["stage.batch_size"], "overrides must look like key=value, got 'stage.batch_size'"),
]


@pytest.mark.parametrize("overrides, message", BAD_RECIPES)
def test_a_bad_recipe_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("mistral-7b/sft", overrides)


def test_recipes_that_are_no_recipes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config must be a YAML file or one of demo/pft, .*, got 'nowhere'"):
        load_recipe("nowhere")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"x\.yaml' cannot be read"):
        load_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("model: {start: a}")
    with pytest.raises(ValueError, match="output_dir must be given"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match=r"^trainer\.no_such_field is not a field of Tr"):
        training_arguments(load_recipe("mistral-7b/sft", ["trainer.no_such_field=1"]))
    with pytest.raises(
        ValueError, match=r"must be a multiple of 3 \(micro-batch\) x 1 \(processes\), got 256"
    ):
        training_arguments(load_recipe("mistral-7b/sft", ["trainer.per_device_train_batch_size=3"]))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_micro_batches_of_all_processes_are_one_batch(tmp_path, monkeypatch, processes):
    """Rows per device x accumulation x processes is the batch of the recipe."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(arguments, "TrainingArguments", lambda **given: given)  # would wait for the others
    made = Recipe(
        str(tmp_path), stage=StageSection(batch_size=24), trainer={"per_device_train_batch_size": 4}
    )
    args = training_arguments(made)
    assert args["per_device_train_batch_size"] == 4
    assert args["gradient_accumulation_steps"] == {1: 6, 2: 3, 3: 2}[processes]
    without = training_arguments(dataclasses.replace(made, trainer={}))
    assert (without["per_device_train_batch_size"], without["gradient_accumulation_steps"]) == (
        1,
        24 // processes,
    )
    for batch in (12, 20):
        other = dataclasses.replace(made, stage=StageSection(batch_size=batch))
        if batch % (4 * processes):
            with pytest.raises(
                ValueError, match=rf"4 \(micro-batch\) x {processes} \(processes\), got {batch}"
            ):
                training_arguments(other)
        else:
            assert training_arguments(other)["gradient_accumulation_steps"] == batch // (4 * processes)


def test_three_stages_in_a_row_and_stage_three_again_from_its_result(folder):
    """Connector alone, then everything with new experts, then everything from these experts."""
    one = write_recipe(
        folder, "one", stage__trains=["projector"], model__vision_experts=0, model__projector_experts=0,
        model__text_experts=0, data__template="mistral_instruct", trainer__max_steps=2,
    )  # fmt: skip
    assert main(["train", "--config", str(one)]) == 0
    start, trained = (load_file(folder / name / "model.safetensors") for name in ("start", "one/model"))
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed == {name for name in start if "multi_modal_projector" in name}
    two = write_recipe(folder, "two", model__start=str(folder / "one" / "model"), trainer__max_steps=2)
    assert main(["train", "--config", str(two), "trainer.logging_steps=1"]) == 0
    entries = [entry for entry in history(folder / "two" / "model") if "loss" in entry]
    assert len(entries) == 2
    wanted = {"language", "clip_balance", "mlp_z", "llm_balance", "clip_load_entropy", "mlp_router_entropy"}
    wanted |= {"llm_zero_experts", "grad_norm", "grad_norm_gates", "tokens_per_second", "memory_gib"}
    logged = set().union(*entries)  # one of the two steps has no images and does not run the tower
    assert wanted <= logged and not any("/" in name for name in logged)
    three = write_recipe(folder, "three", model__start=str(folder / "two" / "model"), trainer__max_steps=2)
    result = run_recipe(load_recipe(three))
    assert CumoForConditionalGeneration.from_pretrained(result).config.vision_config.num_experts == 4
    with pytest.raises(ValueError, match=r"model: vision_experts must be 4, what .* has already, got 8"):
        start_model(load_recipe(three, ["model.vision_experts=8"]).model, load_recipe(three).data)
    with pytest.raises(
        ValueError, match=r"run with another stage\.learning_rate \(was 0\.001, is 1\.0\): choose another"
    ):
        run_recipe(load_recipe(three, ["stage.learning_rate=1"]))


def test_the_logged_loss_is_the_sum_of_its_parts(folder):
    """With images in all rows: a micro-batch of text has no losses of tower and connector to average."""
    write_data(folder, text_rows=0)
    run_recipe(load_recipe(write_recipe(folder, trainer__max_steps=2)))
    entries = [entry for entry in history(folder / "run" / "model") if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        balance, z = (sum(entry[f"{p}_{kind}"] for p in ("clip", "mlp", "llm")) for kind in ("balance", "z"))
        # six coefficients, products and sums in each of two micro-batches; then the sum of the two, for the
        # loss and for its seven parts
        assert_close_after(26, entry["loss"], entry["language"] + 0.1 * balance + 0.01 * z)


def test_without_coefficients_the_loss_is_the_language_models(folder):
    """The router losses are logged nevertheless."""
    write_data(folder, text_rows=0)
    off = {"stage__balance_loss_coef": 0.0, "stage__router_z_loss_coef": 0.0}
    whole = {"trainer__per_device_train_batch_size": 4}
    run_recipe(load_recipe(write_recipe(folder, trainer__max_steps=2, **off, **whole)))
    entries = [entry for entry in history(folder / "run" / "model") if "loss" in entry]
    assert len(entries) == 2 and all(entry["loss"] == entry["language"] for entry in entries)
    assert all(entry["clip_balance"] > 0 and entry["mlp_z"] > 0 for entry in entries)


def test_the_result_reloads_to_the_logits_of_what_was_trained(folder, tiny_batch):
    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.model = model.eval()

    keep = Keep()
    path = run_recipe(load_recipe(write_recipe(folder, trainer__max_steps=2)), [keep])
    again = CumoForConditionalGeneration.from_pretrained(path, use_safetensors=True).eval()
    batch = tiny_batch()
    image = keep.model.config.image_token_index
    batch["input_ids"][batch["input_ids"] == image] = 9
    batch["input_ids"][:, 3:12] = image
    with torch.no_grad():
        assert torch.equal(keep.model(**batch).logits, again(**batch).logits)


@pytest.mark.usefixtures("fp64")
def test_accumulation_changes_nothing_but_rounding(folder):
    """The same global batch as 1 x 4 and as 4 x 1: accumulation does not multiply the router losses."""
    norms = []
    for name, micro in (("a", 4), ("b", 1)):
        path = write_recipe(
            folder, name, trainer__per_device_train_batch_size=micro, trainer__max_steps=1,
            data__grouping="none", stage__balance_loss_coef=5.0, model__text_experts=0,
            model__dtype="float64",
        )  # fmt: skip
        trainer = build_trainer(load_recipe(path))
        only = [1, 3, 6]  # each has three tokens to predict, so the mean of means is the overall mean
        trainer.train_dataset.units = [trainer.train_dataset.units[u] for u in only]
        trainer.lengths, trainer.has_image = trainer.lengths[only], trainer.has_image[only]
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm_gates"])
    assert_same_formula(*norms)


def test_rates_packing_and_precision(folder):
    path = write_recipe(folder, trainer__max_steps=2, stage__projector_learning_rate=5e-2, trainer__bf16=True,
                        data__packing=True, data__max_length=64)  # fmt: skip
    trainer = build_trainer(load_recipe(path))
    assert len(trainer.train_dataset) < 12 and max(trainer.lengths) <= 64
    trainer.train()
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-3, 5e-2}
    by_rate = {
        g["initial_lr"]: sum(p.numel() for p in g["params"]) for g in trainer.optimizer.param_groups if True
    }
    assert by_rate[5e-2] < by_rate[1e-3]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_norms_of_parts_are_those_of_the_gradients_whatever_the_loss_is_scaled_by(folder, monkeypatch):
    """The scaler of fp16, applied here to fp32, without clipping."""

    class Scaled(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # the model has been prepared for fp32
            made.accelerator.native_amp = True
            monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")

    found = []
    for name, scaler in (("plain", None), ("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))):
        recipe = write_recipe(folder, name, trainer__max_steps=2, trainer__max_grad_norm=0.0)
        made = build_trainer(load_recipe(recipe), [Scaled()] if scaler else [])
        made.accelerator.scaler = scaler
        made.train()
        entries = [entry for entry in made.state.log_history if "loss" in entry]
        found.append([{k: v for k, v in entry.items() if k.startswith("grad_norm")} for entry in entries])
    assert len(found[0]) == 2 and "grad_norm_gates" in found[0][0]
    assert found[0] == found[1]  # the scale is a power of two


def test_checkpointing_gives_the_same_losses(folder):
    found = []
    for name, options in {
        "plain": {"trainer__gradient_checkpointing": False},
        "older-name": {"trainer__gradient_checkpointing": True},
        "newer-name": {"trainer__activation_checkpointing": True, "trainer__gradient_checkpointing": True},
    }.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*_checkpointing.* deprecated")
            run_recipe(load_recipe(write_recipe(folder, name, trainer__max_steps=2, **options)))
        entries = [entry for entry in history(folder / name / "model") if "loss" in entry]
        found.append([(entry["loss"], entry["llm_load_entropy"]) for entry in entries])
    assert found[0] == found[1] == found[2]


def test_one_argument_under_two_names_is_refused_with_two_values():
    both = {"gradient_checkpointing": True, "activation_checkpointing": False}
    with pytest.raises(ValueError, match="one argument under two names, got False and True"):
        checkpointing_arguments(both)


def test_step_flops_are_what_torch_counts(tiny_model, tiny_batch):
    """Forward pass of tower, connector and language model in torch's FLOP counter, with eager attention."""
    from torch.utils.flop_counter import FlopCounterMode

    for text in ("mistral", "mixtral"):
        model = tiny_model(text=text, scales=(1, 3)).train()
        model.set_attn_implementation("eager")
        batch = tiny_batch()
        with FlopCounterMode(display=False) as counter:
            model(**batch, use_cache=False)
        # some releases of transformers compute the rotary angles, an outer product, with a matmul, which
        # step_flops does not count
        by_module = counter.get_flop_counts()
        angles = sum(sum(found.values()) for name, found in by_module.items() if name.endswith("rotary_emb"))
        counted = counter.get_total_flops() - angles
        config, ids = model.config, batch["input_ids"]
        ours = {
            trains: step_flops(config, trains, ids.numel(), ids.shape[1], ids.numel(), 2)
            for trains in (("vision", "projector", "language"), ("projector",))
        }
        assert ours["vision", "projector", "language"] == 3 * counted
        assert counted < ours[("projector",)] < 3 * counted


@pytest.mark.parametrize("compat", [None, "cumo"])
def test_the_padding_of_packed_rows_counts_with_compat_only(folder, tiny_config, compat):
    write_model(folder, tiny_config, compat=compat)
    made = build_trainer(load_recipe(write_recipe(folder, data__packing=True, data__max_length=40)))
    batch = made.data_collator([made.train_dataset[0], made.train_dataset[1]])
    assert ("router_mask" in batch) == (compat is None) and "position_ids" in batch


@pytest.mark.parametrize("own_rate", [None, 5e-2])
def test_every_parameter_has_the_rate_and_the_decay_of_its_kind(folder, own_rate):
    """Norms and biases do not decay; the connector may have its own rate. The optimizer has all, once."""
    given = {} if own_rate is None else {"stage__projector_learning_rate": own_rate}
    made = build_trainer(load_recipe(write_recipe(folder, trainer__weight_decay=0.1, **given)))
    made.create_optimizer()
    found = {}
    for group in made.optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    assert len(found) == sum(p.requires_grad for p in made.model.parameters())
    norms = {id(p) for m in made.model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    for name, parameter in made.model.named_parameters():
        rate = own_rate if own_rate is not None and "multi_modal_projector" in name else 1e-3
        decays = id(parameter) not in norms and "bias" not in name
        assert found[id(parameter)] == (rate, 0.1 if decays else 0.0), name


TOWER, CONNECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
TRAINED = {  # stage.trains -> beginnings of the names of what is trained
    "vision": (TOWER,),
    "projector": (CONNECTOR,),
    "language": (LANGUAGE, "lm_head."),
    "vision,projector": (TOWER, CONNECTOR),
    "vision,projector,language": (TOWER, CONNECTOR, LANGUAGE, "lm_head."),
}


@pytest.mark.parametrize("trains", TRAINED)
def test_a_stage_trains_its_parts_and_nothing_else(folder, trains):
    made = build_trainer(load_recipe(write_recipe(folder, stage__trains=trains.split(","))))
    for name, parameter in made.model.named_parameters():
        assert parameter.requires_grad == name.startswith(TRAINED[trains]), name
    assert set(made.monitor.trains) == set(trains.split(","))


def test_settings_of_a_stage_reach_the_model_and_the_batches(folder):
    """Each has another value than the default, and than the others."""
    first, more = write_data(folder, text_rows=0), folder / "more"
    more.mkdir()
    (folder / "red.png").rename(more / "red.png")
    first.rename(more / "all.jsonl")
    for number in (1, 2):
        lines = (more / "all.jsonl").read_text().splitlines()
        (more / f"{number}.jsonl").write_text("\n".join(lines[number::2]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(folder / "start")
    options = {
        "data__files": [str(more / "1.jsonl"), str(more / "2.jsonl")],
        "data__images": [str(folder), str(more)],
        "stage__balance_loss_coef": 0.3,
        "stage__router_z_loss_coef": 0.02,
        "stage__average_loss_over": "micro_batches",
        "data__dummy_images": True,
        "data__max_length": 40,
        "data__grouping": "none",
        "data__template": "plain",
        "data__skip_bad": True,
        "data__cache_dir": str(folder / "kept" / "here"),
        "model__dtype": "bfloat16",
        "model__attn_implementation": "eager",
    }
    made = build_trainer(load_recipe(write_recipe(folder, **options)))
    config, collator, dataset = made.model.config, made.data_collator, made.train_dataset.dataset
    assert (config.balance_loss_coef, config.router_z_loss_coef) == (0.3, 0.02)
    assert config.average_loss_over == "micro_batches"
    assert collator.dummy_images and dataset.max_length == 40 and dataset.template == "plain"
    assert (len(dataset), collator.pad_id, collator.image_size) == (7, 7, 12)
    assert (dataset.files, dataset.pictures.roots) == (options["data__files"], options["data__images"])
    assert dataset.skip_bad and [path.suffix for path in (folder / "kept/here").iterdir()] == [".safetensors"]
    assert max(made.lengths) <= 40 and made.grouping == options["data__grouping"]
    assert made.model.dtype == torch.bfloat16 and config.text_config._attn_implementation == "eager"
    write_data(folder)
    usual = build_trainer(load_recipe(write_recipe(folder, "usual")))
    assert usual.model.config.average_loss_over == "tokens" and not usual.data_collator.dummy_images
    assert usual.grouping == "modality_length" and usual.model.dtype == torch.float32
    assert not usual.train_dataset.dataset.skip_bad and len(list((folder / "index").iterdir())) == 1


def test_rows_use_every_position_and_no_more(folder, tiny_config):
    """The language model has 128; positions of a packed row begin again with each record."""
    config, lengths = tiny_config(), np.array([5, 128, 7])
    for data in (DataSection(), DataSection(max_length=128), DataSection(max_length=500, packing=True)):
        check_positions(config, data, lengths)
        check_positions(config, data, lengths[:0])
        with pytest.raises(ValueError, match=r"at most 128, .*, got 129 tokens in record 2"):
            check_positions(config, data, np.array([5, 128, 129]))
    with pytest.raises(ValueError, match=r"data\.max_length must be at most 128, .*, got 129"):
        check_positions(config, DataSection(max_length=129), lengths[:0])
    turns = [{"from": "human", "value": "red " * 200}, {"from": "gpt", "value": "red"}]
    (folder / "colours.jsonl").write_text(json.dumps({"id": 0, "conversations": turns}))
    with pytest.raises(ValueError, match=r"data\.max_length must be given, at most 128, .* in record 0"):
        build_trainer(load_recipe(write_recipe(folder)))


def test_packs_have_the_length_and_the_pictures_of_all_their_samples(folder):
    """A packed row needs the sum of its samples' tokens, and no row is longer than data.max_length."""
    made = build_trainer(load_recipe(write_recipe(folder, data__packing=True, data__max_length=64)))
    units, dataset = made.train_dataset.units, made.train_dataset.dataset
    assert sorted(i for unit in units for i in unit) == list(range(12)) and max(map(len, units)) > 1
    assert units == plan_packs(dataset.lengths, dataset.has_image, 64, seed=3)  # that of the recipe
    assert units != plan_packs(dataset.lengths, dataset.has_image, 64)
    assert list(made.lengths) == [sum(int(dataset.lengths[i]) for i in unit) for unit in units]
    assert list(made.has_image) == [any(dataset.has_image[i] for i in unit) for unit in units]
    ids = [made.data_collator([made.train_dataset[u]])["input_ids"].shape[1] for u in range(len(units))]
    assert ids == list(made.lengths) and 32 < max(ids) <= 64
    rows = made.data_collator([made.train_dataset[0]])
    assert torch.equal(rows["position_ids"][0, : len(dataset[units[0][0]]["input_ids"])],
                       torch.arange(len(dataset[units[0][0]]["input_ids"])))  # fmt: skip


@pytest.mark.parametrize("trains, lora, needs", [
    (["projector"], None, True),
    (["vision", "projector"], None, True),
    (["projector", "language"], None, False),
    (["projector"], {"r": 2, "targets": ["q_proj"]}, False),
])  # fmt: skip
def test_only_a_stage_without_the_language_model_needs_pictures_in_every_micro_batch(
    folder, trains, lora, needs
):
    """Where adapters or the language model are trained, rows of text have gradients too."""
    if lora is not None:
        pytest.importorskip("peft")
    made = build_trainer(load_recipe(write_recipe(folder, stage__trains=trains, stage__lora=lora)))
    assert made.data_collator.needs_image == needs


def test_the_order_of_the_data_has_its_own_seed(folder):
    """data_seed, or else seed; the new experts have model.seed, and adapters the seed of the Trainer."""
    pytest.importorskip("peft")
    lora = {"r": 2, "targets": ["q_proj"], "dropout": 0.0}

    def made(**changes):
        given = {f"trainer__{name}": value for name, value in changes.items() if name != "model_seed"}
        if "model_seed" in changes:
            given["model__seed"] = changes["model_seed"]
        trainer = build_trainer(load_recipe(write_recipe(folder, **given, stage__lora=lora)))
        assert set(trainer.monitor.trains) == {"vision", "projector"}  # of the language model adapters only
        state = trainer.model.state_dict()
        pick = lambda mark: torch.cat([value.flatten() for name, value in state.items() if mark in name])
        order = list(trainer.get_train_dataloader().batch_sampler)
        return order, pick("lora_A"), pick("gate.weight")

    order, adapters, gates = made(seed=3)
    again = made(seed=3)
    assert order == again[0] and torch.equal(adapters, again[1]) and torch.equal(gates, again[2])
    other = made(seed=4)
    assert order != other[0] and not torch.equal(adapters, other[1]) and torch.equal(gates, other[2])
    apart = made(seed=4, data_seed=3)
    assert apart[0] == order and torch.equal(apart[1], other[1])
    assert made(seed=3, data_seed=0)[0] == made(seed=0)[0] != order
    another = made(seed=3, model_seed=5)
    assert another[0] == order and torch.equal(another[1], adapters) and not torch.equal(another[2], gates)
