"""What the router kernels share (Triton, routing stem): logits, scores, ranks, groups, tile sizes."""

import torch
import triton
import triton.language as tl

from cumo_kernels.backends.triton.common import dot, narrow, precise_exp
from cumo_kernels.backends.triton.launch import next_power_of_2
from cumo_kernels.tiles import tuning
from cumo_kernels.tiles.hardware import KIB, Gpu
from cumo_kernels.types import Scoring

STAGES = 4  # tiles of x and of the gate in flight at a time

TINY: tl.constexpr = tl.constexpr(1e-20)  # TINY of cumo_kernels/types.py


@triton.jit
def count_below(sorted_ptr, value, length, steps):
    """How many of the `length` ascending int32 at sorted_ptr are below `value` (int32 scalar or block)."""
    low = value * 0
    high = low + length
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        below = searching & (tl.load(sorted_ptr + middle, mask=searching, other=0) < value)
        low = tl.where(below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit
def group_bounds(group_offsets_ptr, g, group_size, T, RAGGED: tl.constexpr):
    """First and end token of group g."""
    if RAGGED:
        begin = tl.load(group_offsets_ptr + g)
        end = tl.load(group_offsets_ptr + g + 1)
    else:
        begin = g * group_size
        end = begin + group_size
    return tl.minimum(tl.maximum(begin, 0), T), tl.minimum(tl.maximum(end, 0), T)


@triton.jit
def load_logits(
    x_ptr,  # (T, E), or (T, H) with a gate
    gate_ptr,  # (E, H)
    tokens,  # (BLOCK_T,) int64
    token_mask,
    stride_x_t,
    stride_gate_e,
    H,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_GATE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """(BLOCK_T, BLOCK_E) fp32; -inf right of E, zero below the last token."""
    experts = tl.arange(0, BLOCK_E)
    if HAS_GATE:
        logits = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
        x_ptrs = x_ptr + tokens[:, None] * stride_x_t
        gate_ptrs = gate_ptr + experts[None, :].to(tl.int64) * stride_gate_e
        for h in range(0, H, BLOCK_H):
            cols = h + tl.arange(0, BLOCK_H)
            x = tl.load(x_ptrs + cols[None, :], mask=token_mask[:, None] & (cols < H)[None, :], other=0.0)
            gate = tl.load(
                gate_ptrs + cols[:, None], mask=(cols < H)[:, None] & (experts < E)[None, :], other=0.0
            )
            logits = dot(x, gate, logits, INPUT_PRECISION)
        logits = narrow(logits, x_ptr.dtype.element_ty).to(tl.float32)
    else:
        logits = tl.load(
            x_ptr + tokens[:, None] * stride_x_t + experts[None, :],
            mask=token_mask[:, None] & (experts < E)[None, :],
            other=0.0,
        ).to(tl.float32)
    return tl.where((experts < E)[None, :], logits, float("-inf"))


@triton.jit
def rank_keys(values):
    """int32 keys in the order of fp32 `values`; -0 equals 0, NaN of either sign ranks highest.

    Columns right of E have the lowest value, and ties go to the leftmost column: they are never chosen.
    """
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, 0x7FFFFFFF, keys)


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1], relative error of a few roundings: 2 atanh(e / (2 + e)), t <= 1/3."""
    t = e / (2.0 + e)
    u = t * t
    series = u * (1.0 / 17) + 1.0 / 15
    series = series * u + 1.0 / 13
    series = series * u + 1.0 / 11
    series = series * u + 1.0 / 9
    series = series * u + 1.0 / 7
    series = series * u + 1.0 / 5
    series = series * u + 1.0 / 3
    return 2.0 * (t + t * u * series)


@triton.jit
def score_and_slope(logits, SCORE: tl.constexpr):
    """-> s(logits), s'(logits) of an elementwise score; both 0 at -inf, NaN at NaN."""
    e = precise_exp(-tl.abs(logits))
    inverse = 1.0 / (1.0 + e)
    sigmoid = tl.where(logits >= 0.0, 1.0, e) * inverse
    if SCORE == "sigmoid":
        return sigmoid, e * inverse * inverse
    else:
        tl.static_assert(SCORE == "sqrtsoftplus", "unknown score")
        # not max(logits, 0), which would turn NaN into 0
        root = tl.sqrt_rn(tl.where(logits < 0.0, 0.0, logits) + log1p_of_unit(e))
        return root, tl.where(root == 0.0, 0.0, sigmoid / (2.0 * root))


