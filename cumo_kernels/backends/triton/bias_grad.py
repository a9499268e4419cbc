"""The gradient of down_bias (Triton): the sum of each expert's rows of the upstream gradient, weighted.

    grad_bias[e] = sum over the rows p of e of w[p] * grad[token(p)]        grad (T, N)   grad_bias (E, N)

w[p] is the routing weight of slot permutation[p]. If few experts have many rows each, their rows are split
into parts: one program adds up each part, and sum_rows adds the parts in order. Memory bound: S * N elements;
a token's second and later reads come from L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import narrow, wait_for_earlier
from cumo_kernels.backends.triton.launch import Launch, cdiv, planned
from cumo_kernels.backends.triton.tiles import sum_rows
from cumo_kernels.tiles import tuning


@triton.jit
def _bias_grad_kernel(
    grad_ptr,  # (T, N)
    topk_weights_ptr,  # (S,) fp32 by slot
    permutation_ptr,  # (S,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (PARTS, E, N), fp32 where PARTS > 1
    N,
    stride_grad_t,
    stride_grad_n,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_earlier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    slab = tl.program_id(0) // tiles_n  # part * E + expert
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(expert_offsets_ptr + slab % E)
    end = tl.load(expert_offsets_ptr + slab % E + 1)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_M), PARTS) * BLOCK_M
    first = begin + slab // E * share
    last = tl.minimum(first + share, end)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(first, last, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        inside = rows < last
        slots = tl.load(permutation_ptr + rows, mask=inside, other=0)
        weights = tl.load(topk_weights_ptr + slots, mask=inside, other=0.0)
        # int64: a row number times its stride exceeds 2**31
        row_ptrs = grad_ptr + (slots // TOP_K).to(tl.int64)[:, None] * stride_grad_t
        grad_ptrs = row_ptrs + cols.to(tl.int64)[None, :] * stride_grad_n
        grad = tl.load(grad_ptrs, mask=inside[:, None] & (cols < N)[None, :], other=0.0)
        acc += weights[:, None] * grad.to(tl.float32)
    out = narrow(tl.sum(acc, 0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + slab.to(tl.int64) * N + cols, out, mask=cols < N)


BLOCK_M, BLOCK_N = 16, 128
ROWS_OF_PART = 32  # rows of a part under balanced routing; with fewer, the launch takes longer than the reads
MAX_PARTS = 32


@planned
def _plan(
    device: torch.device, rows: int, num_experts: int, width: int, strides: tuple[int, int], top_k: int
) -> tuple[Launch, int, int]:
    """-> launch, parts, programs."""
    parts, enough = 1, 8 * tuning.gpu_of(device).sms
    tiles = num_experts * cdiv(width, BLOCK_N)
    while parts < MAX_PARTS and parts * tiles < enough and rows >= 2 * parts * num_experts * ROWS_OF_PART:
        parts *= 2
    launch = Launch(
        _bias_grad_kernel,
        N=width,
        stride_grad_t=strides[0],
        stride_grad_n=strides[1],
        TOP_K=top_k,
        E=num_experts,
        PARTS=parts,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
    )
    return launch, parts, parts * tiles


def launch_bias_grad(
    grad: Tensor, topk_weights: Tensor, permutation: Tensor, expert_offsets: Tensor
) -> Tensor:
    """(E, N) in the dtype of `grad`; exactly zero for an expert without rows."""
    num_experts, width = expert_offsets.shape[0] - 1, grad.shape[1]
    rows, top_k = permutation.shape[0], topk_weights.shape[1]
    launch, parts, programs = _plan(
        grad.device, tuning.bucket(rows), num_experts, width, grad.stride(), top_k
    )
    dtype = torch.float32 if parts > 1 else grad.dtype
    out = grad.new_empty(parts, num_experts, width, dtype=dtype)
    if out.numel():
        launch(programs, grad, topk_weights, permutation, expert_offsets, out)
    return sum_rows(out, grad.dtype) if parts > 1 else out[0]
