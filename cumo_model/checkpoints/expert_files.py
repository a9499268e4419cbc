"""The experts in the files of a checkpoint: which tensors of which files make a stacked weight of the model.

It reads names, shapes and dtypes only. Layouts: this project's, the released one of SHI-Labs/CuMo, and those
of the models of transformers, whose own rules for names are used; `published` has those of quantised ones.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from cumo_kernels.packing.tensor import PackedWeight
from cumo_model.checkpoints.assemble import describe
from cumo_model.checkpoints.configs import read_checked
from cumo_model.checkpoints.layout import original_names
from cumo_model.checkpoints.original_config import is_original
from cumo_model.checkpoints.published import PLAIN, Published, published_of
from cumo_model.checkpoints.shards import Shape, Shards, check_tensors
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.json_files import read_object
from cumo_model.model.quantizer import NAME, ExpertWeight, expert_weights, no_experts
from cumo_model.processing.processor import CumoProcessor


@dataclass(frozen=True)
class Stack:
    """A stacked weight of experts, and how it is read one expert at a time.

    Attributes:
        name: of the parameter.
        of: its shape.
        dtype: of the weights in the files; of published packed ones, that of the model.
        read: expert -> (N, K), or PackedWeight (1, N, K) of published ones.
        nbytes: bytes in the files.
        packed: a PackedWeight (1, N, K) on the device "meta" that shows what `read` returns; None if plain.
    """

    name: str
    of: ExpertWeight
    dtype: torch.dtype
    read: Callable[[int], Tensor | PackedWeight]
    nbytes: int
    packed: PackedWeight | None = None


@dataclass(frozen=True)
class Other:
    """A tensor that is no expert's weight, and how it is read.

    Attributes:
        name, shape, dtype: of the tensor in the new files.
        read: gives it.
        is_dequantised: whether `read` makes it of a published quantised one.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    is_dequantised: bool = False


@dataclass
class Source:
    """A checkpoint before its weights are read.

    Attributes:
        folder: its folder.
        values: its config.json, without `quantization_config`.
        shards: its files.
        published: its quantisation by others; None if it is not quantised.
        stacks: its experts' weights.
        others: all other tensors.
        config: of a CuMo; None for another model.
        processor: of a CuMo, if it has a tokenizer.
        is_released: whether it is in the released layout.
    """

    folder: Path
    values: dict[str, Any]
    shards: Shards
    published: Published | None
    config: CumoConfig | None = None
    processor: CumoProcessor | None = None
    is_released: bool = False
    stacks: list[Stack] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)


def read_source(folder: Path) -> Source:
    """Read names and shapes of a checkpoint, and compare them with its config.json.

    Raises:
        ValueError: it has no experts or cannot be read; tensors are missing, or have another shape, or are
            quantised in a way that is not known; the message names them.
    """
    values = read_object(folder / "config.json")
    text = values.get("text_config")
    quantization = values.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if isinstance(quantization, dict) and quantization.get("quant_method") == NAME:
        raise ValueError(f"{folder} is quantised already: its experts are {quantization.get('format')}")
    values = copy.deepcopy(values)
    for place in (values, values.get("text_config")):
        if isinstance(place, dict):
            place.pop("quantization_config", None)
    published = None if not quantization else published_of(quantization, str(folder / "config.json"))
    source = Source(folder, values, Shards(folder), published)
    is_cumo = values.get("model_type") == CumoConfig.model_type or is_original(values)
    if is_cumo:
        if published is not None:
            raise ValueError(f"{folder} is quantised by another program, which is not known for a CuMo")
        source.config, source.processor = describe(folder)
        source.is_released = is_original(values)
        model = _on_meta(CumoForConditionalGeneration, source.config)
    else:
        model = _model_of(folder, values)
    weights = expert_weights(model)
    if not weights:
        raise ValueError(f"{folder} {no_experts(model)}; experts are all that is quantised")
    if is_cumo:
        _from_cumo(source, model, weights)
    else:
        _from_transformers(source, model, weights)
    return source


def _on_meta(kind: type, config: Any) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        return kind(config)


