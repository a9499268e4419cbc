"""Backward through the down projection and the activation (Triton), in one kernel.

    h[p] = g[p] @ down_proj[e]        g[p] = grad[token(p)]   down_proj (E, O, I)   h (S, I)
    dz = w h act'(z)                  weighted = w a          dots = <h, a>         w = weight of slot p

h exists only as a tile in registers: the epilogue reads the pre-activation z, recomputes a = act(z), and
writes what the weight gradients and the routing weights need. For a gated activation z and dz are (S, 2I),
gate first. 2 * S * O * I FLOPs; moves z, dz and weighted once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tuning
from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.backends.triton.common import act_and_grad, dot, input_precision, narrow
from cumo_kernels.backends.triton.tiles import (
    count_tiles,
    describe,
    find_tile,
    halves,
    load_rows,
    load_weight,
    upper_bound,
)

HIDDEN_SUMS = 16  # this epilogue holds z, act and act' beside every sum it finishes


@triton.jit
def _finish_hidden(
    h,  # (BLOCK_M, columns) fp32
    dots,  # (BLOCK_M,) fp32: <h, a> over the columns before these
    weights,  # (BLOCK_M,) fp32
    z_ptr,  # (rows, N) or, gated, (rows, 2N), its first row the tile's
    dz_ptr,  # like z, or None
    weighted_ptr,  # (rows, N), its first row the tile's, or None: gets w * a
    rows_left,
    first_col,
    N,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Backward of the activation for one tile, PARTS times a part of its columns. -> dots"""
    if PARTS > 1:
        left, right = halves(h)
        half: tl.constexpr = h.shape[1] // 2
        dots = _finish_hidden(
            left, dots, weights, z_ptr, dz_ptr, weighted_ptr, rows_left, first_col, N,
            ACTIVATION, GATED, PARTS // 2,
        )  # fmt: skip
        dots = _finish_hidden(
            right, dots, weights, z_ptr, dz_ptr, weighted_ptr, rows_left, first_col + half, N,
            ACTIVATION, GATED, PARTS // 2,
        )  # fmt: skip
    else:
        rows = tl.arange(0, h.shape[0])[:, None]
        cols = (first_col + tl.arange(0, h.shape[1]))[None, :]
        mask = (rows < rows_left) & (cols < N)
        offsets = rows * (2 * N if GATED else N) + cols
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        a, slope = act_and_grad(z, ACTIVATION)
        weighted_h = h * weights[:, None]
        if GATED:
            up = tl.load(z_ptr + N + offsets, mask=mask, other=0.0).to(tl.float32)
            if dz_ptr is not None:
                tl.store(dz_ptr + N + offsets, narrow(weighted_h * a, dz_ptr.dtype.element_ty), mask=mask)
            a = a * up
            slope = slope * up
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, narrow(weighted_h * slope, dz_ptr.dtype.element_ty), mask=mask)
        if weighted_ptr is not None:
            weighted = narrow(weights[:, None] * a, weighted_ptr.dtype.element_ty)
            tl.store(weighted_ptr + (rows * N + cols), weighted, mask=mask)
        dots += tl.sum(h * a, 1)
    return dots


