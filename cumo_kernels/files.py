"""File helpers: atomic writes, names that must stay in a folder, and the location of the user's cache."""

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


def inside(folder: str | os.PathLike, name: str, advice: str = "") -> Path:
    """The path of a file that other data name, such as a picture of a record or a shard of an index.

    Args:
        folder: the file must be in this folder. The folder itself may be reached through links.
        name: path relative to `folder`.
        advice: what the user may do about a link, for the error.

    Raises:
        ValueError: the name is empty or absolute, has `..`, or a symbolic link in it leads out of the folder.
            Links into the blobs of the same repository of a Hugging Face cache are allowed.
    """
    path = Path(folder, name)
    if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{name!r} must be a path inside {os.fspath(folder)!r}")
    root, target = os.path.realpath(folder), os.path.realpath(path)
    roots = [root]
    parents = Path(root).parents
    roots += [str(parents[i + 1] / "blobs") for i, p in enumerate(parents) if p.name == "snapshots"]
    if not any(target == place or target.startswith(os.path.join(place, "")) for place in roots):
        raise ValueError(
            f"{name!r} is a link that leads out of {os.fspath(folder)!r}, to {target!r}"
            + (f"; {advice}" if advice else "")
        )
    return path


def user_cache() -> Path:
    """$CUMO_CACHE, else $XDG_CACHE_HOME/cumo or ~/.cache/cumo.

    Raises:
        RuntimeError: the user has no home directory.
    """
    if asked := os.environ.get("CUMO_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cumo"