def _model_of(folder: Path, values: dict[str, Any]) -> PreTrainedModel:
    """A model of transformers without weights."""
    kind, names = values.get("model_type"), values.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"architectures of {folder / 'config.json'} must be a list of names, got {names!r}")
    found = [getattr(transformers, str(name), None) for name in names[:1]]
    is_model = bool(found) and isinstance(found[0], type) and issubclass(found[0], PreTrainedModel)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or not is_model:
        raise ValueError(
            f"{folder / 'config.json'} must be of a CuMo or a model of transformers, "
            f"got model_type {kind!r} and architectures {names!r}"
        )
    read = lambda values: _on_meta(found[0], CONFIG_MAPPING[kind].from_dict(_without(values)))
    return read_checked(folder / "config.json", read, is_own=False)


def _without(values: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _without(v) for k, v in values.items() if k == "text_config" and isinstance(v, dict)}
    return {k: _with_floats(v) for k, v in (values | nested).items() if k != "quantization_config"}


def _with_floats(value: Any) -> Any:
    """A value of a config.json in which transformers writes inf and nan as objects, for JSON has none."""
    if isinstance(value, list):
        return [_with_floats(one) for one in value]
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(one) for key, one in value.items()}
    return value


def _from_cumo(source: Source, model: PreTrainedModel, weights: dict[str, ExpertWeight]) -> None:
    shards = source.shards
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if source.config.tie_word_embeddings:
        del own["lm_head.weight"]
    parts = {
        key: original_names(key, shape) if source.is_released else {key: shape} for key, shape in own.items()
    }
    wanted = {name: shape for names in parts.values() for name, shape in names.items()}
    check_tensors(shards.shapes, wanted, str(source.folder))
    for key, names in parts.items():
        if key in weights:
            number = (
                len(names) // weights[key].shape[0]
            )  # of tensors for an expert, whose names follow each other
            columns = [list(names)[i::number] for i in range(number)] or [list(names)]
            source.stacks.append(_plain_stack(shards, key, weights[key], columns))
        else:
            source.others.append(_joined(shards, key, own[key], list(names)))


def _joined(shards: Shards, key: str, shape: Shape, names: list[str]) -> Other:
    """A tensor that is stacked of one for each expert, such as a bias."""
    _one_dtype(shards, names)
    read = lambda: torch.cat([shards.read(name).flatten() for name in names]).view(shape)
    only = lambda: shards.read(names[0]).reshape(shape)
    return Other(key, shape, shards.dtypes[names[0]], only if len(names) == 1 else read)


def _one_dtype(shards: Shards, names: list[str]) -> None:
    first, *others = names
    for name in others:
        if shards.dtypes[name] != shards.dtypes[first]:
            raise ValueError(
                f"{first} and {name} must have one dtype to be experts of one tensor, "
                f"got {shards.dtypes[first]} and {shards.dtypes[name]}"
            )