@triton.jit
def grad_hidden_kernel(
    grad_ptr,  # (T, K), K the output size
    weight_ptr,  # (E, K, N), N the intermediate size; None with a descriptor
    weight_desc,  # the same, innermost dimension as stored, or None
    expert_offsets_ptr,  # (E + 1,) int32
    permutation_ptr,  # (S,) int32
    topk_weights_ptr,  # (S,) fp32 by slot
    z_ptr,  # (S, N) or, gated, (S, 2N)
    dz_ptr,  # like z, or None
    weighted_ptr,  # (S, N) or None
    dots_ptr,  # (S, cdiv(N, BLOCK_N)) fp32 or None: <h, a> by column tile
    N,
    K,
    top_k,
    stride_grad_t,
    stride_grad_k,
    stride_w_e,
    stride_w_k,
    stride_w_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_ends = count_tiles(expert_offsets_ptr, tiles_n, E, E_POW2, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0), flatten=FLATTEN):
        expert, end, first_row, tile_n, _ = find_tile(
            tile, tile_ends, expert_offsets_ptr, tiles_n, 1, BLOCK_M, GROUP_M
        )
        rows = first_row + tl.arange(0, BLOCK_M)
        first_col = tile_n * BLOCK_N
        slots = tl.load(permutation_ptr + tl.minimum(rows, end - 1))
        row_ptrs = grad_ptr + (slots // top_k).to(tl.int64)[:, None] * stride_grad_t
        expert_ptr = None
        if weight_desc is None:
            expert_ptr = weight_ptr + expert.to(tl.int64) * stride_w_e

        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            g = load_rows(row_ptrs, None, first_row, k, K, stride_grad_k, BLOCK_K, EVEN_K)
            b = load_weight(
                expert_ptr, weight_desc, expert, first_col, k, N, K, stride_w_n, stride_w_k,
                K_INNER, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K,
            )  # fmt: skip
            h = dot(g, b, h, INPUT_PRECISION)

        # read again rather than kept in registers over the loop
        slots = tl.load(permutation_ptr + tl.minimum(rows, end - 1), volatile=True)
        weights = tl.load(topk_weights_ptr + slots)
        # int64: a row number times its width passes 2**31; within a tile nothing does
        row64 = first_row.to(tl.int64)
        width = 2 * N if GATED else N
        dz_row, weighted_row = dz_ptr, weighted_ptr
        if dz_ptr is not None:
            dz_row = dz_ptr + row64 * width
        if weighted_ptr is not None:
            weighted_row = weighted_ptr + row64 * N
        dots = _finish_hidden(
            h, tl.zeros((BLOCK_M,), tl.float32), weights, z_ptr + row64 * width, dz_row, weighted_row,
            end - first_row, first_col, N, ACTIVATION, GATED, PARTS,
        )  # fmt: skip
        if dots_ptr is not None:
            tl.store(dots_ptr + rows.to(tl.int64) * tiles_n + tile_n, dots, mask=rows < end)


def launch_grad_hidden(
    grad: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    down_proj: Tensor,
    z: Tensor,
    activation: str,
    *,
    need_dz: bool,
    need_weighted: bool,
    need_dots: bool,
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dz like z, w * a (S, I), and <h, a> by column tile (S, tiles) fp32; empty where not needed."""
    num_rows = permutation.shape[0]
    num_experts, out_features, width = down_proj.shape
    gated = ACTIVATIONS[activation].is_gated
    gpu = tuning.gpu_of(grad.device)
    if config is None:
        rows = tuning.bucket(num_rows)
        problem = tuning.Problem(
            "grad_hidden", grad.dtype, rows, width, out_features, num_experts, gathered=True
        )
        config = tuning.get_config(problem, gpu)
    tiles_n = triton.cdiv(width, config.BLOCK_N)
    dz = torch.empty_like(z) if need_dz else grad.new_empty(0)
    weighted = grad.new_empty(num_rows, width) if need_weighted else grad.new_empty(0)
    dots = topk_weights.new_empty(num_rows if need_dots else 0, tiles_n)
    if num_rows * width == 0:
        return dz, weighted, dots

    k_inner = down_proj.stride(1) == 1 and down_proj.stride(2) != 1
    if k_inner:
        weight_desc = describe(down_proj.transpose(1, 2), [1, config.BLOCK_N, config.BLOCK_K], gpu.has_tma)
    else:
        weight_desc = describe(down_proj, [1, config.BLOCK_K, config.BLOCK_N], gpu.has_tma)
    tiles = upper_bound(num_rows, num_experts, config.BLOCK_M) * tiles_n
    grad_hidden_kernel[(min(gpu.sms * config.PER_SM, tiles),)](
        grad,
        None if weight_desc else down_proj,
        weight_desc,
        expert_offsets,
        permutation,
        topk_weights,
        z,
        dz if need_dz else None,
        weighted if need_weighted else None,
        dots if need_dots else None,
        width,
        out_features,
        topk_weights.shape[1],
        *grad.stride(),
        *down_proj.stride(),
        ACTIVATION=activation,
        GATED=gated,
        K_INNER=k_inner,
        EVEN_N=width % config.BLOCK_N == 0,
        EVEN_K=out_features % config.BLOCK_K == 0,
        INPUT_PRECISION=input_precision(grad.dtype),
        PARTS=config.epilogue_parts(config.BLOCK_M, config.BLOCK_N, HIDDEN_SUMS),
        E=num_experts,
        E_POW2=triton.next_power_of_2(num_experts),
        **config.constants("SPLITS"),
    )
    return dz, weighted, dots
