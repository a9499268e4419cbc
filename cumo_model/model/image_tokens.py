"""Pictures in the text: how many tokens each has, in which order, and which places of a row they take.

A picture is one tile of the tower's size or, with anyres, the whole picture as one tile and then a grid of
tiles. Its tokens, by `patch_merge_type`:

    flat            tile after tile
    spatial         the whole picture's, then those of the grid as one image, row by row
    spatial_unpad   as spatial, without the rows or columns that lie wholly in the padding around the picture,
                    and with the model's image_newline after every row; after all of a picture of one tile

The merges are LLaVA-1.6's (its blog post of January 2024); the original CuMo carries them and cannot reach
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from cumo_kernels.hostsync import values_at_hand

MERGES = ("flat", "spatial", "spatial_unpad")
Size = tuple[int, int]  # height and width of a picture in pixels


@dataclass(frozen=True)
class PictureLayout:
    """side: of a tile in pixels; grid: patches along it; tile_tokens: tokens of a tile; pinpoints: (height,
    width) of the grids of tiles that anyres chooses from. A picture's `size` is None if it is one tile."""

    side: int
    grid: int
    tile_tokens: int
    merge: str = "flat"
    pinpoints: Sequence[Size] | None = None

    def tiles(self, size: Size | None) -> int:
        """Tiles of a picture, the whole one among them."""
        rows, columns = self._shape(size)
        return 1 if size is None else 1 + rows * columns

    def tokens(self, size: Size | None) -> int:
        """Tokens of a picture."""
        if self.merge != "spatial_unpad":
            return self.tiles(size) * self.tile_tokens
        if size is None:
            return self.tile_tokens + 1
        rows, columns = self._kept(size)
        return self.tile_tokens + (rows.stop - rows.start) * (columns.stop - columns.start + 1)

    def arrange(self, features: Tensor, size: Size | None, newline: Tensor | None) -> Tensor:
        """(tiles, tile_tokens, H) -> (tokens, H)."""
        if self.merge == "flat":
            return features.flatten(0, 1)
        whole, width = features[0], features.shape[-1]
        if size is None:
            return whole if newline is None else torch.cat([whole, newline[None].to(whole)])
        shape = self._shape(size)
        # (rows of tiles, columns of tiles, patch rows, patch columns, H) -> one image
        image = features[1:].reshape(*shape, self.grid, self.grid, width).transpose(1, 2)
        image = image.reshape(shape[0] * self.grid, shape[1] * self.grid, width)
        if self.merge == "spatial_unpad":
            rows, columns = self._kept(size)
            image = image[rows, columns]
            ends = newline.to(image).expand(image.shape[0], 1, width)
            image = torch.cat([image, ends], 1)
        return torch.cat([whole, image.flatten(0, 1)])

    def _shape(self, size: Size | None) -> Size:
        if size is None:
            return 0, 0
        if not self.pinpoints:
            raise ValueError("image_sizes must come with a config that has image_grid_pinpoints, got none")
        height, width = select_best_resolution(size, self.pinpoints)
        return height // self.side, width // self.side

    def _kept(self, size: Size) -> tuple[slice, slice]:
        """Rows and columns of the grid's patches that show the picture, which lies centred in it."""
        rows, columns = (self.grid * tiles for tiles in self._shape(size))
        height, width = size
        if width / height > columns / rows:
            cut = (rows - int(round(height * (columns / width), 7))) // 2
            return slice(cut, rows - cut), slice(0, columns)
        cut = (columns - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(cut, columns - cut)


def as_tiles(pixel_values: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    """(N, 3, s, s) from that, (B, tiles, 3, s, s), or a list of pictures (3, s, s) or (tiles, 3, s, s).

    Raises:
        ValueError: another shape, or pictures of several sizes.
    """
    if pixel_values is None:
        return None
    if not isinstance(pixel_values, Tensor):
        items = list(pixel_values)
        if not items or not all(isinstance(item, Tensor) and item.ndim in (3, 4) for item in items):
            found = [tuple(getattr(item, "shape", ())) or type(item).__name__ for item in items[:3]]
            raise ValueError(
                f"pixel_values must be a tensor, or a list of (3, s, s) or (tiles, 3, s, s), got {found}"
            )
        items = [item if item.ndim == 4 else item[None] for item in items]
        if len({item.shape[1:] for item in items}) > 1:
            raise ValueError(
                "pixel_values must be tiles of one size (the processor makes them of pictures of any size), "
                f"got {[tuple(item.shape[1:]) for item in items[:3]]}"
            )
        return torch.cat(items)
    return pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values


def _assert_on_device(holds: Tensor, words: str) -> None:
    if not torch.compiler.is_compiling():
        torch._assert_async(holds, words)


def _are_whole(is_image: Tensor, wanted: list[int], lengths: Tensor | None) -> Tensor:
    """() bool: what `check_placeholders` asks for, without a look at any value."""
    most = torch.tensor(wanted, dtype=torch.long, device=is_image.device)
    begun = is_image.sum(1).cumsum(0)  # tokens up to the end of each row
    if lengths is not None:
        lengths = lengths.to(is_image.device)
        return ((lengths >= 0) & (lengths <= most)).all() & (begun[-1] == lengths.sum())
    ends = torch.nn.functional.pad(most.cumsum(0), (1, 0))
    return (begun[:, None] == ends).any(1).all() & (begun[-1] == ends[-1])


def check_no_placeholders(is_image: Tensor, token: int) -> None:
    """No row holds a picture's token where no picture came; as `check_placeholders`."""
    if not values_at_hand(is_image):
        _assert_on_device(~is_image.any(), f"pixel_values must come with image tokens (id {token})")
    elif tokens := int(is_image.sum()):
        raise ValueError(
            f"pixel_values must come with the image tokens (id {token}) of input_ids, got none for {tokens}"
        )


def check_placeholders(
    is_image: Tensor, token: int, wanted: list[int], lengths: Tensor | None, what: str = "images"
) -> None:
    """Every row holds whole pictures, and together they hold all of them; or as much as `lengths` says.

    Args:
        is_image: (B, S) bool.
        token: its id, for messages.
        wanted: tokens of each picture.
        lengths: how many of them `input_ids` has, None: all.
        what: what pictures are called.

    Raises:
        ValueError: for CPU tensors, saying what is where. A GPU would have to wait for the host to look, so
            there the device asserts the same, which a later call raises.
    """
    if lengths is not None and (lengths.shape != (len(wanted),) or lengths.is_floating_point()):
        raise ValueError(
            f"image_lengths must be ({len(wanted)},) integers, one for each image, "
            f"got {tuple(lengths.shape)} {lengths.dtype}"
        )
    if not values_at_hand(is_image):
        _assert_on_device(
            _are_whole(is_image, wanted, lengths),
            f"input_ids must have the image tokens (id {token}) of whole {what} in every row",
        )
        return
    if lengths is not None:
        values, total = lengths.tolist(), int(is_image.sum())
        if any(not 0 <= n <= most for n, most in zip(values, wanted, strict=True)) or sum(values) != total:
            most = f"[0, {wanted[0]}]" if len(set(wanted)) == 1 else f"[0, image's tokens {wanted}]"
            raise ValueError(
                f"image_lengths must lie in {most} and sum to the {total} image "
                f"tokens (id {token}) of input_ids, got {values}"
            )
        return
    counts = is_image.sum(1).tolist()
    alike = len(set(wanted)) <= 1
    each = wanted[0] if alike and wanted else 0
    if sum(counts) != sum(wanted):
        share = f"{each} for each of the {len(wanted)} {what}" if alike else f"{wanted} for the {what}"
        raise ValueError(
            f"input_ids must have {sum(wanted)} image tokens (id {token}), {share} "
            f"in pixel_values, got {sum(counts)}"
        )
    ends, begun, end = {0}, 0, 0
    for number in wanted:
        end += number
        ends.add(end)
    for row, count in enumerate(counts):
        begun += count
        if begun not in ends:
            kind = (
                f"a multiple of {each} image tokens" if alike else f"whole {what}, of {wanted} image tokens,"
            )
            raise ValueError(
                f"input_ids must have {kind} (id {token}) in every row, got {count} in row {row}"
            )


def pictures_per_row(row_tokens: Tensor, lengths: Tensor) -> list[int]:
    """Image tokens of each row and of each picture, in order -> pictures that end in each row."""
    ends = torch.searchsorted(lengths.cumsum(0), row_tokens.cumsum(0), right=True)
    return ends.diff(prepend=ends.new_zeros(1)).tolist()
