"""Recipes: what the run would not follow is refused by name, and values keep their types."""

import dataclasses
import json
import warnings

import pytest
import torch
import yaml

from cumo_model.training.arguments import FIELDS, WITHOUT_EFFECT, default
from cumo_model.training.recipe import (
    DataSection,
    LoraSection,
    ModelSection,
    Recipe,
    StageSection,
    check_model,
    load_recipe,
)
from cumo_model.training.trainer import build_trainer, training_arguments
from tests.model.training.small_runs import write_model, write_recipe


def arguments(*settings):
    """Of a recipe with 32 rows per step in micro-batches of 4, so 8 accumulation steps."""
    given = [f"trainer.{setting}" for setting in settings]
    if not any("per_device_train" in setting for setting in settings):
        given.append("trainer.per_device_train_batch_size=4")
    return training_arguments(load_recipe("demo/sft", ["trainer.use_cpu=true", *given]))


OVERRIDDEN = {  # setting -> what the message says, and the value that is accepted
    "gradient_accumulation_steps=7": (r"must be 8 or left out: it is stage.batch_size 32 / \(4 per dev", "8"),
    "output_dir=elsewhere": ("must be 'runs/demo/sft' or left out: it is the recipe's", "runs/demo/sft"),
    "learning_rate=1e-3": ("must be 0.0015 or left out: it is stage.learning_rate, got 0.001", "1.5e-3"),
    "remove_unused_columns=true": (
        "must be False or left out: the model takes all columns, got True",
        "false",
    ),
    "logging_nan_inf_filter=true": ("must be False or left out: a loss that is not finite stops", "false"),
    "label_names=[answers]": (r"must be \['labels'\] or left out: .*, got \['answers'\]", "[labels]"),
    "use_cache=true": ("must be False or left out: training uses no cache, got True", "false"),
}


@pytest.mark.parametrize("setting", OVERRIDDEN)
def test_a_field_that_the_run_sets_is_refused_unless_equal(setting):
    message, same = OVERRIDDEN[setting]
    name = setting.split("=")[0]
    with pytest.raises(ValueError, match=f"^trainer.{name} {message}"):
        arguments(setting)
    assert getattr(arguments(f"{name}={same}"), name) == yaml.safe_load(same.replace("1.5e-3", "0.0015"))
    assert getattr(arguments(f"{name}="), name) == getattr(arguments(), name)


NO_EFFECT = [
    "eval_strategy=steps", "eval_strategy=epoch", "do_eval=true", "do_predict=true", "eval_steps=10",
    "per_device_eval_batch_size=2", "load_best_model_at_end=true", "metric_for_best_model=loss",
    "greater_is_better=false", "resume_from_checkpoint=runs/x", "push_to_hub=true", "hub_model_id=me/cumo",
    "auto_find_batch_size=true", "train_sampling_strategy=group_by_length", "length_column_name=size",
    "dataloader_drop_last=true", "dataloader_in_order=false", "ignore_data_skip=true",
    "bf16_full_eval=true", "eval_delay=1", "include_for_metrics=[loss]",
    "accelerator_config={even_batches: false}",
    "use_liger_kernel=true", "local_rank=1", "enable_jit_checkpoint=true", "save_only_model=true",
    "parallelism_config={tp_size: 2}", "resume_from_checkpoint=true", "eval_steps=often",
]  # fmt: skip


@pytest.mark.parametrize("setting", NO_EFFECT)
def test_a_field_without_effect_is_refused(setting):
    name = setting.split("=")[0]
    if name not in FIELDS:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=rf"^trainer\.{name}\S* must be left out: [^\n]*, got "):
        arguments(setting)


def test_their_usual_values_are_accepted():
    usual = {name: default(name) for name in WITHOUT_EFFECT if name in FIELDS}
    assert len(usual) > 30
    assert arguments(*(f"{name}={'' if v is None else v}" for name, v in usual.items())).do_eval is False
    assert arguments("eval_strategy=no", "save_strategy=no").save_strategy == "no"  # YAML: False
    arguments("max_steps=3", "num_train_epochs=2", "accelerator_config={non_blocking: true}", "do_train=true")


def test_options_of_checkpointing_without_it_are_refused_and_kept_with_it():
    options = "gradient_checkpointing_kwargs={use_reentrant: true}"
    with pytest.raises(
        ValueError, match=r"checkpointing_kwargs must be left out without trainer\.\w+, got {'use"
    ):
        arguments(options)
    for extra, wanted in (("", False), (options, True)):
        args = arguments("gradient_checkpointing=true", *([extra] if extra else []))
        kept = [v for k, v in vars(args).items() if k.endswith("_checkpointing_kwargs") and v is not None]
        assert kept and all(value == {"use_reentrant": wanted} for value in kept)  # both names in 5.24


