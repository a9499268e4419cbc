"""Identities of runs: a folder of a run is used again only by the same training.

The identity of a run is recorded in JSON files of its folder. It counts from the first checkpoint on; before,
nothing was trained, and a repaired recipe replaces it. Records of earlier versions have other defaults and no
keys that were added later; what they mean is compared, not how they are written.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cumo_model.checkpoints.assemble import describe
from cumo_model.checkpoints.folders import fingerprint, write_json
from cumo_model.checkpoints.processors import template_for
from cumo_model.data.patterns import exists, record_files
from cumo_model.model.json_files import read_object
from cumo_model.processing.processor import DEFAULT_TEMPLATE
from cumo_model.training.recipe import ModelSection, Recipe
from cumo_model.training.run_folder import has_begun, is_first_process
from cumo_model.training.start import DEFAULT_TOP_K

OPAQUE = "content of "  # names whose values are digests, of no use in a message
SIZE = "bytes of "  # names that earlier versions do not record
STARTS = ("start", "vision", "language", "projector")  # of a recipe's section `model`
PATHS = ("data.files", "data.images", "model.tokenizer", *(f"model.{name}" for name in STARTS))
TRAINER = "trainer"  # key of the record of a recipe; its fields may change while a run has not finished


def claim(path: Path, wanted: dict, advice: str = "") -> None:
    """Record the identity of a run in `path`, or check that the recorded one is the same.

    Args:
        path: JSON file in the run's folder.
        wanted: identity of the run: name -> JSON value. Names that begin with OPAQUE have no readable values.
        advice: what else the user may do, for the error.

    Raises:
        ValueError: the run has a checkpoint or a result, and `path` is damaged or contains another identity;
            the message names what differs.
    """
    if not path.exists() or not has_begun(path.parent):
        _record(path, wanted)
        return
    found = read_object(path)
    if "records" in found:  # as earlier versions call it
        found["number of records"] = found.pop("records")
    known = {name: value for name, value in wanted.items() if name in found or not name.startswith(SIZE)}
    _compare(path.parent, found, known, advice)


def _record(path: Path, content: dict) -> None:
    """Write a record, on the first process only: the others do not know whether it holds the run's lock."""
    if is_first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def claim_recipe(path: Path, recipe: Recipe, fields: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """As `claim` for the identity of a recipe.

    A setting left out is the same as its default, or as the value of the model that the stage starts from.

    Args:
        path: JSON file in the run's folder.
        recipe: the recipe.
        fields: fields of the Trainer to record with it.

    Returns:
        The fields that were recorded before; None if the run has not begun, or an earlier version made it.

    Raises:
        ValueError: as `claim`; the message has the dotted names of the keys.
    """
    record = recipe.identity() | {TRAINER: fields or {}}
    if not path.exists() or not has_begun(path.parent):
        claim(path, record)
        return None
    old = read_object(path)
    before = old.pop(TRAINER, None)
    found, wanted = _settings(old), _settings(recipe.identity())
    found, wanted = ({**_settings(Recipe("none").identity()), **values} for values in (found, wanted))
    for key in ("data.template", "data.aspect"):
        if (found[key] is None) != (wanted[key] is None):
            usual = _of_start(recipe.model)[key]
            found[key], wanted[key] = (usual if v is None else v for v in (found[key], wanted[key]))
    moved = [key for key in PATHS if _moved(found.get(key), wanted.get(key))]
    _compare(path.parent, found | {key: wanted[key] for key in moved}, wanted)
    if moved:  # from now on the new places count, whatever comes to the old ones
        for section, _, name in (key.partition(".") for key in moved):
            old[section][name] = wanted[f"{section}.{name}"]
        _record(path, old if before is None else {**old, TRAINER: before})
    return before if isinstance(before, dict) else None


def claim_start(path: Path, model: ModelSection) -> None:
    """As `claim` for the content of the models that a stage starts from.

    If one is missing, nothing is compared: loading reports it, and a finished run does not need it.

    Raises:
        ValueError: as `claim`, also if an earlier stage was trained again.
    """
    named = {name: value for name in STARTS if (value := getattr(model, name)) is not None}
    if not all(os.path.exists(value) for value in named.values()):
        return
    wanted = {f"{OPAQUE}model.{name}": fingerprint(value) for name, value in named.items()}
    if path.is_file() and set(found := read_object(path)).isdisjoint(wanted):
        # earlier versions call them by their paths, which may have moved
        names = {os.path.basename(value): f"{OPAQUE}model.{name}" for name, value in named.items()}
        _record(path, {names.get(os.path.basename(key), key): digest for key, digest in found.items()})
    claim(path, wanted)


def _moved(old: Any, new: Any) -> bool:
    """Whether a path or pattern, or each of a list, is another one and nothing is left at the old one."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and old != new:
        return all(a == b or _moved(a, b) for a, b in zip(old, new, strict=True))
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    return old != new and exists(new) and not exists(old)


def record_fields(path: Path, fields: dict[str, Any]) -> None:
    """Record the fields of the Trainer with which a run goes on."""
    record = read_object(path)
    if record.get(TRAINER) != fields:
        write_json(path, record | {TRAINER: fields})


def sizes_of(files: Sequence[str], missing_ok: bool = False) -> dict[str, int]:
    """The sizes of record files, as an identity for `claim`.

    Args:
        files: names or patterns.
        missing_ok: whether names and patterns may fit no file.

    Raises:
        ValueError: a name or pattern fits no file.
    """
    found = []
    for pattern in files:
        try:
            found += record_files([pattern])
        except ValueError:
            if not missing_ok:
                raise
    return {f"{SIZE}{os.path.basename(file)}": os.path.getsize(file) for file in found}


def _compare(out: Path, found: dict, wanted: dict, advice: str = "") -> None:
    differ = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old != new:
            differ.append(key if key.startswith(OPAQUE) else f"{key} (was {old!r}, is {new!r})")
    if differ:
        raise ValueError(
            f"{out} is a run with another {', another '.join(differ)}: choose another output_dir{advice}"
        )


def _settings(identity: dict) -> dict[str, Any]:
    """Dotted key -> value, without settings that may differ."""
    seeds = identity.get("seed") or [None, None]
    found = dict(zip(("trainer.seed", "trainer.data_seed"), seeds, strict=True))
    for section, values in identity.items():
        if section != "seed":
            found |= _flat(section, values)
    for free in ("data.skip_bad", "stage.expert_exchange"):
        found.pop(free, None)
    for section in ("stage.lora", "model.router"):  # with keys they have no value of their own
        if found.get(section, 0) is None:
            del found[section]
    if found.get("model.top_k") is None:
        found["model.top_k"] = DEFAULT_TOP_K
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: v for inner, item in value.items() for key, v in _flat(f"{name}.{inner}", item).items()}


def _of_start(model: ModelSection) -> dict[str, Any]:
    """Template and aspect ratio of a stage whose recipe says nothing; None where the model has none."""
    if model.start is None:
        return {"data.template": DEFAULT_TEMPLATE, "data.aspect": "pad"}
    none = {"data.template": None, "data.aspect": None}
    if not os.path.isdir(model.start):  # loading reports it; a finished run does not need it
        return none
    processor = describe(model.start)[1]
    if processor is None:
        return none
    try:
        template = template_for(processor)
    except ValueError:
        template = None
    return {"data.template": template, "data.aspect": processor.image_processor.image_aspect_ratio}
