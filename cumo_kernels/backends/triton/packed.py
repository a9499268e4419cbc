"""Tiles of a 4-bit weight and the low-rank term of a product (Triton), for the two GEMM kernels.

A weight (E, N, K) is stored as two elements a byte along K, the even one in the low nibble, with one scale,
and in "int4" possibly one zero point, for each group of GROUP elements along K. A tile is read as bytes and
dequantised in registers, with the arithmetic of `PackedWeight.dequantize`, so it has the same bits:

    nf4, fp4: codes[q] * scale     mxfp4: e2m1[q] * 2^(scale - 127)     int4: (q - zero, or 8) * scale

in fp32, rounded once to the dtype of the rows. The low-rank term adds u[p] @ v[e].T to the same fp32 sums.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import INTERPRETING, dot, narrow
from cumo_kernels.backends.triton.tiles import load_weight
from cumo_kernels.packing.formats import codes_of

TWO_TO_23: tl.constexpr = tl.constexpr(2.0**23)
TWO_TO_126: tl.constexpr = tl.constexpr(2.0**126)
RANK_STEP = 64  # the largest step along the rank; a tile of v has no more columns


@triton.jit
def _look_up(codes_ptr, q):
    """codes[q] in fp32, q (rows, columns) int32 from 0 to 15.

    In the interpreter a load. On a GPU the same load as an instruction that Triton's pipeliner does not see:
    it would copy a code for every element into shared memory.
    """
    if INTERPRETING:
        return tl.load(codes_ptr + q)
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=f,l", [codes_ptr + q], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _decode(q, scale, zero, codes_ptr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The values of the codes q (int32) with their scale and zero point (fp32), rounded to DTYPE."""
    if FORMAT == "mxfp4":
        # sign, exponent and mantissa of e2m1 make an fp32 number with 2^-126 times its value
        bits = ((q & 7) << 22) | ((q >> 3) << 31)
        value = bits.to(tl.float32, bitcast=True) * TWO_TO_126
    elif FORMAT == "int4":
        # q as the last bits of 2^23 is 2^23 + q: conversions of integers have a quarter of the throughput
        value = (q | 0x4B000000).to(tl.float32, bitcast=True) - (zero + TWO_TO_23)
    else:
        value = _look_up(codes_ptr, q)
    return narrow(value * scale, DTYPE)


