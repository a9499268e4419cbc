"""Each option of the image processor has its effect, for pictures that are not square, by hand."""

from enum import Enum

import numpy as np
import pytest
import torch
from PIL import Image

from cumo_model.data.pictures import PixelReader
from cumo_model.processing.image_processor import CumoImageProcessor
from cumo_model.processing.pictures import read_picture
from cumo_model.processing.resizing import Canvas

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
# as torchvision's InterpolationMode, which saved processors may have
Interpolation = Enum("Interpolation", {"NEAREST": "nearest", "LANCZOS": "lanczos"})
MEAN, STD = [0.25, 0.5, 0.75], [0.5, 0.25, 0.2]
RAW = {"do_rescale": False, "do_normalize": False}


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _processor(**options) -> CumoImageProcessor:
    return CumoImageProcessor(
        **{"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, **options}
    )


def _tiles(processor, image, **options) -> list[np.ndarray]:
    """The tiles as (H, W, 3), before rescaling and normalisation."""
    found = processor(image, **RAW, return_tensors="np", **options)["pixel_values"]
    return [tile.transpose(1, 2, 0) for tile in found]


def _is(found: np.ndarray, wanted: Image.Image) -> bool:
    return np.array_equal(found, np.asarray(wanted))


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    return (values.astype(np.float64) * factor).astype(np.float32)


def _normal(values: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    return (values.astype(np.float32) - np.float32(mean)) / np.float32(std)


def test_pixels_are_scaled_then_normalised_per_channel():
    image = _noise(30, 40)
    processor = _processor(image_mean=MEAN, image_std=STD, rescale_factor=1 / 130)
    (raw,) = _tiles(processor, image)
    assert not np.array_equal(raw, _tiles(_processor(), image)[0])  # padding has the colour of the mean
    square = Image.new("RGB", (40, 40), (127, 127, 127))
    square.paste(image, (5, 0))
    grey = np.asarray(square.resize((24, 24), BICUBIC))
    for options, wanted in (
        ({}, _normal(_scaled(raw, 1 / 130), MEAN, STD)),
        ({"do_rescale": False}, _normal(raw, MEAN, STD)),
        ({"do_normalize": False}, _scaled(raw, 1 / 130)),
        ({"rescale_factor": 0.01}, _normal(_scaled(raw, 0.01), MEAN, STD)),
        ({"image_mean": 0.5, "image_std": 2.0}, _normal(_scaled(grey, 1 / 130), [0.5] * 3, [2.0] * 3)),
    ):
        got = processor(image, return_tensors="np", **options)["pixel_values"][0]
        assert np.array_equal(got, wanted.transpose(2, 0, 1)), options


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": MEAN, "image_std": STD},
        {"rescale_factor": 1 / 128},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_rescale": False},
    ],
)
@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [(30, 40), (24, 24), (24, 15), (15, 24)])
def test_training_data_have_the_options_of_the_processor(ratio, settings, size):
    images, picture = _processor(image_aspect_ratio=ratio, **settings), _noise(*size)
    reader = PixelReader(images)
    wanted = images(picture, return_tensors="pt")["pixel_values"][0].float()
    raw = reader.pixels(picture)
    assert reader.side == 24 and raw.dtype == torch.uint8 and torch.equal(reader.normalise(raw), wanted)
    assert torch.equal(reader.normalise(torch.stack([raw, raw])), torch.stack([wanted, wanted]))


def test_the_filter_is_the_one_that_is_asked_for():
    image = _noise(48, 36)
    for asked, used in (
        (BICUBIC, BICUBIC),
        (0, NEAREST),
        (Interpolation.NEAREST, NEAREST),
        (Interpolation.LANCZOS, Image.Resampling.LANCZOS),
    ):
        (square,) = _tiles(_processor(image_aspect_ratio="square"), image, resample=asked)
        assert _is(square, image.resize((32, 24), used).crop((4, 0, 28, 24))), asked
        tiles = _tiles(
            _processor(image_aspect_ratio="anyres", image_grid_pinpoints=[[24, 24]]), image, resample=asked
        )
        assert _is(tiles[0], image.resize((24, 24), used)), asked
        assert _is(tiles[1][3:21], image.resize((24, 18), used)), asked
    tiles = _processor(image_aspect_ratio="anyres", image_grid_pinpoints=[[24, 24]], do_resize=False)
    assert _is(_tiles(tiles, image, resample=None)[0], image.resize((24, 24), BICUBIC))
    (default,) = _tiles(_processor(image_aspect_ratio="square"), image)
    assert _is(default, image.resize((32, 24), BICUBIC).crop((4, 0, 28, 24)))


