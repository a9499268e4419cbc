"""Values of a recipe are checked when it is read, and what it needs before a model is loaded."""

import dataclasses
import errno
import math
import shutil

import pytest
from safetensors import SafetensorError
from transformers.utils import is_flash_attn_2_available

from cumo_model import CumoConfig
from cumo_model.__main__ import main
from cumo_model.checkpoints import assemble as assembling
from cumo_model.data.patterns import record_files
from cumo_model.model.full_disk import is_no_room
from cumo_model.training import plan, trainer
from cumo_model.training.paths import check_paths
from cumo_model.training.plan import check_plan, planned_config, weights_of
from cumo_model.training.recipe import (
    DataSection,
    LoraSection,
    ModelSection,
    StageSection,
    load_recipe,
)
from cumo_model.training.recover import AtomicCheckpoints
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.trainer import build_trainer, run_recipe, training_arguments
from tests.model.training.small_runs import write_recipe

OUT_OF_RANGE = {
    "stage.balance_loss_coef": ["-1", ".nan", ".inf"],
    "stage.router_z_loss_coef": ["-0.1"],
    "stage.learning_rate": ["-1e-5", ".nan"],
    "stage.projector_learning_rate": ["-1"],
    "stage.batch_size": ["-8", "0"],
    "stage.expert_parallel": ["0", "-2"],
    "stage.trains": ["[gate]", "[]"],
    "stage.average_loss_over": ["rows"],
    "stage.lora.r": ["0"],
    "stage.lora.alpha": ["-1"],
    "stage.lora.dropout": ["1.5", "-0.1"],
    "data.max_length": ["-1", "0"],
    "data.grouping": ["some"],
    "data.aspect": ["anyres", "some"],
    "model.vision_experts": ["-1"],
    "model.projector_experts": ["-4"],
    "model.text_experts": ["-1"],
    "model.top_k": ["0", "9"],
    "model.quantize": ["5", "0"],
    "model.seed": ["-1", "4294967296"],
    "model.dtype": ["int8", "float31"],
    "trainer.weight_decay": ["-0.1"],
    "trainer.adam_beta1": ["1", "-0.5"],
    "trainer.adam_beta2": ["1.5"],
    "trainer.adam_epsilon": ["0"],
    "trainer.max_grad_norm": ["-1"],
    "trainer.warmup_steps": ["-3"],
    "trainer.label_smoothing_factor": ["1.1"],
    "trainer.neftune_noise_alpha": ["-1"],
    "trainer.seed": ["-1"],
    "trainer.data_seed": ["4294967296"],
    "trainer.save_total_limit": ["-1"],
    "trainer.torch_empty_cache_steps": ["0"],
    "trainer.per_device_train_batch_size": ["0", "-1"],
    "trainer.dataloader_num_workers": ["-1"],
    "trainer.ddp_timeout": ["0"],
    "trainer.save_steps": [".nan", ".inf"],
    "trainer.logging_steps": [".nan", "-.inf"],
    "data.template": ["alpaca"],
    "stage.lora.targets": ["'('", "3", "[1]", "[]", "''"],
    "variant": ["[a]", "{a: b}"],
}


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_named_when_the_recipe_is_read(key, value):
    with pytest.raises(ValueError, match=rf"^{key} must [^\n]*, got "):
        load_recipe("demo/sft", [f"{key}={value}"])


def test_zero_is_a_coefficient_and_a_whole_number_a_float(folder):
    recipe = load_recipe(
        write_recipe(folder, trainer__max_steps=1),
        ["stage.balance_loss_coef=0", "stage.router_z_loss_coef=1"],
    )
    assert (recipe.stage.balance_loss_coef, recipe.stage.router_z_loss_coef) == (0.0, 1.0)
    run_recipe(recipe)
    made = CumoConfig.from_pretrained(folder / "run" / "model")
    assert (made.balance_loss_coef, made.router_z_loss_coef) == (0.0, 1.0)
    config = CumoConfig(balance_loss_coef=0, router_z_loss_coef=1)
    assert type(config.balance_loss_coef) is type(config.router_z_loss_coef) is float
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="balance_loss_coef must be finite and not negative, got"):
            CumoConfig(balance_loss_coef=bad)


