"""JSON files that hold an object; folders that appear in one move, so that nobody reads half of one; what a
model on disk is known by."""

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


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file that holds an object; ValueError names the file that is missing, damaged or holds more."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` at the end of the `with`; an error leaves nothing.

    Raises:
        ValueError: `path` exists and is not an empty folder; it is left as it is.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already: choose another folder or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}-" + "?" * 8):
        warnings.warn(
            f"{stale} is what a run that was killed left (or one still writes): delete it", stacklevel=3
        )
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield work
        work.chmod(0o755)
        os.replace(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


PROBES, PROBE = 8, 1024  # of a tensor, and bytes of each
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def fingerprint(folder: str | os.PathLike) -> str:
    """A digest of a model's config.json and of pieces of each of its tensors, or of a single file.

    Training changes it, copying does not, and a large model takes a moment.
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
    """Where to look into a file: the tensors of a safetensors file, any other as one."""
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
            pass  # damaged: who loads it says so
    for begin, end in spans:
        if end - begin <= PROBES * PROBE:
            yield begin, end
            continue
        step = (end - begin - PROBE) / (PROBES - 1)
        for number in range(PROBES):
            piece = begin + int(number * step)
            yield piece, piece + PROBE
