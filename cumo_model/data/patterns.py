"""Names and patterns of conversation files and of the places of pictures; torch is not needed."""

import os
from collections.abc import Iterable
from pathlib import Path


def matching(pattern: str | os.PathLike) -> list[str]:
    """The files that match a pattern (`*` and `?` as in a shell), sorted; or the file of that name."""
    pattern = os.fspath(pattern)
    if not any(mark in pattern for mark in "*?["):
        return [pattern] if os.path.exists(pattern) else []
    anchor = Path(pattern).anchor
    return sorted(map(str, Path(anchor or ".").glob(pattern.removeprefix(anchor))))


def exists(pattern: str | os.PathLike) -> bool:
    """Whether there is a file or folder of this name, or one that matches the pattern."""
    return os.path.exists(pattern) or bool(matching(pattern))


def record_files(patterns: str | os.PathLike | list) -> list[str]:
    """Files that match one or several patterns.

    The files of each pattern are sorted. A file that matches several patterns is listed once.

    Raises:
        ValueError: a pattern matches no file.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        files = matching(pattern)
        if not files:
            raise ValueError(f"{os.fspath(pattern)}: the file does not exist")
        found += [file for file in files if file not in found]
    if not found:
        raise ValueError(f"data files must be one name or more, got {patterns!r}")
    return found


def check_roots(wanted: str, roots: Iterable[str]) -> None:
    """Check that the places of pictures are folders, .tar files, or patterns of .tar files.

    Args:
        wanted: the beginning of the message, such as "--images must be a folder or a .tar file".
        roots: the places.

    Raises:
        ValueError: one is missing, or is another file.
    """
    for root in roots:
        is_tar = root.endswith(".tar")
        if not os.path.exists(root) and not (is_tar and matching(root)):
            raise ValueError(f"{wanted}, got {root!r}, which does not exist")
        if not is_tar and not os.path.isdir(root):
            raise ValueError(f"{wanted}, got the file {root!r}")
