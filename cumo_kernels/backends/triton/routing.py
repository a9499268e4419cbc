"""Routing (Triton): from logits to top-k weights and loss statistics in one kernel.

    logits = x, or x @ gate_weight.T rounded to the dtype of x, as torch.nn.Linear would
    p = softmax(logits)          idx = the K largest logits, ties to the lowest index, NaN ranks highest
    w = p[idx] / sum(p[idx])     (or p[idx] when not renormalised)
    mean_probs[g], top1_density[g], mean_squared_logsumexp[g]: means over the tokens of group g

With another Scoring, a selection bias or a given choice, as in the reference's scores.py.

_route_kernel: grid (cdiv(T, BLOCK_T)). A program writes one row of sums for each group that its tokens belong
to. Rows of a group are adjacent, and the last program to finish a group adds them in row order. Memory bound:
reads x once, T * H elements (T * E without a gate). With more than FUSED_EXPERTS the logits come from a GEMM.
_group_means_kernel: grid (cdiv(2 * E + 1, BLOCK_C) * G). It adds the rows where a group has so many that one
program would need longer for them than a second launch takes.
The gradients are in routing_backward.py, sort_by_expert in sorting.py, what the kernels share in logits.py.

Contract: cumo_kernels/ops/routing.py. Reference: cumo_kernels/backends/reference/routing.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import input_precision, precise_exp, wait_for_earlier
from cumo_kernels.backends.triton.launch import (
    Launch,
    cdiv,
    next_power_of_2,
    on_device_of_first,
    planned,
    whole_rows,
)
from cumo_kernels.backends.triton.logits import (
    STAGES,
    TINY,
    choice_keys,
    count_below,
    group_bounds,
    groups_of,
    load_logits,
    rank_keys,
    router_tiles,
    score_and_slope,
    tokens_of_tile,
)
from cumo_kernels.backends.triton.routing_backward import route_backward
from cumo_kernels.backends.triton.sorting import sort_by_expert
from cumo_kernels.tiles.hardware import Gpu, gpu_of
from cumo_kernels.types import Scoring

__all__ = ["route", "route_backward", "route_by", "sort_by_expert"]

PLAIN = Scoring()
CLOSED_STEPS = 16  # loads, one after the other, in which a group's last program adds its sums
FUSED_EXPERTS = 256  # a tile of the gate's product with more does not fit into registers


@triton.jit(do_not_specialize=["T", "G", "group_size", "steps", "closes"])
def _route_kernel(
    x_ptr,  # (T, E), or (T, H) with a gate
    gate_ptr,  # (E, H)
    bias_ptr,  # (E,) fp32
    choice_ptr,  # (T, K) int32 in [0, E]
    group_offsets_ptr,  # (G + 1,) int32
    weights_ptr,  # (T, K) fp32
    indices_ptr,  # (T, K) int32
    mean_probs_ptr,  # (G, E) fp32
    density_ptr,  # (G, E) fp32
    z_ptr,  # (G,) fp32
    sums_ptr,  # (programs + G, 2 * E + 1) fp32: probs, first choices, squared logsumexp
    arrivals_ptr,  # (G,) int32, zero
    stride_x_t,
    stride_gate_e,
    T,
    H,
    G,
    group_size,
    steps,
    closes,  # 0: _group_means_kernel adds the sums
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RAGGED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCORE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CHOICE: tl.constexpr,
    EXPERT_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BY_TWO: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    wait_for_earlier()
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < T
    experts = tl.arange(0, BLOCK_E)
    choices = tl.arange(0, BLOCK_K)
    # int64: token * stride exceeds 2**31 at T * H = 2G elements
    logits = load_logits(
        x_ptr, gate_ptr, tokens.to(tl.int64), token_mask, stride_x_t, stride_gate_e, H,
        E, BLOCK_T, BLOCK_E, BLOCK_H, HAS_GATE, INPUT_PRECISION,
    )  # fmt: skip

    top = tl.max(logits, 1)
    powers = precise_exp(logits - top[:, None])
    total = tl.sum(powers, 1)
    probs = tl.div_rn(powers, tl.broadcast_to(total[:, None], (BLOCK_T, BLOCK_E)))
    lse = tl.log(total) + top
    squared = lse * lse

    scores = probs
    if SCORE != "softmax":
        scores, _ = score_and_slope(logits, SCORE)
        total = tl.sum(scores, 1) + TINY
        probs = tl.div_rn(scores, tl.broadcast_to(total[:, None], (BLOCK_T, BLOCK_E)))
    if HAS_BIAS or EXPERT_GROUPS > 1:
        keys = choice_keys(
            scores, bias_ptr, E, BLOCK_T, BLOCK_E, HAS_BIAS, EXPERT_GROUPS, TOP_GROUPS, PADDED_GROUPS, BY_TWO
        )
    else:
        keys = rank_keys(logits)
    values = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    for k in range(K):
        if HAS_CHOICE:
            choice = tl.load(choice_ptr + tokens.to(tl.int64) * K + k, mask=token_mask, other=E)
            chosen = (experts[None, :] == choice[:, None]) & (experts < E)[None, :]
        else:
            best = tl.max(keys, 1)
            choice = tl.min(tl.where(keys == best[:, None], experts[None, :], BLOCK_E), 1)
            chosen = experts[None, :] == choice[:, None]
            keys = tl.where(chosen, -0x80000000, keys)
        value = tl.sum(tl.where(chosen, scores, 0.0), 1)
        values = tl.where((choices == k)[None, :], value[:, None], values)
        indices = tl.where((choices == k)[None, :], choice[:, None], indices)
    if RENORMALIZE:
        kept = tl.sum(values, 1) + TINY
        values = tl.div_rn(values, tl.broadcast_to(kept[:, None], (BLOCK_T, BLOCK_K)))
    if SCALE != 1.0:
        values = values * SCALE
    slots = tokens.to(tl.int64)[:, None] * K + choices[None, :]
    slot_mask = token_mask[:, None] & (choices < K)[None, :]
    tl.store(weights_ptr + slots, values, mask=slot_mask)
    tl.store(indices_ptr + slots, indices, mask=slot_mask)
    first = tl.sum(tl.where((choices == 0)[None, :], indices, 0), 1)

    # the groups whose tokens (or, if empty, whose position) are in this tile
    begin_tile = tile * BLOCK_T
    end_tile = tl.minimum(begin_tile + BLOCK_T, T)
    if RAGGED:
        g_first = count_below(group_offsets_ptr, begin_tile, G + 1, steps)
        boundary = tl.load(group_offsets_ptr + g_first, mask=g_first <= G, other=begin_tile)
        g_first = tl.maximum(tl.where(boundary == begin_tile, g_first, g_first - 1), 0)
        g_end = tl.minimum(count_below(group_offsets_ptr, end_tile, G + 1, steps), G)
        g_end = tl.where(tile == num_tiles - 1, G, g_end)
    else:
        g_first = begin_tile // group_size
        g_end = (end_tile - 1) // group_size + 1
    expert_mask = experts < E
    for g in range(g_first, g_end):
        begin, end = group_bounds(group_offsets_ptr, g, group_size, T, RAGGED)
        mine = token_mask & (tokens >= begin) & (tokens < end)
        # consecutive overlapping (tile, group) pairs have consecutive tile + g
        row_ptr = sums_ptr + (tile + g).to(tl.int64) * (2 * E + 1)
        prob_sum = tl.sum(tl.where(mine[:, None], probs, 0.0), 0)
        first_sum = tl.sum(tl.where(mine[:, None] & (first[:, None] == experts[None, :]), 1.0, 0.0), 0)
        tl.store(row_ptr + experts, prob_sum, mask=expert_mask)
        tl.store(row_ptr + E + experts, first_sum, mask=expert_mask)
        tl.store(row_ptr + 2 * E, tl.sum(tl.where(mine, squared, 0.0), 0))

        first_tile, last_tile = _tiles_of_group(begin, end, num_tiles, BLOCK_T)
        # all threads write their sums before the arrival is counted, and read sums only after it
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + g, 1, sem="acq_rel")
        if (arrived == last_tile - first_tile) & (closes != 0):
            tl.debug_barrier()
            prob_acc = tl.zeros((BLOCK_R, BLOCK_E), dtype=tl.float32)
            first_acc = tl.zeros((BLOCK_R, BLOCK_E), dtype=tl.float32)
            z_acc = tl.zeros((BLOCK_R,), dtype=tl.float32)
            for start in range(first_tile, last_tile + 1, BLOCK_R):
                tiles = start + tl.arange(0, BLOCK_R)
                row_mask = tiles <= last_tile
                mask = row_mask[:, None] & expert_mask[None, :]
                rows_ptr = sums_ptr + (tiles + g).to(tl.int64) * (2 * E + 1)
                block_ptr = rows_ptr[:, None] + experts[None, :]
                prob_acc += tl.load(block_ptr, mask=mask, other=0.0, cache_modifier=".cg")
                first_acc += tl.load(block_ptr + E, mask=mask, other=0.0, cache_modifier=".cg")
                z_acc += tl.load(rows_ptr + 2 * E, mask=row_mask, other=0.0, cache_modifier=".cg")
            count = tl.maximum(end - begin, 1).to(tl.float32)
            prob_mean = tl.sum(prob_acc, 0) / count
            out = tl.cast(g, tl.int64) * E + experts
            tl.store(mean_probs_ptr + out, prob_mean, mask=expert_mask)
            tl.store(density_ptr + out, tl.sum(first_acc, 0) / count, mask=expert_mask)
            tl.store(z_ptr + g, tl.sum(z_acc, 0) / count)


@triton.jit
def _tiles_of_group(begin, end, num_tiles, BLOCK_T: tl.constexpr):
    """First and last tile of the tokens [begin, end); of no token, the tile that writes zeros for them."""
    first = tl.minimum(begin // BLOCK_T, num_tiles - 1)
    return first, tl.maximum(tl.minimum((end - 1) // BLOCK_T, num_tiles - 1), first)


@triton.jit(do_not_specialize=["T", "group_size", "num_tiles"])
def _group_means_kernel(
    sums_ptr,  # (num_tiles + G, 2 * E + 1) fp32
    group_offsets_ptr,  # (G + 1,) int32
    mean_probs_ptr,  # (G, E) fp32
    density_ptr,  # (G, E) fp32
    z_ptr,  # (G,) fp32
    T,
    group_size,
    num_tiles,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RAGGED: tl.constexpr,
):
    wait_for_earlier()
    WIDTH: tl.constexpr = 2 * E + 1
    blocks: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    g = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = group_bounds(group_offsets_ptr, g, group_size, T, RAGGED)
    first_tile, last_tile = _tiles_of_group(begin, end, num_tiles, BLOCK_T)
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(first_tile, last_tile + 1, BLOCK_R):
        tiles = start + tl.arange(0, BLOCK_R)
        mask = (tiles <= last_tile)[:, None] & (cols < WIDTH)[None, :]
        acc += tl.load(
            sums_ptr + (tiles + g).to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0
        )
    mean = tl.sum(acc, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    row = g.to(tl.int64) * E
    tl.store(mean_probs_ptr + row + cols, mean, mask=cols < E)
    tl.store(density_ptr + row + cols - E, mean, mask=(cols >= E) & (cols < 2 * E))
    tl.store(z_ptr + g + cols - 2 * E, mean, mask=cols == 2 * E)


def _rows_at_a_time(num_experts: int) -> int:
    """Rows of sums that a group's last program loads in one step."""
    return max(4, min(64, 1024 // next_power_of_2(num_experts)))


@planned
def _plan_means(device: torch.device, num_experts: int, block_t: int, ragged: bool) -> tuple[Launch, int]:
    """-> launch, programs per group."""
    launch = Launch(
        _group_means_kernel, E=num_experts, BLOCK_T=block_t, BLOCK_R=64, BLOCK_C=32, RAGGED=ragged,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return launch, cdiv(2 * num_experts + 1, 32)


@planned
def _plan(
    device: torch.device, dtype: torch.dtype, width: int, strides: tuple[int, int], num_experts: int,
    has_gate: bool, block_t: int, ragged: bool, top_k: int, renormalize: bool, scoring: Scoring,
    has_bias: bool, has_choice: bool, precision: str, gpu: Gpu,
) -> tuple[Launch, int]:  # fmt: skip
    """-> launch, tokens per tile."""
    tiles = router_tiles(dtype, width, num_experts, has_gate, block_t, gpu)
    launch = Launch(
        _route_kernel, stride_x_t=strides[0], stride_gate_e=strides[1], H=width, K=top_k,
        BLOCK_K=next_power_of_2(top_k), BLOCK_R=_rows_at_a_time(num_experts), RAGGED=ragged,
        RENORMALIZE=renormalize, SCORE=scoring.score, SCALE=scoring.scale, HAS_BIAS=has_bias,
        HAS_CHOICE=has_choice, INPUT_PRECISION=precision, num_stages=STAGES, **groups_of(scoring), **tiles,
    )  # fmt: skip
    return launch, tiles["BLOCK_T"]


def route(
    x: Tensor, gate_weight: Tensor | None, group_offsets: Tensor | None, num_groups: int, top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`route_by` of a plain softmax."""
    return route_by(x, gate_weight, group_offsets, num_groups, top_k, renormalize, None, None, PLAIN)


@on_device_of_first
def route_by(
    x: Tensor,
    gate_weight: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
    selection_bias: Tensor | None,
    topk_indices: Tensor | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> topk_weights (T, K), topk_indices (T, K) int32, mean_probs (G, E), top1_density (G, E), z (G,)."""
    if gate_weight is not None and gate_weight.shape[0] > FUSED_EXPERTS:
        logits = x @ gate_weight.T
        return route_by(
            logits, None, group_offsets, num_groups, top_k, renormalize, selection_bias, topk_indices, scoring
        )
    has_gate = gate_weight is not None
    num_tokens, hidden_size = x.shape
    num_experts = gate_weight.shape[0] if has_gate else hidden_size
    new = torch.empty if num_tokens else torch.zeros
    wide = {"dtype": torch.float32, "device": x.device}
    weights = new(num_tokens, top_k, **wide)
    indices = new(num_tokens, top_k, dtype=torch.int32, device=x.device)
    mean_probs, density = new(num_groups, num_experts, **wide), new(num_groups, num_experts, **wide)
    z = new(num_groups, **wide)
    if num_tokens == 0:
        return weights, indices, mean_probs, density, z
    x = whole_rows(x)
    gate = whole_rows(gate_weight) if has_gate else x
    gpu, ragged = gpu_of(x.device), group_offsets is not None
    launch, block_t = _plan(
        x.device, x.dtype, hidden_size, (x.stride(0), gate.stride(0)), num_experts, has_gate,
        tokens_of_tile(num_tokens, gpu), ragged, top_k, renormalize, scoring,
        selection_bias is not None, topk_indices is not None, input_precision(x.dtype), gpu,
    )  # fmt: skip
    programs = cdiv(num_tokens, block_t)
    sums = torch.empty(programs + num_groups, 2 * num_experts + 1, **wide)
    # allocated at each call: a persistent buffer would break CUDA-graph trees and stay wrong after an abort
    arrivals = torch.zeros(num_groups, dtype=torch.int32, device=x.device)
    group_size = num_tokens // num_groups
    closes = programs <= CLOSED_STEPS * _rows_at_a_time(num_experts) * num_groups
    launch(
        programs, x, gate, selection_bias, topk_indices, group_offsets, weights, indices, mean_probs, density,
        z, sums, arrivals, num_tokens, num_groups, group_size, (num_groups + 1).bit_length(), int(closes),
    )  # fmt: skip
    if not closes:
        launch, per_group = _plan_means(x.device, num_experts, block_t, ragged)
        launch(
            per_group * num_groups,
            sums,
            group_offsets,
            mean_probs,
            density,
            z,
            num_tokens,
            group_size,
            programs,
        )
    return weights, indices, mean_probs, density, z
