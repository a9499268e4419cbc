"""Reading the files of benchmarks: JSON, JSON lines, tables, and pictures that are part of a file."""

import base64
import binascii
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cumo_model.processing.pictures import decode_image
from cumo_model.serving.questions import json_lines

CELL = 1 << 30  # characters of a cell of a table: a picture as base64 text


def found(folder: Path, *names: str) -> Path:
    """The first of several files or folders that exists.

    Raises:
        ValueError: there is none; all names are told.
    """
    for name in names:
        if (path := folder / name).exists():
            return path
    raise ValueError(f"{folder} must hold {' or '.join(names)}, got none of them" if len(names) > 1 else
                     f"{folder / names[0]} does not exist")  # fmt: skip


def folder_of(folder: Path, *names: str) -> Path:
    """The first of several folders that exists, or else the first: what is in it may not be needed."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: the file cannot be read, or is not text in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got other bytes at {error.start}") from None


def read_json(path: Path, kind: type) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        kind: dict or list.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise ValueError(f"{path} must hold {names[kind]}, got {type(value).__name__}")
    return value


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file of JSON lines, with its place for messages.

    Raises:
        ValueError: the file cannot be read, or a line holds something else.
    """
    for place, value in json_lines(read_text(path), path):
        if not isinstance(value, dict):
            raise ValueError(f"{place}: must be an object, got {type(value).__name__}")
        yield place, value


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a table in a TSV file; empty cells are "".

    Args:
        path: the file.
        columns: names that its first line must hold.

    Raises:
        ValueError: the file cannot be read, or lacks a column or a cell.
    """
    before = csv.field_size_limit(CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t")
            if missing := [name for name in columns if name not in (table.fieldnames or ())]:
                raise ValueError(
                    f"{path} must have the column {missing[0]}, got {table.fieldnames or 'nothing'}"
                )
            rows = list(table)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a table of text in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: must have {len(row) - (None in row)} cells")
    return rows


def value_of(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """A field of a record.

    Raises:
        ValueError: it is missing or of another type; the place is named.
    """
    if name not in record:
        raise ValueError(f"{place}: must have {name}, got {', '.join(map(str, record)) or 'nothing'}")
    value = record[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(one.__name__ for one in kinds)
        raise ValueError(f"{place}: {name} must be {wanted}, got {value!r:.80}")
    return value


class InlinePictures:
    """Pictures that are part of another file, decoded when they are asked for.

    Args:
        sources: name of a picture -> its bytes as base64 text or bytes, or a function that returns them.
    """

    def __init__(self, sources: Mapping[str, str | bytes | Callable[[], str | bytes]]):
        self._sources = sources

    def problem(self, name: str) -> str | None:
        """The reason why there is no picture with this name, or None."""
        return None if name in self._sources else f"image {name!r} does not exist"

    def load(self, name: str) -> Image.Image:
        """Decode a picture.

        Raises:
            ValueError: it is missing or damaged.
        """
        if problem := self.problem(name):
            raise ValueError(problem)
        source = self._sources[name]
        data = source() if callable(source) else source
        if isinstance(data, str):
            text = data.partition(",")[2] if data.startswith("data:") else data
            try:
                data = base64.b64decode("".join(text.split()), validate=True)
            except (binascii.Error, ValueError):
                raise ValueError(f"image {name!r} must be base64 text") from None
        return decode_image(data, name)
