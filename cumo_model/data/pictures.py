"""Access to pictures by name, in folders and uncompressed tar shards; shards are not unpacked."""

import errno
import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cumo_kernels.files import inside
from cumo_model.data.shards import member_name, read_shard, resolve
from cumo_model.processing.pictures import decode_image, load_image, read_picture

KNOWN_DIRECTORIES = 100_000  # directories that are remembered as inside a root
# system errors that say what a file is; all others may be gone in the next moment
_OF_FILES = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EOVERFLOW,
}


def is_system_failure(error: BaseException) -> bool:
    """Whether a picture was not read because of the system (memory, open files, disk, rights), not itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return True
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _OF_FILES:
            return True
        cause = cause.__cause__
    return False


class Pictures:
    """The pictures of a data set.

    A root is a folder, a .tar file, or a pattern of .tar files. If several roots contain a name, the first
    .tar file with that name is used, or else the first folder. A name means the same in a folder and in a
    tar file of that folder. Links are followed inside the roots only.
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
        self._refused: dict[str, str] = {}  # name -> reason
        # of each .tar file with links to directories: its links, and the places of its members
        self._linked: list[tuple[dict[str, str], dict[str, tuple[int, int, int]]]] = []
        self._inside: set[tuple[str, str]] = set()  # folder, directory: names there need no further look
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
                found = read_shard(shard)
            except (OSError, tarfile.TarError) as error:
                raise ValueError(
                    f"image_root {str(shard)!r} is not an uncompressed tar file: {error}"
                ) from None
            # of two members with one name the last is used, as in the unpacked folder
            places = {m.name: (len(self.tars), m.offset, m.size) for m in found.members}
            for name, place in places.items():
                self._members.setdefault(name, place)
            for name, reason in found.refused.items():
                self._refused.setdefault(name, f"in {str(shard)!r} {reason}")
            if found.directories:
                self._linked.append((found.links, places))
            self.tars.append(str(shard))

    @property
    def _named(self) -> str:
        return repr(os.fspath(self.roots[0])) if len(self.roots) == 1 else repr([*map(os.fspath, self.roots)])

    def name_problem(self, name: str) -> str | None:
        """The reason why a name is that of no picture, whatever the folders hold, or None."""
        if os.path.isabs(name) or ".." in Path(name).parts:
            return f"image {name!r} must lie under image_root {self._named}"
        return None

    def place(self, name: str) -> str | tuple[int, int, int]:
        """The path of a picture, or its tar, offset and size.

        Raises:
            ValueError: there is none; the message says why.
        """
        problem = self.name_problem(name)
        if problem:
            raise ValueError(problem)
        if not name.endswith("/") and "\0" not in name:
            member = member_name(name)
            if member in self._members:
                return self._members[member]
            for links, places in self._linked:
                target = resolve(member, links)
                if target in places:
                    return places[target]
            for folder in self.folders:
                path = os.path.join(folder, name)
                if _is_file(path, name):
                    self._require_inside(folder, name)
                    return path
            if member in self._refused:
                raise ValueError(f"image {name!r} {self._refused[member]}")
            above = next((str(up) for up in Path(member).parents if str(up) in self._refused), None)
            if above:
                raise ValueError(f"image {name!r} does not exist: {above!r} {self._refused[above]}")
        raise ValueError(f"image {name!r} does not exist under {self._named}")

    def _require_inside(self, folder: str, name: str) -> None:
        """Refuse a link that leads out of all folders; each directory is looked at once."""
        directory = os.path.dirname(name)
        try:
            if (folder, directory) not in self._inside:
                inside(folder, directory or ".")
                if len(self._inside) >= KNOWN_DIRECTORIES:
                    self._inside.clear()
                self._inside.add((folder, directory))
            if os.path.islink(os.path.join(folder, name)):
                inside(folder, name)
        except ValueError as error:
            target = Path(os.path.realpath(os.path.join(folder, name)))
            if not any(target.is_relative_to(os.path.realpath(other)) for other in self.folders):
                raise ValueError(f"image {error}") from None

    def problem(self, name: str, decode: bool = False) -> str | None:
        """The reason why there is no picture with this name, or None."""
        try:
            if decode:
                read_picture(self.load(name), name)
            else:
                self.place(name)
        except ValueError as error:
            return str(error)
        return None

    def load(self, name: str) -> Image.Image:
        """Decode a picture completely; it is not converted to upright RGB yet, see `read_picture`.

        Raises:
            ValueError: the picture is missing, outside the roots, damaged, too large or not a picture; the
                message names it.
        """
        place = self.place(name)
        if isinstance(place, str):
            return decode_image(place)
        number, offset, size = place
        named = f"{name} in {self.tars[number]}"
        try:
            with open(self.tars[number], "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise ValueError(f"image {named!r} cannot be read: {error.strerror or error}") from error
        return decode_image(data, named)


def _is_file(path: str, name: str) -> bool:
    """As os.path.isfile, but a failure of the system is no answer."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if is_system_failure(error):
            raise ValueError(f"image {name!r} cannot be read: {error.strerror or error}") from error
        return False


class PixelReader:
    """Converts pictures to the tower's input with the image processor: pad, resize, crop, normalise."""

    def __init__(self, image_processor):
        self.image_processor = image_processor
        values = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (3, 256, 1))
        if image_processor.do_rescale:
            values = image_processor.rescale(values, image_processor.rescale_factor)
        if image_processor.do_normalize:
            mean, std = image_processor.image_mean, image_processor.image_std
            values = image_processor.normalize(values, mean, std)
        self._normalised = values[:, :, 0].astype(np.float32)  # of each channel and value of a pixel

    @property
    def side(self) -> int:
        """Side of the output in pixels."""
        return self.image_processor.crop_size["height"]

    def pixels(self, picture: Image.Image) -> Tensor:
        """A picture as (3, s, s) uint8, before normalisation."""
        is_tile = picture.size == (self.side, self.side)  # padding, resizing and cropping change nothing
        if is_tile or picture.mode == "F":  # the image processor would keep floats from 0 to 1 in this range
            picture = load_image(picture)
        if is_tile:
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        done = self.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ][0]
        return torch.from_numpy(np.ascontiguousarray(done).astype(np.uint8))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale and normalise as the image processor does, to the bit: (..., 3, s, s) uint8 -> fp32."""
        done = torch.empty(pixels.shape)
        for channel, table in enumerate(self._normalised):
            done[..., channel, :, :] = torch.from_numpy(table.take(pixels[..., channel, :, :].numpy()))
        return done
