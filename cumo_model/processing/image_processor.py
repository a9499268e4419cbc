"""The image processor: pictures of any size and source -> normalised tiles of the tower's input size."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature, get_patch_output_size, select_best_resolution
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension, SizeDict, get_image_size_for_max_height_width
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorKwargs,
    LlavaNextImageProcessorPil,
)

from cumo_model.model.config import CumoConfig
from cumo_model.model.remote import RemoteCodeMixin
from cumo_model.processing.pictures import Picture, decode_image, read_picture
from cumo_model.processing.resizing import Canvas, Size, resize

ASPECT_RATIOS = ("pad", "square", "anyres")
CHANNELS_FIRST = ChannelDimension.FIRST
LARGE = 1 << 22  # pixels of a picture; of a large resized one only the part that is kept is computed


class CumoImageProcessorKwargs(LlavaNextImageProcessorKwargs, total=False):
    """
    image_aspect_ratio (`str`, *optional*):
        "pad", "square" or "anyres".
    """

    image_aspect_ratio: str


class CumoImageProcessor(RemoteCodeMixin, LlavaNextImageProcessorPil):
    """Image processor: pictures of any size -> pixel_values (tiles, 3, s, s) and image_sizes.

    A picture may be anything that `pictures.read_picture` reads. image_sizes is the (height, width) of each
    picture in pixels, upright. `image_aspect_ratio` has three values:

        pad      pad to a square with the mean colour, as in the later stages of CuMo
        square   crop the longer side to a square, as in the first stage of CuMo
        anyres   the whole picture as one tile, then the tiles of the best grid of `image_grid_pinpoints`; the
                 picture is resized to fit the grid, and the rest of the grid is black

    Tiles are then resized (bicubic, by Pillow, as in CuMo), scaled by 1/255 and normalised with the mean and
    standard deviation of CLIP. Without `do_rescale`, pictures given as floats from 0 to 1 keep this range.
    """

    remote_classes = {"AutoImageProcessor": "CumoImageProcessor"}
    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = CumoImageProcessorKwargs
    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    image_aspect_ratio = "pad"

    def fetch_images(self, image_url_or_urls):
        """Decode what is given as path, URL, bytes or file; other pictures and the nesting are kept."""
        given = image_url_or_urls
        if isinstance(given, list | tuple):
            return [self.fetch_images(one) for one in given]
        if isinstance(given, np.ndarray | torch.Tensor):
            return given[:, :, None] if given.ndim == 2 else given
        return given if isinstance(given, Image.Image) else decode_image(given)

    def process_image(self, image, input_data_format=None, **kwargs) -> Picture:
        """As in transformers, but the pixels are converted when they are resized."""
        return read_picture(image, input_data_format=input_data_format)

    def _preprocess(
        self,
        images: list[Picture],
        image_aspect_ratio: str,
        do_pad: bool | None,
        pad_size: Any,
        do_convert_rgb: bool | None,
        data_format: Any,
        crop_size: Any,
        do_center_crop: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"image_aspect_ratio must be one of {ASPECT_RATIOS}, got {image_aspect_ratio!r}")
        if image_aspect_ratio == "pad" and do_pad is False:
            raise ValueError("do_pad must not be False with image_aspect_ratio 'pad'; 'square' crops instead")
        if pad_size is not None:
            raise ValueError(f"pad_size must be None, pictures are padded to a square, got {pad_size}")
        if do_convert_rgb is False:
            raise ValueError("do_convert_rgb must not be False, the tower takes RGB")
        if data_format not in (None, CHANNELS_FIRST):
            raise ValueError(
                f"data_format must be channels_first, as the tower takes it, got {data_format!r}"
            )
        tiles = []
        for picture in images:
            for tile in self._tiles(
                picture, image_aspect_ratio, crop_size, do_center_crop, image_mean, **kwargs
            ):
                pixels = np.asarray(tile).transpose(2, 0, 1)
                if do_center_crop:
                    pixels = self.center_crop(pixels, crop_size)
                if do_rescale:
                    pixels = self.rescale(pixels, rescale_factor)
                elif picture.is_unit:
                    pixels = self.rescale(pixels, 1 / 255)
                if do_normalize:
                    pixels = self.normalize(pixels, image_mean, image_std)
                tiles.append(pixels)
        sizes = [picture.full_size[::-1] for picture in images]
        return BatchFeature({"pixel_values": tiles, "image_sizes": sizes}, tensor_type=return_tensors)

    def _tiles(
        self,
        picture: Picture,
        image_aspect_ratio: str,
        crop_size: SizeDict,
        do_center_crop: bool,
        image_mean: float | list[float] | None,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        image_grid_pinpoints: list[list[int]],
        **kwargs,
    ) -> list[Image.Image]:
        """The tiles of a picture, resized but not cropped; of a large one at least what the crop keeps."""
        # None and the interpolation modes of torchvision as in transformers
        resample = Image.Resampling.BICUBIC if resample is None else getattr(resample, "name", resample)
        resample = Image.Resampling[resample] if isinstance(resample, str) else Image.Resampling(resample)
        if image_aspect_ratio == "anyres":
            side = crop_size.height
            tiles = [resize(picture, (side, side), resample)]
            tiles += _grid(picture, image_grid_pinpoints, side, resample)
            if do_resize:
                tiles = [tile.resize(_target(tile.size, size), resample) for tile in tiles]
            return tiles
        canvas = None
        if image_aspect_ratio == "pad":
            means = image_mean if isinstance(image_mean, list | tuple) else [image_mean or 0] * 3
            canvas = Canvas.square(picture.size, tuple(int(255 * mean) for mean in means))
        area = picture.size if canvas is None else canvas.size
        target, window = _target(area, size) if do_resize else area, None
        large = LARGE if picture.size[0] * picture.size[1] > LARGE else 4 * LARGE
        if canvas is None and do_center_crop and target[0] * target[1] > large:
            kept = min(target[0], crop_size.width), min(target[1], crop_size.height)
            left, top = (target[0] - kept[0]) // 2, (target[1] - kept[1]) // 2
            window = (left, top, left + kept[0], top + kept[1])
        return [resize(picture, target, resample, canvas, window)]


def _like(size: Size) -> np.ndarray:
    """An array with the shape of a picture, for functions that read nothing else; it takes no memory."""
    return np.broadcast_to(np.uint8(0), (3, size[1], size[0]))


def _target(size: Size, wanted: SizeDict) -> Size:
    """Width and height after resizing to `wanted`, as in transformers."""
    if wanted.shortest_edge and wanted.longest_edge:
        found = get_size_with_aspect_ratio(size[::-1], wanted.shortest_edge, wanted.longest_edge)
    elif wanted.shortest_edge:
        found = get_resize_output_image_size(_like(size), wanted.shortest_edge, False, None, CHANNELS_FIRST)
    elif wanted.max_height and wanted.max_width:
        found = get_image_size_for_max_height_width(size[::-1], wanted.max_height, wanted.max_width)
    elif wanted.height and wanted.width:
        found = (wanted.height, wanted.width)
    else:
        raise ValueError(
            f"size must have height and width, max_height and max_width, or shortest_edge, got {dict(wanted)}"
        )
    return found[1], found[0]


def _grid(picture: Picture, pinpoints: list[list[int]], side: int, resample: int) -> list[Image.Image]:
    """The tiles of the grid that fits a picture best, row by row."""
    if not pinpoints:
        raise ValueError(f"image_grid_pinpoints must be given with anyres, got {pinpoints}")
    rows, columns = select_best_resolution(picture.full_size[::-1], pinpoints)
    height, width = get_patch_output_size(_like(picture.full_size), (rows, columns), CHANNELS_FIRST)
    grid = Image.new("RGB", (columns, rows))
    place = ((columns - width) // 2, (rows - height) // 2)
    grid.paste(resize(picture, (width, height), resample), place)
    places = [(left, top) for top in range(0, rows, side) for left in range(0, columns, side)]
    return [grid.crop((left, top, left + side, top + side)) for left, top in places]


AutoImageProcessor.register(CumoConfig, image_processor_classes={"pil": CumoImageProcessor})
