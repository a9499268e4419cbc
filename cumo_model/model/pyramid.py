"""S2: one tower sees the image at several scales; every scale ends up on the same token grid.

A scale of k means the image enlarged k times and cut into k * k tiles of the tower's size; the tiles'
features are put back together and averaged k x k. Tiles of a batch are ordered tile-major:
tile (i, j) of image b is row (i * k + j) * B + b.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def split_chessboard(x: Tensor, num_split: int) -> Tensor:
    """(B, C, H, W) -> (num_split^2 * B, C, H / num_split, W / num_split), tile-major."""
    B, C, H, W = x.shape
    if H % num_split or W % num_split:
        raise ValueError(f"x must have sides divisible by num_split {num_split}, got {tuple(x.shape)}")
    tiles = x.view(B, C, num_split, H // num_split, num_split, W // num_split)
    return tiles.permute(2, 4, 0, 1, 3, 5).reshape(-1, C, H // num_split, W // num_split)


def merge_chessboard(x: Tensor, num_split: int) -> Tensor:
    """Inverse of `split_chessboard`."""
    N, C, H, W = x.shape
    if N % num_split**2:
        raise ValueError(
            f"x must have a multiple of num_split^2 = {num_split**2} tiles, got {tuple(x.shape)}"
        )
    tiles = x.view(num_split, num_split, N // num_split**2, C, H, W)
    return tiles.permute(2, 3, 0, 4, 1, 5).reshape(-1, C, H * num_split, W * num_split)


def image_pyramid(images: Tensor, scales: Sequence[int]) -> Tensor:
    """(B, C, s, s) -> (N, C, s, s): the crops of every scale, scale after scale, `crop_counts` each.

    Enlarging is bicubic without antialias, in fp32, rounded to the images' dtype.
    """
    crops = []
    for scale in scales:
        if scale == 1:
            crops.append(images)
        else:
            side = images.shape[-1] * scale
            large = nn.functional.interpolate(images.float(), size=(side, side), mode="bicubic").to(
                images.dtype
            )
            crops.append(split_chessboard(large, scale))
    return crops[0] if len(crops) == 1 else torch.cat(crops)


def crop_counts(num_images: int, scales: Sequence[int]) -> list[int]:
    """Crops of each scale."""
    return [num_images * scale**2 for scale in scales]


def merge_scales(features: Tensor, scales: Sequence[int], grid: int) -> Tensor:
    """Patch features of all crops, (N, grid * grid, C) -> (B, grid * grid, len(scales) * C)."""
    num_images = features.shape[0] // sum(scale**2 for scale in scales)
    merged = []
    for scale, part in zip(scales, features.split(crop_counts(num_images, scales)), strict=True):
        if scale > 1:
            maps = part.transpose(1, 2).unflatten(2, (grid, grid))
            board = merge_chessboard(maps, scale)
            # every cell is the mean of scale x scale patches: area interpolation of an integer factor
            pooled = nn.functional.avg_pool2d(board.float(), scale).to(part.dtype)
            part = pooled.flatten(2).transpose(1, 2)
        merged.append(part)
    return merged[0] if len(merged) == 1 else torch.cat(merged, dim=-1)
