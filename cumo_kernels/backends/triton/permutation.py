"""Permutation (Triton): token order -> expert order, and the weighted sum back to token order.

    permute:           out[p] = x[permutation[p] // K]                            x (T, H)     out (S, H)
    combine:           out[t] = sum_k topk_weights[t, k] * rows[inverse[t * K + k]]
                                                                                  rows (S, H)  out (T, H)
    combine_backward:  drows[inverse[s]] = topk_weights[s] * grad[s // K]
                       dweights[s] = <grad[s // K], rows[inverse[s]]>             grad (T, H)

Sorted positions of dropped slots (inverse -1) are set to zero and never read.
_permute_kernel, _combine_kernel: one program per tile of rows x columns; memory bound, S * H + T * H elements
(permute reads a token K times, from L2). _combine_backward_kernel: one program per BLOCK_S slots, whole rows;
2 * S * H + T * H elements. Rows are moved in 16-byte pieces when H and the strides allow it.

Contract: cumo_kernels/ops/permutation.py. Reference: cumo_kernels/backends/reference/permutation.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import narrow, tile_of_rows, wait_for_earlier
from cumo_kernels.backends.triton.launch import Launch, cdiv, on_device_of_first, planned, whole_rows


@triton.jit(do_not_specialize=["S"])
def _permute_kernel(
    x_ptr,  # (T, H)
    permutation_ptr,  # (S,) int32
    inverse_ptr,  # (S,) int32
    out_ptr,  # (S, H)
    stride_x_t,
    S,
    H,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier()
    col_tiles = tl.cdiv(H, BLOCK_H)
    positions = tl.program_id(0) // col_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    cols = tl.program_id(0) % col_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = positions < S
    slots = tl.load(permutation_ptr + positions, mask=mask, other=0)
    kept = mask & (tl.load(inverse_ptr + slots, mask=mask, other=-1) >= 0)
    # int64: row * stride exceeds 2**31 at S * H = 2G elements
    tokens = (slots // K).to(tl.int64)
    in_row = (cols < H)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_x_t + cols[None, :], mask=kept[:, None] & in_row, other=0.0)
    tl.store(out_ptr + positions.to(tl.int64)[:, None] * H + cols[None, :], x, mask=mask[:, None] & in_row)


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    rows_ptr,  # (S, H)
    weights_ptr,  # (T, K) fp32
    inverse_ptr,  # (S,) int32
    out_ptr,  # (T, H)
    stride_rows_s,
    T,
    H,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    wait_for_earlier()
    col_tiles = tl.cdiv(H, BLOCK_H)
    tokens = (tl.program_id(0) // col_tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.program_id(0) % col_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = tokens < T
    in_row = (cols < H)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    # unrolled, so that the loads of all choices overlap
    for k in tl.static_range(K):
        positions = tl.load(inverse_ptr + tokens * K + k, mask=mask, other=-1).to(tl.int64)
        kept = positions >= 0
        row_ptrs = rows_ptr + positions[:, None] * stride_rows_s + cols[None, :]
        row = tl.load(row_ptrs, mask=kept[:, None] & in_row, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + tokens * K + k, mask=kept, other=0.0)
            acc += weight[:, None] * row
        else:
            acc += row
    out = narrow(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tokens[:, None] * H + cols[None, :], out, mask=mask[:, None] & in_row)


@triton.jit(do_not_specialize=["S"])
def _combine_backward_kernel(
    grad_ptr,  # (T, H)
    rows_ptr,  # (S, H)
    weights_ptr,  # (S,) fp32
    permutation_ptr,  # (S,) int32
    inverse_ptr,  # (S,) int32
    drows_ptr,  # (S, H)
    dweights_ptr,  # (S,) fp32
    stride_grad_t,
    stride_rows_s,
    S,
    H,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier()
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = slots < S
    tokens = (slots // K).to(tl.int64)
    positions = tl.load(inverse_ptr + slots, mask=mask, other=-1).to(tl.int64)
    kept = positions >= 0
    weights = tl.load(weights_ptr + slots, mask=kept, other=0.0)
    # rows that no slot points at: this program clears those with the numbers of its slots
    owners = tl.load(permutation_ptr + slots, mask=mask, other=0)
    dropped = mask & (tl.load(inverse_ptr + owners, mask=mask, other=0) < 0)
    acc = tl.zeros((BLOCK_S, BLOCK_H), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        cols = h + tl.arange(0, BLOCK_H)
        in_row = (cols < H)[None, :]
        row_mask = kept[:, None] & in_row
        grad_ptrs = grad_ptr + tokens[:, None] * stride_grad_t + cols[None, :]
        row_ptrs = rows_ptr + positions[:, None] * stride_rows_s + cols[None, :]
        grad = tl.load(grad_ptrs, mask=row_mask, other=0.0).to(tl.float32)
        row = tl.load(row_ptrs, mask=row_mask, other=0.0).to(tl.float32)
        acc += grad * row
        drow = narrow(weights[:, None] * grad, drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + positions[:, None] * H + cols[None, :], drow, mask=row_mask)
    tl.store(dweights_ptr + slots, tl.sum(acc, 1), mask=mask)
    if tl.max(dropped.to(tl.int32), 0) > 0:
        for h in range(0, H, BLOCK_H):
            cols = h + tl.arange(0, BLOCK_H)
            zero = tl.zeros((BLOCK_S, BLOCK_H), dtype=drows_ptr.dtype.element_ty)
            zero_ptrs = drows_ptr + slots.to(tl.int64)[:, None] * H + cols[None, :]
            tl.store(zero_ptrs, zero, mask=dropped[:, None] & (cols < H)[None, :])


@planned
def _plan_permute(device: torch.device, dtype: torch.dtype, width: int, stride: int, top_k: int):
    """-> launch, rows of a tile, column tiles."""
    rows, cols = tile_of_rows(width, dtype.itemsize)
    launch = Launch(_permute_kernel, stride_x_t=stride, H=width, K=top_k, BLOCK_S=rows, BLOCK_H=cols)
    return launch, rows, cdiv(width, cols)


@planned
def _plan_combine(
    device: torch.device, dtype: torch.dtype, width: int, stride: int, top_k: int, weighted: bool
):
    """-> launch, tokens of a tile, column tiles."""
    rows, cols = tile_of_rows(width, dtype.itemsize)
    launch = Launch(
        _combine_kernel,
        stride_rows_s=stride,
        H=width,
        K=top_k,
        BLOCK_T=rows,
        BLOCK_H=cols,
        WEIGHTED=weighted,
    )
    return launch, rows, cdiv(width, cols)


@planned
def _plan_backward(
    device: torch.device, dtype: torch.dtype, width: int, strides: tuple[int, int], top_k: int
):
    """-> launch, slots per program."""
    rows, cols = tile_of_rows(width, dtype.itemsize)
    launch = Launch(
        _combine_backward_kernel,
        stride_grad_t=strides[0],
        stride_rows_s=strides[1],
        H=width,
        K=top_k,
        BLOCK_S=rows,
        BLOCK_H=cols,
    )
    return launch, rows


@on_device_of_first
def permute(x: Tensor, permutation: Tensor, inverse_permutation: Tensor, top_k: int) -> Tensor:
    num_slots, hidden_size = permutation.shape[0], x.shape[1]
    out = x.new_empty(num_slots, hidden_size)
    if out.numel() == 0:
        return out
    x = whole_rows(x)
    launch, block_s, col_tiles = _plan_permute(x.device, x.dtype, hidden_size, x.stride(0), top_k)
    launch(cdiv(num_slots, block_s) * col_tiles, x, permutation, inverse_permutation, out, num_slots)
    return out


@on_device_of_first
def combine(rows: Tensor, topk_weights: Tensor | None, inverse_permutation: Tensor, top_k: int) -> Tensor:
    num_tokens, hidden_size = inverse_permutation.shape[0] // top_k, rows.shape[1]
    out = rows.new_empty(num_tokens, hidden_size)
    if out.numel() == 0:
        return out
    rows = whole_rows(rows)
    weights = None if topk_weights is None else topk_weights.contiguous()
    launch, block_t, col_tiles = _plan_combine(
        rows.device, rows.dtype, hidden_size, rows.stride(0), top_k, weights is not None
    )
    launch(cdiv(num_tokens, block_t) * col_tiles, rows, weights, inverse_permutation, out, num_tokens)
    return out


@on_device_of_first
def combine_backward(
    grad: Tensor, rows: Tensor, topk_weights: Tensor, permutation: Tensor, inverse_permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the output (T, H) -> gradients of rows (S, H) and topk_weights (T, K)."""
    (num_slots, hidden_size), top_k = rows.shape, topk_weights.shape[1]
    drows, dweights = rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape)
    if num_slots == 0:
        return drows, dweights
    grad, rows = whole_rows(grad), whole_rows(rows)
    strides = grad.stride(0), rows.stride(0)
    launch, block_s = _plan_backward(rows.device, rows.dtype, hidden_size, strides, top_k)
    launch(
        cdiv(num_slots, block_s),
        grad,
        rows,
        topk_weights.contiguous(),
        permutation,
        inverse_permutation,
        drows,
        dweights,
        num_slots,
    )
    return drows, dweights
