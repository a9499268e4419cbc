"""Checkpoint files between our layout and that of the released SHI-Labs/CuMo checkpoints.

A tensor is copied from shard to shard, never a whole model: one output shard is in memory at a time. Before
anything is written, the names and shapes of the source are held against what its config.json promises.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cumo_model.config import CumoConfig
from cumo_model.cumo import CumoForConditionalGeneration
from cumo_model.files import new_directory
from cumo_model.layout import original_names
from cumo_model.original_config import TOWER_FOLDER, is_original, to_original

SHARD_BYTES = 2 * 1000**3
LAYOUTS = ("cumo", "original")
WEIGHTS, PICKLES = "model.safetensors", "pytorch_model.bin"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json", "config.json")

Shape = tuple[int, ...]


def own_layout(config: CumoConfig) -> dict[str, Shape]:
    """What a model of this config holds in our layout, name -> shape; built on the meta device."""
    with torch.device("meta"):
        model = CumoForConditionalGeneration(config)
    layout = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del layout["lm_head.weight"]
    return layout


def original_layout(config: CumoConfig) -> dict[str, Shape]:
    """The same in the original layout."""
    layout: dict[str, Shape] = {}
    for key, shape in own_layout(config).items():
        layout.update(original_names(key, shape))
    return layout


class Shards:
    """The tensors of a folder by name: `model*.safetensors`, or `pytorch_model*.bin` read without unpickling.

    Raises:
        ValueError: no such file, a damaged one, or one that holds more than tensors; the message names it.
    """

    def __init__(self, folder: str | os.PathLike, names: tuple[str, ...] = (WEIGHTS, PICKLES)):
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, Any] | None = None
        for path in self._paths(names):
            source = self._source(path)
            for name in source.keys():
                tensor = source.get_slice(name) if hasattr(source, "get_slice") else source[name]
                is_tensor = isinstance(tensor, Tensor)
                self.files[name] = path
                self.shapes[name] = tuple(tensor.shape if is_tensor else tensor.get_shape())
                self.dtypes[name] = tensor.dtype if is_tensor else DTYPES[tensor.get_dtype()]

    def _paths(self, names: tuple[str, ...]) -> list[Path]:
        for name in names:
            stem, suffix = name.rsplit(".", 1)
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                found = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                paths = [self.folder / file for file in found]
            else:
                paths = sorted(self.folder.glob(f"{stem}*.{suffix}"))
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise ValueError(f"{missing[0]} is missing: {index.name} names it")
            if paths:
                return paths
        raise ValueError(f"{self.folder} holds neither {' nor '.join(names)}")

    def _source(self, path: Path):
        if self._open is None or self._open[0] != path:
            self._open = None
            self._open = (path, _read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path))
        return self._open[1]

    def __getitem__(self, name: str) -> Tensor:
        source = self._source(self.files[name])
        return source.get_tensor(name) if hasattr(source, "get_tensor") else source[name]


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def _read_safetensors(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_bin(path: str | os.PathLike) -> dict[str, Tensor]:
    """A pickled file of tensors, mapped, without running what else a pickle may hold.

    Raises:
        ValueError: it is damaged or holds more than tensors.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # pickles fail in many ways; the user needs one line
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} is refused: it is damaged or holds more than tensors "
            f"({reason[0] if reason else error!r})"
        ) from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path} is refused: it must hold tensors by name")
    return values


def check_tensors(found: dict[str, Shape], wanted: dict[str, Shape], source: str) -> None:
    """ValueError that counts and names what is missing, unexpected or of another shape."""
    problems = []
    for what, names in (
        ("missing", wanted.keys() - found.keys()),
        ("not known", found.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{len(names)} {what} ({', '.join(sorted(names)[:3])})")
    wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    if wrong:
        first = wrong[0]
        problems.append(
            f"{len(wrong)} of another shape ({first} is {found[first]}, config.json says {wanted[first]})"
        )
    if problems:
        raise ValueError(
            f"{source} does not hold what its config.json promises: of {len(wanted)} tensors "
            f"{'; '.join(problems)}"
        )


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
        ValueError: names or shapes are not those of config.json, a file is damaged or is a pickle of more than
            tensors, the model has no form in the original layout, or `target` is there already.
    """
    source = Path(source)
    config_file = source / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{source} has no config.json")
    values = json.loads(config_file.read_text())
    if not is_original(values) and values.get("model_type") != CumoConfig.model_type:
        raise ValueError(
            f"{config_file} must be of model_type cumo, llava_mistral or llava_mixtral, "
            f"got {values.get('model_type')!r}"
        )
    is_theirs = is_original(values)
    layout = layout or ("cumo" if is_theirs else "original")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    config = CumoConfig.from_pretrained(source)
    config.architectures = [CumoForConditionalGeneration.__name__]
    ours = own_layout(config)
    parts = {key: original_names(key, shape) for key, shape in ours.items()}
    theirs = {name: shape for names in parts.values() for name, shape in names.items()}
    new_config = to_original(config) if layout == "original" else None
    shards = Shards(source)
    check_tensors(shards.shapes, theirs if is_theirs else ours, str(source))

    if is_theirs == (layout == "original"):
        plan = [(name, shape, lambda name=name: shards[name]) for name, shape in shards.shapes.items()]
    elif is_theirs:
        plan = [
            (key, shape, lambda key=key: _join(shards, parts[key], ours[key])) for key, shape in ours.items()
        ]
    else:
        plan = list(_split(shards, parts))
    with new_directory(target) as work:
        if new_config is None:
            config.save_pretrained(work)
        else:
            _write_original_config(work, new_config, config)
        _write_shards(work, plan, lambda name: _dtype_of(shards, parts, name), shard_bytes, progress)
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith(NOT_COPIED):
                shutil.copy(path, work / path.name)
    return Path(target)


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


def _write_shards(
    folder: Path,
    plan: list[tuple[str, Shape, Callable[[], Tensor]]],
    dtype_of: Callable[[str], torch.dtype],
    shard_bytes: int,
    progress: bool,
) -> None:
    """Write tensors in order, at most `shard_bytes` to a file, with the index that transformers reads."""
    files: list[list[tuple[str, Callable[[], Tensor]]]] = [[]]
    size = total = 0
    for name, shape, read in plan:
        nbytes = prod(shape) * dtype_of(name).itemsize
        if files[-1] and size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append((name, read))
        size, total = size + nbytes, total + nbytes
    names = (
        [WEIGHTS]
        if len(files) == 1
        else [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    )
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="writing",
        disable=not progress,
        mininterval=0.3 if sys.stderr.isatty() else 20,
    )
    with bar:
        for file, tensors in zip(names, files, strict=True):
            shard = {}
            for name, read in tensors:
                shard[name] = read().contiguous()
                bar.update(shard[name].nbytes)
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard
    if len(files) > 1:
        weight_map = {name: file for file, tensors in zip(names, files, strict=True) for name, _ in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
