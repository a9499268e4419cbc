"""Files of ours: written in one move, and where a user's cache is."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, readable for all; an error leaves nothing beside it."""
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
        RuntimeError: the user has no home.
    """
    if asked := os.environ.get("CUMO_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cumo"
