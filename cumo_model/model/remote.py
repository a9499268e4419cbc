"""Checkpoints that open where only their folder is known: `auto_map` in their files, and the module it names.

Tools that have never imported this package find the classes with `trust_remote_code=True`. transformers would
copy the source files of the classes into every folder that is saved later; here the folder has one module of
a few lines that imports the installed package.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cumo_kernels.files import write_whole

MODULE = "cumo_remote"
CODE = '''"""Names the classes of this checkpoint for trust_remote_code=True; they are in the package cumo."""

try:
    from cumo_model import (  # noqa: F401
        CumoConfig,
        CumoForConditionalGeneration,
        CumoImageProcessor,
        CumoModel,
        CumoProcessor,
        CumoVisionConfig,
        CumoVisionModel,
    )
except ModuleNotFoundError as error:
    if error.name != "cumo_model":
        raise
    told = "this checkpoint needs the package cumo, which is not installed here: pip install cumo"
    raise ImportError(told) from None
'''


class RemoteCodeMixin:
    """A class of this package that `auto_map` can name.

    Attributes:
        remote_classes: the Auto classes of transformers, and the class that each opens from a folder.
    """

    remote_classes: dict[str, str] = {}

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """As in transformers for classes of other packages; it has no effect on those of this package.

        transformers calls it for each class that it has found by `auto_map`, and from then on copies the
        source file of the class into every folder that is saved. Folders of this package need no such copy.
        """
        if not cls.__module__.startswith("cumo_model."):
            super().register_for_auto_class(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, remote_code: bool | None = None, **kwargs):
        """Save as transformers does.

        Args:
            save_directory: the folder.
            *args: as in transformers.
            remote_code: whether the folder also opens with `trust_remote_code=True` in programs that have not
                imported this package. None: as in the folder that this was loaded from, by default not.
            **kwargs: as in transformers.
        """
        with opening_anywhere(self, remote_code):
            found = super().save_pretrained(save_directory, *args, **kwargs)
            if is_remote(self):
                write_module(save_directory)
        return found


def is_remote(part: Any) -> bool:
    """Whether the `auto_map` of a config or a processor names the module of this package."""
    return any(map(_is_ours, _auto_map(part).values()))


def write_module(folder: str | os.PathLike) -> None:
    """Write the module that `auto_map` names."""
    write_whole(Path(folder, f"{MODULE}.py"), CODE)


@contextlib.contextmanager
def opening_anywhere(part: Any, remote_code: bool | None) -> Iterator[None]:
    """Inside the `with` block the `auto_map` of a config or a processor is what is to be saved.

    Args:
        part: the config or the processor; others than those of this package keep what they have.
        remote_code: as in `RemoteCodeMixin.save_pretrained`.

    Raises:
        ValueError: remote_code is True for a part that has no class for it.
    """
    classes = getattr(part, "remote_classes", {})
    if remote_code and not classes:
        raise ValueError(f"remote_code must be False for a {type(part).__name__}, got True")
    is_set, before = "auto_map" in vars(part), _auto_map(part)
    wanted = is_remote(part) if remote_code is None else remote_code
    auto_map = {name: value for name, value in before.items() if not _is_ours(value)}
    if wanted:
        auto_map |= auto_map_of(classes)
    if auto_map != before:
        vars(part).pop("auto_map", None)
        if auto_map:
            part.auto_map = auto_map
    try:
        yield
    finally:
        vars(part).pop("auto_map", None)
        if is_set:
            part.auto_map = before


def auto_map_of(classes: dict[str, str]) -> dict[str, str]:
    """The `auto_map` that names classes of this package."""
    return {auto: f"{MODULE}.{name}" for auto, name in classes.items()}


def _auto_map(part: Any) -> dict[str, Any]:
    found = vars(part).get("auto_map")
    return found if isinstance(found, dict) else {}


def _is_ours(value: Any) -> bool:
    """Whether a value of `auto_map` names our module, perhaps in a repository: owner/name--module.class."""
    return isinstance(value, str) and value.rpartition("--")[2].startswith(f"{MODULE}.")
