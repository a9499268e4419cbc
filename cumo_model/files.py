"""JSON files that hold an object; folders that appear in one move, so that nobody reads half of one."""

import contextlib
import glob
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
