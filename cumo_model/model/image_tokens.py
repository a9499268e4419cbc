"""Image tokens in the text: how many tokens a picture has, their order, and their positions in a row.

A picture is an input image. Without anyres it is one tile of the tower's input size. With anyres it is the
whole image as one tile, followed by a grid of tiles. `patch_merge_type` sets the order of its tokens:

    flat            the tokens of one tile after another
    spatial         the tokens of the whole image, then those of the grid as one image, row by row
    spatial_unpad   as spatial, but without the rows or columns that show only padding, and with the model's
                    image_newline after each row (for a picture of one tile: once, at the end)

The merge types are those of LLaVA-1.6 (blog post of January 2024). The original CuMo contains the code but
never runs it.
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
    """How pictures become tiles and tokens. In all methods `size` is None for a picture of one tile.

    Attributes:
        side: side of a tile in pixels.
        grid: patches along a side of a tile.
        tile_tokens: tokens of a tile.
        merge: one of MERGES.
        pinpoints: (height, width) in pixels of the tile grids that anyres chooses from.
    """

    side: int
    grid: int
    tile_tokens: int
    merge: str = "flat"
    pinpoints: Sequence[Size] | None = None

    def tiles(self, size: Size | None) -> int:
        """Number of tiles of a picture, the tile of the whole image included."""
        rows, columns = self._shape(size)
        return 1 if size is None else 1 + rows * columns

    def tiles_of(self, sizes: Sequence[Size | None], num_tiles: int) -> list[int]:
        """Number of tiles of each picture.

        Raises:
            ValueError: they do not sum to `num_tiles`.
        """
        tiles = [self.tiles(size) for size in sizes]
        if sum(tiles) != num_tiles:
            raise ValueError(
                f"pixel_values must have {sum(tiles)} tiles for the {len(sizes)} image_sizes, got {num_tiles}"
            )
        return tiles

    def tokens(self, size: Size | None) -> int:
        """Number of tokens of a picture."""
        if self.merge != "spatial_unpad":
            return self.tiles(size) * self.tile_tokens
        if size is None:
            return self.tile_tokens + 1
        rows, columns = self._kept(size)
        return self.tile_tokens + (rows.stop - rows.start) * (columns.stop - columns.start + 1)

    def arrange(self, features: Tensor, size: Size | None, newline: Tensor | None) -> Tensor:
        """Arrange the features of one picture as tokens: (tiles, tile_tokens, H) -> (tokens, H)."""
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

    def arrange_single(self, features: Tensor, newline: Tensor | None) -> Tensor:
        """`arrange` of N pictures of one tile each: (N, tile_tokens, H) -> (N, tokens, H)."""
        if self.merge != "spatial_unpad":
            return features
        ends = newline.to(features).expand(features.shape[0], 1, features.shape[2])
        return torch.cat([features, ends], 1)

    def _shape(self, size: Size | None) -> Size:
        if size is None:
            return 0, 0
        if not self.pinpoints:
            raise ValueError("image_sizes must come with a config that has image_grid_pinpoints, got none")
        height, width = select_best_resolution(size, self.pinpoints)
        return height // self.side, width // self.side

    def _kept(self, size: Size) -> tuple[slice, slice]:
        """Rows and columns of grid patches that show the picture, which is centred in the grid."""
        rows, columns = (self.grid * tiles for tiles in self._shape(size))
        height, width = size
        if width / height > columns / rows:
            cut = (rows - int(round(height * (columns / width), 7))) // 2
            return slice(cut, rows - cut), slice(0, columns)
        cut = (columns - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(cut, columns - cut)


def picture_sizes(num_tiles: int, image_sizes: Tensor | None) -> list[Size | None]:
    """The size of each picture, None for a picture of one tile.

    Args:
        num_tiles: number of all tiles.
        image_sizes: (number of pictures, 2); None: each tile is one picture.
    """
    if image_sizes is None:
        return [None] * num_tiles
    return [tuple(size) for size in torch.as_tensor(image_sizes).tolist()]


def as_tiles(pixel_values: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    """Convert the accepted forms of pixel_values to one tensor of tiles (N, 3, s, s).

    Args:
        pixel_values: (N, 3, s, s), (B, tiles, 3, s, s), or a list of (3, s, s) or (tiles, 3, s, s) tensors.

    Returns:
        The tiles; None if there are none, as in a batch of texts.

    Raises:
        ValueError: an element has another shape, or tiles differ in size.
    """
    if pixel_values is None:
        return None
    if not isinstance(pixel_values, Tensor):
        items = []
        for (
            item
        ) in pixel_values:  # one level of lists, as processors of transformers return; None: no picture
            items += list(item) if isinstance(item, list | tuple) else [] if item is None else [item]
        if not items:
            return None
        if not all(isinstance(item, Tensor) and item.ndim in (3, 4) for item in items):
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
        pixel_values = torch.cat(items)
    elif pixel_values.ndim == 5:
        pixel_values = pixel_values.flatten(0, 1)
    return pixel_values if pixel_values.shape[0] else None


def _assert_on_device(holds: Tensor, words: str) -> None:
    if not torch.compiler.is_compiling():
        torch._assert_async(holds, words)


def _are_whole(is_image: Tensor, wanted: list[int], lengths: Tensor | None) -> Tensor:
    """The condition of `check_placeholders` as a bool tensor of shape (), without host synchronisation."""
    most = torch.tensor(wanted, dtype=torch.long, device=is_image.device)
    begun = is_image.sum(1).cumsum(0)  # image tokens up to the end of each row
    if lengths is not None:
        lengths = lengths.to(is_image.device)
        return ((lengths >= 0) & (lengths <= most)).all() & (begun[-1] == lengths.sum())
    ends = torch.nn.functional.pad(most.cumsum(0), (1, 0))
    return (begun[:, None] == ends).any(1).all() & (begun[-1] == ends[-1])


def check_no_placeholders(is_image: Tensor, token: int) -> None:
    """Check that no row has image tokens when no picture is given. Errors are as in `check_placeholders`."""
    if not values_at_hand(is_image):
        _assert_on_device(~is_image.any(), f"pixel_values must come with image tokens (id {token})")
    elif tokens := int(is_image.sum()):
        raise ValueError(
            f"pixel_values must come with the image tokens (id {token}) of input_ids, got none for {tokens}"
        )


def check_lengths(lengths: Tensor | None, num_pictures: int) -> None:
    """Check shape and dtype of image_lengths."""
    if lengths is not None and (lengths.shape != (num_pictures,) or lengths.is_floating_point()):
        raise ValueError(
            f"image_lengths must be ({num_pictures},) integers, one for each image, "
            f"got {tuple(lengths.shape)} {lengths.dtype}"
        )


def check_placeholders(
    is_image: Tensor,
    token: int,
    wanted: list[int],
    lengths: Tensor | None,
    what: str = "images",
    input_ids: Tensor | None = None,
) -> None:
    """Check that each row has the tokens of complete pictures, and that all rows together have all pictures.

    With `lengths` the check is instead that each length is between 0 and the tokens of its picture, and that
    the lengths sum to the number of image tokens.

    Args:
        is_image: (B, S) bool, True at image tokens.
        token: id of the image token, for messages.
        wanted: number of tokens of each picture.
        lengths: number of tokens of each picture in `input_ids`; None: all of them.
        what: the word for pictures in messages.
        input_ids: (B, S), for a message that names the image token of another tokenizer.

    Raises:
        ValueError: the check fails, for CPU tensors. On a GPU this would need a host synchronisation. There
            the same condition is a device assertion, which a later CUDA call raises.
    """
    check_lengths(lengths, len(wanted))
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
            f"in pixel_values, got {sum(counts)}{_other_token(input_ids, counts, sum(wanted))}"
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


def _other_token(input_ids: Tensor | None, counts: list[int], wanted: int) -> str:
    """For a message: the only id that occurs as often as image tokens should, if these do not occur."""
    if input_ids is None or any(counts):
        return ""
    ids, times = input_ids.unique(return_counts=True)
    found = ids[times == wanted].tolist()
    if len(found) != 1:
        return ""
    return (
        f", but {wanted} tokens of id {found[0]}: if this is image_token_id of the processor, "
        "config.image_token_index of the model must be the same"
    )


def pictures_per_row(row_tokens: Tensor, lengths: Tensor) -> list[int]:
    """Number of pictures whose last token is in each row.

    Args:
        row_tokens: (B,) image tokens of each row.
        lengths: (number of pictures,) image tokens of each picture, in order.
    """
    ends = torch.searchsorted(lengths.cumsum(0), row_tokens.cumsum(0), right=True)
    return ends.diff(prepend=ends.new_zeros(1)).tolist()