def test_reentrant_checkpointing_is_not_replaced_where_the_model_refuses_it(folder):
    options = {"trainer__gradient_checkpointing": True}
    options["trainer__gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    trainer = build_trainer(load_recipe(write_recipe(folder, trainer__max_steps=1, **options)))
    with pytest.raises(ValueError, match="use_reentrant False where there are experts, got True"):
        trainer.train()


VALUES = {  # setting -> the value of the field
    "adam_epsilon=1e-6": 1e-6,
    "max_steps=1e3": 1000,
    "run_name=123": "123",
    'run_name="123"': "123",
    "run_name=1e5": "1e5",
    "run_name=inf": "inf",
    "lr_scheduler_kwargs={min_lr: 1e-7, name: a}": {"min_lr": 1e-7, "name": "a"},
    "warmup_steps=3": 3,
    "save_steps=0.5": 0.5,
    "optim_args=a=1": "a=1",
    "warmup_steps=3.0": 3.0,
    "ddp_timeout=1800.0": 1800,
    "num_train_epochs=2": 2,
    "debug=[underflow_overflow]": ["underflow_overflow"],
    "report_to=[tensorboard]": ["tensorboard"],
    "include_num_input_tokens_seen=true": "all",
    "trackio_static_space_id=false": False,
    "optim_target_modules=all-linear": "all-linear",
    "fsdp=true": True,
    "fsdp=[full_shard]": True,
    "fsdp=full_shard auto_wrap": True,
    "fsdp=false": False,
    "fsdp_config=": None,
    "seed=": 42,
    "weight_decay=": 0.0,
    "save_total_limit=": None,
    "max_steps=-1": -1,
}


@pytest.mark.parametrize("setting", VALUES)
def test_values_have_the_type_of_their_field(setting):
    found = getattr(arguments(setting), setting.split("=")[0])
    assert found == VALUES[setting] and type(found) is type(VALUES[setting])


WRONG = {
    "per_device_train_batch_size=1.5": "must be of type int, got 1.5",
    "per_device_train_batch_size=0": "must be at least 1, got 0",
    "max_steps=2.5": "must be of type int, got 2.5",
    "max_steps=many": "must be of type int, got 'many'",
    "seed=true": "must be of type int, got True",
    "bf16=maybe": "must be of type bool, got 'maybe'",
    "run_name=1.10": "must be of type str, got 1.1",
    "weight_decay=[1]": r"must be of type float, got \[1\]",
    "debug=5": "must be of type list or str, got 5",
    "lr_scheduler_kwargs=5": "must be of type dict or str, got 5",
    "lr_scheduler_kwargs=some.json": "must contain keys and values, got 'some.json'",
    "max_steps=0": "must be at least 1, or -1 for whole epochs, got 0",
    "max_steps=-2": "must be at least 1, or -1 for whole epochs, got -2",
    "num_train_epochs=0": "must be positive and finite, got 0",
    "num_train_epochs=.nan": "must be positive and finite, got nan",
    "save_steps=0": "must be positive .*, got 0",
    "logging_steps=-1": "must be positive .*, got -1",
    "save_strategy=best": "must be another one: a stage has no evaluation, got 'best'",
    "lr_scheduler_type=greedy": "must be another one: a stage has no evaluation, got 'greedy'",
    "log_level=loud": "must be one of .*debug.*, got 'loud'",
    "include_num_input_tokens_seen=some": "must be one of no, all, .*, got 'some'",
    "dataloader_persistent_workers=true": "must be left out without trainer.dataloader_num_workers, got True",
    "dataloader_multiprocessing_context=fork": "must be left out without trainer.dataloader_num_workers",
    "dataloader_num_workers=-1": "must be at least 0, got -1",
    "fsdp_config=nowhere.json": "'nowhere.json' cannot be read: nowhere.json does not exist",
    "deepspeed=nowhere.json": "'nowhere.json' cannot be read: nowhere.json does not exist",
    "accelerator_config=nowhere.json": "'nowhere.json' cannot be read: nowhere.json does not exist",
    "accelerator_config=[1]": r"must be of type dict or str, got \[1\]",
}


@pytest.mark.parametrize("setting", WRONG)
def test_values_of_another_type_are_named(setting):
    with pytest.raises(ValueError, match=f"^trainer.{setting.split('=')[0]} {WRONG[setting]}"):
        arguments(setting)


ACCELERATOR = {  # content of accelerator_config -> the message
    '{"split_batches": true}': r"accelerator_config\.split_batches must be left out: the .*, got True",
    '{"even_batches": false}': r"accelerator_config\.even_batches must be left out",
    '{"gradient_accumulation_kwargs": {"num_steps": 3}}': (
        r"accelerator_config\.gradient_accumulation_kwargs\.num_steps must be left out: .*batch_size, got 3"
    ),
    '{"gradient_accumulation_kwargs": {"steps": 3}}': r"kwargs must have keys of .*, got {'steps': 3}",
    '{"gradient_accumulation_kwargs": 3}': "kwargs must have keys of .*, got 3",
    "[]": None,
    "{": None,
}


# what is no object is found by its type, tested above, unless it is in a file
WHEREVER = [
    (content, how)
    for content, message in ACCELERATOR.items()
    for how in (("file",) if message is None else ("object", "string", "file"))
]


@pytest.mark.parametrize(("content", "how"), WHEREVER)
def test_a_config_is_read_wherever_it_is(tmp_path, content, how):
    (tmp_path / "config.json").write_text(content)
    message = ACCELERATOR[content]
    value = {"object": lambda: json.loads(content), "string": lambda: content}.get(
        how, lambda: str(tmp_path / "config.json")
    )()
    recipe = Recipe("out", trainer={"accelerator_config": value, "use_cpu": True})
    with pytest.raises(ValueError, match=message or r"accelerator_config '.*config\.json' cannot be read: "):
        training_arguments(recipe)


def test_configs_with_what_a_run_uses_are_accepted(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"even_batches": true, "gradient_accumulation_kwargs": {"sync_each_batch": true}}')
    args = arguments(f"accelerator_config={config}")
    assert args.accelerator_config.gradient_accumulation_kwargs == {"sync_each_batch": True}
    config.write_text('{"reshard_after_forward": false}')
    assert arguments(f"fsdp_config={config}").fsdp_plugin_args["reshard_after_forward"] is False
    trainer = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": "true"}'}
    args = training_arguments(Recipe("out", trainer={**trainer, "use_cpu": True}))
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_fsdp_config_without_fsdp_is_refused():
    with pytest.raises(ValueError, match=r"^trainer.fsdp_config must be left out if trainer.fsdp is False"):
        arguments("fsdp=false", "fsdp_config={version: 2}")
    with pytest.raises(ValueError, match=r"^trainer\.fsdp_config\.xla must be left out"):
        arguments("fsdp_config={xla: true}")


def test_optimizer_and_schedule_are_checked_before_a_model_is_loaded(folder):
    for setting, message in (
        (
            {"trainer__lr_scheduler_kwargs": {"foo": 1}},
            "trainer.lr_scheduler_kwargs {'foo': 1} cannot be used",
        ),
        ({"trainer__optim_args": "a"}, "trainer.optim adamw_torch_fused cannot be used: "),
    ):
        recipe = load_recipe(write_recipe(folder, model__start="nowhere", **setting))
        with pytest.raises(ValueError, match=message) as error:
            build_trainer(recipe)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.seed=1", "trainer.seed=2"], "^trainer.seed must be given once, got 1 and 2"),
        (
            ["stage={batch_size: 8}", "stage.batch_size=16"],
            "^stage.batch_size must be given once, got 8 and 16",
        ),
        (
            ["stage.lora.r=8", "stage.lora=null"],
            "^stage.lora must be given once, got 8 for stage.lora.r and None",
        ),
        (["data.files=["], r"^override 'data.files=\[' is not YAML: [^\n]*$"),
        (["trainer=5"], "^trainer must contain keys and values, got 5"),
        (["stage={batch_size: 8, batch_size: 9}"], "the key 'batch_size' is given twice"),
        (
            ["stage.batch_size=0", "trainer.per_device_train_batch_size=1"],
            "^stage.batch_size must be at least 1",
        ),
        (
            ["stage.trains=[vision]", "stage.projector_learning_rate=1"],
            "^stage.projector_learning_rate must be left",
        ),
    ],
)
def test_overrides_that_cannot_all_hold(overrides, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(load_recipe("demo/sft", overrides))


def test_overrides_that_can_all_hold():
    recipe = load_recipe(
        "demo/sft", ["trainer.seed=1", "trainer.seed=1", "stage={batch_size: 8}", "stage.trains=vision"]
    )
    assert (recipe.trainer["seed"], recipe.stage.batch_size, recipe.stage.trains) == (1, 8, ("vision",))
    assert load_recipe("demo/sft", ["stage=", "trainer="]).stage == StageSection()


def test_a_run_has_the_defaults_of_the_docs_where_a_recipe_says_nothing():
    args = training_arguments(Recipe("out", stage=StageSection(batch_size=6, learning_rate=3e-4)))
    assert (args.output_dir, args.learning_rate, args.gradient_accumulation_steps) == ("out", 3e-4, 6)
    assert (args.logging_steps, args.save_total_limit, args.save_strategy.value) == (1, 2, "steps")
    assert (args.report_to, args.disable_tqdm, args.log_level_replica) == ([], False, "passive")
    assert (args.optim.value, args.ddp_find_unused_parameters) == ("adamw_torch_fused", True)
    assert (args.remove_unused_columns, args.logging_nan_inf_filter, args.label_names) == (
        False,
        False,
        ["labels"],
    )
    assert args.use_cpu == (not torch.cuda.is_available()) and args.per_device_train_batch_size == 1
    assert args.gradient_checkpointing_kwargs is None and args.max_grad_norm == 1.0
    checkpointing = {"gradient_checkpointing": True}
    assert training_arguments(Recipe("out", trainer=checkpointing)).gradient_checkpointing_kwargs == {
        "use_reentrant": False
    }
    given = {"logging_steps": 5, "save_total_limit": 0, "optim": "sgd", "ddp_find_unused_parameters": False}
    args = training_arguments(Recipe("out", trainer=given))
    assert (args.logging_steps, args.save_total_limit, args.optim.value) == (5, 0, "sgd")
    assert args.ddp_find_unused_parameters is False


def test_the_command_line_wins_over_a_variant_and_a_variant_over_its_base(tmp_path):
    """Key by key, also in sections and in objects inside them; a variant is that of the command line."""
    (tmp_path / "base.yaml").write_text(
        "output_dir: base\nstage: {batch_size: 1, learning_rate: 1, balance_loss_coef: 1}\n"
        "trainer: {seed: 1, lr_scheduler_kwargs: {a: 1, b: 1}}\nvariant: x\n"
        "variants: {x: {stage: {learning_rate: 3}}, y: {stage: {learning_rate: 4, balance_loss_coef: 4}}}\n"
    )
    (tmp_path / "own.yaml").write_text(
        "base: base.yaml\nstage: {batch_size: 2, learning_rate: 2}\ntrainer: {lr_scheduler_kwargs: {a: 2}}\n"
    )
    recipe = load_recipe(tmp_path / "own.yaml")
    stage = recipe.stage
    assert (recipe.output_dir, recipe.variant) == ("base", "x")
    assert (stage.batch_size, stage.learning_rate, stage.balance_loss_coef) == (2, 3.0, 1.0)
    assert recipe.trainer == {"seed": 1, "lr_scheduler_kwargs": {"a": 2, "b": 1}}
    given = ["variant=y", "stage.learning_rate=5", "stage.batch_size=6", "output_dir=there"]
    recipe = load_recipe(tmp_path / "own.yaml", given)
    stage = recipe.stage
    assert (stage.batch_size, stage.learning_rate, stage.balance_loss_coef) == (6, 5.0, 4.0)
    assert (recipe.output_dir, recipe.variant) == ("there", "y")


def test_a_key_twice_in_a_file_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("output_dir: a\nstage:\n  batch_size: 1\n  batch_size: 2\n")
    with pytest.raises(
        ValueError, match=r"x.yaml' cannot be read: the key 'batch_size' is given twice [^\n]*$"
    ):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision", "a"),
        ("language", "a"),
        ("projector", "a.bin"),
        ("tokenizer", "a"),
        ("scales", [1, 3]),
        ("compat", "cumo"),
    ],
)
def test_what_a_start_model_has_itself_is_refused(folder, name, value):
    recipe = write_recipe(folder, **{f"model__{name}": value})
    with pytest.raises(ValueError, match=f"model.{name} must be left out with model.start, .*, got "):
        load_recipe(recipe)
    assert load_recipe(recipe, [f"model.{name}=null"]).model.start is not None
    if name != "scales":
        with pytest.raises(ValueError, match=f"model.{name} must be left out with model.start"):
            check_model(ModelSection(start="a", **{name: value}))


