"""Conversation files, one record at a time: LLaVA JSON lists, JSON lines, .json members of tar shards.

`scan` reads a file of any size in the memory of one record and goes on behind a record that is broken;
`check` says everything that is wrong with a file.
"""

import json
import mmap
import os
import re
import tarfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cumo_model.data.pictures import PICTURE_SUFFIXES, Pictures
from cumo_model.processing.conversation import IMAGE_MARKER, render, reserved_marker, turn_problem
from cumo_model.processing.templates import get_template


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a conversation file."""

    file: str
    record: int | None  # position in the file from 0; None: the file itself
    id: Any
    reason: str
    fatal: bool = True  # False: the record loads, but none of its labels are trained on
    line: int | None = None  # from 1, where the record begins

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.file}: {self.reason}"
        place = f"{self.file}:{self.line}" if self.line else self.file
        name = f" (id {self.id!r})" if self.id is not None else ""
        return f"{place}: record {self.record}{name}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """A record where it stands; `value` is None and `reason` says why when it cannot be read."""

    number: int
    line: int
    offset: int  # bytes
    length: int
    value: Any
    reason: str | None = None
    beside: tuple[str, ...] = ()  # the pictures beside it in a tar shard, where it names none


def scan(path: str | os.PathLike) -> Iterator[Row]:
    """Yield every record of a .json list, a .jsonl file or a .tar shard, broken ones with the reason.

    In a shard a record is a member `name.json`. Where it names no picture, its pictures are the members
    `name.jpg`, or several `name.0.jpg`, `name.1.jpg` in the order of their names (or .png ...).

    Raises:
        ValueError: the file itself cannot be used; the message begins with its name.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: the file does not exist")
    try:
        if path.endswith(".tar"):
            yield from _scan_tar(path)
            return
        with open(path, "rb") as file:
            if os.path.getsize(path) == 0:
                raise ValueError(f"{path}: is not JSON: the file is empty")
            if path.endswith((".jsonl", ".ndjson")):
                yield from _scan_lines(file)
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield from _scan_list(path, data)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_row(path: str, offset: int, length: int) -> Any:
    """The record `scan` found there."""
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.read(length).decode("utf-8-sig"))


