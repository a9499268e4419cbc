"""Routing (Triton): from logits to top-k weights and loss statistics in one kernel; the sort in one or two.

    logits = x, or x @ gate_weight.T rounded to the dtype of x, as torch.nn.Linear would
    p = softmax(logits)          idx = the K largest logits, ties to the lowest index, NaN ranks highest
    w = p[idx] / sum(p[idx])     (or p[idx] when not renormalised)
    mean_probs[g], top1_density[g], mean_squared_logsumexp[g]: means over the tokens of group g

_route_kernel: grid (cdiv(T, BLOCK_T)). A program writes one row of sums for each group that its tokens belong
to. Rows of a group are adjacent, and the last program to finish a group adds them in row order. Memory bound:
reads x once, T * H elements (T * E without a gate). With more than FUSED_EXPERTS the logits come from a GEMM.
_route_backward_kernel: grid (min(cdiv(T, BLOCK_T), programs)); reads x and writes dx, 2 * T * H elements. The
gate's gradient is summed per program in fp32, then sum_rows adds the programs' sums in order.
sort_by_expert is in sorting.py; logits.py has what both kernels share.

Contract: cumo_kernels/ops/routing.py. Reference: cumo_kernels/backends/reference/routing.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import (
    dot,
    input_precision,
    narrow,
    only_if,
    precise_exp,
    wait_for_earlier,
)
from cumo_kernels.backends.triton.launch import (
    Launch,
    cdiv,
    next_power_of_2,
    on_device_of_first,
    planned,
    whole_rows,
)
from cumo_kernels.backends.triton.logits import (
    count_below,
    group_bounds,
    load_logits,
    rank_keys,
)
from cumo_kernels.backends.triton.sorting import sort_by_expert
from cumo_kernels.backends.triton.tiles import sum_rows
from cumo_kernels.tiles import tuning
from cumo_kernels.tiles.hardware import KIB, Gpu, gpu_of

__all__ = ["route", "route_backward", "sort_by_expert"]

STAGES = 4  # tiles of x and of the gate in flight at a time
FUSED_EXPERTS = 256  # a tile of the gate's product with more does not fit into registers
FUSED_GATE_EXPERTS = 32  # above this, the gate has enough arithmetic for a separate GEMM in backward


@triton.jit(do_not_specialize=["T", "G", "group_size", "steps"])
def _route_kernel(
    x_ptr,  # (T, E), or (T, H) with a gate
    gate_ptr,  # (E, H)
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

    keys = rank_keys(logits)
    values = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    for k in range(K):
        best = tl.max(keys, 1)
        choice = tl.min(tl.where(keys == best[:, None], experts[None, :], BLOCK_E), 1)
        chosen = experts[None, :] == choice[:, None]
        value = tl.sum(tl.where(chosen, probs, 0.0), 1)
        values = tl.where((choices == k)[None, :], value[:, None], values)
        indices = tl.where((choices == k)[None, :], choice[:, None], indices)
        keys = tl.where(chosen, -0x80000000, keys)
    if RENORMALIZE:
        kept = tl.sum(values, 1)
        values = tl.div_rn(values, tl.broadcast_to(kept[:, None], (BLOCK_T, BLOCK_K)))
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

        first_tile = tl.minimum(begin // BLOCK_T, num_tiles - 1)
        last_tile = tl.maximum(tl.minimum((end - 1) // BLOCK_T, num_tiles - 1), first_tile)
        # all threads write their sums before the arrival is counted, and read sums only after it
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + g, 1, sem="acq_rel")
        if arrived == last_tile - first_tile:
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


@triton.jit(do_not_specialize=["T", "G", "group_size", "steps"])
def _route_backward_kernel(
    grad_weights_ptr,  # (T, K) fp32
    grad_mean_probs_ptr,  # (G, E) fp32
    grad_z_ptr,  # (G,) fp32
    x_ptr,  # (T, E), or (T, H) with a gate
    gate_ptr,  # (E, H)
    indices_ptr,  # (T, K) int32
    group_offsets_ptr,  # (G + 1,) int32
    dx_ptr,  # like x, contiguous
    dgate_sums_ptr,  # (programs, E, H) fp32
    stride_x_t,
    stride_gate_e,
    T,
    H,
    G,
    group_size,
    steps,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RAGGED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    wait_for_earlier()
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    experts = tl.arange(0, BLOCK_E)
    expert_mask = experts < E
    for tile in range(pid, tl.cdiv(T, BLOCK_T), num_programs):
        tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        token_mask = tokens < T
        tokens64 = tokens.to(tl.int64)
        mask = token_mask[:, None] & expert_mask[None, :]
        logits = load_logits(
            x_ptr, gate_ptr, tokens64, token_mask, stride_x_t, stride_gate_e, H,
            E, BLOCK_T, BLOCK_E, BLOCK_H, HAS_GATE, INPUT_PRECISION,
        )  # fmt: skip
        top = tl.max(logits, 1)
        powers = precise_exp(logits - top[:, None])
        total = tl.sum(powers, 1)
        probs = powers / total[:, None]
        lse = tl.log(total) + top

        # each token's share of its group's means
        if RAGGED:
            group = count_below(group_offsets_ptr, tokens + 1, G + 1, steps) - 1
            in_group = token_mask & (group >= 0) & (group < G)
            begin = tl.load(group_offsets_ptr + group, mask=in_group, other=0)
            end = tl.load(group_offsets_ptr + group + 1, mask=in_group, other=1)
            share = 1.0 / (end - begin).to(tl.float32)
        else:
            group = tokens // group_size
            in_group = token_mask
            share = 1.0 / group_size.to(tl.float32)
        group_probs = group.to(tl.int64)[:, None] * E + experts[None, :]
        dprobs = tl.load(grad_mean_probs_ptr + group_probs, mask=in_group[:, None] & mask, other=0.0)
        dz = tl.load(grad_z_ptr + group, mask=in_group, other=0.0) * share
        if RAGGED:
            dprobs = dprobs * share[:, None]
        else:
            dprobs = dprobs * share

        # grad_weights and the choices, scattered to the experts
        dweights = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
        chosen = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
        for k in range(K):
            choice = tl.load(indices_ptr + tokens64 * K + k, mask=token_mask, other=-1)
            grad = tl.load(grad_weights_ptr + tokens64 * K + k, mask=token_mask, other=0.0)
            here = experts[None, :] == choice[:, None]
            dweights = tl.where(here, grad[:, None], dweights)
            chosen = tl.where(here, 1, chosen)
        if RENORMALIZE:
            kept = tl.where(token_mask, tl.sum(tl.where(chosen != 0, probs, 0.0), 1), 1.0)
            along = tl.sum(dweights * probs, 1) / kept
            dweights = tl.where(chosen != 0, (dweights - along[:, None]) / kept[:, None], 0.0)
        dprobs += dweights
        dlogits = probs * (dprobs - tl.sum(dprobs * probs, 1)[:, None] + (2.0 * lse * dz)[:, None])
        dlogits = narrow(tl.where(mask, dlogits, 0.0), DTYPE)

        if HAS_GATE:
            for h in range(0, H, BLOCK_H):
                cols = h + tl.arange(0, BLOCK_H)
                x_mask = token_mask[:, None] & (cols < H)[None, :]
                gate_mask = expert_mask[:, None] & (cols < H)[None, :]
                if NEED_X:
                    gate = tl.load(
                        gate_ptr + experts[:, None].to(tl.int64) * stride_gate_e + cols[None, :],
                        mask=gate_mask,
                        other=0.0,
                    )
                    dx = dot(dlogits, gate, tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32), INPUT_PRECISION)
                    tl.store(dx_ptr + tokens64[:, None] * H + cols[None, :], narrow(dx, DTYPE), mask=x_mask)
                if NEED_GATE:
                    x_ptrs = x_ptr + tokens64[:, None] * stride_x_t + cols[None, :]
                    x = tl.load(x_ptrs, mask=x_mask, other=0.0)
                    # this program's own sums: zero for its first tile, then those of its previous tile
                    sum_ptrs = dgate_sums_ptr + (pid.to(tl.int64) * E + experts[:, None]) * H + cols[None, :]
                    before = tl.load(sum_ptrs, mask=only_if(tile != pid, gate_mask), other=0.0)
                    tl.store(sum_ptrs, dot(tl.trans(dlogits), x, before, INPUT_PRECISION), mask=gate_mask)
            if NEED_GATE:
                tl.debug_barrier()
        elif NEED_X:
            tl.store(dx_ptr + tokens64[:, None] * E + experts[None, :], dlogits, mask=mask)


def _tokens_of_tile(num_tokens: int, gpu: Gpu) -> int:
    """Enough programs to fill the chip, then fewer, larger ones (another tile height rounds differently)."""
    per_program = 0 if tuning.BATCH_INVARIANT else num_tokens // (2 * gpu.sms)
    return 64 if per_program >= 64 else 32 if per_program >= 32 else 16


def _tiles(dtype: torch.dtype, width: int, num_experts: int, has_gate: bool, block_t: int, gpu: Gpu) -> dict:
    """Tile sizes that forward and backward share, so that both compute the same logits."""
    block_e = next_power_of_2(num_experts)
    if not has_gate:
        # 32 values per thread spill registers
        block_t = 4 if block_e > 256 else max(8, min(128, 1024 // block_e))
        tile = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_H": 16}
        # with four warps the assembler spills two registers on sm_120
        num_warps = max(8 if gpu.capability >= 120 else 4, block_t * block_e // 512)
        return {"E": num_experts, **tile, "HAS_GATE": False, "num_warps": num_warps}
    is_fp32 = dtype == torch.float32
    block_e = max(16, block_e)  # the minimum width of a tensor-core tile
    # IEEE products run out of registers; Triton 3.6 cannot place a 64 x 16 tile in the tensor memory of
    # data-centre Blackwell
    block_t = min(block_t, 16 if is_fp32 else 32 if gpu.capability in (100, 103) else 64)
    block_h = min(64 if is_fp32 or block_e > 64 else 128, max(16, next_power_of_2(width)))
    while STAGES * (block_t + block_e) * block_h * dtype.itemsize > gpu.shared_memory - 8 * KIB:
        block_h //= 2
    tile = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_H": block_h}
    return {"E": num_experts, **tile, "HAS_GATE": True, "num_warps": 8 if block_e > 64 else 4}


@planned
def _plan(
    kernel, device: torch.device, dtype: torch.dtype, width: int, strides: tuple[int, int], num_experts: int,
    has_gate: bool, block_t: int, ragged: bool, top_k: int, renormalize: bool,
    precision: str, gpu: Gpu, need_x: bool = True, need_gate: bool = True,
) -> tuple[Launch, int]:  # fmt: skip
    """-> launch, tokens per tile."""
    tiles = _tiles(dtype, width, num_experts, has_gate, block_t, gpu)
    own = {"NEED_X": need_x, "NEED_GATE": need_gate, "num_stages": 3}
    if kernel is _route_kernel:
        rows = max(4, min(64, 1024 // tiles["BLOCK_E"]))
        own = {
            "BLOCK_K": next_power_of_2(top_k),
            "BLOCK_R": rows,
            "num_stages": STAGES,
        }
    launch = Launch(
        kernel, stride_x_t=strides[0], stride_gate_e=strides[1], H=width, K=top_k, RAGGED=ragged,
        RENORMALIZE=renormalize, INPUT_PRECISION=precision, **own, **tiles,
    )  # fmt: skip
    return launch, tiles["BLOCK_T"]


@on_device_of_first
def route(
    x: Tensor,
    gate_weight: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> topk_weights (T, K), topk_indices (T, K) int32, mean_probs (G, E), top1_density (G, E), z (G,)."""
    if gate_weight is not None and gate_weight.shape[0] > FUSED_EXPERTS:
        return route(x @ gate_weight.T, None, group_offsets, num_groups, top_k, renormalize)
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
        _route_kernel, x.device, x.dtype, hidden_size, (x.stride(0), gate.stride(0)), num_experts, has_gate,
        _tokens_of_tile(num_tokens, gpu), ragged, top_k, renormalize, input_precision(x.dtype), gpu,
    )  # fmt: skip
    programs = cdiv(num_tokens, block_t)
    sums = torch.empty(programs + num_groups, 2 * num_experts + 1, **wide)
    # allocated at each call: a persistent buffer would break CUDA-graph trees and stay wrong after an abort
    arrivals = torch.zeros(num_groups, dtype=torch.int32, device=x.device)
    launch(
        programs, x, gate, group_offsets, weights, indices, mean_probs, density, z, sums, arrivals,
        num_tokens, num_groups, num_tokens // num_groups, (num_groups + 1).bit_length(),
    )  # fmt: skip
    return weights, indices, mean_probs, density, z


