"""Gradients of routing (Triton): one kernel, which computes the logits anew.

_route_backward_kernel: grid (min(cdiv(T, BLOCK_T), programs)); reads x and writes dx, 2 * T * H elements. The
gate's gradient is summed per program in fp32, then sum_rows adds the programs' sums in order.

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
from cumo_kernels.backends.triton.launch import Launch, cdiv, on_device_of_first, planned, whole_rows
from cumo_kernels.backends.triton.logits import (
    TINY,
    count_below,
    load_logits,
    router_tiles,
    score_and_slope,
    tokens_of_tile,
)
from cumo_kernels.backends.triton.tiles import sum_rows
from cumo_kernels.tiles.hardware import Gpu, gpu_of
from cumo_kernels.types import Scoring

PLAIN = Scoring()
FUSED_GATE_EXPERTS = 32  # above this, the gate has enough arithmetic for a separate GEMM in backward


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
    SCORE: tl.constexpr,
    SCALE: tl.constexpr,
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

        scores = probs
        if SCORE != "softmax":
            scores, slopes = score_and_slope(logits, SCORE)

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
        if SCALE != 1.0:
            dweights = dweights * SCALE
        if RENORMALIZE:
            kept = tl.sum(tl.where(chosen != 0, scores, 0.0), 1) + TINY
            kept = tl.where(token_mask, kept, 1.0)
            along = tl.sum(dweights * scores, 1) / kept
            dweights = tl.where(chosen != 0, (dweights - along[:, None]) / kept[:, None], 0.0)
        if SCORE == "softmax":
            dprobs += dweights
            dlogits = probs * (dprobs - tl.sum(dprobs * probs, 1)[:, None] + (2.0 * lse * dz)[:, None])
        else:
            all_scores = tl.sum(scores, 1) + TINY
            along = tl.sum(dprobs * scores, 1) / all_scores
            dscores = (dprobs - along[:, None]) / all_scores[:, None] + dweights
            dlogits = dscores * slopes + probs * (2.0 * lse * dz)[:, None]
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


@planned
def _plan(
    device: torch.device, dtype: torch.dtype, width: int, strides: tuple[int, int], num_experts: int,
    has_gate: bool, block_t: int, ragged: bool, top_k: int, renormalize: bool, scoring: Scoring,
    precision: str, gpu: Gpu, need_x: bool, need_gate: bool,
) -> tuple[Launch, int]:  # fmt: skip
    """-> launch, tokens per tile."""
    tiles = router_tiles(dtype, width, num_experts, has_gate, block_t, gpu)
    if not has_gate and tiles["BLOCK_E"] > 256:  # with four warps Triton 3.9 spills two registers
        tiles["num_warps"] = max(8, tiles["num_warps"])
    launch = Launch(
        _route_backward_kernel, stride_x_t=strides[0], stride_gate_e=strides[1], H=width, K=top_k,
        RAGGED=ragged, RENORMALIZE=renormalize, SCORE=scoring.score, SCALE=scoring.scale, NEED_X=need_x,
        NEED_GATE=need_gate, INPUT_PRECISION=precision, num_stages=3, **tiles,
    )  # fmt: skip
    return launch, tiles["BLOCK_T"]


def route_backward(
    grad_weights: Tensor, grad_mean_probs: Tensor, grad_z: Tensor, x: Tensor, gate_weight: Tensor | None,
    topk_indices: Tensor, group_offsets: Tensor | None, renormalize: bool, need_x: bool, need_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`route_by_backward` of a plain softmax."""
    return route_by_backward(
        grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets, renormalize,
        need_x, need_gate, PLAIN,
    )  # fmt: skip


@on_device_of_first
def route_by_backward(
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
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Gradients of topk_weights, mean_probs and z -> gradients of x and gate_weight, empty where not needed.

    With v = p[idx] and s = sum(v): dv = (dw - <dw, w>) / s. Then dp sums dv and the groups' share,
    and dlogits = p * (dp - <dp, p> + 2 * lse * the groups' share of dz).
    Other scores: as in the reference's scores.py.
    """
    has_gate, nothing = gate_weight is not None, x.new_empty(0)
    if has_gate and gate_weight.shape[0] > FUSED_GATE_EXPERTS:
        dlogits, _ = route_by_backward(
            grad_weights, grad_mean_probs, grad_z, x @ gate_weight.T, None, topk_indices, group_offsets,
            renormalize, True, False, scoring,
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
        x.device, x.dtype, hidden_size, (x.stride(0), gate.stride(0)), num_experts,
        has_gate, tokens_of_tile(num_tokens, gpu), ragged, topk_indices.shape[1], renormalize,
        scoring, input_precision(x.dtype), gpu, need_x, need_gate,
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