def test_sizes_of_every_form():
    """Resized to the size, then the middle is cut; without cropping the whole is kept."""
    image = _noise(60, 40)
    for size, wanted in (
        ({"shortest_edge": 30}, (45, 30)),
        ({"shortest_edge": 30, "longest_edge": 36}, (36, 24)),
        ({"height": 26, "width": 50}, (50, 26)),
        ({"max_height": 80, "max_width": 90}, (90, 60)),
    ):
        processor = _processor(image_aspect_ratio="square", size=size, do_center_crop=False)
        whole = image.resize(wanted, BICUBIC)
        assert _is(_tiles(processor, image)[0], whole), size
        left, top = (wanted[0] - 24) // 2, (wanted[1] - 24) // 2
        middle = whole.crop((left, top, left + 24, top + 24))
        assert _is(_tiles(processor, image, do_center_crop=True)[0], middle), size
    with pytest.raises(ValueError, match="size must have height and width"):
        _processor(size={"longest_edge": 30})(image)


def test_without_resizing_the_middle_is_cut():
    image = _noise(61, 40)
    (found,) = _tiles(_processor(image_aspect_ratio="square"), image, do_resize=False)
    assert _is(found, image.crop((18, 8, 42, 32)))
    (found,) = _tiles(_processor(), image, do_resize=False, do_center_crop=False)
    assert found.shape == (61, 61, 3) and _is(found[10:50], image)


@pytest.mark.parametrize("width, height", [(41, 30), (30, 41), (41, 41), (1, 6)])
def test_a_padded_picture_is_in_the_middle_rounded_up_and_left(width, height):
    image, side = _noise(width, height), max(width, height)
    (found,) = _tiles(_processor(image_mean=MEAN), image, do_resize=False, do_center_crop=False)
    wanted = Image.new("RGB", (side, side), (63, 127, 191))
    wanted.paste(image, ((side - width) // 2, (side - height) // 2))
    assert _is(found, wanted)
    assert Canvas.square((width, height), (1, 2, 3)).colour == (1, 2, 3)
    assert Canvas((4, 4)).colour == (0, 0, 0) and read_picture(image).size == (width, height)


def test_a_grid_is_read_row_by_row_and_its_rest_is_black():
    """A picture of 3 to 2 on two rows of two tiles: 48 x 32, with 8 black rows above and below."""
    image = _noise(90, 60)
    processor = _processor(image_aspect_ratio="anyres", image_grid_pinpoints=[[48, 48]])
    grid = Image.new("RGB", (48, 48))
    grid.paste(image.resize((48, 32), BICUBIC), (0, 8))
    first, *tiles = _tiles(processor, image)
    assert _is(first, image.resize((24, 24), BICUBIC)) and len(tiles) == 4
    for tile, (left, top) in zip(tiles, ((0, 0), (24, 0), (0, 24), (24, 24)), strict=True):
        assert _is(tile, grid.crop((left, top, left + 24, top + 24)))
    tall = Image.new("RGB", (24, 48))
    tall.paste(image.transpose(Image.Transpose.TRANSPOSE).resize((24, 36), BICUBIC), (0, 6))
    _, *tiles = _tiles(
        processor, image.transpose(Image.Transpose.TRANSPOSE), image_grid_pinpoints=[[24, 48], [48, 24]]
    )
    assert _is(np.concatenate(tiles), tall)
    with pytest.raises(ValueError, match="image_grid_pinpoints must be given with anyres"):
        processor(image, image_grid_pinpoints=[])
