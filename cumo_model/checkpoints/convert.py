"""Conversion of checkpoints between this project's layout and that of the released SHI-Labs/CuMo checkpoints.

Tensors are copied one by one, and one output shard at a time is in memory. Before anything is written, the
names and shapes of the source are compared with those that its config.json requires. Nothing else is lost
either: config and processor of the copy are read back and compared with those of the source.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cumo_model.checkpoints.assemble import describe, is_quantized
from cumo_model.checkpoints.folders import in_units, new_directory
from cumo_model.checkpoints.layout import original_names, own_layout
from cumo_model.checkpoints.original_config import (
    EXPORTED,
    TOWER_FOLDER,
    differing,
    is_original,
    to_original,
)
from cumo_model.checkpoints.processors import open_anywhere, same_processor
from cumo_model.checkpoints.shards import PICKLES, WEIGHTS, Shape, Shards, check_tensors, write_shards
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.indexes import inside_checkpoint
from cumo_model.model.json_files import read_object
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.tokenizer_files import has_tokenizer, no_tokenizer

SHARD_BYTES = 2 * 1000**3
LAYOUTS = ("cumo", "original")
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth")  # other weights and states of training
INDEXES = (f"{WEIGHTS}.index.json", f"{PICKLES}.index.json")
KEPT = "original_files"  # folder with files of a released checkpoint that the processor's files replace


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    remote_code: bool = False,
) -> Path:
    """Convert a checkpoint to the other layout; all values stay bit-identical, and so do the answers.

    Config, processor and other files survive a conversion to the other layout and back. A key of config.json
    and the folder `original_files` hold what the other layout has no place for; the original code ignores
    them. Its flag `training` becomes False.

    Args:
        source: folder with config.json and safetensors shards, or `.bin` files that contain only tensors.
        target: new folder, created atomically. Other files, such as those of a tokenizer, are copied too,
            except further weights and states of training, which a warning names.
        layout: layout of the target, "cumo" or "original"; by default the other one than that of the source.
        shard_bytes: largest size of an output file in bytes, unless a single tensor is larger. It is also
            about the memory needed.
        progress: whether to show a progress bar.
        remote_code: whether the copy, which then has the layout "cumo", also opens with
            `trust_remote_code=True` in programs that have not imported this package. A copy of a folder that
            opens so does it too.

    Returns:
        The path of `target`.

    Raises:
        ValueError: names or shapes do not match config.json; experts of one layer differ in dtype; a file is
            damaged, contains more than tensors, or is a link that leads out of the folder; the disk is too
            small; the released layout cannot describe the model or the processor; or `target` exists already.
    """
    if not shard_bytes >= 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    source = Path(source)
    config, processor = describe(source)
    if is_quantized(source):
        raise ValueError(
            f"{source} has experts in four bits, which are not converted: convert, then quantize"
        )
    values = read_object(source / "config.json")
    is_released = is_original(values)
    layout = layout or ("cumo" if is_released or remote_code else "original")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if remote_code and layout != "cumo":
        raise ValueError(f"layout must be 'cumo' with remote_code, got {layout!r}, the original code's own")
    config.architectures = [CumoForConditionalGeneration.__name__]
    own = own_layout(config)
    parts = {key: original_names(key, shape) for key, shape in own.items()}
    released = {name: shape for names in parts.values() for name, shape in names.items()}
    new_config = None
    if layout == "original":
        try:
            new_config = to_original(config, _pictures(processor), source)
        except ValueError:
            raise
        except Exception as error:  # of any kind, by what a released config.json said, which is kept there
            reason = " ".join(str(error).split())
            raise ValueError(f"{source / 'config.json'}: original cannot be used: {reason}") from error
    shards = Shards(source)
    files = other_files(source, shards)
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
    check_disk(Path(target), needed + sum((source / inner).stat().st_size for inner in files))
    with new_directory(target) as work:
        if new_config is None:
            config.save_pretrained(work)
        else:
            _write_original_config(work, new_config, config)
        if layout == "cumo" and EXPORTED in values and values["mm_vision_tower"] == TOWER_FOLDER:
            files = [inner for inner in files if inner != Path(TOWER_FOLDER, "config.json")]  # of the export
        if is_released and layout == "cumo" and EXPORTED not in values:
            copy_to_own(source, files, work, processor)
        elif new_config is not None and not is_released and EXPORTED not in new_config:
            _copy_to_original(source, files, work, processor)
        else:
            copy_files(source, files, work)
        check_content(work, config, processor)
        if remote_code:
            config.save_pretrained(work, remote_code=True)
            open_anywhere(work)
        write_shards(work, plan, lambda name: _dtype_of(shards, parts, name), shard_bytes, progress)
    return Path(target)


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str | None,
    shard_bytes: int,
    remote_code: bool = False,
) -> None:
    """The command `python -m cumo_model convert`: convert, and say what the copy lacks."""
    convert(source, target, layout, shard_bytes, remote_code=remote_code)
    if not has_tokenizer(target):
        print(f"{os.fspath(source)!r} has no tokenizer, so that the copy {no_tokenizer(target)}")


def _pictures(processor: CumoProcessor | None) -> dict[str, Any] | None:
    if processor is None:
        return None
    images = processor.image_processor
    is_tiled = images.image_aspect_ratio == "anyres"
    return {
        "image_aspect_ratio": images.image_aspect_ratio,
        "image_grid_pinpoints": list(map(list, images.image_grid_pinpoints)) if is_tiled else None,
    }


def check_disk(target: Path, needed: int) -> None:
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(f"{parent} must have {in_units(needed)} free, got {in_units(free)}")


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


def other_files(source: Path, shards: Shards) -> list[Path]:
    """Files beside config.json and the weights, relative to `source`; a warning names those left out."""
    read, found, left = set(shards.files.values()), [], []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names + [name for name in folders if Path(folder, name).is_symlink()]):
            path = Path(folder, name)
            inner = path.relative_to(source)
            if path in read or inner in (Path("config.json"), *map(Path, INDEXES)):
                continue
            if path.is_symlink():
                inside_checkpoint(source, str(inner))
            # also links to folders of the checkpoint, links to nothing, and pipes
            (found if path.is_file() and not name.endswith(NOT_COPIED) else left).append(inner)
    if left:
        warnings.warn(f"not copied from {source}: {', '.join(map(str, left))}", stacklevel=3)
    return found


def copy_files(source: Path, files: Iterable[Path], work: Path) -> None:
    """Copy files that `work` does not have yet."""
    for inner in files:
        if not (work / inner).exists():
            (work / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / inner, work / inner)


def copy_to_own(source: Path, files: list[Path], work: Path, processor: CumoProcessor | None) -> None:
    """Copy the other files and write the processor; files that it replaces are kept in KEPT."""
    if processor is not None:
        processor.save_pretrained(work)
    copy_files(source, [inner for inner in files if (work / inner).exists()], work / KEPT)
    copy_files(source, files, work)


def _copy_to_original(source: Path, files: list[Path], work: Path, processor: CumoProcessor | None) -> None:
    """Copy the other files. Those in KEPT replace the processor's if they give the same processor."""
    kept = [inner.relative_to(KEPT) for inner in files if inner.parts[0] == KEPT]
    files = [inner for inner in files if inner.parts[0] != KEPT]
    written = set() if processor is None else _files_of(processor)
    if processor is not None:
        before = {path for path in work.rglob("*") if path.is_file()}
        copy_files(source / KEPT, kept, work)
        copy_files(source, [inner for inner in files if inner not in written], work)
        try:
            found = describe(work)[1]
        except ValueError:
            found = None
        if same_processor(found, processor):
            return
        for path in {path for path in work.rglob("*") if path.is_file()} - before:
            path.unlink()
    copy_files(source, files, work)


def _files_of(processor: CumoProcessor) -> set[Path]:
    """The files that `save_pretrained` of a processor writes."""
    with tempfile.TemporaryDirectory(prefix="cumo-") as folder:
        processor.save_pretrained(folder)
        return {path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()}


def check_content(work: Path, config: CumoConfig, processor: CumoProcessor | None) -> None:
    """Check that the copy says of the model and its processor what the source says."""
    again, found = describe(work)
    if lost := differing(again, config):
        raise ValueError(f"the layout of the copy cannot describe {', '.join(lost)} of config.json")
    if not same_processor(found, processor):
        raise ValueError("the layout of the copy cannot describe the processor")
