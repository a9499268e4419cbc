"""Checkpoints in another layout than our own: whoever reads one registers it here.

Model code knows one layout, that of its state_dict. `cumo_model.checkpoints.original` registers the layout of
the released checkpoints when cumo_model is imported.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedConfig


class Layout(Protocol):
    model_types: Sequence[str]  # in its config.json

    def config_values(
        self, values: dict[str, Any], folder: str | os.PathLike | None = None
    ) -> dict[str, Any]:
        """Its config.json as keywords of CumoConfig."""

    def is_loader(self, cls: type) -> bool:
        """Whether `cls` is what `load` itself calls `from_pretrained` of."""

    def load(self, cls: type, path: str | os.PathLike, *args, **kwargs):
        """What `cls.from_pretrained(path, *args, **kwargs)` returns for a checkpoint in this layout."""


LAYOUTS: list[Layout] = []


def layout_of(values: dict[str, Any]) -> Layout | None:
    """The layout of a config.json; None for our own and for those nobody registered."""
    kind = values.get("model_type")
    return next((layout for layout in LAYOUTS if kind in layout.model_types), None)


def read_config(path: str | os.PathLike | None, **where) -> dict[str, Any]:
    """config.json of a folder or of the hub, as it is there; {} without one.

    Args:
        where: keywords of `from_pretrained`; revision, subfolder, cache_dir and token count.
    """
    if path is None:
        return {}
    known = {key: where[key] for key in ("revision", "subfolder", "cache_dir", "token") if key in where}
    try:
        return PreTrainedConfig.get_config_dict(path, **known)[0]
    except OSError:  # a folder of adapters or of a processor, or an error that transformers words
        return {}
