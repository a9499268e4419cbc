"""Access to pictures by name, in folders and uncompressed tar shards; shards are not unpacked."""

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cumo_model.processing.pictures import load_image

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class Pictures:
    """The pictures of a data set.

    A root is a folder, a .tar file, or a pattern of .tar files. If several roots contain a name, the first
    .tar file with that name is used, or else the first folder.
    """

    def __init__(self, roots: str | os.PathLike | Sequence[str | os.PathLike]):
        """Index the .tar files.

        Args:
            roots: one root or several.

        Raises:
            ValueError: a .tar file is missing, compressed or damaged.
        """
        self.roots = [roots] if isinstance(roots, str | os.PathLike) else list(roots)
        self.folders = [os.fspath(root) for root in self.roots if not os.fspath(root).endswith(".tar")]
        self.tars: list[str] = []
        self._members: dict[str, tuple[int, int, int]] = {}  # name -> tar, offset, size
        for root in map(os.fspath, self.roots):
            if root.endswith(".tar"):
                self._index(root)

    def _index(self, pattern: str) -> None:
        path = Path(pattern)
        shards = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else [path]
        if not shards:
            raise ValueError(f"image_root {pattern!r} fits no tar file")
        for shard in shards:
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        if member.isfile():
                            place = (len(self.tars), member.offset_data, member.size)
                            self._members.setdefault(member.name.removeprefix("./"), place)
            except (OSError, tarfile.TarError) as error:
                raise ValueError(
                    f"image_root {str(shard)!r} is not an uncompressed tar file: {error}"
                ) from None
            self.tars.append(str(shard))

    @property
    def _named(self) -> str:
        return repr(os.fspath(self.roots[0])) if len(self.roots) == 1 else repr([*map(os.fspath, self.roots)])

    def _file(self, name: str) -> str | None:
        for folder in self.folders:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
        return None

    def problem(self, name: str, decode: bool = False) -> str | None:
        """The reason why there is no picture with this name, or None."""
        if os.path.isabs(name) or ".." in Path(name).parts:
            return f"image {name!r} must lie under image_root {self._named}"
        if name not in self._members and self._file(name) is None:
            return f"image {name!r} does not exist under {self._named}"
        if decode:
            try:
                self.load(name)
            except ValueError as error:
                return str(error)
        return None

    def load(self, name: str) -> Image.Image:
        """Decode a picture completely, as RGB.

        Raises:
            ValueError: the picture is missing, truncated or not a picture; the message names it.
        """
        if name not in self._members:
            return load_image(self._file(name) or os.path.join(*self.folders[:1], name))
        number, offset, size = self._members[name]
        with open(self.tars[number], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {name!r} in {self.tars[number]!r} cannot be read: {error}") from error


class PixelReader:
    """Converts pictures to the tower's input with the image processor: pad, resize, crop, normalise."""

    def __init__(self, image_processor):
        self.image_processor = image_processor
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        # (pixel / 255 - mean) / std as one multiply and one add
        self._scale, self._shift = 1 / (255 * std), -mean / std

    @property
    def side(self) -> int:
        """Side of the output in pixels."""
        return self.image_processor.crop_size["height"]

    def pixels(self, picture: Image.Image) -> Tensor:
        """A picture as (3, s, s) uint8, before normalisation."""
        if picture.size == (self.side, self.side):  # padding, resizing and cropping change nothing
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        done = self.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ][0]
        return torch.from_numpy(np.ascontiguousarray(done).astype(np.uint8))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale and normalise as the image processor does: (..., 3, s, s) uint8 -> fp32."""
        return pixels.to(torch.float32).mul_(self._scale).add_(self._shift)
