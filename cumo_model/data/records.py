"""Readers of conversation files: LLaVA JSON lists, JSON lines, and .json members of tar shards.

`scan` reads one record at a time, so a file of any size needs the memory of one record. It continues after a
broken record. `check` reports all problems of a file.
"""

import json
import mmap
import os
import re
import tarfile
import unicodedata
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cumo_model.data.media import OTHER_SUFFIXES, names_a_file, picture_suffixes, unread_mark, unread_media
from cumo_model.data.pictures import Pictures
from cumo_model.data.shards import Member, read_shard
from cumo_model.processing.conversation import IMAGE_MARKER, render, reserved_marker, turn_problem
from cumo_model.processing.templates import get_template


@dataclass(frozen=True)
class Problem:
    """One problem of a conversation file.

    Attributes:
        file: name of the file.
        record: position in the file, from 0. None: the problem concerns the file itself.
        id: the record's id, or None.
        reason: description of the problem.
        fatal: False if the record can be loaded, but none of its labels are trained on.
        line: line on which the record begins, from 1.
    """

    file: str
    record: int | None
    id: Any
    reason: str
    fatal: bool = True
    line: int | None = None

    def __str__(self) -> str:
        if self.record is None:
            return f"{self.file}: {self.reason}"
        place = f"{self.file}:{self.line}" if self.line else self.file
        name = f" (id {self.id!r})" if self.id is not None else ""
        return f"{place}: record {self.record}{name}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """A record and its place in the file.

    Attributes:
        number: position in the file, from 0.
        line: line on which the record begins, from 1.
        offset: position in the file in bytes.
        length: length in bytes.
        value: the parsed record; None if it cannot be read.
        reason: the reason why it cannot be read, or None.
        beside: names of the picture members that belong to a record of a tar shard which names no picture.
    """

    number: int
    line: int
    offset: int
    length: int
    value: Any
    reason: str | None = None
    beside: tuple[str, ...] = ()


def scan(path: str | os.PathLike) -> Iterator[Row]:
    """Yield each record of a .json list, a .jsonl file or a .tar shard; a broken record has a `reason`.

    In a shard a record is a member `name.json`. If it has no key `image`, its pictures are the member
    `name.jpg`, or the members `name.0.jpg`, `name.1.jpg`, ... in the order of their names (also .png etc.).

    Raises:
        ValueError: the file cannot be read; the message begins with its name.
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
    """Read the record that `scan` found at this offset and length, in bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.read(length).decode("utf-8-sig"))


class _Repeated(ValueError):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise _Repeated(f"has the key {key!r} more than once")
    return found


def _parse(data: bytes) -> tuple[Any, str | None]:
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_repeats), None
    except _Repeated as error:
        return None, str(error)
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 text: {error}"
    except json.JSONDecodeError as error:
        return None, f"is not JSON: {error.msg} at its line {error.lineno}, column {error.colno}"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:  # for example an integer with thousands of digits
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
        shard = read_shard(path)
        records = [member for member in shard.members if member.name.endswith(".json")]
        names = {member.name.removesuffix(".json") for member in records}
        beside = _beside(shard.members, names, picture_suffixes())
        refused = _beside([Member(name, 0, 0) for name in shard.refused], names, picture_suffixes())
        unread, seen = _beside(shard.members, names, OTHER_SUFFIXES), set()
        with open(path, "rb") as file:
            for number, member in enumerate(records):
                file.seek(member.offset)
                value, reason = _parse(file.read(member.size))
                key, own = member.name.removesuffix(".json"), ()
                if isinstance(value, dict) and "image" not in value:
                    own = beside.get(key, ())
                    value = with_pictures(value, own)
                    if key in refused:
                        reason = f"has {refused[key][0]!r} beside it, which {shard.refused[refused[key][0]]}"
                if key in seen:
                    reason = reason or f"is the second member with the name {member.name!r}"
                elif key in unread:
                    reason = reason or f"has {unread[key][0]!r} beside it, but only pictures are read"
                seen.add(key)
                yield Row(number, number + 1, member.offset, member.size, value, reason, own)
        number = len(records)
        for name in sorted(shard.refused):
            if name.endswith(".json"):
                yield Row(number, number + 1, 0, 0, None, f"{name!r} {shard.refused[name]}")
                number += 1
        if shard.ends_early:
            yield Row(number, number + 1, os.path.getsize(path), 0, None, "the archive is truncated")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: is not an uncompressed tar file: {error}") from None


def _beside(members: list[Member], records: set[str], suffixes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Members with these suffixes by record: that with the longest name that begins theirs, up to a dot."""
    found: dict[str, list[str]] = {}
    for member in members:
        name, suffix = os.path.splitext(member.name)
        if suffix.lower() not in suffixes:
            continue
        while name not in records and "." in os.path.basename(name):
            name = os.path.splitext(name)[0]
        if name in records:
            found.setdefault(name, []).append(member.name)
    return {name: tuple(sorted(set(names), key=_natural)) for name, names in found.items()}


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def with_pictures(record: dict, names: Sequence[str]) -> dict:
    """A copy of the record with these picture names; the record itself if there are none."""
    return {**record, "image": names[0] if len(names) == 1 else list(names)} if names else record


