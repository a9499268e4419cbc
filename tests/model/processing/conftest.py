"""Processors of small pictures, one for each treatment of pictures that are not square."""

import pytest

from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor

GRID = [[24, 48], [48, 24], [48, 48]]


@pytest.fixture(scope="module")
def processors():
    tokenizer = train_tokenizer(["what is it?", "a red apple"] * 20, 320)
    grids = {"anyres": {"image_grid_pinpoints": GRID}}
    return {
        ratio: build_processor(tokenizer, 24, 8, image_aspect_ratio=ratio, **grids.get(ratio, {}))
        for ratio in ("pad", "square", "anyres")
    }