def _plain_stack(shards: Shards, key: str, of: ExpertWeight, columns: list[list[str]]) -> Stack:
    """A stack of plain tensors.

    Args:
        shards: the files.
        key: name of the parameter.
        of: its shape.
        columns: for each part of an expert's rows the names of all experts' tensors; or one name of all.
    """
    experts, rows, width = of.shape
    names = [name for column in columns for name in column]
    _one_dtype(shards, names)
    is_stacked = len(names) == 1 and (experts > 1 or len(shards.shapes[names[0]]) == 3)
    part = (rows // len(columns), width)
    whole = (experts, width, rows) if of.is_transposed else of.shape
    for name in names:
        if shards.shapes[name] != (whole if is_stacked else part):
            wanted = whole if is_stacked else part
            raise ValueError(f"{name} must be {wanted}, as config.json says, got {shards.shapes[name]}")
    if not shards.dtypes[names[0]].is_floating_point:
        raise ValueError(f"{names[0]} must be of a float dtype, got {shards.dtypes[names[0]]}")

    def read(expert: int) -> Tensor:
        if is_stacked:
            found = shards.read(names[0], expert)
            return found.T.contiguous() if of.is_transposed else found
        found = [shards.read(column[expert]) for column in columns]
        return found[0] if len(found) == 1 else torch.cat(found)

    dtype = shards.dtypes[names[0]]
    return Stack(key, of, dtype, read, prod(of.shape) * dtype.itemsize)


def _from_transformers(source: Source, model: PreTrainedModel, weights: dict[str, ExpertWeight]) -> None:
    shards, known = source.shards, model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    published = source.published or PLAIN
    groups = published.grouped(shards)
    found: dict[str, dict[str | None, list[str]]] = {}
    seen: set[str] = set()
    for base in sorted(groups, key=dot_natural_key):
        prefix = model.base_model_prefix
        renamed, pattern = rename_source_key(base, renamings, converters, prefix, known)
        if renamed not in known and base in known:
            renamed, pattern = base, None
        seen |= _made(renamed, pattern, converters)
        if renamed in weights:
            found.setdefault(renamed, {}).setdefault(pattern, []).append(base)
            continue
        name = renamed if pattern is None and renamed in known else base
        shape = tuple(known[name].shape) if name in known else None
        source.others.append(Other(name, *published.other(shards, base, groups[base], shape, _dtype(source))))
    _check_all(source, model, seen)
    for key, of in weights.items():
        columns = _columns(key, of, found[key], converters, str(source.folder))
        names = [base for column in columns for base in column]
        kinds = {frozenset(groups[name]) == frozenset([""]) for name in names}
        if kinds == {True}:
            if source.published is not None:
                raise ValueError(
                    f"{names[0]} must be quantised, as config.json says of experts, got plain weights"
                )
            source.stacks.append(_plain_stack(shards, key, of, columns))
        else:
            stack = published.stack(
                shards, of, [[groups[name] for name in column] for column in columns], names
            )
            source.stacks.append(Stack(key, of, _dtype(source), *stack))


def _dtype(source: Source) -> torch.dtype:
    """The dtype of the model in config.json; bf16 if it names none."""
    text = source.values.get("text_config")
    text = text if isinstance(text, dict) else {}
    names = [place.get(key) for place in (source.values, text) for key in ("dtype", "torch_dtype")]
    name = next((name for name in names if name), "bfloat16")
    return getattr(torch, str(name).removeprefix("torch."))


def _made(name: str, pattern: str | None, converters: list[WeightConverter]) -> set[str]:
    """The tensors of the model that one of the files becomes. A converter that splits it names the first."""
    rules = [rule for rule in converters if pattern is not None and pattern in rule.source_patterns]
    return {name} | {name.replace(rule.target_patterns[0], t) for rule in rules for t in rule.target_patterns}


def _check_all(source: Source, model: PreTrainedModel, seen: set[str]) -> None:
    """Check that no tensor of the model is missing, except those that transformers does not miss either."""
    unmissed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied = model.all_tied_weights_keys
    missing = [
        name
        for name in model.state_dict()
        if not ({name, tied.get(name)} & seen or any(pattern.search(name) for pattern in unmissed))
    ]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source.folder} does not match its config.json: {missing[0]} is missing{more}")


def _columns(
    key: str,
    of: ExpertWeight,
    found: dict[str | None, list[str]],
    converters: list[WeightConverter],
    folder: str,
) -> list[list[str]]:
    """For each part of an expert's rows the names of the experts' tensors, in order; or one name of all."""
    if list(found) == [None]:
        return [found[None]]
    converter = next(rule for rule in converters if set(found) & set(rule.source_patterns))
    steps = [type(step) for step in converter.operations]
    is_stack = steps[:1] == [MergeModulelist] and converter.operations[0].dim == 0
    if len(converter.source_patterns) > 1:
        is_stack &= steps[1:] == [Concatenate] and converter.operations[1].dim == 1
    else:
        is_stack &= len(steps) == 1
    if not is_stack or of.is_transposed:
        raise ValueError(f"{key} of {folder} is made in a way that cannot be quantised from files: {steps}")
    columns = [found.get(pattern, []) for pattern in converter.source_patterns]
    for pattern, column in zip(converter.source_patterns, columns, strict=True):
        numbers = [int(re.findall(r"\.(\d+)\.", name)[-1]) for name in column]
        lost = sorted(set(range(of.shape[0])) - set(numbers))
        if lost:
            raise ValueError(f"{key} of {folder}: {pattern.strip('.')} of expert {lost[0]} is missing")
        if len(column) != of.shape[0]:
            raise ValueError(f"{key} of {folder} must have {of.shape[0]} experts, got {len(column)}")
    return columns
