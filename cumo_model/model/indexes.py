"""Index files of sharded checkpoints: the files that they name must lie in the folder of the checkpoint."""

import os
from pathlib import Path

from cumo_kernels.files import inside
from cumo_model.model.json_files import read_object


def index_files(index: str | os.PathLike) -> list[Path]:
    """The files that an index such as model.safetensors.index.json names, each once, in order of name.

    Raises:
        ValueError: the index is damaged, or names a file outside its folder.
    """
    index = Path(index)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map of tensors and files, got {weight_map!r}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(f"{index}: the file of {tensor} must be a name, got {name!r}")
    return [_named(index, name) for name in sorted(set(weight_map.values()))]


def check_indexes(path: str | os.PathLike | None, subfolder: str | None = None) -> None:
    """Check the index files of a folder before transformers follows them; for a name of the hub, do nothing.

    Args:
        path: as in `from_pretrained`.
        subfolder: as in `from_pretrained`.

    Raises:
        ValueError: an index is damaged, or it or `transformers_weights` of config.json names a file outside
            the folder.
    """
    if path is None or not os.path.isdir(path):
        return
    folder = Path(path, subfolder or "")
    for index in sorted(folder.glob("*.index*.json")):
        index_files(index)
    try:
        named = read_object(folder / "config.json").get("transformers_weights")
    except ValueError:  # transformers reports it
        return
    if isinstance(named, str):
        _named(folder / "config.json", named)


def inside_checkpoint(folder: str | os.PathLike, name: str) -> Path:
    """`inside` for the files of a checkpoint."""
    return inside(folder, name, "copy the file, or make the folder itself the link")


def _named(source: Path, name: str) -> Path:
    try:
        return inside_checkpoint(source.parent, name)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
