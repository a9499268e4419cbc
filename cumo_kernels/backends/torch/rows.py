"""Row-wise work: in parts that fit in a CPU's cache, in one piece on other devices."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cumo_kernels.hostsync import values_at_hand

PART = 1 << 17  # elements of a part: half a MiB in fp32, so that the few tensors of an epilogue share an L2


def parts(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover the rows; on a CPU about PART elements each, so that fp32 copies fit in the cache."""
    step = max(1, PART // max(width, 1)) if device.type == "cpu" else max(num_rows, 1)
    for begin in range(0, num_rows, step):
        yield slice(begin, begin + step)


def dropped(inverse_permutation: Tensor) -> Tensor | None:
    """Mask of dropped slots; None on a CPU where none is dropped (reading it there needs no sync)."""
    mask = inverse_permutation < 0
    return None if values_at_hand(mask) and not mask.any() else mask


def expert_of(rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """The expert whose rows hold each sorted position in `rows`; the last expert for positions past them."""
    return torch.searchsorted(expert_offsets[1:-1].contiguous(), rows, right=True)


def sorted_positions(num_rows: int, expert_offsets: Tensor) -> Tensor:
    """(S,) int32: 0, 1, ..."""
    return torch.arange(num_rows, dtype=torch.int32, device=expert_offsets.device)