def test_experts_that_a_start_model_has_are_those_of_the_recipe(folder, tiny_config):
    write_model(folder, tiny_config, vision_experts=4, projector_num_experts=4)
    for changes, message in (
        (
            {"model__top_k": 1},
            "model.top_k must be 2 or left out, as vision_experts of the model has already, got 1",
        ),
        ({"model__vision_experts": 1}, "model.vision_experts must be 4, what the model has already, got 1"),
        ({"model__scratch": True}, "model.scratch must be False where model.start has the experts, got True"),
        (
            {"model__scratch": True} | {f"model__{place}_experts": 0 for place in ("vision", "projector")},
            "model.scratch must be False without new experts, got True",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_trainer(load_recipe(write_recipe(folder, **{"model__text_experts": 0, **changes})))
    build_trainer(load_recipe(write_recipe(folder, model__scratch=True)))  # Mixtral's experts are new


def test_top_k_is_that_of_experts_or_left_out(folder, tiny_config):
    none = {f"model__{place}_experts": 0 for place in ("vision", "projector", "text")}
    build = lambda **changes: build_trainer(load_recipe(write_recipe(folder, **{**none, **changes})))
    with pytest.raises(ValueError, match=r"model.top_k must be left out, as the model has no experts, got 3"):
        build(model__top_k=3)
    build(model__top_k=2)
    write_model(folder, tiny_config, vision_experts=4)
    path = folder / "start/config.json"
    values = json.loads(path.read_text())
    values["vision_config"]["num_experts_per_tok"] = 1
    path.write_text(json.dumps(values))
    for number in (0, 4):  # the default is refused nowhere, whatever the experts have
        build(model__vision_experts=number)
        build(model__vision_experts=number, model__top_k=1)
        for top_k in (2, 3):
            with pytest.raises(ValueError, match=r"model.top_k must be 1 or left out, as vision_experts of"):
                build(model__vision_experts=number, model__top_k=top_k)
    made = build(model__projector_experts=4).model.config
    assert (made.vision_config.num_experts_per_tok, made.projector_num_experts_per_tok) == (1, 2)
    made = build(model__projector_experts=4, model__top_k=3).model.config
    assert (made.vision_config.num_experts_per_tok, made.projector_num_experts_per_tok) == (1, 3)


@pytest.mark.parametrize("kind", [ModelSection, DataSection, StageSection, LoraSection])
def test_values_of_sections_have_the_type_of_their_field(kind):
    place = {ModelSection: "model", DataSection: "data", StageSection: "stage"}.get(kind, "stage.lora")
    for field in dataclasses.fields(kind):
        read = lambda value, name=field.name: load_recipe("demo/sft", [f"{place}.{name}={value}"])
        if "float" in str(field.type):
            section = read(1)
            for part in place.split("."):
                section = getattr(section, part)
            assert type(getattr(section, field.name)) is float
        if field.name in ("targets", "lora"):
            continue
        with pytest.raises(ValueError, match=rf"^{place}\.{field.name} must be [^\n]*, got "):
            read("[[1]]" if "tuple" in str(field.type) else "[1]")
        if "tuple" in str(field.type):
            read("")
        elif "None" not in str(field.type):
            with pytest.raises(ValueError, match=rf"^{place}\.{field.name} must be of type \w+, got None"):
                read("")


def test_settings_of_a_stage_that_nothing_reads(folder):
    with pytest.raises(
        ValueError, match=r"stage.expert_exchange must be exact or left out if .* is 1, got 'pa"
    ):
        load_recipe("demo/sft", ["stage.expert_exchange=padded"])
    for value in ("", "''"):
        with pytest.raises(ValueError, match=r"^output_dir must be "):
            load_recipe("demo/sft", [f"output_dir={value}"])
    build_trainer(load_recipe(write_recipe(folder, stage__balance_loss_coef=0, stage__router_z_loss_coef=1)))


def test_coefficients_without_effect_are_told(folder):
    places = {f"model__{place}_experts": 0 for place in ("vision", "projector", "text")}
    off = {"stage__balance_loss_coef": 0.0, "stage__router_z_loss_coef": 0.0}
    for name in off:  # the other one is given
        with pytest.warns(UserWarning, match="stage.balance_loss_coef and .* have no effect"):
            build_trainer(load_recipe(write_recipe(folder, **places, **{name: 0.0})))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="stage.balance_loss_coef")
        build_trainer(load_recipe(write_recipe(folder, "off", **places, **off)))
        build_trainer(load_recipe(write_recipe(folder, "on")))
