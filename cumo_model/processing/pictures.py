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
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

SIDE = 65_535  # longest side in pixels, that of JPEG
MEMORY = 150_000_000  # bytes of a decoded file
OVERSHOOT = 1 / 16  # of the range 0 to 1: resizing of float pictures overshoots
# formats whose decoder holds more than the decoded pixels: bytes per pixel in addition
DECODERS = {"WEBP": 12, "AVIF": 8, "JPEG2000": 16, "TIFF": 4, "MPO": 0}
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
    """

    size: tuple[int, int]
    part: Callable[[int, int, int, int], Image.Image]
    is_unit: bool = False

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
        image = source if isinstance(source, Image.Image) else _open(source, named)
        _check_sides(image.size, named)
        is_decoded = not (isinstance(image, ImageFile.ImageFile) and (image.tile or image._im is None))
        if not is_decoded and needed(image) > MEMORY:
            image = _smaller(image, named)
        image.load()
        return image
    except FileNotFoundError:
        raise ValueError(f"{named} does not exist") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{named} is not a picture in a format that Pillow supports") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        raise ValueError(f"{named} cannot be read: {error or type(error).__name__}") from error


class _Refused(Exception):
    pass


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


def _file(text: str, named: str) -> str | bytes:
    """A path, or the content of a URL or of base64 text."""
    if text.startswith(("http://", "https://")):
        try:
            # some servers refuse the default name of Python
            request = urllib.request.Request(text, headers={"User-Agent": "cumo"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _Refused(f"{named} cannot be fetched: {error or type(error).__name__}") from None
    if text.startswith("file://"):
        return text.removeprefix("file://")
    if text.startswith("data:image/") or not os.path.exists(text):
        try:
            data = base64.b64decode("".join(text.split(",", 1)[-1].split()), validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if data and text.startswith("data:"):
            return data
        if data:
            try:
                with Image.open(io.BytesIO(data)):
                    return data
            except Exception:
                pass  # a path that could be base64 text
    return text


def _check_sides(size: tuple[int, int], named: str) -> None:
    if max(size) > SIDE:
        raise _Refused(f"{named} must have sides of at most {SIDE} pixels, got {size[0]} x {size[1]}")
    if min(size) < 1:
        raise _Refused(f"{named} must have at least one pixel, got {size[0]} x {size[1]}")


def needed(image: Image.Image) -> int:
    """Bytes of memory in which the file of an opened image is decoded, approximately."""
    bands = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}.get(image.mode, 4)
    extra = DECODERS.get(image.format or "", 0)
    if image.format in ("JPEG", "MPO") and "progressive" in image.info:
        extra += 6  # the coefficients of three channels
    return image.size[0] * image.size[1] * (bands + extra)


def _smaller(image: ImageFile.ImageFile, named: str) -> Image.Image:
    """The same file, opened again, so that it is decoded at a smaller size."""
    width, height = image.size
    if image.format in ("JPEG", "MPO") and image.fp is not None and "progressive" not in image.info:
        place = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(place)
        for factor in (2, 4, 8):
            again = Image.open(io.BytesIO(data))
            again.draft(None, (width // factor, height // factor))
            if needed(again) <= MEMORY:
                return again
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
    try:
        convert, is_unit = _converter(image)
    except _Refused as error:
        raise ValueError(f"{named} {error}") from None

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

    return Picture((height, width) if orientation >= 5 else (width, height), part, is_unit)


def _converter(image: Image.Image) -> tuple[Callable[[Image.Image], Image.Image], bool]:
    """A function that converts any part of `image` to RGB, and whether the image is float from 0 to 1."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        low, high = image.getextrema() if mode in ("I", "F") else (0, 65535)
        if mode == "F" and not _is_finite(image):
            raise _Refused("must have finite values, got NaN or infinity")
        kind = {"I": np.int32, "F": np.float32}.get(mode, np.uint16)
        if mode == "I" and image.format == "PNG":
            kind = np.uint16  # earlier releases of Pillow read 16-bit grey as I
        eight_bits, is_unit = _to_eight_bits(np.dtype(kind), low, high)
        return lambda part: Image.fromarray(eight_bits(np.asarray(part))).convert("RGB"), is_unit
    if mode == "LAB":
        srgb = ImageCms.createProfile("sRGB")
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, "LAB", "RGB")
        return lambda part: ImageCms.applyTransform(part, to_rgb), False
    by_way_of = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    if by_way_of is not None:
        return lambda part: part.convert(by_way_of).convert("RGB"), False
    return lambda part: part.convert("RGB"), False  # returns a copy if it is RGB


def _to_eight_bits(dtype: np.dtype, low: float, high: float) -> tuple[Callable, bool]:
    """A function that converts values of this dtype and range to uint8, and whether they are from 0 to 1."""
    if dtype == np.bool_:
        return lambda values: values.astype(np.uint8) * 255, False
    if dtype.kind == "f":
        if -OVERSHOOT <= low and high <= 1 + OVERSHOOT:
            return lambda values: _rounded(values, 255), True
        if -255 * OVERSHOOT <= low and 2 <= high <= 255 * (1 + OVERSHOOT):
            return lambda values: _rounded(values, 1), False
        raise _Refused(f"must have floats from 0 to 1 or from 0 to 255, got {low:g} to {high:g}")
    if low < 0 or high > 65535:
        raise _Refused(f"must have integers from 0 to 255 or from 0 to 65535, got {low} to {high}")
    if dtype == np.uint16 or high > 255:
        return lambda values: (values >> 8).astype(np.uint8), False
    return lambda values: values.astype(np.uint8), False


def _is_finite(image: Image.Image) -> bool:
    rows = ((top, min(top + 256, image.height)) for top in range(0, image.height, 256))
    return all(np.isfinite(np.asarray(image.crop((0, a, image.width, b)))).all() for a, b in rows)


def _rounded(values: np.ndarray, scale: int) -> np.ndarray:
    return np.rint(np.clip(values.astype(np.float32) * scale, 0, 255)).astype(np.uint8)


def _of_array(array: np.ndarray | torch.Tensor, named: str, input_data_format: str | None) -> Picture:
    values = array
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    shape = values.shape
    if values.ndim == 2:
        values = values[:, :, None]
    elif values.ndim == 3 and values.size:
        try:
            layout = ChannelDimension(
                input_data_format or infer_channel_dimension_format(values, (1, 2, 3, 4))
            )
        except ValueError:
            layout = None
        if layout == ChannelDimension.FIRST:
            values = values.transpose(1, 2, 0)
    if values.ndim != 3 or not values.size or not 1 <= values.shape[2] <= 4:
        raise ValueError(f"{named} must be (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels, got {shape}")
    if values.dtype.kind not in "buif":
        raise ValueError(f"{named} must be an array of numbers, got dtype {values.dtype}")
    if values.shape[2] != 3:  # alpha is dropped, and grey becomes three equal channels
        values = values[:, :, :3] if values.shape[2] == 4 else values[:, :, :1]
    try:
        _check_sides(values.shape[1::-1], named)
    except _Refused as error:
        raise ValueError(str(error)) from None
    try:
        eight_bits, is_unit = _to_eight_bits(values.dtype, values.min(), values.max())
    except _Refused as error:
        raise ValueError(f"{named} {error}") from None

    def part(left: int, top: int, right: int, bottom: int) -> Image.Image:
        found = eight_bits(values[top:bottom, left:right])
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(found, (*found.shape[:2], 3))))

    return Picture((values.shape[1], values.shape[0]), part, is_unit)
