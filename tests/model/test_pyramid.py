"""S2 against cumo_spec.md 1.3: bicubic pyramid, tile order, pooling, channel order."""

import pytest
import torch
from torch.nn.functional import interpolate

from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_model.model.pyramid import (
    crop_counts,
    image_pyramid,
    merge_chessboard,
    merge_scales,
    split_chessboard,
)


def test_tiles_are_row_major_and_tile_major():
    """Row (i * k + j) * B + b is tile (i, j) of image b."""
    x = torch.randn(2, 3, 12, 12)
    tiles = split_chessboard(x, 3)
    assert tiles.shape == (18, 3, 4, 4)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                tile = x[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                assert torch.equal(tiles[(i * 3 + j) * 2 + b], tile)
    assert torch.equal(merge_chessboard(tiles, 3), x)


@pytest.mark.parametrize("scales", [(1,), (1, 3), (1, 2, 3), (2,)])
def test_pyramid_is_the_image_then_its_enlargements(scales):
    images = torch.randn(2, 3, 8, 8)
    crops = image_pyramid(images, scales)
    assert crops.shape == (sum(crop_counts(2, scales)), 3, 8, 8)
    for scale, part in zip(scales, crops.split(crop_counts(2, scales)), strict=True):
        side = 8 * scale
        large = interpolate(images, size=(side, side), mode="bicubic", align_corners=False, antialias=False)
        assert torch.equal(merge_chessboard(part, scale), large)


def test_enlarging_is_fp32_inside():
    images = torch.randn(1, 3, 8, 8).bfloat16()
    crops = image_pyramid(images, (1, 3))
    assert crops.dtype == torch.bfloat16
    large = interpolate(images.float(), size=(24, 24), mode="bicubic").bfloat16()
    assert torch.equal(merge_chessboard(crops[1:], 3), large)
    assert torch.equal(crops[:1], images)


@pytest.mark.parametrize("scales", [(1, 3), (2, 1, 3)])
def test_scales_meet_on_one_grid_in_order(scales):
    grid, channels, images = 4, 5, 2

    def op(features):
        return merge_scales(features, scales, grid)

    def reference(features):
        parts = []
        for scale, part in zip(scales, features.split(crop_counts(images, scales)), strict=True):
            maps = part.transpose(1, 2).reshape(-1, channels, grid, grid)
            board = maps.new_zeros(images, channels, grid * scale, grid * scale)
            for row, tile in enumerate(maps):
                b, position = row % images, row // images
                i, j = position // scale * grid, position % scale * grid
                board[b, :, i : i + grid, j : j + grid] = tile
            parts.append(interpolate(board, size=(grid, grid), mode="area").flatten(2).transpose(1, 2))
        return torch.cat(parts, -1)

    features = torch.randn(sum(crop_counts(images, scales)), grid * grid, channels)
    assert_as_accurate_as_torch(op, reference, features)
    assert_as_accurate_as_torch(op, reference, features.bfloat16())


def test_pooling_is_fp32_inside():
    features = torch.randn(9, 16, 5).bfloat16()
    wanted = merge_scales(features.float(), (3,), 4).bfloat16()
    assert torch.equal(merge_scales(features, (3,), 4), wanted)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must have sides divisible by num_split 3, got \(1, 3, 8, 9\)"):
        split_chessboard(torch.randn(1, 3, 8, 9), 3)
    with pytest.raises(
        ValueError, match=r"x must have a multiple of num_split\^2 = 9 tiles, got \(8, 3, 4, 4\)"
    ):
        merge_chessboard(torch.randn(8, 3, 4, 4), 3)
