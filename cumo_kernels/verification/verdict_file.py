"""self_check.json: the verdicts of self-checks on this machine, shared by its processes.

    [{"gpu": ..., "capability": 90, "sms": 132, "driver": ..., "torch": ..., "triton": ..., "code": ...,
      "switches": ..., "source": ..., "built": ..., "backend": "triton", "op": "expert_mlp",
      "dtype": "bfloat16", "passed": true, "cases": 4, "date": "2026-11-28", "until": 0, "reason": "",
      "command": ""}]

The file is in $CUMO_CACHE, else in $XDG_CACHE_HOME/cumo or ~/.cache/cumo; if none of these is writable, in
the user's own folder below the temporary one. A row is valid until `until`, in seconds since 1970; 0 means
for ever. A damaged file, or a folder that cannot be written or locked, is not an error.
"""

import contextlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cumo_kernels.files import user_cache, write_whole

NAME = "self_check.json"
KINDS = {
    **dict.fromkeys(("gpu", "driver", "torch", "triton", "code", "switches", "source", "built"), str),
    **dict.fromkeys(("backend", "op", "dtype", "date", "reason", "command"), str),
    **dict.fromkeys(("capability", "sms", "cases"), int),
    "until": (int, float),
    "passed": (bool, type(None)),  # None: inconclusive
}
# fields in which a newer row may differ from the row that it replaces
NEWER = ("source", "built", "passed", "cases", "date", "until", "reason", "command")


def _temporary() -> Path | None:
    return Path(tempfile.gettempdir()) / f"cumo-{os.getuid()}" if hasattr(os, "getuid") else None


def folders() -> list[Path]:
    """Folders where the file may be, in order of preference."""
    found = []
    with contextlib.suppress(RuntimeError):  # a user without a home directory
        found.append(user_cache())
    if (path := _temporary()) is not None:
        found.append(path)
    return found


def _is_own(folder: Path) -> bool:
    """Whether no other user can write there; a foreign file could declare wrong kernels correct."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _make(folder: Path) -> None:
    """Create the folder; OSError if that fails or if other users can write there."""
    if folder != _temporary():
        folder.mkdir(parents=True, exist_ok=True)
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
        raise PermissionError(f"other users can write in {folder}")


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not row.keys() >= KINDS.keys():
        return False
    fits = lambda name, kind: (
        isinstance(row[name], kind) and (name == "passed" or type(row[name]) is not bool)
    )
    return all(fits(name, kind) for name, kind in KINDS.items())


def _read(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    now = time.time()
    good = [row for row in rows if _is_row(row)] if isinstance(rows, list) else []
    return [row for row in good if not row["until"] or row["until"] > now]


def load() -> list[dict]:
    """The valid rows of all folders; of several for the same key, the user's own comes last."""
    trusted = [folder for folder in folders() if folder != _temporary() or _is_own(folder)]
    return [row for folder in reversed(trusted) for row in _read(folder / NAME)]


def keep(new: list[dict]) -> Path | None:
    """Save `new`, replacing rows for the same, atomically -> the path; None if it cannot be saved."""
    place = lambda row: sorted((name, str(row[name])) for name in KINDS if name not in NEWER)
    taken = [place(row) for row in new]
    for folder in folders():
        path = folder / NAME
        rows = [row for row in _read(path) if place(row) not in taken] + new
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        try:
            _make(folder)
            write_whole(path, text)
            return path
        except OSError:
            continue
    return None


def _lock_file() -> IO | None:
    for folder in folders():
        try:
            _make(folder)
            return (folder / NAME).with_suffix(".lock").open("a")
        except OSError:
            continue
    return None


@contextlib.contextmanager
def alone(head_start: float, seconds: float) -> Iterator[None]:
    """Lock: one process at a time of those that share the file, a node's rank 0 first; ends with its process.

    Args:
        head_start: seconds in which local rank 0 of torchrun may come first.
        seconds: the longest time to wait for another process.
    """
    file = None
    with contextlib.suppress(ImportError):
        import fcntl  # not on Windows

        file = _lock_file()
    if file is None:
        yield
        return
    with file:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            # waiting ranks only read, and may share the lock
            first = first or time.monotonic() > begin + head_start
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if first else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                if first:
                    break
                fcntl.flock(file, fcntl.LOCK_UN)
            except BlockingIOError:
                first = True  # another process checks or reads
            except OSError:  # this file system has no locks
                break
            time.sleep(0.1)
        yield
