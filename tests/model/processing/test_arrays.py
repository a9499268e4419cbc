"""Arrays and tensors as pictures: dtypes, ranges, channels, and what is no picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cumo_model.processing import load_image
from cumo_model.processing.pictures import read_picture


@pytest.mark.parametrize("shape, channels", [((6, 7), 1), ((6, 7, 1), 1), ((6, 7, 2), 2), ((6, 7, 4), 4)])
def test_arrays_of_other_channels(shape, channels):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    kept = values.reshape(6, 7, channels)[:, :, : 3 if channels == 4 else 1]
    wanted = np.broadcast_to(kept, (6, 7, 3))
    assert np.array_equal(np.asarray(load_image(values)), wanted)
    if values.ndim == 3:
        assert np.array_equal(np.asarray(load_image(values.transpose(2, 0, 1))), wanted)
    assert np.array_equal(np.asarray(load_image(torch.from_numpy(values))), wanted)


def test_bool_half_and_bfloat16_arrays():
    mask = np.eye(6, dtype=bool)
    assert np.array_equal(np.asarray(load_image(mask))[:, :, 0], mask * 255)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got = np.asarray(load_image(torch.from_numpy(mask).to(dtype)))
        assert np.array_equal(got[:, :, 0], mask * 255)


@pytest.mark.parametrize(
    "values, told",
    [
        (np.full((6, 6, 3), np.nan), "got nan to nan"),
        (np.full((6, 6, 3), -1.8), "floats from 0 to 1 or from 0 to 255, got -1.8"),
        (np.full((6, 6, 3), 1.5), "floats from 0 to 1 or from 0 to 255, got 1.5"),
        (np.full((6, 6, 3), 70_000), "integers from 0 to 255 or from 0 to 65535"),
        (np.full((6, 6, 3), -1), "integers from 0 to 255 or from 0 to 65535, got -1"),
        (np.zeros((6, 6, 5)), r"must be \(H, W\), \(H, W, C\) or \(C, H, W\) .* got \(6, 6, 5\)"),
        (np.zeros((0, 6, 3)), r"got \(0, 6, 3\)"),
        (np.zeros((2, 6, 6, 3)), r"got \(2, 6, 6, 3\)"),
        (np.array([["a"]]), "array of numbers"),
        (Image.new("F", (3, 3), float("inf")), "finite"),
        (Image.new("I", (3, 3), -5), "got -5"),
        (Image.new("L", (0, 3)), "must have at least one pixel, got 0 x 3"),
        (Image.new("F", (3, 3), 1e6), "got 1e.06"),
        (3, "got int"),
        (None, "got NoneType"),
        ("no such file.png", "image 'no such file.png' does not exist"),
        (b"", "is not a picture"),
        (b"GIF89a", "cannot be read|is not a picture"),
    ],
)
def test_what_is_no_picture_is_named(values, told):
    with pytest.raises(ValueError, match=told) as error:
        load_image(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (15, 61)])
@pytest.mark.parametrize("ratio", ["pad", "square", "anyres"])
def test_floats_without_rescaling_keep_their_range(processors, ratio, size):
    """C24 of the reports: such pictures failed unless they were square."""
    upright = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    processor = processors[ratio].image_processor
    wanted = processor(upright, return_tensors="pt")["pixel_values"]
    for floats in (upright / 255, torch.from_numpy(upright).permute(2, 0, 1) / 255):
        got = processor(floats, do_rescale=False, return_tensors="pt")["pixel_values"]
        assert torch.equal(got, wanted)
    raw = processor(upright, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert raw.dtype == torch.uint8
    unit = processor(upright / 255, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(unit, (raw.numpy().astype(np.float64) * (1 / 255)).astype(np.float32))


@pytest.mark.parametrize("height, width", [(1, 50), (2, 50), (4, 50), (50, 1), (50, 4), (1, 1), (2, 4)])
def test_arrays_of_few_rows_or_columns(height, width):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for array in (values, values.transpose(2, 0, 1), torch.from_numpy(values)):
        assert np.array_equal(np.asarray(load_image(array)), values)


@pytest.mark.parametrize("shape", [(3, 50, 3), (1, 50, 1), (4, 9, 2), (3, 3, 3)])
def test_arrays_that_may_be_read_in_two_ways_need_their_format(processors, shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"may be .* input_data_format must be given, channels_last or"):
        processors["pad"].image_processor(values)
    for layout, axes in (("channels_last", (0, 1, 2)), ("channels_first", (1, 2, 0))):
        got = read_picture(values, input_data_format=layout)
        wanted = values.transpose(axes)[:, :, : 3 if shape[axes[2]] in (3, 4) else 1]
        assert np.array_equal(np.asarray(got.image), np.broadcast_to(wanted, (*wanted.shape[:2], 3)))
        processors["pad"].image_processor(values, input_data_format=layout)


def test_16_bits_in_the_other_byte_order():
    values = np.full((6, 7), 200, np.uint16)
    for dtype in ("<u2", ">u2"):
        assert np.asarray(load_image(values.astype(dtype))).max() == 0  # the high byte
    image = Image.new("I", (3, 3), 200)
    image.format = "PNG"  # as earlier releases of Pillow open 16-bit grey
    assert np.asarray(load_image(image)).max() == 0


def test_16_bits_from_a_file_and_from_an_array():
    values = np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    wanted = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, 2)
    for source in (
        out.getvalue(),
        values,
        torch.from_numpy(values.astype(np.int32)),
        Image.fromarray(values),
    ):
        assert np.array_equal(np.asarray(load_image(source)), wanted)