@on_device_of_first
def route_backward(
    grad_weights: Tensor,
    grad_mean_probs: Tensor,
    grad_z: Tensor,
    x: Tensor,
    gate_weight: Tensor | None,
    topk_indices: Tensor,
    group_offsets: Tensor | None,
    renormalize: bool,
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of topk_weights, mean_probs and z -> gradients of x and gate_weight, empty where not needed.

    With v = p[idx] and s = sum(v): dv = (dw - <dw, w>) / s. Then dp sums dv and the groups' share,
    and dlogits = p * (dp - <dp, p> + 2 * lse * the groups' share of dz).
    """
    has_gate, nothing = gate_weight is not None, x.new_empty(0)
    if has_gate and gate_weight.shape[0] > FUSED_GATE_EXPERTS:
        dlogits, _ = route_backward(
            grad_weights, grad_mean_probs, grad_z, x @ gate_weight.T, None, topk_indices, group_offsets,
            renormalize, True, False,
        )  # fmt: skip
        return dlogits @ gate_weight if need_x else nothing, dlogits.T @ x if need_gate else nothing
    (num_tokens, hidden_size), (num_groups, num_experts) = x.shape, grad_mean_probs.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else nothing
    if num_tokens == 0:
        return dx, torch.zeros_like(gate_weight) if need_gate else nothing
    x = whole_rows(x)
    gate = whole_rows(gate_weight) if has_gate else x
    gpu, ragged = gpu_of(x.device), group_offsets is not None
    launch, block_t = _plan(
        _route_backward_kernel, x.device, x.dtype, hidden_size, (x.stride(0), gate.stride(0)), num_experts,
        has_gate, _tokens_of_tile(num_tokens, gpu), ragged, topk_indices.shape[1], renormalize,
        input_precision(x.dtype), gpu, need_x, need_gate,
    )  # fmt: skip
    programs = cdiv(num_tokens, block_t)
    sums = None
    if need_gate:
        programs = min(programs, 2 * gpu.sms)
        sums = torch.empty(programs, num_experts, hidden_size, dtype=torch.float32, device=x.device)
    launch(
        programs, grad_weights.contiguous(), grad_mean_probs.contiguous(), grad_z.contiguous(), x, gate,
        topk_indices.contiguous(), group_offsets, dx, sums,
        num_tokens, num_groups, num_tokens // num_groups, (num_groups + 1).bit_length(),
    )  # fmt: skip
    return dx, sum_rows(sums, x.dtype) if need_gate else nothing
