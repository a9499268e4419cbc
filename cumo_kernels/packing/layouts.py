"""Packed weights of other libraries: moved bit by bit into a PackedWeight and back, never through floats.

bitsandbytes    (E * N * K / 2, 1) uint8, the first weight of a byte in its HIGH half; absmax of all blocks
compressed-tensors, "pack-quantized"    int32, eight weights each, the first in the lowest bits; zero points
                packed in the same way along the rows; for every expert its own (N, K / 8)
gpt-oss         blocks (E, N, K / 32, 16) uint8, low half first, and scales (E, N, K / 32) uint8
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cumo_kernels.packing.formats import nibbles, pack_nibbles
from cumo_kernels.packing.tensor import PackedWeight

INT32_WEIGHTS = 8


def _check_type(name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")


def _swapped(data: Tensor) -> Tensor:
    """Bytes with their halves exchanged."""
    return (data >> 4) | (data << 4)


def from_bitsandbytes(
    data: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    format: str = "nf4",
    group: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedWeight:
    """What `bitsandbytes.functional.quantize_4bit` returns.

    Args:
        data: (E * N * K / 2, 1) uint8.
        absmax: (E * N * K / group,) fp32, of a state without nested statistics (dequantise these first).
        shape: (E, N, K); K is a multiple of `group`.
        format: "nf4" or "fp4".
        group: the block size.
        dtype: as for PackedWeight.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    _check_type("data", data, torch.uint8)
    _check_type("absmax", absmax, torch.float32)
    experts, rows, width = shape
    if width % group:
        raise ValueError(f"shape must have rows of a multiple of {group} weights, the group, got {width}")
    if data.numel() != experts * rows * width // 2:
        raise ValueError(
            f"data must be {experts * rows * width // 2} bytes for {tuple(shape)}, got {data.numel()}"
        )
    if absmax.numel() != experts * rows * width // group:
        wanted = experts * rows * width // group
        raise ValueError(f"absmax must have {wanted} elements for {tuple(shape)}, got {absmax.numel()}")
    packed = _swapped(data.reshape(experts, rows, width // 2))
    return PackedWeight(packed, absmax.reshape(experts, rows, width // group), None, format, dtype)


def to_bitsandbytes(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """data and absmax of `from_bitsandbytes`."""
    return _swapped(weight.packed).reshape(-1, 1), weight.scales.to(torch.float32).reshape(-1)


def _words(packed: Tensor) -> Tensor:
    """(..., K / 2) uint8 -> (..., K / 8) int32, the first weight in the lowest bits."""
    groups = packed.unflatten(-1, (-1, 4)).to(torch.int32)
    return groups[..., 0] | (groups[..., 1] << 8) | (groups[..., 2] << 16) | (groups[..., 3] << 24)


def _bytes(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    return torch.stack([(words >> shift) & 255 for shift in (0, 8, 16, 24)], -1).to(torch.uint8).flatten(-2)


def from_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
) -> PackedWeight:
    """4-bit integers in the format "pack-quantized", of one expert or of several stacked ones.

    Args:
        weight_packed: (N, K / 8) or (E, N, K / 8) int32.
        weight_scale: (N, K / G) or (E, N, K / G), fp32, bf16 or fp16.
        weight_zero_point: (N / 8, K / G) or (E, N / 8, K / G) int32, or None for a symmetric weight.
        shape: (N, K) or (E, N, K).
        dtype: as for PackedWeight; None: that of the scales.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    _check_type("weight_packed", weight_packed, torch.int32)
    if not isinstance(weight_scale, Tensor):
        raise ValueError(f"weight_scale must be a tensor, got {type(weight_scale).__name__}")
    *stack, rows, width = shape
    if width % INT32_WEIGHTS:
        raise ValueError(f"shape must have rows of a multiple of {INT32_WEIGHTS} weights, got {width}")
    _check_shape("weight_packed", weight_packed, (*stack, rows, width // INT32_WEIGHTS))
    if tuple(weight_scale.shape[:-1]) != (*stack, rows):
        flipped = weight_scale.ndim == len(shape) and weight_scale.shape[-1] == rows
        hint = ": it is transposed" if flipped else ""
        wanted = f"({', '.join(map(str, (*stack, rows)))}, K / group)"
        raise ValueError(f"weight_scale must be {wanted}, got {tuple(weight_scale.shape)}{hint}")
    zeros = None
    if weight_zero_point is not None:
        _check_type("weight_zero_point", weight_zero_point, torch.int32)
        blocks = weight_scale.shape[-1]
        _check_shape("weight_zero_point", weight_zero_point, (*stack, -(-rows // INT32_WEIGHTS), blocks))
        along = nibbles(_bytes(weight_zero_point.transpose(-1, -2).contiguous()))
        zeros = along.transpose(-1, -2)[..., :rows, :].contiguous()
    packed, scales = _bytes(weight_packed), weight_scale
    if not stack:
        packed, scales = packed[None], scales[None]
        zeros = None if zeros is None else zeros[None]
    return PackedWeight(packed, scales, zeros, "int4", dtype or weight_scale.dtype)


def to_compressed_tensors(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight_packed, weight_scale and weight_zero_point of `from_compressed_tensors`, stacked.

    Raises:
        ValueError: the weight is not in int4, or K is no multiple of 8.
    """
    if weight.format != "int4":
        raise ValueError(f"weight must be in int4, got {weight.format}")
    zero_point = None
    if weight.zeros is not None:
        along = weight.zeros.transpose(-1, -2)
        missing = -along.shape[-1] % INT32_WEIGHTS
        # rows that fill up the last word have the number of 0, which is 8
        along = torch.nn.functional.pad(along, (0, missing), value=8)
        zero_point = _words(pack_nibbles(along)).transpose(-1, -2).contiguous()
    return _words(weight.packed), weight.scales, zero_point


def from_gpt_oss(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """The experts of gpt-oss checkpoints.

    Args:
        blocks: (E, N, K / 32, 16) uint8.
        scales: (E, N, K / 32) uint8.
        dtype: as for PackedWeight.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    _check_type("blocks", blocks, torch.uint8)
    _check_type("scales", scales, torch.uint8)
    if blocks.ndim != 4 or blocks.shape[3] != 16:
        raise ValueError(f"blocks must be (E, N, K / 32, 16), got {tuple(blocks.shape)}")
    if scales.shape != blocks.shape[:3]:
        flipped = scales.ndim == 3 and tuple(scales.transpose(1, 2).shape) == tuple(blocks.shape[:3])
        hint = ": they are transposed" if flipped else ""
        raise ValueError(f"scales must be {tuple(blocks.shape[:3])}, got {tuple(scales.shape)}{hint}")
    return PackedWeight(blocks.flatten(2), scales, None, "mxfp4", dtype)


def to_gpt_oss(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """blocks and scales of `from_gpt_oss`.

    Raises:
        ValueError: the weight is not in mxfp4.
    """
    if weight.format != "mxfp4":
        raise ValueError(f"weight must be in mxfp4, got {weight.format}")
    return weight.packed.unflatten(-1, (-1, 16)), weight.scales
