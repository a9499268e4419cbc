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

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cumo_model.model.config import AVERAGES
from cumo_model.training.arguments import SHIPPED, typed_fields
from cumo_model.training.parallel import EXCHANGES

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
PARTS = {  # part that a stage can train -> its modules in CumoForConditionalGeneration
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language": ("model.language_model", "lm_head"),
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
    scratch: bool = False  # new experts have random weights instead of copies
    seed: int = 0  # seed of new gates and of a new connector
    compat: str | None = None
    dtype: str = "float32"  # dtype of the weights; trainer.bf16 computes in bf16 with fp32 weights
    attn_implementation: str | None = None
    quantize: int | None = None  # 4 or 8 bits; quantised weights are frozen, for QLoRA


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


@dataclass(frozen=True)
class LoraSection:
    r: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: Any = r"model\.language_model\..*(q|k|v|o|gate|up|down)_proj"  # names, or one regular expression
    target_parameters: tuple[str, ...] = ()  # stacked experts: experts.gate_up_proj, experts.down_proj ...

    def __post_init__(self):
        if self.target_parameters and self.dropout:
            raise ValueError(
                "stage.lora.dropout must be 0 with target_parameters, for which peft has no dropout, "
                f"got {self.dropout}"
            )


@dataclass(frozen=True)
class StageSection:
    trains: tuple[str, ...] = tuple(PARTS)
    batch_size: int = 256  # global: over all processes and accumulation steps
    learning_rate: float = 2e-5
    projector_learning_rate: float | None = None
    balance_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    average_loss_over: str = "tokens"  # of a step; "micro_batches" as in the original code
    expert_parallel: int = 1  # processes that share the experts of a layer
    expert_exchange: str = "exact"  # "padded" needs more memory but no host synchronisation
    lora: LoraSection | None = None

    def __post_init__(self):
        if self.projector_learning_rate is not None and "projector" not in self.trains:
            raise ValueError(
                "stage.projector_learning_rate must be left out if stage.trains has no projector, "
                f"got {self.projector_learning_rate}"
            )
        if not self.trains or set(self.trains) - set(PARTS):
            raise ValueError(f"stage.trains must name some of {sorted(PARTS)}, got {list(self.trains)}")
        if self.average_loss_over not in AVERAGES:
            names = ", ".join(AVERAGES)
            raise ValueError(
                f"stage.average_loss_over must be one of {names}, got {self.average_loss_over!r}"
            )
        if self.expert_exchange not in EXCHANGES:
            raise ValueError(
                f"stage.expert_exchange must be one of {', '.join(EXCHANGES)}, got {self.expert_exchange!r}"
            )
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
        if not self.output_dir:
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


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(
        path.relative_to(SHIPPED).with_suffix("").as_posix()
        for path in SHIPPED.rglob("*.yaml")
        if not path.name.startswith("_") and path.parent != SHIPPED
    )


def load_recipe(config: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        config: path of a YAML file, or name of a shipped recipe ("mistral-7b/sft").
        overrides: `key=value` strings; values are parsed as YAML.

    Raises:
        ValueError: the file cannot be read, or a key or value is not valid; the message names it.
    """
    path = Path(config)
    if not path.is_file() and (SHIPPED / f"{config}.yaml").is_file():  # a folder may have such a name
        path = SHIPPED / f"{config}.yaml"
    values = _read(path)
    given = _parse_overrides(overrides)
    variants, variant = values.pop("variants", {}), given.get("variant", values.get("variant"))
    if variant is not None and variant not in variants:
        if not variants:
            raise ValueError(f"variant must be left out, as the recipe has no variants, got {variant!r}")
        raise ValueError(f"variant must be one of {', '.join(variants)}, got {variant!r}")
    values = _merge(_merge(values, variants.get(variant) or {}), given)
    return _build(Recipe, values, "")


def _read(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(), OneValue)
    except FileNotFoundError:
        names = ", ".join(shipped_recipes())
        raise ValueError(f"config must be a YAML file or one of {names}, got {str(path)!r}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {str(path)!r} must contain keys and values, got {type(values).__name__}")
    base = values.pop("base", None)
    return values if base is None else _merge(_read(path.parent / base), values)


def _merge(under: dict, over: dict) -> dict:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_overrides(overrides: Sequence[str]) -> dict:
    found: dict = {}
    given: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"overrides must look like key=value, got {override!r}")
        try:
            value: Any = yaml.load(text, OneValue) if text else None
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r} is not YAML: {' '.join(str(error).split())}") from None
        for key, item in _leaves(value, name).items():
            for other in given:
                both = f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
                if both and (other != key or given[other] != item):
                    raise ValueError(
                        f"{key} must be given once, got {given[other]!r}"
                        + (f" for {other}" if other != key else "")
                        + f" and {item!r}"
                    )
            given[key] = item
        for key in reversed(name.split(".")):
            value = {key: value}
        found = _merge(found, value)
    return found


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """Dotted name -> value of everything that an override sets."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {path: v for key, item in value.items() for path, v in _leaves(item, f"{name}.{key}").items()}


class OneValue(yaml.SafeLoader):
    """YAML in which a key may be given once only; PyYAML takes the last value without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _build(kind: type, values: Any, place: str):
    """Build a dataclass from a dict. Strings such as 1e-3, which YAML does not parse, become numbers."""
    if not isinstance(values, dict):
        raise ValueError(f"{place.rstrip('.') or 'config'} must contain keys and values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{place}{unknown[0]} is not a key; the keys are {', '.join(fields)}")
    missing = [n for n, f in fields.items() if n not in values and _required(f)]
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
            built[name] = typed_fields(value or {})
        else:
            built[name] = _typed(fields[name], value, place)
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


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(f: dataclasses.Field, value: Any, place: str) -> Any:
    """A value of a section as the type of its field."""
    if f.type is Any:
        return value
    wanted = f.type.__name__ if isinstance(f.type, type) else str(f.type)
    item = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", wanted)
    if item is not None:
        if value is None:
            return f.default
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_of_kind([item[1]], v, f"{place}{f.name}") for v in items)
    return _of_kind(wanted.split(" | "), value, f"{place}{f.name}")


def _of_kind(names: list[str], value: Any, key: str) -> Any:
    if "float" in names and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            value = float(value)
    if not any(type(value).__name__ == name for name in names) and not (value is None and "None" in names):
        raise ValueError(f"{key} must be of type {' | '.join(names)}, got {value!r}")
    return value
