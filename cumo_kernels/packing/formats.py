"""The 4-bit formats: what the sixteen values of a nibble mean, and how weights are rounded to them.

A row of K weights is cut into blocks of `group` weights, each with one scale. A weight is stored as a number
q from 0 to 15; two neighbours share a byte, the first in its low half. All arithmetic is in fp32:

    nf4, fp4   codes[q] * scale                  scale = largest magnitude of the block
    mxfp4      codes[q] * 2^(s - 127)            s = floor(log2(largest magnitude)) - 2 + 127; s = 255 is NaN
    int4       (q - zero) * scale                zero is 8 in a symmetric weight

Sources: nf4 is QLoRA (arXiv 2305.14314, appendix E), fp4 the other 4-bit type of bitsandbytes; mxfp4 is MX of
the OCP specification 1.0 (elements E2M1, scales E8M0, section 6.3 for the conversion); int4 is the affine
quantisation of compressed-tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
FP4_PARTS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths
FP4 = tuple(part / 12 for part in FP4_PARTS) + tuple(-part / 12 for part in FP4_PARTS)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# fmt: on
SCALES = (torch.float32, torch.bfloat16, torch.float16)
SYMMETRIC_ZERO = 8  # of int4 without zeros
E8M0_NAN = 255
E8M0_OF_NOT_FINITE = 253  # what `quantize` makes of an infinity or a NaN: one more than of finite weights
CHUNK = 1 << 24  # weights that are unpacked at a time: 64 MiB of fp32


@dataclass(frozen=True)
class Format:
    """A row of FORMATS."""

    name: str
    group: int  # default number of weights that share a scale
    groups: tuple[int, ...]  # all that are supported
    codes: tuple[float, ...] | None  # value of each q; None: q - zero
    scales: tuple[torch.dtype, ...]  # dtypes of the scales, the default first
    may_have_zeros: bool = False


_POWERS = (32, 64, 128, 256)
FORMATS = {
    row.name: row
    for row in (
        Format("nf4", 64, _POWERS, NF4, SCALES),
        Format("fp4", 64, _POWERS, FP4, SCALES),
        Format("mxfp4", 32, (32,), E2M1, (torch.uint8,)),
        Format("int4", 128, _POWERS, None, SCALES, may_have_zeros=True),
    )
}


def nibbles(packed: Tensor) -> Tensor:
    """(..., K / 2) uint8 -> (..., K) uint8: the numbers from 0 to 15, the low half of a byte first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def pack_nibbles(q: Tensor) -> Tensor:
    """(..., K) uint8 of numbers from 0 to 15 -> (..., K / 2) uint8; the inverse of `nibbles`."""
    return q[..., ::2] | (q[..., 1::2] << 4)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^(s - 127) of uint8 exponents s (E8M0), in fp32; NaN for 255."""
    bits = exponents.to(torch.int32) << 23
    bits = torch.where(exponents == 0, 1 << 22, bits)  # 2^-127, which is subnormal
    bits = torch.where(exponents == E8M0_NAN, 0x7FC00000, bits)
    return bits.view(torch.float32)


def _unpacked(packed: Tensor, scales: Tensor, zeros: Tensor | None, row: Format) -> Tensor:
    """Values in fp32, with a dimension of the blocks: (..., K / G, G)."""
    q = nibbles(packed).unflatten(-1, (scales.shape[-1], -1))
    if row.codes is not None:
        codes = torch.tensor(row.codes, dtype=torch.float32, device=packed.device)
        values = codes[q.int()]
    elif zeros is None:
        values = q.to(torch.float32) - SYMMETRIC_ZERO
    else:
        values = q.to(torch.float32) - zeros[..., None].to(torch.float32)
    scales = power_of_two(scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)
    return values.mul_(scales[..., None])


def unpack(packed: Tensor, scales: Tensor, zeros: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """The weights, computed in fp32 and rounded once to `dtype`.

    Args:
        packed: (E, N, K / 2) uint8.
        scales: (E, N, K / G).
        zeros: (E, N, K / G) uint8, of int4 only; or None.
        name: of the format.
        dtype: a float dtype.

    Returns:
        (E, N, K).
    """
    row = FORMATS[name]
    experts, rows, half = packed.shape
    out = torch.empty(experts, rows, 2 * half, dtype=dtype, device=packed.device)
    step = max(1, CHUNK // max(1, rows * 2 * half))
    for first in range(0, experts, step):
        part = slice(first, first + step)
        some = None if zeros is None else zeros[part]
        out[part] = _unpacked(packed[part], scales[part], some, row).flatten(-2)
    return out


def _nearest(values: Tensor, codes: tuple[float, ...]) -> Tensor:
    """The q whose code is nearest; halfway between two, the lower value, as bitsandbytes decides."""
    table = torch.tensor(codes, dtype=torch.float32, device=values.device)
    ordered, order = table.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(values, middles, out_int32=True)]


def _round_to_codes(blocks: Tensor, row: Format, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = blocks.abs().amax(-1)
    scales = largest.to(scale_dtype)
    used = scales.to(torch.float32)
    inverse = 1.0 / used.clamp(min=torch.finfo(torch.float32).tiny)
    return _nearest((blocks * inverse[..., None]).clamp_(-1, 1), row.codes), scales


def _round_to_mx(blocks: Tensor) -> tuple[Tensor, Tensor]:
    largest = blocks.abs().amax(-1)
    exponents = (largest.view(torch.int32) >> 23) - 2  # that of E2M1's largest power of two
    exponents = exponents.clamp(min=0)
    values = (blocks / power_of_two(exponents.to(torch.uint8))[..., None]).abs_()
    # halfway between two magnitudes the one whose last bit is 0, as floats are rounded
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=blocks.device)
    below = torch.bucketize(values, middles, out_int32=True)
    up = torch.bucketize(values, middles, out_int32=True, right=True)
    magnitude = torch.where(below % 2 == 0, below, up)
    return (magnitude + 8 * torch.signbit(blocks)).to(torch.uint8), exponents.to(torch.uint8)


def _round_to_int(
    blocks: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    if symmetric:
        span = 2 * blocks.abs().amax(-1)
    else:
        lowest, highest = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        span = highest - lowest
    scales = (span / 15).to(scale_dtype)
    scales = torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
    used = scales.to(torch.float32)
    if symmetric:
        zeros, shift = None, torch.full_like(used, SYMMETRIC_ZERO)
    else:
        shift = (-lowest / used).round_().clamp_(0, 15)
        zeros = shift.to(torch.uint8)
    q = (blocks / used[..., None]).round_().add_(shift[..., None]).clamp_(0, 15)
    return q.to(torch.uint8), scales, zeros


def quantize(
    weight: Tensor, name: str, group: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round weights to the nearest values of a format.

    Args:
        weight: (E, N, K) float; K is a multiple of `group`.
        name, group, symmetric, scale_dtype: as for `cumo_kernels.pack`.

    Returns:
        packed (E, N, K / 2) uint8, scales (E, N, K / G), zeros (E, N, K / G) uint8 or None.
    """
    row, found = FORMATS[name], []
    step = max(1, CHUNK // max(1, weight[0].numel())) if weight.shape[0] else 1
    for some in weight.split(step):
        blocks = some.to(torch.float32).unflatten(-1, (-1, group))
        zeros = None
        if name == "mxfp4":
            q, scales = _round_to_mx(blocks)
        elif row.codes is not None:
            q, scales = _round_to_codes(blocks, row, scale_dtype)
        else:
            q, scales, zeros = _round_to_int(blocks, symmetric, scale_dtype)
        found.append((pack_nibbles(q.flatten(-2)), scales, zeros))
    packed, scales, zeros = zip(*found, strict=True)
    return torch.cat(packed), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
