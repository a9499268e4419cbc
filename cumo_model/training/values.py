"""Types and ranges of the values of a recipe, checked when it is read, before torch is loaded."""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a setting may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Range:
    return Range(f"at least {low}", lambda value: value >= low)


def one_of(*names: Any) -> Range:
    words = [str(name) for name in names]
    text = " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
    return Range(text, lambda value: value in names)


NOT_NEGATIVE = Range("finite and not negative", lambda value: 0 <= value < math.inf)
POSITIVE = Range("finite and positive", lambda value: 0 < value < math.inf)
SHARE = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
UNIT = Range("from 0 to 1", lambda value: 0 <= value <= 1)
SEED = Range("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)  # the range of numpy


def check_range(key: str, value: Any, allowed: Range | None) -> None:
    """Check that a value of a key, or each item of a tuple, lies in a range; None always does.

    Raises:
        ValueError: the message names the key, the range and the value.
    """
    if allowed is None:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if item is not None and not allowed.holds(item):
            raise ValueError(f"{key} must be {allowed.words}, got {item!r}")


def check_known(name: str, known: Collection[str], place: str) -> None:
    """Check that a key is known.

    Raises:
        ValueError: the message names the nearest known key, or all keys if none is near.
    """
    if name in known:
        return
    if near := nearest(name, known):
        raise ValueError(f"{place}{name} is not a key: did you mean {place}{near}?")
    raise ValueError(f"{place}{name} is not a key; the keys are {', '.join(known)}")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that resembles `name` most, or None if none does."""
    found = difflib.get_close_matches(str(name), known, 1, 0.6)
    return found[0] if found else None


def check_section(section: Any, place: str, ranges: Mapping[str, Range]) -> None:
    """Check types and ranges of the fields of a dataclass, which may have been made in Python.

    Args:
        section: the dataclass.
        place: text before the name of a field in messages, such as "stage.".
        ranges: field -> its range.

    Raises:
        ValueError: the message names the field, what was wanted and what was got.
    """
    for field in fields(section):
        value = getattr(section, field.name)
        converted = typed(field, value, place)
        if type(converted) is not type(value) or converted != value:
            object.__setattr__(section, field.name, converted)  # sections are frozen
        check_range(f"{place}{field.name}", converted, ranges.get(field.name))


def typed(field: Field, value: Any, place: str) -> Any:
    """A value as the type of its field. Strings such as 1e-3, which YAML does not parse, become numbers.

    Raises:
        ValueError: the value is of another type.
    """
    if field.type is Any or (value is not None and value is field.default):
        return value
    wanted = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    key = f"{place}{field.name}"
    item = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", wanted)
    if item is not None:
        if value is None:
            return field.default
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_of_kind([item[1]], v, key) for v in items)
    return _of_kind([name.rpartition(".")[2] for name in wanted.split(" | ")], value, key)


def _of_kind(names: list[str], value: Any, key: str) -> Any:
    if "float" in names and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            value = float(value)
    if not any(type(value).__name__ == name for name in names) and not (value is None and "None" in names):
        raise ValueError(f"{key} must be of type {' | '.join(names)}, got {value!r}")
    return value


def required(field: Field) -> bool:
    """Whether a field of a dataclass has no default."""
    return field.default is MISSING and field.default_factory is MISSING