def picture_names(record: dict) -> list[str]:
    """Picture names of a valid record (see `record_problem`), in the order of their markers."""
    image = record.get("image") or []
    return [image] if isinstance(image, str) else list(image)


_SPACE = re.compile(rb"[\s,]*")
# a string ends at the end of its line, so that a missing quote damages one line only
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
                yield Row(number, line, place, 0, None, "the file ends inside the list")
            elif _SPACE.match(data, place + 1).end() < len(data):
                line += _newlines(data, counted, place)
                yield Row(number, line, place, 0, None, "the file has more data after the end of the list")
            return
        line, counted = line + _newlines(data, counted, place), place
        if data[place : place + 1] == b"}":
            yield Row(number, line, place, 1, None, "unmatched }")
            number, place = number + 1, place + 1
            continue
        end = _element_end(data, place)
        value, reason = _parse(data[place : end or len(data)])
        if reason and end is None:
            reason = "the file ends inside this record"
        yield Row(number, line, place, (end or len(data)) - place, value, reason)
        number += 1
        following = end if reason is None else _next_record(data, place + 1, end)
        if following is None and reason is not None:
            return
        place = len(data) if following is None else following


def _newlines(data: mmap.mmap, start: int, end: int) -> int:
    return data[start:end].count(b"\n")


def _element_end(data: mmap.mmap, start: int) -> int | None:
    """End of the list element that begins at `start`; None if the file ends first."""
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
    """The next position after a broken record at which a record can be read."""
    for candidate in _RECORD.finditer(data, start):
        if end is not None and candidate.start() > end:
            return end
        stop = _element_end(data, candidate.start())
        value, reason = _parse(data[candidate.start() : stop or len(data)])
        if reason is None and isinstance(value, dict) and "conversations" in value:
            return candidate.start()
    return end


READ = ("id", "image", "conversations")  # keys of a record that have a meaning
_SURROGATE = re.compile("[\ud800-\udfff]")  # valid in JSON, but not accepted by tokenizers


def record_problem(record: Any) -> str | None:
    """The reason why a record is not a conversation with one `<image>` marker per picture, or None.

    Without a marker, `image` may also be null, "" or [].
    """
    if not isinstance(record, dict):
        return f"must be an object with conversations, got {type(record).__name__}"
    if "conversations" not in record:
        other = next((key for key in ("messages", "conversation", "dialog") if key in record), None)
        return "has no conversations" + (f", but {other}, which is not read" if other else "")
    problem = turn_problem(record["conversations"])
    if problem:
        return problem
    if len(record["conversations"]) % 2:
        return "the last question has no answer"
    for order, turn in enumerate(record["conversations"], 1):
        if _SURROGATE.search(turn["value"]):
            return f"turn {order} holds half of a surrogate pair, which is not a character"
        if is_blank(turn["value"]):
            return f"turn {order} is empty"
        problem = unread_media({key: turn[key] for key in turn if key not in ("from", "value")})
        if problem:
            return f"turn {order} {problem}"
    markers = sum(turn["value"].count(IMAGE_MARKER) for turn in record["conversations"])
    image = record.get("image")
    names = image if isinstance(image, list) else [image] if image not in (None, "") else []
    if not all(isinstance(name, str) and name for name in names):
        return f"image must be a file name or a list of them, got {image!r}"
    other = next((name for name in names if name.lower().endswith(OTHER_SUFFIXES)), None)
    if other:
        return f"image must name pictures, got {other!r}, which is a video or sound"
    problem = unread_media({key: record[key] for key in record if key not in READ}, names)
    if problem:
        return problem
    if isinstance(record.get("system"), str) and record["system"].strip():
        return "has a text under 'system', which is not read: the template has the system text"
    if "image" in record and not names and markers:
        return f"image must be a file name or a list of them where a turn holds {IMAGE_MARKER}, got {image!r}"
    images = len(names)
    problem = _mark_problem(record, markers, images)
    if problem:
        return problem
    if markers == 0 and images == 1:
        return f"names the image {picture_names(record)[0]!r} but no turn holds {IMAGE_MARKER}"
    if markers != images:
        return f"{markers} {IMAGE_MARKER} markers but {images} images"
    return None


