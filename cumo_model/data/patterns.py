"""Names and patterns of conversation files."""

import os
from pathlib import Path


def record_files(patterns: str | os.PathLike | list) -> list[str]:
    """Files that match one or several patterns (`*` and `?` as in a shell).

    The files of each pattern are sorted. A file that matches several patterns is listed once.

    Raises:
        ValueError: a pattern matches no file.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        pattern = os.fspath(pattern)
        if any(mark in pattern for mark in "*?["):
            anchor = Path(pattern).anchor
            files = sorted(map(str, Path(anchor or ".").glob(pattern.removeprefix(anchor))))
        else:
            files = [pattern] if os.path.exists(pattern) else []
        if not files:
            raise ValueError(f"{pattern}: the file does not exist")
        found += [file for file in files if file not in found]
    if not found:
        raise ValueError(f"data files must be one name or more, got {patterns!r}")
    return found
