"""Checkpoint files between our layout and that of the released SHI-Labs/CuMo checkpoints.

A tensor is copied from shard to shard, never a whole model: one output shard is in memory at a time. Before
anything is written, the names and shapes of the source are held against what its config.json promises.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cumo_model.checkpoints.assemble import describe
from cumo_model.checkpoints.folders import new_directory, read_object
from cumo_model.checkpoints.layout import original_names, own_layout
from cumo_model.checkpoints.original_config import TOWER_FOLDER, is_original, to_original
from cumo_model.checkpoints.shards import Shape, Shards, check_tensors, write_shards
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration

SHARD_BYTES = 2 * 1000**3
LAYOUTS = ("cumo", "original")
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Copy a checkpoint into the other layout, bit for bit.

    Args:
        source: folder with config.json and safetensors shards, or `.bin` files that hold nothing but tensors.
        target: new folder; appears in one move. Tokenizer files and the like are copied along.
        layout: "cumo" or "original"; the other one than the source's unless given.
        shard_bytes: largest output file, but for a tensor that alone is larger; about the memory it takes.
        progress: show a bar.

    Raises:
        ValueError: names or shapes are not those of config.json, experts of one place differ in dtype, a
            file is damaged or pickles more than tensors, the disk is too small,
            the model has no form in the original layout, or `target` is there already.
    """
    if not shard_bytes >= 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    source = Path(source)
    config, processor = describe(source)
    is_theirs = is_original(read_object(source / "config.json"))
    layout = layout or ("cumo" if is_theirs else "original")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    config.architectures = [CumoForConditionalGeneration.__name__]
    ours = own_layout(config)
    parts = {key: original_names(key, shape) for key, shape in ours.items()}
    theirs = {name: shape for names in parts.values() for name, shape in names.items()}
    new_config = to_original(config) if layout == "original" else None
    shards = Shards(source)
    check_tensors(shards.shapes, theirs if is_theirs else ours, str(source))

    if is_theirs and layout == "cumo":
        _check_stacks(shards, parts)
    if is_theirs == (layout == "original"):
        plan = [(name, shape, lambda name=name: shards[name]) for name, shape in shards.shapes.items()]
    elif is_theirs:
        plan = [
            (key, shape, lambda key=key: _join(shards, parts[key], ours[key])) for key, shape in ours.items()
        ]
    else:
        plan = list(_split(shards, parts))
    needed = sum(prod(shape) * _dtype_of(shards, parts, name).itemsize for name, shape, _ in plan)
    _check_disk(Path(target), needed)
    with new_directory(target) as work:
        if new_config is None:
            if is_theirs and processor is not None:
                processor.save_pretrained(work)
            config.save_pretrained(work)
        else:
            _write_original_config(work, new_config, config)
            check_tensors(dict(own_layout(CumoConfig.from_pretrained(work))), ours, "the original layout")
        write_shards(work, plan, lambda name: _dtype_of(shards, parts, name), shard_bytes, progress)
        for path in source.iterdir():
            if (
                path.is_file()
                and not (work / path.name).exists()
                and path.name != "config.json"
                and not path.name.endswith(NOT_COPIED)
            ):
                shutil.copy(path, work / path.name)
    return Path(target)


def _check_disk(target: Path, needed: int) -> None:
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(f"{parent} must have {needed / 1e9:.1f} GB free, got {free / 1e9:.1f} GB")


def _check_stacks(shards: Shards, parts: dict[str, dict[str, Shape]]) -> None:
    """What is stacked must be of one dtype: in any other the bits would change."""
    for names in parts.values():
        first, *others = names
        for name in others:
            if shards.dtypes[name] != shards.dtypes[first]:
                raise ValueError(
                    f"{first} and {name} must have one dtype to be experts of one tensor, "
                    f"got {shards.dtypes[first]} and {shards.dtypes[name]}"
                )


def _dtype_of(shards: Shards, parts: dict[str, dict[str, Shape]], name: str) -> torch.dtype:
    if name in shards.dtypes:
        return shards.dtypes[name]
    if name in parts:
        return shards.dtypes[next(iter(parts[name]))]
    return shards.dtypes[next(key for key, names in parts.items() if name in names)]


def _join(shards: Shards, names: dict[str, Shape], shape: Shape) -> Tensor:
    """Their parts, in order, as our tensor."""
    if len(names) == 1:
        return shards[next(iter(names))].reshape(shape)
    tensor, position = None, 0
    for name in names:
        part = shards[name]
        if tensor is None:
            tensor = torch.empty(prod(shape), dtype=part.dtype)
        tensor[position : position + part.numel()] = part.flatten()
        position += part.numel()
    return tensor.view(shape)


def _split(
    shards: Shards, parts: dict[str, dict[str, Shape]]
) -> Iterator[tuple[str, Shape, Callable[[], Tensor]]]:
    """Our tensors as their parts; a file's tensor is read once for all of them."""
    held: dict[str, Tensor] = {}

    def part(key: str, begin: int, shape: Shape) -> Tensor:
        if key not in held:
            held.clear()
            held[key] = shards[key].flatten()
        return held[key][begin : begin + prod(shape)].view(shape).clone()

    for key, names in parts.items():
        begin = 0
        for name, shape in names.items():
            yield name, shape, lambda key=key, begin=begin, shape=shape: part(key, begin, shape)
            begin += prod(shape)


def _write_original_config(work: Path, values: dict[str, Any], config: CumoConfig) -> None:
    (work / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if values["mm_vision_tower"] == TOWER_FOLDER:
        (work / TOWER_FOLDER).mkdir()
        tower = config.vision_config.to_dict() | {
            "model_type": "clip_vision_model",
            "transformers_version": None,
        }
        (work / TOWER_FOLDER / "config.json").write_text(json.dumps(tower, indent=2, default=str) + "\n")