def _mark_problem(record: dict, markers: int, images: int) -> str | None:
    """The reason why a question holds a placeholder that is not `<image>`, or None."""
    rest = {key: record[key] for key in record if key not in READ}
    is_unread = images > markers or (not images and names_a_file(rest))
    for order, turn in enumerate(record["conversations"], 1):
        if turn["from"] == "human":
            mark = unread_mark(turn["value"], 0 < images == markers, is_unread)
            if mark:
                only = f"only {IMAGE_MARKER} is read"
                return f"turn {order} holds {mark}, which would be trained on as text: {only}"
    return None


_INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks without a shape


def is_blank(text: str) -> bool:
    """Whether a text has no character that can be seen, as zero-width spaces have none."""
    return all(
        letter.isspace()
        or letter in _INVISIBLE
        or unicodedata.category(letter) in ("Cc", "Cf")
        or "variation selector" in unicodedata.name(letter, "").lower()
        for letter in text
    )


def row_problems(
    row: Row, path: str, pictures: Pictures | None, decode: bool, template: str
) -> list[Problem]:
    """The problems of one record of `scan`; at most one is returned."""
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
    """Yield every problem of a conversation file, in order.

    Args:
        path: a file that `scan` can read.
        image_root: as in `Pictures`; None: pictures are not checked.
        decode: also decode each picture, which finds truncated files and files that are not pictures.
        count: the first element is set to the number of records read so far.
        template: name of the template whose separators must not occur inside a turn.
    """
    for row, problems in checked_rows(path, image_root, decode, template):
        if row is not None and count is not None:
            count[0] = row.number + 1
        yield from problems


def checked_rows(
    path: str | os.PathLike, image_root, decode: bool, template: str
) -> Iterator[tuple[Row | None, list[Problem]]]:
    """Yield each record with its problems, in order; arguments as in `check`. Decodes pictures in parallel.

    A problem of the file itself, or of a .tar file of pictures, comes last, without a record.
    """
    get_template(template)
    name, row = os.fspath(path), None
    try:
        pictures = None if image_root is None else Pictures(image_root)

        def checked(row: Row) -> tuple[Row, list[Problem]]:
            return row, row_problems(row, name, pictures, decode, template)

        in_order = map if pictures is None or not decode else _in_order
        for row, problems in in_order(checked, scan(path)):
            yield row, problems
    except ValueError as error:
        yield None, [Problem(name, None, None, str(error).removeprefix(f"{name}: "))]
        return
    if row is None:
        yield None, [Problem(name, None, None, "holds no records")]


def _in_order(function: Callable, items: Iterable) -> Iterator:
    """`map` with a thread per core. Pillow decodes without the interpreter's lock."""
    has_affinity = hasattr(os, "sched_getaffinity")
    workers = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    waiting: deque = deque()
    remaining, failed = iter(items), None
    try:
        while True:
            try:
                waiting.append(pool.submit(function, next(remaining)))
            except StopIteration:
                break
            except ValueError as error:  # the items before it are still done
                failed = error
                break
            if len(waiting) > 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failed is not None:
            raise failed
    finally:
        pool.shutdown(cancel_futures=True)
