"""Conversion of checkpoints between this project's layout and that of the released SHI-Labs/CuMo checkpoints.

Tensors are copied one by one, and one output shard at a time is in memory. Before anything is written, the
names and shapes of the source are compared with those that its config.json requires.
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
    """Convert a checkpoint to the other layout; all values stay bit-identical.

    Args:
        source: folder with config.json and safetensors shards, or `.bin` files that contain only tensors.
        target: new folder, created atomically. Other files, such as those of a tokenizer, are copied too.
        layout: layout of the target, "cumo" or "original"; by default the other one than that of the source.
        shard_bytes: largest size of an output file in bytes, unless a single tensor is larger. It is also
            about the memory needed.
        progress: whether to show a progress bar.

    Returns:
        The path of `target`.

    Raises:
        ValueError: names or shapes do not match config.json; experts of one layer differ in dtype; a file is
            damaged or contains more than tensors; the disk is too small; the released layout cannot describe
            the model; or `target` exists already.
    """
    if not shard_bytes >= 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    source = Path(source)
    config, processor = describe(source)
    is_released = is_original(read_object(source / "config.json"))
    layout = layout or ("cumo" if is_released else "original")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    config.architectures = [CumoForConditionalGeneration.__name__]
    own = own_layout(config)
    parts = {key: original_names(key, shape) for key, shape in own.items()}
    released = {name: shape for names in parts.values() for name, shape in names.items()}
    new_config = to_original(config) if layout == "original" else None
    shards = Shards(source)
    check_tensors(shards.shapes, released if is_released else own, str(source))

    if is_released and layout == "cumo":
        _check_stacks(shards, parts)
    if is_released == (layout == "original"):
        plan = [(name, shape, lambda name=name: shards[name]) for name, shape in shards.shapes.items()]
    elif is_released:
        plan = [
            (key, shape, lambda key=key: _join(shards, parts[key], own[key])) for key, shape in own.items()
        ]
    else:
        plan = list(_split(shards, parts))
    needed = sum(prod(shape) * _dtype_of(shards, parts, name).itemsize for name, shape, _ in plan)
    _check_disk(Path(target), needed)
    with new_directory(target) as work:
        if new_config is None:
            if is_released and processor is not None:
                processor.save_pretrained(work)
            config.save_pretrained(work)
        else:
            _write_original_config(work, new_config, config)
            check_tensors(dict(own_layout(CumoConfig.from_pretrained(work))), own, "the original layout")
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
    """Check that tensors to be stacked have one dtype, because a conversion would change their values."""
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
    """Concatenate tensors of the released layout to one stacked tensor."""
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
    """Split stacked tensors into those of the released layout; each stacked tensor is read once."""
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
