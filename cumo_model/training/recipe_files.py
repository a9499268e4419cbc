"""Reading of recipe files: YAML with a base recipe, and `key=value` overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SHIPPED = Path(__file__).with_name("recipes")


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(
        path.relative_to(SHIPPED).with_suffix("").as_posix()
        for path in SHIPPED.rglob("*.yaml")
        if not path.name.startswith("_") and path.parent != SHIPPED
    )


def read_recipe(path: Path, above: Sequence[Path] = ()) -> dict:
    """Read a YAML file and the recipes that it is based on.

    Args:
        path: the file.
        above: the files that are based on it.

    Raises:
        ValueError: a file cannot be read, contains no keys, or is based on itself.
    """
    if path.resolve() in [other.resolve() for other in above]:
        chain = " -> ".join(map(str, (*above, path)))
        raise ValueError(f"base must be another recipe, got a circle: {chain}")
    try:
        values = yaml.load(path.read_text(), OneValue)
    except FileNotFoundError:
        if above:
            raise ValueError(f"base of {str(above[-1])!r} must be a YAML file, got {str(path)!r}") from None
        names = ", ".join(shipped_recipes())
        raise ValueError(f"config must be a YAML file or one of {names}, got {str(path)!r}") from None
    except IsADirectoryError:
        key = f"base of {str(above[-1])!r}" if above else "config"
        raise ValueError(f"{key} must be a YAML file, got {str(path)!r}, which is a folder") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {str(path)!r} must contain keys and values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"base of {str(path)!r} must be the name of a YAML file, got {base!r}")
    return merge(read_recipe(path.parent / base, (*above, path)), values)


def merge(under: dict, over: dict) -> dict:
    """The keys of both dicts, also of the dicts inside; those of `over` replace others."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict:
    """The values of `key=value` strings, as nested dicts.

    Raises:
        ValueError: a string is none, or a key is given twice with different values.
    """
    found: dict = {}
    given: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"overrides must look like key=value, got {override!r}")
        try:
            value: Any = yaml.load(text, OneValue) if text else None
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r} is not YAML: {' '.join(str(error).split())}") from None
        for key, item in _leaves(value, name).items():
            for other in given:
                both = f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
                if both and (other != key or given[other] != item):
                    raise ValueError(
                        f"{key} must be given once, got {given[other]!r}"
                        + (f" for {other}" if other != key else "")
                        + f" and {item!r}"
                    )
            given[key] = item
        for key in reversed(name.split(".")):
            value = {key: value}
        found = merge(found, value)
    return found


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """Dotted name -> value of everything that an override sets."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {path: v for key, item in value.items() for path, v in _leaves(item, f"{name}.{key}").items()}


class OneValue(yaml.SafeLoader):
    """YAML in which a key may be given once only; PyYAML takes the last value without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                problem = None
                if not isinstance(key, yaml.ScalarNode):
                    problem = "a key must be a name, got a list or keys and values"
                elif (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is given twice"
                if problem is not None:
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)