IN_PYTHON = [
    (StageSection, {"batch_size": -8}, "stage.batch_size must be at least 1, got -8"),
    (StageSection, {"batch_size": 2.5}, "stage.batch_size must be of type int, got 2.5"),
    (StageSection, {"learning_rate": "fast"}, "stage.learning_rate must be of type float, got 'fast'"),
    (
        StageSection,
        {"trains": ("gate",)},
        "stage.trains must be one of vision, projector, language, got 'gate'",
    ),
    (
        ModelSection,
        {"top_k": 5, "vision_experts": 4},
        "model.top_k must be at most model.vision_experts 4, got 5",
    ),
    (ModelSection, {"scales": ()}, "model.scales must have at least one factor"),
    (ModelSection, {"compat": "llava"}, "model.compat must be cumo, got 'llava'"),
    (DataSection, {"packing": True}, "data.max_length must be given for data.packing, got None"),
    (LoraSection, {"r": 0}, "stage.lora.r must be at least 1, got 0"),
]


@pytest.mark.parametrize("kind, values, message", IN_PYTHON)
def test_sections_made_in_python_are_checked_too(kind, values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**values)


def test_sections_made_in_python_have_the_types_of_their_fields():
    stage = StageSection(learning_rate=1, trains=["projector"])
    assert type(stage.learning_rate) is float and stage.trains == ("projector",)
    assert StageSection(lora=LoraSection()).lora.r == 64
    assert hash(dataclasses.replace(ModelSection(vision="a", language="b"), scales=[1, 3]).scales)


DEFAULTS = {  # a recipe that says nothing; those of LoRA are LLaVA's
    ModelSection: {"scales": (1, 3), "vision_experts": 0, "projector_experts": 0, "text_experts": 0,
                   "scratch": False, "seed": 0, "dtype": "float32"},
    DataSection: {"files": (), "images": (), "grouping": "modality_length", "packing": False,
                  "skip_bad": False, "dummy_images": False},
    LoraSection: {"r": 64, "alpha": 16, "dropout": 0.05, "target_parameters": (),
                  "targets": r"model\.language_model\..*(q|k|v|o|gate|up|down)_proj"},
    StageSection: {"trains": ("vision", "projector", "language"), "batch_size": 256, "learning_rate": 2e-5,
                   "balance_loss_coef": 0.0, "router_z_loss_coef": 0.0, "average_loss_over": "tokens",
                   "expert_parallel": 1, "expert_exchange": "exact"},
}  # fmt: skip


@pytest.mark.parametrize("kind", DEFAULTS)
def test_sections_have_the_defaults_of_the_docs(kind):
    """All others are None."""
    given = {key: value for key, value in dataclasses.asdict(kind()).items() if value is not None}
    assert given == DEFAULTS[kind]


UNKNOWN = {
    "stage.learningrate=1": "stage.learningrate is not a key: did you mean stage.learning_rate?",
    "stages.batch_size=1": "stages is not a key: did you mean stage?",
    "data.file=[x]": "data.file is not a key: did you mean data.files?",
    "model.top-k=2": "model.top-k is not a key: did you mean model.top_k?",
    "stage.lora.rank=2": "stage.lora.rank is not a key; the keys are r, alpha, dropout",
    "trainer.max_step=3": "trainer.max_step is not a field .* did you mean trainer.max_steps?",
    "trainer.warmup_stepz=3": "trainer.warmup_stepz is not a field .* did you mean trainer.warmup_steps?",
    "trainer.xyz=3": r"trainer.xyz is not a field of TrainingArguments of transformers \S+$",
}


@pytest.mark.parametrize("override", UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override):
    with pytest.raises(ValueError, match=f"^{UNKNOWN[override]}".replace("?", r"\?")):
        load_recipe("demo/sft", [override])


