"""Checks of the files, folders and packages that a recipe needs, with the standard library only."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from cumo_model.data.patterns import check_roots, matching
from cumo_model.processing.tokenizer_files import has_tokenizer, no_tokenizer

MODEL_PATHS = ("start", "vision", "language", "projector", "tokenizer")


def check_paths(model: Any, data: Any, output_dir: str | os.PathLike) -> None:
    """Check that what a recipe names exists, before anything is loaded.

    Args:
        model: the recipe's section `model`.
        data: the recipe's section `data`.
        output_dir: the folder of the run.

    Raises:
        ValueError: a file or folder is missing or of another kind, or output_dir cannot be the folder of a
            run; the message names the key.
    """
    _check_home({f"model.{name}": getattr(model, name) for name in MODEL_PATHS})
    _check_home({"data.files": data.files, "data.images": data.images, "data.cache_dir": data.cache_dir})
    if (model.start is None) == (model.vision is None or model.language is None):
        raise ValueError("model must have either start, or vision and language, got both or neither")
    for name in ("start", "vision", "language"):
        path = getattr(model, name)
        if path is None:
            continue
        _check_folder(f"model.{name}", path)
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ValueError(
                f"model.{name} must be a folder with a config.json, got {path!r}, which has none"
            )
    if model.tokenizer is not None:
        _check_folder("model.tokenizer", model.tokenizer)
    key = "start" if model.start is not None else "tokenizer"
    where = model.start or model.tokenizer or model.language
    if not has_tokenizer(where):
        raise ValueError(
            f"model.{key} must be a folder with a tokenizer, got {where!r}, which {no_tokenizer(where)}"
        )
    if model.projector is not None and not os.path.isfile(model.projector):
        raise ValueError(f"model.projector must be a file, got {model.projector!r}, which is not a file")
    if not data.files:
        raise ValueError("data.files must name at least one file, got none")
    for pattern in data.files:
        if not matching(pattern):
            raise ValueError(f"data.files must name files, got {pattern!r}, which does not exist")
        if os.path.isdir(pattern):
            raise ValueError(f"data.files must name files, got {pattern!r}, which is a folder")
    if not data.images and not any(pattern.endswith(".tar") for pattern in data.files):
        raise ValueError("data.images must name a folder or .tar files, got none")
    check_roots("data.images must name folders or .tar files", data.images)
    if data.cache_dir is not None:
        _check_place("data.cache_dir", data.cache_dir)
    check_output(output_dir, model)


def check_packages(model: Any, stage: Any) -> None:
    """Check that the packages that a recipe needs are installed.

    Args:
        model: the recipe's section `model`.
        stage: the recipe's section `stage`.

    Raises:
        ValueError: a package is missing; the message names the key, and the extra that installs it.
    """
    needed = [("stage.lora", stage.lora, "peft", "train")]
    needed.append(("model.quantize", model.quantize, "bitsandbytes", "quantize"))
    for key, value, package, extra in needed:
        if value is not None and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{key} needs the package {package}, which is not installed: pip install cumo[{extra}]"
            )


def _check_home(named: Mapping[str, Any]) -> None:
    for key, value in named.items():
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and os.fspath(path).startswith("~"):
                whole = os.path.expanduser(path)
                raise ValueError(
                    f"{key} must not begin with ~, which only a shell expands: write {whole!r}, got {path!r}"
                )


def _check_folder(key: str, path: str) -> None:
    if not os.path.isdir(path):
        raise ValueError(f"{key} must be a folder, got {path!r}, which is not a folder")


def _check_place(key: str, path: str) -> None:
    """A folder that can be written to, or can be created."""
    out = above = os.path.abspath(path)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        what = "is a file" if above == out else f"lies below the file {above!r}"
        raise ValueError(f"{key} must be a folder, got {path!r}, which {what}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{key} must be a folder that can be written to, got {path!r}: there is no permission to write "
            f"to {above!r}"
        )


def check_output(output_dir: str | os.PathLike, model: Any) -> None:
    """Check that a folder can be that of a run.

    Args:
        output_dir: the folder, which need not exist.
        model: the recipe's section `model`.

    Raises:
        ValueError: it is or lies below a file, cannot be written to, or contains or lies in a start model.
    """
    _check_home({"output_dir": output_dir})
    output_dir = os.fspath(output_dir)
    out = os.path.abspath(output_dir)
    _check_place("output_dir", output_dir)
    for name in ("start", "vision", "language"):
        path = getattr(model, name)
        if path is None or not os.path.isfile(os.path.join(path, "config.json")):
            continue  # loading reports it
        if os.path.commonpath([os.path.realpath(path), os.path.realpath(out)]) in (
            os.path.realpath(out),
            os.path.realpath(path),
        ):
            raise ValueError(
                f"output_dir must not contain model.{name} {path!r}, nor lie inside it, got {output_dir!r}"
            )
