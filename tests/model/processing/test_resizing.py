"""Resizing in strips is resizing the whole, and large pictures need little memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cumo_model.data.pictures import PixelReader
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor, resizing
from cumo_model.processing.image_processor import LARGE as LARGE_RESULT
from cumo_model.processing.pictures import read_picture
from cumo_model.processing.resizing import Canvas, resize


def _whole(image: Image.Image, side: int) -> Image.Image:
    """The steps of the original code: pad to a square, then resize."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.sampled_from([7, 24, 48]),
    strip=st.sampled_from([1, 500, 1 << 20]),
    between=st.sampled_from([60, 1 << 22]),
    resample=st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR]),
)
def test_resizing_in_strips_is_resizing_the_whole(width, height, side, strip, between, resample):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    picture, canvas = read_picture(image), Canvas.square(image.size, (122, 116, 104))
    square = Image.new("RGB", canvas.size, canvas.colour)
    square.paste(image, (canvas.left, canvas.top))
    one_pass = image.resize((side, height), resample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "STRIP", strip)
        patch.setattr(resizing, "BETWEEN", between)
        patch.setattr(resizing, "WHOLE", 0)
        for wanted, got in (
            (square.resize((side, side), resample), resize(picture, (side, side), resample, canvas)),
            (one_pass.resize((side, 9), resample), resize(picture, (side, 9), resample)),
        ):
            difference = np.abs(np.asarray(wanted, int) - np.asarray(got, int)).max()
            # in groups of columns, the positions are rounded to fp32: one level in each pass
            assert difference <= (0 if between > height * side else 2)


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    seed=st.integers(0, 9),
)
def test_a_window_is_the_middle_of_the_whole(width, height, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    short = min(width, height)
    size = (24 * width // short, 24 * height // short)
    left, top = (size[0] - 24) // 2, (size[1] - 24) // 2
    box = (left, top, left + 24, top + 24)
    # Pillow chooses the order of its passes by the size of the result
    wanted = image.resize((size[0], height), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "WHOLE", 0)
        got = resize(read_picture(image), size, Image.Resampling.BICUBIC, window=box)
    difference = np.abs(np.asarray(wanted.crop(box), int) - np.asarray(got, int)).max()
    assert difference <= 2  # positions are rounded to fp32: one level in each pass


@pytest.mark.parametrize("size", [(10, 300), (300, 10)])
def test_a_window_beside_the_picture_shows_the_canvas(size):
    """Where the filter reaches no pixel of the picture, in either direction."""
    picture, colour = read_picture(Image.new("RGB", size, "white")), (122, 116, 104)
    canvas = Canvas.square(size, colour)
    windows = [(0, 0, 10, 60), (50, 0, 60, 60), (0, 0, 60, 10), (0, 50, 60, 60)]
    found = [resize(picture, (60, 60), Image.Resampling.BICUBIC, canvas, window) for window in windows]
    if size[0] > size[1]:  # the picture lies across: above and below it
        found = found[::-1]
    assert [image.getcolors() for image in found[:2]] == [[(600, colour)]] * 2
    assert all(image.getextrema()[0][1] > colour[0] for image in found[2:])  # the picture is on the others


def test_ordinary_pictures_are_bit_equal_to_the_original_steps():
    processor = build_processor(train_tokenizer(["what is it?"] * 20, 300), 24, 8)
    for size in ((400, 300), (300, 400), (1000, 37)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        got = PixelReader(processor.image_processor).pixels(image)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(_whole(image, 24)))


@pytest.mark.parametrize(
    "size", [(7, 700), (700, 7), (40, 3000), (3000, 40), (13, 5006), (5006, 13), (1, 900)]
)
def test_thin_pictures_are_cropped_like_the_whole(size):
    """Resize the short side to the tower's, then crop the middle, as in the first stage."""
    processor = build_processor(
        train_tokenizer(["what is it?"] * 20, 300), 336, 14, image_aspect_ratio="square"
    ).image_processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    short = min(size)
    whole = (336 * size[0] // short, 336 * size[1] // short)
    left, top = (whole[0] - 336) // 2, (whole[1] - 336) // 2
    assert (max(whole) - 336) % 2 == (max(size) == 5006)  # half a pixel is rounded down
    wanted = image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + 336, top + 336))
    got = PixelReader(processor).pixels(image).permute(1, 2, 0).numpy()
    # with a window, positions are rounded to fp32: one level in each pass
    assert np.abs(np.asarray(wanted, int) - got).max() <= (2 if whole[0] * whole[1] > 4 * LARGE_RESULT else 0)


LARGE = [  # (mode, width, height, format, options); the last column is whether it is read
    ("RGB", 60_000, 1, "PNG", True),
    ("RGB", 1, 60_000, "PNG", True),
    ("RGB", 10_000, 10, "PNG", True),
    ("RGB", 500, 60_000, "PNG", True),
    ("RGB", 60_000, 500, "PNG", True),
    ("RGB", 6_000, 6_000, "BMP", True),
    ("L", 12_000, 12_000, "PNG", True),
    ("RGB", 13_000, 13_000, "JPEG", True),
    ("noise", 6_500, 6_500, "JPEG", True),  # a file of 60 MB
    ("RGB", 4_000, 3_000, "WEBP", True),
    ("RGB", 3_600, 2_750, "JPEG2000", True),
    ("RGB", 4_000, 3_000, "AVIF", True),
    ("RGB", 6_000, 4_000, "progressive", True),
    ("RGB", 5_000, 4_200, "TIFF", True),
    ("RGB", 13_000, 13_000, "BMP", False),
    ("RGB", 100_000, 1, "PNG", False),
    ("L", 1, 100_000, "PNG", False),
]
MEASURE = """
import sys, warnings
from PIL import Image
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor
warnings.simplefilter("ignore")
tokenizer = train_tokenizer(["what is it?"] * 20, 300)
grid = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672]]}
processors = [build_processor(tokenizer, 336, 14, image_aspect_ratio=r, **(grid if r == "anyres" else {}))
              for r in ("pad", "square", "anyres")]
def resident(name):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
for processor in processors:
    processor.image_processor(Image.new("RGB", (50, 70)), return_tensors="pt")
for path in sys.argv[1:]:
    for processor in processors:
        open("/proc/self/clear_refs", "w").write("5")
        before = resident("VmRSS:")
        try:
            processor.image_processor(path, return_tensors="pt")
            said = "read"
        except ValueError as error:
            said = str(error)
        print(resident("VmHWM:") - before, said, sep="|", flush=True)
"""


has_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs"
)


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


