"""Recipes: definitions of single training stages, as YAML files.

    base: other.yaml          recipe to inherit from, relative to this file; the keys below override its keys
    variant: paper            the entry of `variants` to apply, if sources give different hyperparameters
    variants: {paper: {...}, script: {...}}
    output_dir: runs/...
    model: {...}              source of the weights                         (ModelSection)
    data: {...}               training data                                 (DataSection)
    stage: {...}              trained parts, losses and learning rates      (StageSection)
    trainer: {...}            any field of transformers.TrainingArguments

`key=value` on the command line overrides a key. Dots separate sections from keys:
`stage.learning_rate=1e-5 variant=script`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cumo_model.model.choices import ASPECTS, AVERAGES, COMPATS, DTYPES, EXCHANGES, GROUPINGS
from cumo_model.processing.templates import get_template
from cumo_model.training.paths import check_paths
from cumo_model.training.recipe_files import SHIPPED, merge, parse_overrides, read_recipe
from cumo_model.training.run_folder import finished_step
from cumo_model.training.values import (
    NOT_NEGATIVE,
    SEED,
    UNIT,
    at_least,
    check_known,
    check_section,
    one_of,
    required,
    typed,
)

# keys that may differ when a run is resumed
FREE = ("trainer", "output_dir")
PARTS_ONLY = (
    "vision",
    "language",
    "projector",
    "tokenizer",
    "scales",
    "compat",
)  # of `model`, without `start`
EXPERTS = ("vision_experts", "projector_experts", "text_experts")
PARTS = {  # part that a stage can train -> its modules in CumoForConditionalGeneration
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language": ("model.language_model", "lm_head"),
}


MODEL_RANGES = {
    **dict.fromkeys(EXPERTS, at_least(0)),
    "top_k": at_least(1),
    "scales": at_least(1),
    "seed": SEED,
    "compat": one_of(*COMPATS),
    "dtype": one_of(*DTYPES),
    "quantize": one_of(4, 8),
}
DATA_RANGES = {
    "aspect": one_of(*ASPECTS),
    "max_length": at_least(1),
    "grouping": one_of(*GROUPINGS),
}
LORA_RANGES = {"r": at_least(1), "alpha": at_least(1), "dropout": UNIT}
STAGE_RANGES = {
    "trains": one_of(*PARTS),
    "batch_size": at_least(1),
    "learning_rate": NOT_NEGATIVE,
    "projector_learning_rate": NOT_NEGATIVE,
    "balance_loss_coef": NOT_NEGATIVE,
    "router_z_loss_coef": NOT_NEGATIVE,
    "selection_bias_rate": NOT_NEGATIVE,
    "average_loss_over": one_of(*AVERAGES),
    "expert_parallel": at_least(1),
    "expert_exchange": one_of(*EXCHANGES),
}


@dataclass(frozen=True)
class ModelSection:
    """Source of the weights: either one checkpoint, or a vision tower and a language model.

    `start` is the folder of a CuMo checkpoint, dense or with experts. Otherwise `vision` and `language` are
    folders with a CLIP (or CuMo) tower and a causal language model, and the connector is new. `projector`,
    `tokenizer`, `scales` and `compat` are for such parts; a checkpoint has its own.
    """

    start: str | None = None
    vision: str | None = None
    language: str | None = None
    projector: str | None = None  # mm_projector.bin of the original code, with `vision` and `language`
    tokenizer: str | None = None  # folder of the tokenizer, if it is not in `language`
    scales: tuple[int, ...] = (1, 3)
    vision_experts: int = 0  # number of copies of each dense MLP; existing experts of this number are kept
    projector_experts: int = 0
    text_experts: int = 0
    top_k: int | None = None  # experts per token; by default 2 for new experts, and existing ones keep theirs
    router: dict | None = None  # options of the routers (docs/model.md); existing experts keep theirs
    scratch: bool = False  # new experts have random weights instead of copies
    seed: int = 0  # seed of new gates and of a new connector
    compat: str | None = None
    dtype: str = "float32"  # dtype of the weights; trainer.bf16 computes in bf16 with fp32 weights
    attn_implementation: str | None = None
    quantize: int | None = None  # 4 or 8 bits; quantised weights are frozen, for QLoRA

    def __post_init__(self):
        check_section(self, "model.", MODEL_RANGES)
        if not self.scales:
            raise ValueError("model.scales must have at least one factor, got ()")
        experts = [(name, getattr(self, name)) for name in EXPERTS]
        for name, number in experts:
            if number > 1 and self.top_k is not None and self.top_k > number:
                raise ValueError(f"model.top_k must be at most model.{name} {number}, got {self.top_k}")


@dataclass(frozen=True)
class DataSection:
    files: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    template: str | None = None  # by default that of model.start; for parts mistral_instruct_system
    # "pad", or "square", which crops images as LLaVA's first stage does; by default that of model.start
    aspect: str | None = None
    max_length: int | None = None
    grouping: str = "modality_length"
    packing: bool = False  # fill rows of max_length tokens; the batch size then counts rows
    skip_bad: bool = False
    cache_dir: str | None = None  # folder of the index; by default `index` next to output_dir
    dummy_images: bool = False  # add a grey image to each row without an image, as the original code does

    def __post_init__(self):
        check_section(self, "data.", DATA_RANGES)
        if self.template is not None:
            try:
                get_template(self.template)
            except ValueError as error:
                raise ValueError(f"data.{error}") from None
        if self.packing and self.max_length is None:
            raise ValueError("data.max_length must be given for data.packing, got None")


@dataclass(frozen=True)
class LoraSection:
    r: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: Any = r"model\.language_model\..*(q|k|v|o|gate|up|down)_proj"  # names, or one regular expression
    target_parameters: tuple[str, ...] = ()  # stacked experts: experts.gate_up_proj, experts.down_proj ...

    def __post_init__(self):
        check_section(self, "stage.lora.", LORA_RANGES)
        self._check_targets()

    def _check_targets(self) -> None:
        targets = self.targets
        wanted = "stage.lora.targets must be names of modules, or one regular expression"
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"{wanted}, got {targets!r}: {error}") from None
        elif not isinstance(targets, list | tuple) or not all(isinstance(name, str) for name in targets):
            raise ValueError(f"{wanted}, got {targets!r}")
        if not targets and not self.target_parameters:
            raise ValueError(f"{wanted}, got {targets!r} and no target_parameters")


@dataclass(frozen=True)
class StageSection:
    trains: tuple[str, ...] = tuple(PARTS)
    batch_size: int = 256  # global: over all processes and accumulation steps
    learning_rate: float = 2e-5
    projector_learning_rate: float | None = None
    balance_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    selection_bias_rate: float | None = None  # of routers with a selection bias; by default 0.001
    average_loss_over: str = "tokens"  # of a step; "micro_batches" as in the original code
    expert_parallel: int = 1  # processes that share the experts of a layer
    expert_exchange: str = "exact"  # "padded" needs more memory but no host synchronisation
    lora: LoraSection | None = None

    def __post_init__(self):
        check_section(self, "stage.", STAGE_RANGES)
        if self.projector_learning_rate is not None and "projector" not in self.trains:
            raise ValueError(
                "stage.projector_learning_rate must be left out if stage.trains has no projector, "
                f"got {self.projector_learning_rate}"
            )
        if not self.trains:
            raise ValueError(f"stage.trains must name some of {sorted(PARTS)}, got []")
        if self.expert_exchange != EXCHANGES[0] and self.expert_parallel == 1:
            raise ValueError(
                f"stage.expert_exchange must be {EXCHANGES[0]} or left out if stage.expert_parallel is 1, "
                f"got {self.expert_exchange!r}"
            )


@dataclass(frozen=True)
class Recipe:
    output_dir: str
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    stage: StageSection = field(default_factory=StageSection)
    trainer: dict = field(default_factory=dict)
    variant: str | None = None

    def __post_init__(self):
        if not isinstance(self.output_dir, str | os.PathLike) or not str(self.output_dir).strip():
            raise ValueError(f"output_dir must be a folder, got {self.output_dir!r}")

    def identity(self) -> dict:
        """The values that must be the same when a run is resumed; all others may change."""
        seeds = [self.trainer.get(name) for name in ("seed", "data_seed")]  # for packing and order
        values = {key: value for key, value in plain(self).items() if key not in FREE} | {"seed": seeds}
        del values["stage"]["expert_exchange"]  # results differ by rounding only
        values["data"]["skip_bad"] = False  # whatever it is: a run that met a bad picture goes on with it
        return values


def plain(recipe: Recipe) -> dict:
    """A recipe as a dict of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def load_recipe(config: str | os.PathLike, overrides: Sequence[str] = (), files: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        config: path of a YAML file, or name of a shipped recipe ("mistral-7b/sft").
        overrides: `key=value` strings; values are parsed as YAML.
        files: also check that the files and folders named in the recipe exist, as `check_paths`, unless the
            run has a result.

    Raises:
        ValueError: the file cannot be read, or a key or value is not valid; the message names it.
    """
    path = Path(config)
    if not path.is_file() and (SHIPPED / f"{config}.yaml").is_file():  # a folder may have such a name
        path = SHIPPED / f"{config}.yaml"
    values = read_recipe(path)
    given = parse_overrides(overrides)
    variants, variant = values.pop("variants", None) or {}, given.get("variant", values.get("variant"))
    if not isinstance(variants, dict) or not all(isinstance(v or {}, dict) for v in variants.values()):
        raise ValueError(f"variants must contain names with keys and values, got {variants!r}")
    if variant is not None and (not isinstance(variant, str) or variant not in variants):
        if not variants:
            raise ValueError(f"variant must be left out, as the recipe has no variants, got {variant!r}")
        raise ValueError(f"variant must be one of {', '.join(variants)}, got {variant!r}")
    recipe = _build(Recipe, merge(merge(values, variants.get(variant) or {}), given), "")
    if files and finished_step(recipe.output_dir) is None:
        check_paths(recipe.model, recipe.data, recipe.output_dir)
    # imports torch and transformers, so that all else is reported first
    from cumo_model.training.arguments import typed_fields

    return dataclasses.replace(recipe, trainer=typed_fields(recipe.trainer))


def _build(kind: type, values: Any, place: str):
    """Build a dataclass from a dict."""
    if not isinstance(values, dict):
        raise ValueError(f"{place.rstrip('.') or 'config'} must contain keys and values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in values:
        check_known(name, fields, place)
    missing = [n for n, f in fields.items() if n not in values and required(f)]
    if missing:
        raise ValueError(f"{place}{missing[0]} must be given")
    if kind is ModelSection:
        _check_start(values)
    sections = {"model": ModelSection, "data": DataSection, "stage": StageSection, "lora": LoraSection}
    built = {}
    for name, value in values.items():
        if name in sections and name != "lora" and value is None:  # a section without keys
            continue
        if name in sections and value is not None:
            built[name] = _build(sections[name], value, f"{place}{name}.")
        elif name == "trainer":
            if not isinstance(value or {}, dict):
                raise ValueError(f"trainer must contain keys and values, got {value!r}")
            built[name] = dict(value or {})
        else:
            built[name] = typed(fields[name], value, place)
    return kind(**built)


def _check_start(values: dict) -> None:
    """Refuse keys of the section `model` that are those of the checkpoint it starts from."""
    for name in PARTS_ONLY if values.get("start") is not None else ():
        if values.get(name) is not None:
            raise ValueError(
                f"model.{name} must be left out with model.start, whose own is used, got {values[name]!r}"
            )


def check_model(model: ModelSection) -> None:
    """Refuse keys that have no effect, in a section that may have been made in Python.

    Raises:
        ValueError: the message names the key.
    """
    usual = ModelSection()
    _check_start(
        {"start": model.start}
        | {name: v for name in PARTS_ONLY if (v := getattr(model, name)) != getattr(usual, name)}
    )
    if model.scratch and max(model.vision_experts, model.projector_experts, model.text_experts) < 2:
        raise ValueError("model.scratch must be False without new experts, got True")
