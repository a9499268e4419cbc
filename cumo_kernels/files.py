"""File helpers: atomic writes, and the location of the user's cache."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace `path` atomically, readable for all users; an error leaves no temporary file."""
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def user_cache() -> Path:
    """$CUMO_CACHE, else $XDG_CACHE_HOME/cumo or ~/.cache/cumo.

    Raises:
        RuntimeError: the user has no home directory.
    """
    if asked := os.environ.get("CUMO_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cumo"