@triton.jit
def _load_spread(
    row_ptrs,  # (ROWS, 1) to the first group of each row
    mask_rows,  # (ROWS, 1)
    first_col,
    L,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The scales or zero points of a tile as fp32: (ROWS, COLS), or (ROWS, 1) if a row has one."""
    ROWS: tl.constexpr = row_ptrs.shape[0]
    COUNT: tl.constexpr = COLS // SHARED
    cols = (first_col + tl.arange(0, COUNT) * SHARED)[None, :]
    if EVEN:
        loaded = tl.load(row_ptrs + cols // GROUP)
    else:
        loaded = tl.load(row_ptrs + cols // GROUP, mask=mask_rows & (cols < L), other=0)
    if FORMAT == "mxfp4" and row_ptrs.dtype.element_ty == tl.uint8:
        # e8m0: 0 is 2^-127, which has no exponent bits of its own, and 255 is NaN
        exponent = loaded.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        values = tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        values = loaded.to(tl.float32)
    if COUNT > 1:
        values = tl.broadcast_to(values[:, :, None], (ROWS, COUNT, SHARED))
        values = tl.reshape(values, (ROWS, COLS))
    return values


@triton.jit
def load_packed(
    packed_ptr,  # (rows, L / 2) uint8 of one expert
    scales_ptr,  # (rows, L / GROUP) of one expert
    zeros_ptr,  # like scales, uint8, or None
    codes_ptr,  # (16,) fp32, or None
    first_row,
    first_col,
    num_rows,
    L,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The (ROWS, COLS) tile of DTYPE at (first_row, first_col) of a stored weight (num_rows, L).

    SHARED columns from a multiple of SHARED on have one scale. Outside the weight the tile is zero.
    """
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask_rows = rows < num_rows
    col_bytes = (first_col // 2 + tl.arange(0, COLS // 2))[None, :]
    ptrs = packed_ptr + rows * (L // 2) + col_bytes
    if EVEN:
        pairs = tl.load(ptrs)
    else:
        pairs = tl.load(ptrs, mask=mask_rows & (col_bytes < L // 2), other=0)
    groups = L // GROUP
    scale = _load_spread(
        scales_ptr + rows * groups, mask_rows, first_col, L, GROUP, SHARED, COLS, EVEN, FORMAT
    )
    zero = 8.0
    if zeros_ptr is not None:
        zero = _load_spread(
            zeros_ptr + rows * groups, mask_rows, first_col, L, GROUP, SHARED, COLS, EVEN, FORMAT
        )
    # interleaved before the arithmetic: Triton 3.6 fails to compile a dot of an interleaved tile
    q = tl.interleave(pairs & 15, pairs >> 4).to(tl.int32)
    return _decode(q, scale, zero, codes_ptr, FORMAT, DTYPE)


@triton.jit
def load_operand(
    expert_ptr,  # to weight[expert], or None with a descriptor
    weight_desc,
    scales_ptr,  # to scales[expert], or None without FORMAT
    zeros_ptr,
    codes_ptr,
    expert,
    first_n,
    k,
    N,  # columns before the end of this half
    K,
    stride_w_n,
    stride_w_k,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    HALVES: tl.constexpr,  # N times this is the number of columns of the whole weight
    K_INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`load_weight` of a plain weight, or with FORMAT of a packed one, packed along K if K_INNER, else N."""
    if FORMAT is None:
        tile = load_weight(
            expert_ptr, weight_desc, expert, first_n, k, N, K, stride_w_n, stride_w_k,
            K_INNER, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K,
        )  # fmt: skip
    elif K_INNER:
        tile = load_packed(
            expert_ptr, scales_ptr, zeros_ptr, codes_ptr, first_n, k, N, K,
            FORMAT, GROUP, SHARED, BLOCK_N, BLOCK_K, EVEN_N and EVEN_K, DTYPE,
        ).T  # fmt: skip
    else:
        tile = load_packed(
            expert_ptr, scales_ptr, zeros_ptr, codes_ptr, k, first_n, K, N * HALVES,
            FORMAT, GROUP, SHARED, BLOCK_K, BLOCK_N, EVEN_N and EVEN_K, DTYPE,
        )  # fmt: skip
    return tile


@triton.jit
def add_low_rank(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    u_ptr,  # (rows, R), rows in expert order
    v_ptr,  # v[expert], (N, R)
    first_row,
    end,
    first_n,
    N,
    used_rank,  # R, or 0 to add nothing
    R,
    stride_v_n,
    stride_v_r,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + u[rows] @ v[expert, first_n : first_n + BLOCK_N].T, with rows from `first_row` to `end`."""
    rows = tl.minimum(first_row + tl.arange(0, acc.shape[0]), end - 1).to(tl.int64)[:, None]
    cols_n = (first_n + tl.arange(0, acc.shape[1]))[None, :]
    for r in tl.range(0, used_rank, BLOCK_R, num_stages=1):
        ranks = r + tl.arange(0, BLOCK_R)
        u = tl.load(u_ptr + rows * R + ranks[None, :], mask=ranks[None, :] < R, other=0.0)
        v_ptrs = v_ptr + cols_n.to(tl.int64) * stride_v_n + ranks.to(tl.int64)[:, None] * stride_v_r
        v = tl.load(v_ptrs, mask=(ranks[:, None] < R) & (cols_n < N), other=0.0)
        acc = dot(u, v, acc, INPUT_PRECISION)
    return acc


class Packed(NamedTuple):
    """A 4-bit weight as a launcher takes it, contiguous; nominal shape (E, N, K), transposed (E, K, N)."""

    data: Tensor  # (E, N, K / 2) uint8
    scales: Tensor  # (E, N, K / G)
    zeros: Tensor | None  # like scales, uint8
    format: str
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, rows, width = self.data.shape
        return (num_experts, 2 * width, rows) if self.is_transposed else (num_experts, rows, 2 * width)

    @property
    def group(self) -> int:
        return 2 * self.data.shape[2] // self.scales.shape[2] if self.scales.shape[2] else 1

    def stride(self) -> tuple[int, int, int]:
        """Those of `data`, in bytes."""
        by_expert, by_row, by_byte = self.data.stride()
        return (by_expert, by_byte, by_row) if self.is_transposed else (by_expert, by_row, by_byte)

    @property
    def kind(self) -> tuple[str, int]:
        """What decides the code of a kernel, beside shapes: format and length of a group."""
        return self.format, self.group

    def transpose(self, first: int, second: int) -> "Packed":
        assert {first, second} == {1, 2}
        return self._replace(is_transposed=not self.is_transposed)

    def contiguous(self) -> "Packed":
        zeros = None if self.zeros is None else self.zeros.contiguous()
        return self._replace(data=self.data.contiguous(), scales=self.scales.contiguous(), zeros=zeros)

    def pointers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scales, zero points and table of codes, as the kernels take them."""
        return self.scales, self.zeros, _table_of(self.format, self.data)


def packed_or_plain(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format: str | None
) -> Tensor | Packed:
    """The weight of an op's arguments: `weight` itself without a format."""
    return weight if format is None else Packed(weight, scales, zeros, format).contiguous()


def _table_of(format: str, like: Tensor) -> Tensor | None:
    """(16,) fp32: the codes of a format, if its kernel reads them."""
    return None if format in ("mxfp4", "int4") else codes_of(format, like)


def packed_constants(
    kind: tuple[str, int] | None, block: int, second_half: int = 0
) -> dict[str, str | int | None]:
    """FORMAT, GROUP and SHARED of a kernel.

    Args:
        kind: `Packed.kind`, or None for a plain weight.
        block: size of a tile along the packed direction.
        second_half: the column where the tiles of a gated weight's second half begin, if it is packed along
            its columns.
    """
    if kind is None:
        return {"FORMAT": None, "GROUP": None, "SHARED": None}
    format, group = kind
    return {"FORMAT": format, "GROUP": group, "SHARED": math.gcd(block, group, second_half)}


class LowRank(NamedTuple):
    """The second pair of a product: sums get u (S, R), in expert order, times v[e] (N, R) transposed."""

    u: Tensor
    v: Tensor  # (E, N, R), any strides


def low_rank_key(low_rank: LowRank | None) -> tuple[int, ...] | None:
    """What a plan must know of it."""
    return None if low_rank is None else (low_rank.u.shape[1], *low_rank.v.stride())


def low_rank_constants(key: tuple[int, ...] | None, columns: int) -> dict[str, int | None]:
    """R, strides and step of a kernel; `columns` of v are read at once."""
    names = ("R", "stride_v_e", "stride_v_n", "stride_v_r")
    if key is None:
        return dict.fromkeys((*names, "BLOCK_R"))
    step = min(RANK_STEP, max(16, 1 << (key[0] - 1).bit_length()))
    while step > 16 and step * columns > 8192:
        step //= 2
    return dict(zip(names, key, strict=True)) | {"BLOCK_R": step}