@has_peak
@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (10_000, 10), (10, 10_000)])
def test_thin_pictures_need_little_memory(tmp_path, size, ratio):
    """They took up to 10 GB, because padding or cropping came before resizing."""
    processor = build_processor(
        train_tokenizer(["what is it?"] * 20, 300), 336, 14, image_aspect_ratio=ratio
    ).image_processor
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    processor(Image.new("RGB", (50, 70)), return_tensors="pt")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins again
    before = _resident("VmRSS:")
    processor(str(tmp_path / "a.png"), return_tensors="pt")
    assert _resident("VmHWM:") - before < 60e6


@pytest.mark.slow
@has_peak
def test_large_and_thin_pictures_need_under_200_mb(tmp_path):
    paths = []
    for number, (mode, width, height, kind, _) in enumerate(LARGE):
        paths.append(tmp_path / str(number))
        if mode == "noise":
            Image.effect_noise((width, height), 80).convert("RGB").save(paths[-1], kind, quality=98)
        elif kind == "progressive":
            Image.new(mode, (width, height), 99).save(paths[-1], "JPEG", progressive=True)
        else:
            Image.new(mode, (width, height), 99).save(paths[-1], kind)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = iter(run.stdout.splitlines())
    for mode, width, height, kind, is_read in LARGE:
        for ratio in ("pad", "square", "anyres"):
            peak, said = next(lines).split("|", 1)
            assert int(peak) < 200e6, (mode, width, height, kind, ratio, peak)
            assert (said == "read") == is_read, (mode, width, height, kind, ratio, said)
            assert is_read or "must" in said
