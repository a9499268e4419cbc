"""Registry of checkpoint layouts other than this project's own.

Model code handles one layout only, that of its state_dict. `cumo_model.checkpoints.original` registers the
layout of the released checkpoints, and the reader of image tokens, when cumo_model is imported.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedConfig


class Layout(Protocol):
    """What a registered layout must provide."""

    model_types: Sequence[str]  # values of model_type in its config.json

    def config_values(
        self, values: dict[str, Any], folder: str | os.PathLike | None = None
    ) -> dict[str, Any]:
        """Translate config.json of this layout to keyword arguments of CumoConfig."""

    def is_loader(self, cls: type) -> bool:
        """Whether `cls` is the class on which `load` itself calls `from_pretrained`."""

    def load(self, cls: type, path: str | os.PathLike, *args, **kwargs):
        """Load a checkpoint of this layout, as `cls.from_pretrained(path, *args, **kwargs)` would."""


LAYOUTS: list[Layout] = []
# function of a folder that returns the id of the image token of its tokenizer, None without a tokenizer
TOKEN_READERS: list[Callable[[Path], int | None]] = []


_known_token: ContextVar[int | None] = ContextVar("_known_token", default=None)


def layout_of(values: dict[str, Any]) -> Layout | None:
    """The registered layout of a config.json. None for this project's layout and for unregistered ones."""
    kind = values.get("model_type")
    return next((layout for layout in LAYOUTS if kind in layout.model_types), None)


def read_config(path: str | os.PathLike | None, **where: Any) -> dict[str, Any]:
    """Read config.json of a folder or a hub repository without translating it; {} if there is none.

    Args:
        path: folder or hub name; None gives {}.
        **where: keyword arguments of `from_pretrained`. Only revision, subfolder, cache_dir and token are
            used.
    """
    if path is None:
        return {}
    known = {key: where[key] for key in ("revision", "subfolder", "cache_dir", "token") if key in where}
    try:
        return PreTrainedConfig.get_config_dict(path, **known)[0]
    except OSError:  # a folder of adapters or of a processor, or an error that transformers reports later
        return {}


def image_token_of(path: str | os.PathLike | None, subfolder: str | None = None) -> int | None:
    """Id of the image token of the tokenizer in a folder; None without a folder or a readable tokenizer."""
    if (known := _known_token.get()) is not None:
        return known
    folder = Path(path or "", subfolder or "")
    if path is None or not folder.is_dir():
        return None
    return next((token for read in TOKEN_READERS if (token := read(folder)) is not None), None)


@contextmanager
def known_image_token(token: int) -> Iterator[None]:
    """Inside the `with` block `image_token_of` gives this id and reads no files."""
    before = _known_token.set(token)
    try:
        yield
    finally:
        _known_token.reset(before)
