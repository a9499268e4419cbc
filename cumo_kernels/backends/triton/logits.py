"""Device functions shared by the router kernels (Triton, routing stem): logits, ranks, groups."""

import triton
import triton.language as tl

from cumo_kernels.backends.triton.common import dot, narrow


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
