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

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cumo_kernels.tracing import is_eager

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
CHUNK = 1 << 24  # weights that are converted at a time: 64 MiB of fp32
CACHED = 1 << 18  # the same on a CPU: 1 MiB


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


def _fill(table: Tensor, name: str) -> Tensor:
    for i, code in enumerate(FORMATS[name].codes or range(16)):
        table[i].fill_(code)  # no copy from the host, for which a stream would wait
    return table


def _lasting(name: str, device: torch.device) -> Tensor:
    """A table whose values are in place, for any stream, made in no mode and in no memory pool of a graph."""

    def make() -> Tensor:
        table = _fill(torch.empty(16, dtype=torch.float32, device=device), name)
        if device.type == "cuda":
            with torch.cuda.device(device):
                done = torch.cuda.Event()
                done.record()
                while not done.query():  # once in a process
                    time.sleep(0)
        return table

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


_LASTING: dict[tuple[str, torch.device], Tensor] = {}


def codes_of(name: str, like: Tensor) -> Tensor:
    """(16,) fp32 on the device of `like`: each number of a format before scale and zero point."""
    device = like.device
    if device.type != "cuda":
        return torch.tensor(FORMATS[name].codes or range(16), dtype=torch.float32, device=device)
    key = name, device
    is_kept = key in _LASTING
    if not is_eager(like) or (not is_kept and torch.cuda.is_current_stream_capturing()):
        return _fill(like.new_empty(16, dtype=torch.float32), name)  # of the trace or the graph alone
    if not is_kept:
        _LASTING[key] = _lasting(name, device)
    return _LASTING[key]


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
    experts, rows, half = packed.shape
    codes, q = codes_of(name, packed), torch.arange(256, device=packed.device)
    # both numbers of a byte at once, as one element of 8 bytes
    pairs = torch.stack((codes[q & 15], codes[q >> 4]), -1).view(torch.int64).flatten()
    out = torch.empty(experts * rows, 2 * half, dtype=dtype, device=packed.device)
    packed, scales = packed.reshape(experts * rows, half), scales.reshape(experts * rows, -1)
    zeros = None if zeros is None else zeros.reshape(experts * rows, -1)
    step = max(1, (CACHED if packed.device.type == "cpu" else CHUNK) // max(1, 2 * half))
    if torch.compiler.is_compiling():
        step = max(1, experts * rows)
    for first in range(0, experts * rows, step):
        part = slice(first, first + step)
        values = pairs.index_select(0, packed[part].flatten().int()).view(torch.float32)
        values = values.view(-1, scales.shape[1], 2 * half // scales.shape[1])
        if name == "int4":
            values -= SYMMETRIC_ZERO if zeros is None else zeros[part, :, None]
        scale = scales[part, :, None]
        values *= power_of_two(scale) if scale.dtype == torch.uint8 else scale
        out[part] = values.flatten(1)
    return out.view(experts, rows, 2 * half)


def _nearest(values: Tensor, codes: tuple[float, ...]) -> Tensor:
    """The q whose code is nearest; halfway between two, the lower value, as bitsandbytes decides."""
    table = torch.tensor(codes, dtype=torch.float32, device=values.device)
    ordered, order = table.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(values, middles, out_int32=True)]


def _numbers(blocks: Tensor, name: str, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The number of each weight, (..., K / G, G) uint8, with these scales and zero points."""
    if name == "mxfp4":
        values = (blocks / power_of_two(scales)[..., None]).abs_()
        # halfway between two magnitudes the one whose last bit is 0, as floats are rounded
        middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=blocks.device)
        below = torch.bucketize(values, middles, out_int32=True)
        up = torch.bucketize(values, middles, out_int32=True, right=True)
        return (torch.where(below % 2 == 0, below, up) + 8 * torch.signbit(blocks)).to(torch.uint8)
    used = scales.to(torch.float32)[..., None]
    if (codes := FORMATS[name].codes) is not None:
        inverse = 1.0 / used.clamp(min=torch.finfo(torch.float32).tiny)
        return _nearest((blocks * inverse).clamp_(-1, 1), codes)
    shift = SYMMETRIC_ZERO if zeros is None else zeros[..., None]
    return (blocks / used).round_().add_(shift).clamp_(0, 15).to(torch.uint8)


def _scales_of(
    blocks: Tensor, name: str, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that fit the blocks."""
    if name != "int4":
        largest = blocks.abs().amax(-1)
        if name != "mxfp4":
            return largest.to(scale_dtype), None
        exponents = (largest.view(torch.int32) >> 23) - 2  # that of E2M1's largest power of two
        return exponents.clamp(min=0).to(torch.uint8), None
    if symmetric:
        span = 2 * blocks.abs().amax(-1)
    else:
        lowest, highest = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        span = highest - lowest
    scales = (span / 15).to(scale_dtype)
    scales = torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
    if symmetric:
        return scales, None
    return scales, (-lowest / scales.to(torch.float32)).round_().clamp_(0, 15).to(torch.uint8)


def _in_blocks(weight: Tensor, group: int) -> Tensor:
    return weight.to(torch.float32).contiguous().unflatten(-1, (-1, group))


def _at_a_time(weight: Tensor) -> int:
    return max(1, CHUNK // max(1, weight[0].numel())) if weight.shape[0] else 1


def requantize(weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, name: str) -> None:
    """Round other weights into the parts of a packed one, in place.

    A block keeps its scale and zero point if they fit the new weights at least as well as those that
    `quantize` would choose: weights that are multiples of their scale already stay what they are.

    Args:
        weight: (E, N, K) float.
        packed, scales, zeros: as for `unpack`; they are overwritten.
        name: of the format.
    """
    group, step = 2 * packed.shape[-1] // scales.shape[-1], _at_a_time(weight)
    for first in range(0, weight.shape[0], step):
        part = slice(first, first + step)
        blocks = _in_blocks(weight[part], group)
        old = scales[part], None if zeros is None else zeros[part]
        tried = []
        for one in (old, _scales_of(blocks, name, zeros is None, scales.dtype)):
            q = _numbers(blocks, name, *one)
            values = unpack(pack_nibbles(q.flatten(-2)), *one, name, torch.float32)
            tried.append((*one, q, (values.unflatten(-1, (-1, group)) - blocks).square_().sum(-1)))
        (*_, kept_q, kept_error), (new_scales, new_zeros, new_q, new_error) = tried
        better = ~(kept_error <= new_error)
        packed[part] = pack_nibbles(torch.where(better[..., None], new_q, kept_q).flatten(-2))
        scales[part] = torch.where(better, new_scales, scales[part])
        if zeros is not None:
            zeros[part] = torch.where(better, new_zeros, zeros[part])


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
    found = []
    for some in weight.split(_at_a_time(weight)):
        blocks = _in_blocks(some, group)
        scales, zeros = _scales_of(blocks, name, symmetric, scale_dtype)
        found.append((pack_nibbles(_numbers(blocks, name, scales, zeros).flatten(-2)), scales, zeros))
    packed, scales, zeros = zip(*found, strict=True)
    return torch.cat(packed), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