def test_a_recipe_based_on_itself_is_named(tmp_path):
    for name, base in (("a", "b.yaml"), ("b", "./sub/../a.yaml"), ("own", "own.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\noutput_dir: runs/x\n")
    (tmp_path / "sub").mkdir()
    for name, chain in (("a", r"a.yaml -> \S*b.yaml -> \S*a.yaml"), ("own", r"own.yaml -> \S*own.yaml")):
        with pytest.raises(ValueError, match=rf"^base must be another recipe, got a circle: \S*{chain}$"):
            load_recipe(tmp_path / f"{name}.yaml")
    wrong = {
        "nowhere.yaml": r"a YAML file, got '\S*nowhere.yaml'",
        "[1]": r"the name of a YAML file, got \[1\]",
    }
    for base, message in wrong.items():
        (tmp_path / "a.yaml").write_text(f"base: {base}\noutput_dir: runs/x\n")
        with pytest.raises(ValueError, match=rf"^base of '\S*a.yaml' must be {message}"):
            load_recipe(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("output_dir: runs/x\n? [a, b]\n: 3\n")
    with pytest.raises(ValueError, match=r"^config \S*a.yaml' cannot be read: a key must be a name"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("output_dir: runs/x\nvariants: 3\n")
    with pytest.raises(ValueError, match=r"^variants must contain names"):
        load_recipe(tmp_path / "a.yaml")


PATHS = {  # override -> message
    "model.start={f}/nowhere": r"model.start must be a folder, got '\S*nowhere', which is not a folder",
    "model.start={f}": "model.start must be a folder with a config.json",
    "data.files=[{f}/colours.jsonl, {f}/none.jsonl]": r"data.files must name files, got '\S*none.jsonl'",
    "data.files=[{f}/*.none]": r"data.files must name files, got '\S*\*.none'",
    "data.files=[]": "data.files must name at least one file",
    "data.images=[]": "data.images must name a folder or .tar files, got none",
    "data.files=[~/x.jsonl]": "data.files must not begin with ~, which only a shell expands: write '/",
    "output_dir=~/run": "output_dir must not begin with ~",
    "data.images=[{f}/none]": r"data.images must name folders or .tar files, got '\S*none'",
    "data.files=[{f}/start]": r"data.files must name files, got '\S*start', which is a folder",
    "data.images=[{f}/colours.jsonl]": r"data.images must name folders or .tar files, got the file '\S*'",
    "data.cache_dir={f}/colours.jsonl/a": "data.cache_dir must be a folder, got .*, which lies below",
    "output_dir={f}/colours.jsonl": "output_dir must be a folder, got .*, which is a file",
    "output_dir={f}/colours.jsonl/run": "output_dir must be a folder, got .*, which lies below the file",
    "output_dir={f}/start": r"output_dir must not contain model.start '\S*start'",
    "output_dir={f}/start/run": "output_dir must not contain model.start .*, nor lie inside it",
}


@pytest.mark.parametrize("override", PATHS)
def test_what_does_not_exist_is_named_before_a_model_is_loaded(folder, override, monkeypatch, capsys):
    monkeypatch.setattr(assembling, "load_whole", None)  # a call would be another error
    recipe, given = write_recipe(folder), override.format(f=folder)
    with pytest.raises(ValueError, match=f"^{PATHS[override]}"):
        load_recipe(recipe, [given], files=True)
    with pytest.raises(ValueError, match=f"^{PATHS[override]}"):
        run_recipe(load_recipe(recipe, [given]))
    assert main(["train", "--config", str(recipe), given]) == 1
    said = capsys.readouterr().err
    assert said.startswith("cumo: ") and said.count("\n") == 1


def test_a_name_with_brackets_is_a_pattern_before_and_after_loading(folder):
    """Even where a file has that very name."""
    file = folder / "colours[1].jsonl"
    file.write_text((folder / "colours.jsonl").read_text())
    with pytest.raises(ValueError, match=r"^data.files must name files, got '\S*colours\[1\].jsonl'"):
        load_recipe(write_recipe(folder, data__files=[str(file)]), files=True)
    assert record_files(folder / "colours?1?.jsonl") == [str(file)]


def test_only_what_writes_can_say_that_a_disk_is_full():
    full = [OSError(errno.ENOSPC, "x"), RuntimeError("PytorchStreamWriter"), SafetensorError("os error 28")]
    other = [OSError(errno.ENOENT, "File too large"), ValueError("File too large"), KeyError("No space left")]
    assert all(map(is_no_room, full)) and not any(map(is_no_room, other))


def test_a_start_without_a_tokenizer_is_named(folder):
    for path in (folder / "start").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"^model.start must be a folder with a tokenizer, got .*: copy"):
        load_recipe(write_recipe(folder), files=True)


def test_parts_are_looked_for_too(folder):
    parts = {"vision": str(folder / "start"), "language": str(folder / "start")}
    for name in ("projector", "tokenizer", "vision", "language"):
        model = ModelSection(**{**parts, name: str(folder / "none")})
        with pytest.raises(ValueError, match=f"^model.{name} must be a f"):
            check_paths(model, DataSection(files=("x",)), folder / "run")
    with pytest.raises(
        ValueError, match="must have either start, or vision and language, got both or neither"
    ):
        check_paths(ModelSection(vision="a"), DataSection(files=("x",)), folder / "run")


def test_a_whole_number_is_a_beta_and_a_package_may_be_missing(folder):
    assert type(load_recipe("demo/sft", ["trainer.adam_beta1=0"]).trainer["adam_beta1"]) is float
    recipe = load_recipe(write_recipe(folder), ["model.attn_implementation=flash_attention_2"])
    if not is_flash_attn_2_available():
        with pytest.raises(ValueError, match=r"^model: [^\n]*FlashAttention2"):
            run_recipe(recipe)


@pytest.mark.parametrize(
    "key, names", [("targets", ["q_proj", "nothing"]), ("target_parameters", ["experts.nothing"])]
)
def test_every_name_of_adapters_must_fit(folder, key, names):
    changes = [f"stage.lora={{r: 2, dropout: 0, {key}: {names}}}"]
    with pytest.raises(
        ValueError, match=rf"^stage.lora.{key} must name parts of the model, got '\S*nothing'"
    ):
        build_trainer(load_recipe(write_recipe(folder), changes))


def test_only_experts_have_dropout_among_target_parameters(folder):
    """Of other parameters peft computes W + B A, where no input can be dropped."""
    changes = ["stage.lora={r: 2, target_parameters: [q_proj.weight], targets: []}"]
    with pytest.raises(
        ValueError,
        match=r"^stage.lora.dropout must be 0 with target_parameters that are no weights of experts, for "
        r"which peft has no dropout, got 0.05 and \S*q_proj.weight$",
    ):
        build_trainer(load_recipe(write_recipe(folder), changes))


NONE = " ".join(f"model.{name}=0" for name in plan.EXPERTS)
EXPERTS = {
    f"model.top_k=3 {NONE.replace('vision_experts=0', 'vision_experts=2')}": "model.top_k must be",
    "stage.expert_parallel=2": "stage.expert_parallel must divide the number of processes, 1, got 2",
    "stage.expert_parallel=2 trainer.bf16=false stage.lora.r=2": "stage.expert_parallel must be 1 with lora",
    "data.max_length=129": "data.max_length must be at most 128, text_config.max_position_embeddings",
    "trainer.report_to=nothing": "trainer.report_to .* cannot be used: nothing is not supported",
    f"model.scratch=true {NONE}": "model.scratch must",
    "model.quantize=4": "model.quantize must be left out without stage.lora, .*, got 4",
    "trainer.optim=galore_adamw trainer.optim_target_modules=[x]": "trainer.optim galore_adamw cannot",
}


@pytest.mark.parametrize("overrides", EXPERTS)
def test_experts_and_processes_are_checked_before_a_model_is_loaded(folder, overrides, monkeypatch):
    monkeypatch.setattr(trainer, "begin", None)
    with pytest.raises(ValueError, match=f"^{EXPERTS[overrides]}"):
        build_trainer(load_recipe(write_recipe(folder), overrides.split()))


def test_reports_to_null_are_none(folder):
    assert build_trainer(load_recipe(write_recipe(folder), ["trainer.report_to="])).args.report_to == []


def planned(folder, *overrides):
    recipe = load_recipe(write_recipe(folder), overrides)
    return recipe, weights_of(recipe, planned_config(recipe.model))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.text_experts=0"],
        ["stage.trains=[projector]"],
        [
            "model.vision_experts=0",
            "model.projector_experts=0",
            "model.text_experts=0",
            "stage.trains=[vision]",
        ],
    ],
)
def test_the_planned_numbers_of_weights_are_those_of_the_model(folder, overrides):
    recipe, (total, trained) = planned(folder, *overrides)
    model = build_trainer(recipe).model
    weights = [p for name, p in model.named_parameters() if ".gate.weight" not in name]
    assert total == sum(p.numel() for p in weights)
    assert trained == sum(p.numel() for p in weights if p.requires_grad)