def groups_of(scoring: Scoring) -> dict[str, int | bool]:
    """Arguments of `choice_keys`."""
    return {
        "EXPERT_GROUPS": scoring.expert_groups,
        "TOP_GROUPS": scoring.top_groups,
        "PADDED_GROUPS": triton.next_power_of_2(scoring.expert_groups),
        "BY_TWO": scoring.group_score == "top2",
    }


@triton.jit
def choice_keys(
    scores,  # (BLOCK_T, BLOCK_E) fp32
    bias_ptr,  # (E,) fp32
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPERT_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BY_TWO: tl.constexpr,
):
    """int32 keys of score + bias; the lowest for experts outside of the best groups and right of E."""
    LOWEST: tl.constexpr = -0x80000000
    experts = tl.arange(0, BLOCK_E)
    ranks = scores
    if HAS_BIAS:
        ranks = scores + tl.load(bias_ptr + experts, mask=experts < E, other=0.0)[None, :]
    keys = tl.where((experts < E)[None, :], rank_keys(ranks), LOWEST)
    if EXPERT_GROUPS > 1:
        of_group = experts // (E // EXPERT_GROUPS)
        groups = tl.arange(0, PADDED_GROUPS)
        group_keys = tl.full((BLOCK_T, PADDED_GROUPS), LOWEST, tl.int32)
        for g in range(EXPERT_GROUPS):
            own = tl.where((of_group == g)[None, :], keys, LOWEST)
            best = tl.max(own, 1)
            if BY_TWO:
                first = tl.min(tl.where(own == best[:, None], experts[None, :], BLOCK_E), 1)
                rest = tl.where(experts[None, :] == first[:, None], LOWEST, own)
                second = tl.max(rest, 1)
                other = tl.min(tl.where(rest == second[:, None], experts[None, :], BLOCK_E), 1)
                two = (experts[None, :] == first[:, None]) | (experts[None, :] == other[:, None])
                best = rank_keys(tl.sum(tl.where(two, ranks, 0.0), 1))
            group_keys = tl.where((groups == g)[None, :], best[:, None], group_keys)
        allowed = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
        for _ in range(TOP_GROUPS):
            best = tl.max(group_keys, 1)
            choice = tl.min(tl.where(group_keys == best[:, None], groups[None, :], PADDED_GROUPS), 1)
            group_keys = tl.where(groups[None, :] == choice[:, None], LOWEST, group_keys)
            allowed = tl.where(of_group[None, :] == choice[:, None], 1, allowed)
        keys = tl.where(allowed != 0, keys, LOWEST)
    return keys


def tokens_of_tile(num_tokens: int, gpu: Gpu) -> int:
    """Enough programs to fill the chip, then fewer, larger ones (another tile height rounds differently)."""
    per_program = 0 if tuning.BATCH_INVARIANT else num_tokens // (2 * gpu.sms)
    return 64 if per_program >= 64 else 32 if per_program >= 32 else 16


def router_tiles(
    dtype: torch.dtype, width: int, num_experts: int, has_gate: bool, block_t: int, gpu: Gpu
) -> dict[str, int | bool]:
    """Tile sizes that forward and backward share, so that both compute the same logits."""
    block_e = next_power_of_2(num_experts)
    if not has_gate:
        # 32 values per thread spill registers
        block_t = 4 if block_e > 256 else max(8, min(128, 1024 // block_e))
        if gpu.capability >= 120 and 256 <= block_e <= 512:  # nor has the assembler room for 16 there
            block_t //= 2
        tile = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_H": 16}
        # with four warps the assembler spills two registers on sm_120, and on sm_80 from 256 experts on
        wide = gpu.capability >= 120 or (gpu.capability < 90 and block_e >= 256)
        num_warps = max(8 if wide else 4, block_t * block_e // 512)
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
