"""How a persistent program finds its tile and loads the operands of one step (shared by the GEMM kernels).

Rows of expert e are [expert_offsets[e], expert_offsets[e + 1]). An expert has cdiv(its rows, BLOCK_M) *
tiles_n * SPLITS tiles. Tiles are numbered expert by expert, so a program finds a tile's expert on the device
from the offsets alone, and the grid does not depend on the routing.

An operand is a pointer with strides, or a descriptor that the copy engine of Hopper and later reads
(launch.py); a descriptor returns zeros outside the tensor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import narrow, wait_for_earlier
from cumo_kernels.backends.triton.launch import Launch, cdiv, next_power_of_2, planned


def upper_bound(num_rows: int, num_experts: int, block_m: int) -> int:
    """The largest number of row tiles that a routing of `num_rows` rows can need."""
    return min(cdiv(num_rows, block_m) + num_experts - 1, num_rows)


@triton.jit
def count_tiles(
    expert_offsets_ptr,  # (E + 1,) int32
    tiles_per_row_tile,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """-> for each expert the number of tiles up to its last, (E_POW2,) int32."""
    experts = tl.arange(0, E_POW2)
    begins = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    return tl.cumsum(tl.cdiv(ends - begins, BLOCK_M) * tiles_per_row_tile, 0)


@triton.jit
def find_tile(
    tile,
    tile_ends,  # (E_POW2,) from count_tiles
    expert_offsets_ptr,  # (E + 1,) int32
    tiles_n,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """-> expert, its end row, the tile's first row, the tile's column index, the tile's split."""
    earlier = tile_ends <= tile
    expert = tl.sum(earlier.to(tl.int32), 0)
    local = tile - tl.max(tl.where(earlier, tile_ends, 0), 0)
    begin = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    tiles_m = tl.cdiv(end - begin, BLOCK_M)
    split = 0
    if SPLITS > 1:
        split = local // (tiles_m * tiles_n)
        local = local % (tiles_m * tiles_n)
    tile_m, tile_n = grouped_order(local, tiles_m, tiles_n, GROUP_M)
    return expert, end, begin + tile_m * BLOCK_M, tile_n, split


@triton.jit
def grouped_order(local, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """GROUP_M row tiles run before the next column tile, so that concurrent tiles share L2 lines."""
    group = local // (GROUP_M * tiles_n)
    within = local % (GROUP_M * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit
def load_rows(
    row_ptrs,  # (BLOCK_M, 1) pointers to the first element of each row, or None with a descriptor
    x_desc,  # (rows, K) or None
    first_row,
    k,
    K,
    stride_x_k,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """x[rows, k : k + BLOCK_K], zero past K."""
    if x_desc is not None:
        tile = x_desc.load([first_row, k])
    else:
        cols = k + tl.arange(0, BLOCK_K)
        # int64: a transposed view has stride T here, and K * T exceeds 2**31
        ptrs = row_ptrs + cols.to(tl.int64)[None, :] * stride_x_k
        if EVEN_K:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=cols[None, :] < K, other=0.0)
    return tile


@triton.jit
def load_weight(
    expert_ptr,  # to weight[expert], or None with a descriptor
    weight_desc,  # (E, N, K) when K_INNER, else (E, K, N), or None
    expert,
    first_n,
    k,
    N,
    K,
    stride_w_n,
    stride_w_k,
    K_INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """weight[expert, first_n : first_n + BLOCK_N, k : k + BLOCK_K] transposed, (BLOCK_K, BLOCK_N)."""
    if weight_desc is not None:
        if K_INNER:
            tile = weight_desc.load([expert, first_n, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            tile = weight_desc.load([expert, k, first_n]).reshape(BLOCK_K, BLOCK_N)
    else:
        cols_n = (first_n + tl.arange(0, BLOCK_N))[None, :]
        cols_k = (k + tl.arange(0, BLOCK_K))[:, None]
        ptrs = expert_ptr + cols_k.to(tl.int64) * stride_w_k + cols_n.to(tl.int64) * stride_w_n
        if EVEN_N and EVEN_K:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=(cols_k < K) & (cols_n < N), other=0.0)
    return tile


@triton.jit
def halves(tile):
    """(M, N) -> its left and right halves, (M, N / 2) each."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.reshape(tile, (M, 2, N // 2)).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["R"])
def _sum_rows_kernel(
    rows_ptr,  # (R, N) fp32
    out_ptr,  # (N,)
    R,
    N,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_earlier()
    # int64: R * N exceeds 2**31
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (cols < N)[None, :]
        acc += tl.load(rows_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + cols, narrow(tl.sum(acc, 0), out_ptr.dtype.element_ty), mask=cols < N)


@planned
def _plan_sum(device: torch.device, num_rows: int, width: int) -> tuple[Launch, int]:
    block_r = min(32, next_power_of_2(num_rows))
    block_n = 4096 // block_r
    launch = Launch(_sum_rows_kernel, R=num_rows, N=width, BLOCK_R=block_r, BLOCK_N=block_n)
    return launch, cdiv(width, block_n)


def sum_rows(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, ...) fp32 -> (...): the sum over the first dimension, in a fixed order."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    if out.numel():
        launch, programs = _plan_sum(partials.device, partials.shape[0], out.numel())
        launch(programs, partials, out)
    return out