def test_the_disk_must_have_room_for_what_will_be_saved(folder, monkeypatch, capsys):
    """The needed size is at most what a run really writes at one time, and within a tenth of it."""
    recipe = write_recipe(folder, trainer__max_steps=6, trainer__save_steps=2, trainer__save_total_limit=1)
    most, real = [], AtomicCheckpoints._publish

    def publish(self, written, final):
        run = final.parent
        most.append(sum(path.stat().st_size for path in run.rglob("*") if path.is_file()))
        real(self, written, final)

    monkeypatch.setattr(AtomicCheckpoints, "_publish", publish)
    result = run_recipe(load_recipe(recipe))
    written = max(most) + sum(path.stat().st_size for path in result.iterdir())
    shutil.rmtree(folder / "run")
    usage = shutil.disk_usage(folder)
    free = lambda size: monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=size))
    made = load_recipe(recipe)
    args = training_arguments(made)
    free(written)
    check_plan(made, args)
    free(int(written * 0.9))
    monkeypatch.setattr(assembling, "load_whole", None)
    capsys.readouterr()
    assert main(["train", "--config", str(recipe)]) == 1
    said = capsys.readouterr().err
    wanted = "for 2 checkpoints of .* MB and the result .model. of .* MB, got .* MB in"
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match=f"^output_dir must be on a disk with .* MB free, {wanted}"):
        check_plan(made, args)
    assert not checkpoints(folder / "run")
    free(int(written * 0.7))  # one checkpoint less
    for option in ("save_strategy=no", "max_steps=1"):
        other = load_recipe(recipe, [f"trainer.{option}"])
        check_plan(other, training_arguments(other))