def _parse(data: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(data.decode("utf-8-sig")), None
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 text: {error}"
    except json.JSONDecodeError as error:
        return None, f"is not JSON: {error.msg} at its line {error.lineno}, column {error.colno}"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        return None, f"is not JSON that Python reads: {error}"


def _scan_lines(file) -> Iterator[Row]:
    number, offset = 0, 0
    for line, data in enumerate(file, 1):
        if data.strip():
            yield Row(number, line, offset, len(data), *_parse(data))
            number += 1
        offset += len(data)


def _scan_tar(path: str) -> Iterator[Row]:
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            members = [member for member in tar if member.isfile()]
            records = [member for member in members if member.name.endswith(".json")]
            beside = _pictures_beside(members, {member.name.removesuffix(".json") for member in records})
            for number, member in enumerate(records):
                file.seek(member.offset_data)
                value, reason = _parse(file.read(member.size))
                own: tuple[str, ...] = ()
                if isinstance(value, dict) and "image" not in value:
                    own = beside.get(member.name.removesuffix(".json"), ())
                    value = with_pictures(value, own)
                yield Row(number, number + 1, member.offset_data, member.size, value, reason, own)
            if members and _ends_early(file, members[-1]):
                place = os.path.getsize(path)
                reason = "the file ends before its archive does"
                yield Row(len(records), len(records) + 1, place, 0, None, reason)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: is not an uncompressed tar file: {error}") from None


def _ends_early(file, last: tarfile.TarInfo) -> bool:
    """Whether more should follow the last member that tarfile found: it takes a torn end for the end."""
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(0, os.SEEK_END)
    if file.tell() < last.offset_data + last.size:
        return True
    file.seek(end)
    return file.read(tarfile.BLOCKSIZE).strip(tarfile.NUL) != b""


def _pictures_beside(members: list[tarfile.TarInfo], records: set[str]) -> dict[str, tuple[str, ...]]:
    """Picture members by the record whose name theirs begins with, up to a dot; the longest name counts."""
    found: dict[str, list[str]] = {}
    for member in members:
        name, suffix = os.path.splitext(member.name)
        if suffix.lower() not in PICTURE_SUFFIXES:
            continue
        while name not in records and "." in os.path.basename(name):
            name = os.path.splitext(name)[0]
        if name in records:
            found.setdefault(name, []).append(member.name)
    return {name: tuple(sorted(names, key=_natural)) for name, names in found.items()}


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def with_pictures(record: dict, names: Sequence[str]) -> dict:
    """The record with these pictures as its own."""
    return {**record, "image": names[0] if len(names) == 1 else list(names)} if names else record


def picture_names(record: dict) -> list[str]:
    """The pictures of a record that `record_problem` has nothing against, in the order of their markers."""
    image = record.get("image", [])
    return [image] if isinstance(image, str) else list(image)


_SPACE = re.compile(rb"[\s,]*")
# a string ends at its line's end, so that a missing quote damages one line and not the rest of the file
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[\[\]{},]')
_RECORD = re.compile(rb'\{\s*"(?:id|image|conversations)"')


def _scan_list(path: str, data: mmap.mmap) -> Iterator[Row]:
    place = _SPACE.match(data, len(BOM_UTF8) if data[:3] == BOM_UTF8 else 0).end()
    if data[place : place + 1] != b"[":
        value, reason = _parse(data[:])
        raise ValueError(f"{path}: {reason or f'must hold a list of records, got {type(value).__name__}'}")
    number, line, counted = 0, 1, 0
    place += 1
    while True:
        place = _SPACE.match(data, place).end()
        if data[place : place + 1] in (b"]", b""):
            if data[place : place + 1] == b"":
                line += _newlines(data, counted, place)
                yield Row(number, line, place, 0, None, "the file ends before its list does")
            elif _SPACE.match(data, place + 1).end() < len(data):
                line += _newlines(data, counted, place)
                yield Row(number, line, place, 0, None, "the list ends here, and more follows")
            return
        line, counted = line + _newlines(data, counted, place), place
        if data[place : place + 1] == b"}":
            yield Row(number, line, place, 1, None, "} closes nothing")
            number, place = number + 1, place + 1
            continue
        end = _element_end(data, place)
        value, reason = _parse(data[place : end or len(data)])
        if reason and end is None:
            reason = "the file ends before this record does"
        yield Row(number, line, place, (end or len(data)) - place, value, reason)
        number += 1
        following = end if reason is None else _next_record(data, place + 1, end)
        if following is None and reason is not None:
            return
        place = len(data) if following is None else following


def _newlines(data: mmap.mmap, start: int, end: int) -> int:
    return data[start:end].count(b"\n")


def _element_end(data: mmap.mmap, start: int) -> int | None:
    """Where the list element that begins at `start` ends; None if the file ends first."""
    depth = 0
    for token in _TOKEN.finditer(data, start):
        mark = token.group()
        if mark in (b"{", b"["):
            depth += 1
        elif mark == b",":
            if depth == 0:
                return token.start()
        elif mark in (b"}", b"]"):
            if depth == 0:
                return token.start()
            depth -= 1
    return None


def _next_record(data: mmap.mmap, start: int, end: int | None) -> int | None:
    """The next place behind a broken record from which a record can be read."""
    for candidate in _RECORD.finditer(data, start):
        if end is not None and candidate.start() > end:
            return end
        stop = _element_end(data, candidate.start())
        value, reason = _parse(data[candidate.start() : stop or len(data)])
        if reason is None and isinstance(value, dict) and "conversations" in value:
            return candidate.start()
    return end


_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, no tokenizer reads it


def record_problem(record: Any) -> str | None:
    """Why a record is no conversation with one `<image>` marker for each of its pictures, or None."""
    if not isinstance(record, dict):
        return f"must be an object with conversations, got {type(record).__name__}"
    if "conversations" not in record:
        return "has no conversations"
    problem = turn_problem(record["conversations"])
    if problem:
        return problem
    if len(record["conversations"]) % 2:
        return "the last question has no answer"
    for order, turn in enumerate(record["conversations"], 1):
        if _SURROGATE.search(turn["value"]):
            return f"turn {order} holds half of a surrogate pair, which is no character"
    if "image" in record:
        names = record["image"] if isinstance(record["image"], list) else [record["image"]]
        if not names or not all(isinstance(name, str) and name for name in names):
            return f"image must be a file name or a list of them, got {record['image']!r}"
    markers = sum(turn["value"].count(IMAGE_MARKER) for turn in record["conversations"])
    images = len(picture_names(record))
    if markers == 0 and images == 1:
        return f"names the image {picture_names(record)[0]!r} but no turn holds {IMAGE_MARKER}"
    if markers != images:
        return f"{markers} {IMAGE_MARKER} markers but {images} images"
    return None


def row_problems(
    row: Row, path: str, pictures: Pictures | None, decode: bool, template: str
) -> list[Problem]:
    """What is wrong with one record of `scan`."""
    name = row.value.get("id") if isinstance(row.value, dict) else None
    reason = row.reason or record_problem(row.value)
    if reason is None and pictures is not None:
        found = (pictures.problem(name, decode) for name in picture_names(row.value))
        reason = next((problem for problem in found if problem), None)
    if reason is None and not get_template(template).instruct:
        try:
            render(row.value["conversations"], template)
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        return [Problem(path, row.number, name, reason, line=row.line)]
    for order, turn in enumerate(row.value["conversations"], 1):
        mark = reserved_marker([turn], template)
        if mark:
            reason = f"turn {order} holds {mark}, which the template uses: no label is trained on"
            return [Problem(path, row.number, name, reason, fatal=False, line=row.line)]
    return []


def check(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    decode: bool = False,
    count: list[int] | None = None,
    template: str = "mistral_instruct_system",
) -> Iterator[Problem]:
    """Yield every problem of a conversation file, in order; nothing when it is fine.

    Args:
        path: a file `scan` reads.
        image_root: what `Pictures` takes; None leaves the pictures unchecked.
        decode: decode each picture too, which finds cut-off and foreign files.
        count: its first element is set to the number of records read so far.
        template: whose marks no turn should hold.
    """
    get_template(template)
    name, count = os.fspath(path), [0] if count is None else count
    try:
        pictures = None if image_root is None else Pictures(image_root)
        for row in scan(path):
            count[0] = row.number + 1
            yield from row_problems(row, name, pictures, decode, template)
    except ValueError as error:
        yield Problem(name, None, None, str(error).removeprefix(f"{name}: "))
        return
    if count[0] == 0:
        yield Problem(name, None, None, "holds no records")


def record_files(patterns: str | os.PathLike | list) -> list[str]:
    """Files named by one pattern or several (`*` and `?` as in a shell), each sorted, without repetition.

    Raises:
        ValueError: a pattern fits no file.
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
