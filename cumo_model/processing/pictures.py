"""Reading of pictures: from any source, upright, as 8-bit RGB, with little memory.

A picture has the same pixels whether it is given as a path, URL, bytes, opened PIL image, array or tensor:

- EXIF orientation is applied to files and PIL images.
- Transparency is dropped, as in the original code. Palettes, CMYK, YCbCr, HSV and LAB become RGB.
- 16 bits per channel: the high byte, as Pillow reads 16-bit RGB files.
- Integers above 8 bits (PIL mode I): 0 to 255 as they are, else up to 65535 the high byte.
- Floats (PIL mode F): 0 to 1 times 255, or 0 to 255 as they are, rounded. Overshoot of OVERSHOOT is clipped.

`Picture` converts parts when they are read, so that at most one decoded copy of a file is in memory. A file
that would need more than MEMORY is refused, or, if it is a JPEG, decoded at a half to an eighth of its size.
"""

import base64
import binascii
import http.client
import io
import os
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from transformers.image_utils import ChannelDimension

SIDE = 65_535  # longest side in pixels, that of JPEG
MEMORY = 150_000_000  # bytes of a decoded file
OVERSHOOT = 1 / 16  # of the range 0 to 1: resizing of float pictures overshoots
# formats whose decoder holds more than the decoded pixels: bytes per pixel in addition, fewer than it really
# takes, so that pictures of 12 megapixels pass; MEMORY leaves room for it
DECODERS = {"WEBP": 8.5, "AVIF": 8, "JPEG2000": 11}
JPEGS = ("JPEG", "MPO")
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        size: (width, height) in pixels, upright.
        part: function of (left, top, right, bottom) that returns this part as an RGB image.
        is_unit: whether the picture was given as floats from 0 to 1.
        full_size: size of the file's picture; `size` is smaller if a large JPEG was decoded smaller.
    """

    size: tuple[int, int]
    part: Callable[[int, int, int, int], Image.Image]
    is_unit: bool
    full_size: tuple[int, int]

    @property
    def image(self) -> Image.Image:
        """The whole picture as an RGB image."""
        return self.part(0, 0, *self.size)


def read_picture(source: Any, name: str | None = None, input_data_format: str | None = None) -> Picture:
    """Read a picture.

    Args:
        source: a path, a URL, a data URL or base64 text, the bytes of a file or an open binary file, a PIL
            image, or an array or tensor of shape (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels: grey,
            grey and alpha, RGB, or RGB and alpha.
        name: name of the picture in error messages; by default its path or URL.
        input_data_format: "channels_first" or "channels_last", if the shape of an array is ambiguous.

    Raises:
        ValueError: the picture is missing, damaged, too large, or not a picture; the message names it.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _of_array(source, f"image {name!r}" if name else "image", input_data_format)
    return _of_image(decode_image(source, name), _named(source, name))


def load_image(source: Any, name: str | None = None) -> Image.Image:
    """Read a picture completely as an upright RGB image; arguments and errors are those of `read_picture`."""
    return read_picture(source, name).image


def decode_image(source: Any, name: str | None = None) -> Image.Image:
    """Open and decode a picture file without converting it; a PIL image is decoded if it is not yet.

    Raises:
        ValueError: as `read_picture`.
    """
    named = _named(source, name)
    try:
        if not isinstance(source, Image.Image):
            image = _open(source, named)
            try:
                _check_sides(image.size, named)
                if needed(image) > MEMORY:
                    _decode_smaller(image, named)
                image.load()
            except BaseException:
                image.close()
                raise
            return image
        _check_sides(source.size, named)
        with _locks[id(source) // 16 % len(_locks)]:
            is_decoded = not (isinstance(source, ImageFile.ImageFile) and (source.tile or source._im is None))
            if is_decoded or needed(source) <= MEMORY:
                source.load()
                return source
            again = _opened_again(source)
        return decode_image(again, name or getattr(source, "filename", None))
    except _Refused:
        raise
    except FileNotFoundError:
        raise ValueError(f"{named} does not exist") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{named} is not a picture in a format that Pillow supports") from None
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise ValueError(f"{named} cannot be read: {reason}") from error


# for decoding images that callers have opened and may use in several threads, by the identity of the image
_locks = [threading.Lock() for _ in range(64)]


class _Refused(ValueError):
    """An error whose message is complete."""


def _named(source: Any, name: str | None) -> str:
    if name is None and isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    if name is None and isinstance(source, Image.Image):
        name = getattr(source, "filename", None)
    if not name or not isinstance(name, str):
        return "image"
    return f"image {name!r}" if len(name) <= 200 else f"image '{name[:60]}...'"


def _open(source: Any, named: str) -> Image.Image:
    if isinstance(source, str | os.PathLike):
        source = _file(os.fspath(source), named)
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    if not isinstance(source, str | os.PathLike) and not hasattr(source, "read"):
        raise _Refused(
            f"{named} must be a path, URL, bytes, PIL image, array or tensor, got {type(source).__name__}"
        )
    return Image.open(source)


def _opened_again(image: ImageFile.ImageFile) -> str | io.BytesIO:
    """The file of an image that a caller has opened and not decoded yet, whose object must not change."""
    if isinstance(image.filename, str) and os.path.isfile(image.filename):
        return image.filename
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    return io.BytesIO(data)


def _file(text: str, named: str) -> str | bytes:
    """A path, or the content of a URL or of base64 text."""
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        try:
            # some servers refuse the default name of Python
            request = urllib.request.Request(text, headers={"User-Agent": "cumo"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _Refused(f"{named} cannot be fetched: {str(error) or type(error).__name__}") from None
    if scheme.startswith("file://"):
        return urllib.request.url2pathname(text[len("file://") :])
    if text.startswith("data:image/") or not os.path.exists(text):
        try:
            data = base64.b64decode("".join(text.split(",", 1)[-1].split()), validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if text.startswith("data:"):
            if not data:
                raise _Refused(f"{named} is not base64 text")
            return data
        if data:
            try:
                with Image.open(io.BytesIO(data)):
                    return data
            except Image.DecompressionBombError:
                return data  # it is refused where it is opened
            except Exception:
                pass  # a path that could be base64 text
    return text


def _check_sides(size: tuple[int, int], named: str) -> None:
    if max(size) > SIDE:
        raise _Refused(f"{named} must have sides of at most {SIDE} pixels, got {size[0]} x {size[1]}")
    if min(size) < 1:
        raise _Refused(f"{named} must have at least one pixel, got {size[0]} x {size[1]}")


def needed(image: Image.Image) -> float:
    """Bytes of memory in which the file of an opened image is decoded, approximately."""
    pixels = image.size[0] * image.size[1]
    return pixels * (_stored(image.mode) + DECODERS.get(image.format or "", 0)) + _beside(image, pixels)


def _stored(mode: str) -> int:
    """Bytes in which Pillow stores a pixel."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def _beside(image: Image.Image, pixels: int) -> float:
    """Bytes that a decoder needs in addition, where this depends on the file."""
    if image.format in JPEGS and "progressive" in image.info:  # coefficients of 16 bits, of the full size
        channels = [(channel[1], channel[2]) for channel in getattr(image, "layer", ())] or [(1, 1)] * 3
        largest = max(h for h, _ in channels) * max(v for _, v in channels)
        return 2 * pixels * sum(h * v for h, v in channels) / largest
    if image.format == "TIFF":  # the rows of one strip
        rows = min(image.tag_v2.get(278, image.height), image.height)
        return min(3, _stored(image.mode)) * pixels * rows / image.height
    return 0


def _decode_smaller(image: Image.Image, named: str) -> None:
    """Let a large JPEG be decoded at a half to an eighth of its size; refuse other files."""
    (width, height), pixels = image.size, image.size[0] * image.size[1]
    beside = _beside(image, pixels)
    for factor in (2, 4, 8) if image.format in JPEGS else ():
        if pixels / factor**2 * _stored(image.mode) + beside <= MEMORY:
            image.draft(None, (width // factor, height // factor))
            image.full_size = (width, height)
            return
    raise _Refused(
        f"{named} must be decoded in at most {MEMORY // 1_000_000} MB of memory, got a {image.format} of "
        f"{width} x {height} pixels, mode {image.mode}, which needs {needed(image) / 1e6:.0f} MB"
    )


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 if there is none, or if its EXIF data are damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data do not make the picture unusable
        return 1
    return found if found in TURNS else 1


def _of_image(image: Image.Image, named: str) -> Picture:
    orientation, (width, height) = orientation_of(image), image.size
    convert, is_unit = _converter(image, named)

    def stored(x: int, y: int) -> tuple[int, int]:
        """The place in the file of a place in the upright picture."""
        if orientation >= 5:
            x, y = y, x
        mirrored = orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)
        return (width - x if mirrored[0] else x, height - y if mirrored[1] else y)

    def part(left: int, top: int, right: int, bottom: int) -> Image.Image:
        (a, b), (c, d) = stored(left, top), stored(right, bottom)
        box = (min(a, c), min(b, d), max(a, c), max(b, d))
        found = convert(image if box == (0, 0, width, height) else image.crop(box))
        found = found.transpose(TURNS[orientation]) if orientation in TURNS else found
        found.info = {}  # with an orientation that no longer holds
        return found

    full_size = getattr(image, "full_size", image.size)
    if orientation >= 5:
        return Picture((height, width), part, is_unit, full_size[::-1])
    return Picture((width, height), part, is_unit, full_size)


def _converter(image: Image.Image, named: str) -> tuple[Callable[[Image.Image], Image.Image], bool]:
    """A function that converts any part of `image` to RGB, and whether the image is float from 0 to 1."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        low, high = image.getextrema() if mode in ("I", "F") else (0, 65535)
        if mode == "F" and not _is_finite(image):
            raise ValueError(f"{named} must have finite values, got NaN or infinity")
        kind = {"I": np.int32, "F": np.float32}.get(mode, np.uint16)
        if mode == "I" and image.format == "PNG":
            kind = np.uint16  # earlier releases of Pillow read 16-bit grey as I
        eight_bits, is_unit = _to_eight_bits(np.dtype(kind), low, high, named)
        return lambda part: Image.fromarray(eight_bits(np.asarray(part))).convert("RGB"), is_unit
    if mode == "LAB":
        srgb = ImageCms.createProfile("sRGB")
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, "LAB", "RGB")
        return lambda part: ImageCms.applyTransform(part, to_rgb), False
    by_way_of = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    if by_way_of is not None:
        return lambda part: part.convert(by_way_of).convert("RGB"), False
    return _to_rgb, False


def _to_rgb(part: Image.Image) -> Image.Image:
    """A copy as RGB. Alpha is dropped; of a palette with alpha Pillow would warn."""
    if part.mode == "P" and "transparency" in part.info:
        part = part.copy()
        del part.info["transparency"]
    return part.convert("RGB")


def _to_eight_bits(dtype: np.dtype, low: float, high: float, named: str) -> tuple[Callable, bool]:
    """A function that converts values of this dtype and range to uint8, and whether they are from 0 to 1."""
    if dtype == np.bool_:
        return lambda values: values.astype(np.uint8) * 255, False
    if dtype.kind == "f":
        if -OVERSHOOT <= low and high <= 1 + OVERSHOOT:
            return lambda values: _rounded(values, 255), True
        if -255 * OVERSHOOT <= low and 2 <= high <= 255 * (1 + OVERSHOOT):
            return lambda values: _rounded(values, 1), False
        raise ValueError(f"{named} must have floats from 0 to 1 or from 0 to 255, got {low:g} to {high:g}")
    if low < 0 or high > 65535:
        raise ValueError(f"{named} must have integers from 0 to 255 or from 0 to 65535, got {low} to {high}")
    if (dtype.kind == "u" and dtype.itemsize == 2) or high > 255:
        return lambda values: (values >> 8).astype(np.uint8), False
    return lambda values: values.astype(np.uint8), False


def _is_finite(image: Image.Image) -> bool:
    rows = ((top, min(top + 256, image.height)) for top in range(0, image.height, 256))
    return all(np.isfinite(np.asarray(image.crop((0, a, image.width, b)))).all() for a, b in rows)


def _rounded(values: np.ndarray, scale: int) -> np.ndarray:
    return np.rint(np.clip(values.astype(np.float32) * scale, 0, 255)).astype(np.uint8)


def _is_channels_first(shape: tuple[int, ...], named: str, input_data_format: str | None) -> bool:
    if input_data_format is not None:
        return ChannelDimension(input_data_format) == ChannelDimension.FIRST
    first, last = shape[0], shape[2]
    for channels in ((3,), (1, 2, 3, 4)):  # three channels are the usual case
        if (first in channels) != (last in channels):
            return first in channels
    if first in channels:
        raise ValueError(
            f"{named} of shape {shape} may be (H, W, C) or (C, H, W): input_data_format must be given, "
            "channels_last or channels_first"
        )
    return False


def _of_array(array: np.ndarray | torch.Tensor, named: str, input_data_format: str | None) -> Picture:
    values = array
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        is_known = values.dtype in (torch.float16, torch.float32, torch.float64)
        values = (values.float() if values.is_floating_point() and not is_known else values).numpy()
    shape = values.shape
    if values.ndim == 2:
        values = values[:, :, None]
    elif values.ndim == 3 and _is_channels_first(shape, named, input_data_format):
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or not values.size or not 1 <= values.shape[2] <= 4:
        raise ValueError(f"{named} must be (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels, got {shape}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"{named} must be an array of numbers, got dtype {values.dtype}")
    if values.shape[2] != 3:  # alpha is dropped, and grey becomes three equal channels
        values = values[:, :, :3] if values.shape[2] == 4 else values[:, :, :1]
    _check_sides(values.shape[1::-1], named)
    eight_bits, is_unit = _to_eight_bits(values.dtype, values.min(), values.max(), named)

    def part(left: int, top: int, right: int, bottom: int) -> Image.Image:
        found = eight_bits(values[top:bottom, left:right])
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(found, (*found.shape[:2], 3))))

    size = values.shape[1], values.shape[0]
    return Picture(size, part, is_unit, size)
