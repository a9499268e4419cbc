"""Expert MLPs (Triton): three launches forward, and a backward that reads rows of x and grad by token.

    a[p] = act(x[token(p)] @ up_proj[e].T + up_bias[e])       y[p] = a[p] @ down_proj[e].T + down_bias[e]
    out[t] = sum_k topk_weights[t, k] * y[position of (t, k)]

Backward, with g[p] = grad[token(p)] and w[p] its routing weight: grad_hidden.py computes h = g @ down_proj.
While a tile of h is in registers, it computes dz = w h act'(z), w a (which the gradient of down_proj needs in
addition to g), and the tile's share of <h, a>, the gradient of w without <g, down_bias>. Two weight
gradients, the gradient of down_bias, the input gradient and its combine follow.

If there are few rows, the GEMMs gather them as they read; for many, a copy in expert order is made first
(`sorted_rows`), which the copy engine can load without the help of the multiplying warps.

FLOPs and saved bytes: cumo_kernels/ops/experts.py. Contract: cumo_kernels/ops/experts.py.
Reference: cumo_kernels/backends/reference/experts.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.triton.bias_grad import launch_bias_grad
from cumo_kernels.backends.triton.common import (
    act,
    gate_offset,
    linear,
    narrow,
    only_if,
    up_offset,
    wait_for_earlier,
)
from cumo_kernels.backends.triton.grad_hidden import launch_grad_hidden
from cumo_kernels.backends.triton.grouped_gemm import launch_gemm
from cumo_kernels.backends.triton.launch import (
    Launch,
    can_describe,
    cdiv,
    next_power_of_2,
    on_device_of_first,
    planned,
)
from cumo_kernels.backends.triton.packed import LowRank, Packed
from cumo_kernels.backends.triton.permutation import combine, permute
from cumo_kernels.backends.triton.weight_grad import launch_weight_grad
from cumo_kernels.tiles import tuning


@triton.jit
def _weigh_rows_kernel(
    source_ptr,  # (T, N) with GATHER, else (S, N) or, gated, (S, 2N)
    topk_weights_ptr,  # (S,) fp32 by slot
    permutation_ptr,  # (S,) int32
    end_ptr,  # () int32: expert_offsets[E]
    out_ptr,  # (S, N)
    N,
    top_k,
    stride_source_s,
    stride_source_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_earlier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < tl.load(end_ptr)
    mask = inside[:, None] & (cols < N)[None, :]
    slots = tl.load(permutation_ptr + rows, mask=inside, other=0)
    weights = tl.load(topk_weights_ptr + slots, mask=inside, other=0.0)
    # int64: a row number times its stride exceeds 2**31
    source = (slots // top_k if GATHER else rows).to(tl.int64)
    at = gate_offset(cols, ACTIVATION) if GATED else cols
    ptrs = source_ptr + source[:, None] * stride_source_s + at.to(tl.int64)[None, :] * stride_source_n
    value = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        value = act(value, ACTIVATION)
    if GATED:
        up = tl.load(ptrs + up_offset(N, ACTIVATION), mask=mask, other=0.0).to(tl.float32)
        value = value * linear(up, ACTIVATION)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out_ptrs, narrow(weights[:, None] * value, out_ptr.dtype.element_ty), mask=mask)


@planned
def _plan_weigh(
    device: torch.device,
    width: int,
    top_k: int,
    strides: tuple[int, int],
    activation: str | None,
    gather: bool,
) -> tuple[Launch, int, int]:
    """-> launch, rows of a tile, column tiles."""
    block_m, block_n = 8, min(next_power_of_2(width), 512)
    launch = Launch(
        _weigh_rows_kernel,
        N=width,
        top_k=top_k,
        stride_source_s=strides[0],
        stride_source_n=strides[1],
        ACTIVATION=None if activation is None else get_activation(activation).spelled,
        GATED=activation is not None and get_activation(activation).is_gated,
        GATHER=gather,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return launch, block_m, cdiv(width, block_n)


def weigh_rows(
    source: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    activation: str | None = None,
    gather: bool = False,
) -> Tensor:
    """(S, N): w[p] * source[p], with `gather` w[p] * source[token(p)], or w[p] * act(z[p]) of z."""
    is_gated = activation is not None and get_activation(activation).is_gated
    num_rows, width = permutation.shape[0], source.shape[1] // (1 + is_gated)
    out = source.new_empty(num_rows, width)
    if out.numel():
        launch, block_m, tiles_n = _plan_weigh(
            source.device, width, topk_weights.shape[1], source.stride(), activation, gather
        )
        launch(cdiv(num_rows, block_m) * tiles_n, source, topk_weights, permutation, expert_offsets[-1], out)
    return out


@triton.jit(do_not_specialize=["num_slots"])
def _topk_weights_grad_kernel(
    dots_ptr,  # (S, tiles) fp32 by sorted position
    grad_ptr,  # (T, O)
    down_bias_ptr,  # (E, O) or None
    inverse_permutation_ptr,  # (S,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (S,) fp32 by slot
    num_slots,
    O,
    top_k,
    stride_grad_t,
    stride_grad_o,
    TILES: tl.constexpr,
    TILES_POW2: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    wait_for_earlier()
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    positions = tl.load(inverse_permutation_ptr + slots, mask=slots < num_slots, other=-1)
    kept = positions >= 0
    tiles = tl.arange(0, TILES_POW2)
    dots = tl.load(
        dots_ptr + positions.to(tl.int64)[:, None] * TILES + tiles[None, :],
        mask=kept[:, None] & (tiles < TILES)[None, :],
        other=0.0,
    )
    total = tl.sum(dots, 1)
    if down_bias_ptr is not None:
        experts = tl.arange(0, E_POW2)
        ends = tl.load(expert_offsets_ptr + 1 + experts, mask=experts < E, other=2**31 - 1)
        expert = tl.sum((ends[None, :] <= positions[:, None]).to(tl.int32), 1)
        acc = tl.zeros((BLOCK_S, BLOCK_O), tl.float32)
        for first in tl.range(0, O, BLOCK_O):
            cols = first + tl.arange(0, BLOCK_O)
            mask = kept[:, None] & (cols < O)[None, :]
            grad_ptrs = grad_ptr + (slots // top_k).to(tl.int64)[:, None] * stride_grad_t
            grad = tl.load(grad_ptrs + cols.to(tl.int64)[None, :] * stride_grad_o, mask=mask, other=0.0)
            bias = tl.load(down_bias_ptr + expert[:, None] * O + cols[None, :], mask=mask, other=0.0)
            acc += grad.to(tl.float32) * bias.to(tl.float32)
        total += tl.sum(acc, 1)
    tl.store(out_ptr + slots, total, mask=slots < num_slots)


SLOTS = 8  # per program of _topk_weights_grad_kernel


@planned
def _plan_topk_weights_grad(
    device: torch.device, width: int, top_k: int, strides: tuple[int, int], tiles: int, num_experts: int
) -> Launch:
    return Launch(
        _topk_weights_grad_kernel,
        O=width,
        top_k=top_k,
        stride_grad_t=strides[0],
        stride_grad_o=strides[1],
        TILES=tiles,
        TILES_POW2=next_power_of_2(tiles),
        E=num_experts,
        E_POW2=next_power_of_2(num_experts),
        BLOCK_S=SLOTS,
        BLOCK_O=min(next_power_of_2(width), 256),
    )


def topk_weights_grad(
    dots: Tensor,
    grad: Tensor,
    down_bias: Tensor | None,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """<h, a> + <g, down_bias> for every slot, (T, K); 0 for a dropped one."""
    out = torch.empty_like(topk_weights)
    num_slots = out.numel()
    if num_slots:
        bias = None if down_bias is None else down_bias.contiguous()
        launch = _plan_topk_weights_grad(
            grad.device, grad.shape[1], topk_weights.shape[1], grad.stride(), dots.shape[1],
            expert_offsets.shape[0] - 1,
        )  # fmt: skip
        launch(cdiv(num_slots, SLOTS), dots, grad, bias, inverse_permutation, expert_offsets, out, num_slots)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _combine_splits_kernel(
    partials_ptr,  # (SPLITS, S, N) fp32
    topk_weights_ptr,  # (T, TOP_K) fp32 or None
    inverse_permutation_ptr,  # (S,) int32
    out_ptr,  # (T, N)
    num_rows,
    N,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_earlier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    # int64: SPLITS * S * N exceeds 2**31
    token = (tl.program_id(0) // tiles_n).to(tl.int64)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for choice in tl.static_range(TOP_K):
        position = tl.load(inverse_permutation_ptr + token * TOP_K + choice).to(tl.int64)
        mask = only_if(position >= 0, cols < N)
        row = tl.zeros((BLOCK_N,), tl.float32)
        for split in tl.static_range(SPLITS):
            row += tl.load(partials_ptr + (position + split * num_rows) * N + cols, mask=mask, other=0.0)
        if topk_weights_ptr is not None:
            # a dropped slot's weight may be anything
            row *= tl.load(topk_weights_ptr + token * TOP_K + choice, mask=position >= 0, other=0.0)
        total += row
    tl.store(out_ptr + token * N + cols, narrow(total, out_ptr.dtype.element_ty), mask=cols < N)


@planned
def _plan_combine_splits(device: torch.device, width: int, top_k: int, num_splits: int) -> tuple[Launch, int]:
    """-> launch, column tiles."""
    block_n = min(next_power_of_2(width), 1024)
    launch = Launch(_combine_splits_kernel, N=width, TOP_K=top_k, SPLITS=num_splits, BLOCK_N=block_n)
    return launch, cdiv(width, block_n)


SORT_FROM = 4096  # rows: with fewer, a copy costs more than it saves


def sorted_rows(
    x: Tensor, permutation: Tensor, inverse_permutation: Tensor, top_k: int
) -> tuple[Tensor, Tensor | None]:
    """-> rows for a GEMM, and the permutation by which it must still gather them, or None."""
    # batch invariance: the GEMM of a row must not depend on the number of rows
    enough = permutation.shape[0] >= SORT_FROM and not tuning.BATCH_INVARIANT
    if enough and can_describe(x, tuning.gpu_of(x.device).has_tma):
        return permute(x, permutation, inverse_permutation, top_k), None
    return x, permutation


def multiply_and_combine(
    rows: Tensor,
    weight: Tensor | Packed,
    expert_offsets: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    inverse_permutation: Tensor,
    top_k: int,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Sum over each token's slots of weight times row, (T, N); the combine also sums the split-k partials."""
    y, _ = launch_gemm(
        rows, weight, expert_offsets, bias, None, top_k, None, low_rank=low_rank, zero_tail=False
    )
    if y.ndim == 2:
        return combine(y, topk_weights, inverse_permutation, top_k)
    num_splits, num_rows, width = y.shape
    out = rows.new_empty(num_rows // top_k, width)
    launch, tiles_n = _plan_combine_splits(rows.device, width, top_k, num_splits)
    launch(out.shape[0] * tiles_n, y, topk_weights, inverse_permutation, out, num_rows)
    return out


@on_device_of_first
def expert_mlp(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    memory: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (out (T, O), z, a); z and a are empty unless the memory plan keeps them for backward."""
    top_k = topk_weights.shape[1]
    keep_z = memory in ("preact", "all")
    rows, gather = sorted_rows(x, permutation, inverse_permutation, top_k)
    a, z = launch_gemm(
        rows, up_proj, expert_offsets, up_bias, gather, top_k, activation, keep_pre=keep_z, zero_tail=False
    )
    out = multiply_and_combine(
        a, down_proj, expert_offsets, down_bias, topk_weights.contiguous(), inverse_permutation, top_k
    )
    return out, z, a if memory == "all" else x.new_empty(0)


@on_device_of_first
def expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    z: Tensor,
    a: Tensor,
    activation: str,
    memory: str,
    need_x: bool,
    need_weights: bool,
    need_up: bool,
    need_up_bias: bool,
    need_down: bool,
    need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, topk_weights, up_proj, up_bias, down_proj, down_bias; empty where not needed."""
    top_k = topk_weights.shape[1]
    topk_weights = topk_weights.contiguous()
    dx, dup, dup_bias, ddown, ddown_bias = (x.new_empty(0) for _ in range(5))
    dweights = topk_weights.new_empty(0)
    plan = (topk_weights, permutation, expert_offsets)
    x_rows, x_gather = x, permutation
    if memory == "x" or need_up or need_up_bias:
        x_rows, x_gather = sorted_rows(x, permutation, inverse_permutation, top_k)
    if memory == "x":
        _, z = launch_gemm(
            x_rows, up_proj, expert_offsets, up_bias, x_gather, top_k, activation,
            keep_out=False, keep_pre=True, zero_tail=False,
        )  # fmt: skip

    # if `a` is saved, applying the weight to the narrower g costs less
    need_weighted = need_down and memory != "all"
    weighted = dz = x.new_empty(0)
    need_dz = need_x or need_up or need_up_bias
    g, g_gather = grad, permutation
    if need_dz or need_weights or need_weighted:
        g, g_gather = sorted_rows(grad, permutation, inverse_permutation, top_k)
    if need_dz or need_weights:
        dz, weighted, dots = launch_grad_hidden(
            g, *plan, down_proj, z, activation, need_dz=need_dz, need_weighted=need_weighted,
            need_dots=need_weights, is_sorted=g_gather is None,
        )  # fmt: skip
        if need_weights:
            dweights = topk_weights_grad(
                dots, grad, down_bias, inverse_permutation, expert_offsets, topk_weights
            )
    elif need_weighted:
        weighted = weigh_rows(z, *plan, activation)

    if need_weighted:
        ddown, _ = launch_weight_grad(g, weighted, expert_offsets, g_gather, top_k, False, gather="grad")
    elif need_down:
        ddown, _ = launch_weight_grad(
            weigh_rows(grad, *plan, gather=True), a, expert_offsets, None, top_k, False
        )
    if need_down_bias:
        ddown_bias = launch_bias_grad(grad, *plan)
    if need_up or need_up_bias:
        dup, dup_bias = launch_weight_grad(
            dz, x_rows, expert_offsets, x_gather, top_k, need_up_bias, need_weight=need_up
        )
    if need_x:
        dx = multiply_and_combine(
            dz, up_proj.transpose(1, 2), expert_offsets, None, None, inverse_permutation, top_k
        )
    return dx, dweights, dup, dup_bias, ddown, ddown_bias
