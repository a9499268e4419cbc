"""File helpers: JSON objects, folders that are created atomically, and fingerprints of models on disk."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cumo_kernels.files import write_whole


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_whole(path, json.dumps(content, indent=1))


def in_units(size: int) -> str:
    """A number of bytes for a message: GB, below 0.1 GB in MB."""
    return f"{size / 1000**3:,.2f} GB" if size >= 10**8 else f"{size / 1000**2:,.2f} MB"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for messages of one line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Create a folder atomically.

    Yields a temporary folder beside `path`. At the end of the `with` block it is renamed to `path`; after an
    error it is deleted.

    Raises:
        ValueError: `path` exists and is not an empty folder; it is not changed.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already: choose another folder or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}-" + "?" * 8):
        warnings.warn(
            f"{stale} is left over from a killed run (or still being written): delete it if no run uses it",
            stacklevel=3,
        )
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield work
        work.chmod(0o755)
        os.replace(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


PROBES, PROBE = 8, 1024  # samples per tensor, and bytes per sample
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def fingerprint(folder: str | os.PathLike) -> str:
    """A digest of a model's config.json and of samples of each of its tensors, or of a single file.

    Training changes the digest, copying does not. It reads at most PROBES * PROBE bytes of a tensor, so that
    it is fast for large models.
    """
    digest = hashlib.sha256()
    folder = Path(folder)
    if folder.is_file():
        files = [folder]
    else:
        files = [folder / "config.json", *(p for p in folder.iterdir() if p.suffix in WEIGHTS)]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            for begin, end in _pieces(path, file):
                file.seek(begin)
                digest.update(file.read(end - begin))
    return digest.hexdigest()


def _pieces(path: Path, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Byte ranges to sample: per tensor in a safetensors file, over the whole of any other file."""
    size = path.stat().st_size
    spans = [(0, size)]
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(max(0, min(start, size) - 8)))
            offsets = [value["data_offsets"] for name, value in header.items() if name != "__metadata__"]
            spans = [(start + begin, start + end) for begin, end in offsets]
            yield 0, start
        except (ValueError, AttributeError, KeyError, TypeError):
            pass  # damaged; the loader reports it
    for begin, end in spans:
        if end - begin <= PROBES * PROBE:
            yield begin, end
            continue
        step = (end - begin - PROBE) / (PROBES - 1)
        for number in range(PROBES):
            piece = begin + int(number * step)
            yield piece, piece + PROBE
