"""Tensor files: read by name without unpickling, check names and shapes, write shards."""

import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cumo_model.model.indexes import index_files

WEIGHTS, PICKLES = "model.safetensors", "pytorch_model.bin"

Shape = tuple[int, ...]


class Shards:
    """The tensors of a folder by name, from `model*.safetensors` or from `pytorch_model*.bin`.

    `.bin` files are read without unpickling other objects than tensors.

    Raises:
        ValueError: a file is missing or damaged, contains more than tensors, or lies outside the folder; the
            message names it.
    """

    def __init__(self, folder: str | os.PathLike, names: tuple[str, ...] = (WEIGHTS, PICKLES)):
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, Any] | None = None
        self._begins: dict[str, int] = {}  # first byte in a .safetensors file
        self._mapped = 0  # bytes that `read` has read of an open file
        for path in self._paths(names):
            source = self._source(path)
            if path.suffix == ".safetensors":
                self._begins |= _begins(path)
            for name in source.keys():
                tensor = source.get_slice(name) if hasattr(source, "get_slice") else source[name]
                is_tensor = isinstance(tensor, Tensor)
                self.files[name] = path
                self.shapes[name] = tuple(tensor.shape if is_tensor else tensor.get_shape())
                kind = tensor.dtype if is_tensor else DTYPES.get(tensor.get_dtype())
                if kind is None:
                    raise ValueError(f"{name} of {path} must be of {list(DTYPES)}, got {tensor.get_dtype()}")
                self.dtypes[name] = kind
        self._open = None

    def _paths(self, names: tuple[str, ...]) -> list[Path]:
        for name in names:
            stem, suffix = name.rsplit(".", 1)
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                paths = index_files(index)
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

    def read(self, name: str, first: int | None = None) -> Tensor:
        """A tensor, or one element of its first dimension, for large files that are read piece by piece.

        Pages of a mapped file that have been read stay in this process's memory. A .safetensors file is not
        mapped, nor is its header parsed again; others are opened again after MAPPED bytes.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        path, shape = self.files[name], self.shapes[name]
        shape = shape if first is None else shape[1:]
        nbytes = prod(shape) * self.dtypes[name].itemsize
        if name in self._begins:
            self._open = None
            begin = self._begins[name] + (first or 0) * nbytes
            return _read_bytes(path, begin, nbytes).view(self.dtypes[name]).view(shape)
        if self._mapped > MAPPED or (self._open is not None and self._open[0] != path):
            self._open, self._mapped = None, 0
        self._mapped += nbytes
        source = self._source(path)
        return source[name] if first is None else source[name][first]


MAPPED = 1 << 26

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _read_safetensors(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _begins(path: Path) -> dict[str, int]:
    """Where the tensors of a .safetensors file, which has been checked, begin."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def _read_bytes(path: Path, begin: int, count: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=torch.uint8)
    data = bytearray(count)
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            found = file.readinto(data)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if found != count:
        raise ValueError(f"{path} is damaged: it has become shorter while it was read")
    return torch.frombuffer(data, dtype=torch.uint8)


def read_bin(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a pickled file of tensors, memory-mapped, without running code from the pickle.

    Raises:
        ValueError: the file is damaged or contains more than tensors.
    """
    try:
        with warnings.catch_warnings():  # torch's advice about pickles that it then refuses
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # files of releases of torch before 1.6 are no zip files and cannot be mapped
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} must be a file, got a folder") from None
    except Exception as error:  # a damaged pickle can raise any exception; report it in one line
        raise ValueError(refusal(path, error)) from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path} is refused: it must hold tensors by name; {CONVERT}")
    return values


CONVERT = "if you trust its source, load it there and save its tensors by name as .safetensors"


def refusal(path: str | os.PathLike, error: BaseException) -> str:
    """Why a pickled file is not read, without the advice of torch's message, which is to run its code."""
    lines = str(error).strip().splitlines()
    is_advice = is_refused_pickle(error)
    reason = "" if is_advice or not lines else f" ({lines[0]})"
    what = "it holds more than tensors" if is_advice else "it is damaged or holds more than tensors"
    return f"{path} is refused: {what}{reason}; {CONVERT}"


def is_refused_pickle(error: BaseException) -> bool:
    """Whether torch has refused to run code from a pickle."""
    return "weights_only" in str(error) or "Weights only" in str(error)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled file as in `read_bin`."""
    if not os.fspath(path).endswith(".safetensors"):
        return read_bin(path)
    source = _read_safetensors(Path(path))
    return {name: source.get_tensor(name) for name in source.keys()}


def check_tensors(found: dict[str, Shape], wanted: dict[str, Shape], source: str) -> None:
    """Compare names and shapes of tensors with the expected ones.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message counts and names them.
    """
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
            f"{source} does not match config.json: of {len(wanted)} tensors {'; '.join(problems)}"
        )


def write_shards(
    folder: Path,
    plan: list[tuple[str, Shape, Callable[[], Tensor]]],
    dtype_of: Callable[[str], torch.dtype],
    shard_bytes: int,
    progress: bool,
) -> None:
    """Write tensors in order, at most `shard_bytes` per file, with an index for transformers."""
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
            path = folder / file
            try:
                path.touch()
                mode = path.stat().st_mode  # as the umask wants it; safetensors writes for the owner alone
                save_file(shard, path, metadata={"format": "pt"})
                path.chmod(mode)
            except (SafetensorError, OSError) as error:  # such as a full disk
                raise ValueError(f"{path} cannot be written: {error}") from None
            del shard
    if len(files) > 1:
        weight_map = {name: file for file, tensors in zip(names, files, strict=True) for name, _ in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
