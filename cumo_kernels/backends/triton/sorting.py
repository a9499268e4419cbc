"""The stable sort of slots by expert (Triton, routing stem).

_count_kernel, _sort_kernel: grid (programs). Each program counts and then places a run of slots; S * E adds.
No atomics: a slot's position follows from the counts of all earlier runs.

Contract: cumo_kernels/ops/routing.py. Reference: cumo_kernels/backends/reference/routing.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import wait_for_earlier
from cumo_kernels.backends.triton.launch import Launch, cdiv, next_power_of_2, on_device_of_first, planned


@triton.jit(do_not_specialize=["S", "run"])
def _count_kernel(
    indices_ptr,  # (S,) int32
    counts_ptr,  # (programs, E) int32
    S,
    run,
    E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    wait_for_earlier()
    pid = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    end = tl.minimum((pid + 1) * run, S)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(pid * run, end, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        chosen = tl.load(indices_ptr + slots, mask=slots < end, other=-1)
        counts += tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + pid * E + experts, counts, mask=experts < E)


@triton.jit(do_not_specialize=["S", "run"])
def _sort_kernel(
    indices_ptr,  # (S,) int32
    counts_ptr,  # (programs, E) int32, unused with one program
    tokens_per_expert_ptr,  # (E,) int32
    expert_offsets_ptr,  # (E + 1,) int32
    permutation_ptr,  # (S,) int32
    inverse_ptr,  # (S,) int32
    S,
    run,
    E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ALONE: tl.constexpr,
):
    wait_for_earlier()
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    experts = tl.arange(0, BLOCK_E)
    expert_mask = experts < E
    begin = pid * run
    end = tl.minimum(begin + run, S)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)  # counts of the programs before this one
    if ALONE:
        for start in range(0, S, BLOCK_S):
            slots = start + tl.arange(0, BLOCK_S)
            chosen = tl.load(indices_ptr + slots, mask=slots < S, other=-1)
            counts += tl.sum(((chosen[:, None] == experts[None, :]) & expert_mask[None, :]).to(tl.int32), 0)
    else:
        for start in range(0, num_programs, BLOCK_P):
            programs = start + tl.arange(0, BLOCK_P)
            block = tl.load(
                counts_ptr + programs[:, None] * E + experts[None, :],
                mask=(programs < num_programs)[:, None] & expert_mask[None, :],
                other=0,
            )
            counts += tl.sum(block, 0)
            before += tl.sum(tl.where((programs < pid)[:, None], block, 0), 0)
    ends = tl.cumsum(counts, 0)
    if pid == 0:
        tl.store(tokens_per_expert_ptr + experts, counts, mask=expert_mask)
        tl.store(expert_offsets_ptr, 0)
        tl.store(expert_offsets_ptr + 1 + experts, ends, mask=expert_mask)

    # the position of each expert's next slot, and of the next dropped slot
    free = ends - counts + before
    free_dropped = tl.sum(counts, 0) + begin - tl.sum(before, 0)
    for start in range(begin, end, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        mask = slots < end
        chosen = tl.load(indices_ptr + slots, mask=mask, other=-1)
        here = ((chosen[:, None] == experts[None, :]) & expert_mask[None, :]).to(tl.int32)
        rank = tl.cumsum(here, 0) - 1
        kept = (chosen >= 0) & (chosen < E)
        dropped = (mask & (kept == 0)).to(tl.int32)
        position = tl.where(
            kept,
            tl.sum(here * (free[None, :] + rank), 1),
            free_dropped + tl.cumsum(dropped, 0) - 1,
        )
        tl.store(permutation_ptr + position, slots, mask=mask)
        tl.store(inverse_ptr + slots, tl.where(kept, position, -1), mask=mask)
        free += tl.sum(here, 0)
        free_dropped += tl.sum(dropped, 0)


MAX_PROGRAMS = 256  # every program of the sort reads all counts


@planned
def _plan(device: torch.device, num_experts: int) -> tuple[int, Launch, Launch, Launch]:
    """-> slots per step; the count, the sort after it, and the sort by a single program."""
    block_e = next_power_of_2(num_experts)
    # (BLOCK_S, BLOCK_E) is what one step ranks: 32 values per thread
    block_s = max(16, min(2048, 8192 // block_e))
    tiles = {"E": num_experts, "BLOCK_S": block_s, "BLOCK_E": block_e}
    count = Launch(_count_kernel, num_warps=8, **tiles)
    block_p = max(4, min(MAX_PROGRAMS, 8192 // block_e))
    sort, sort_alone = (
        # a single program holds all that it ranks: with 8 warps Triton 3.9 spills registers
        Launch(_sort_kernel, BLOCK_P=block_p, ALONE=alone, num_warps=16 if alone else 8, **tiles)
        for alone in (False, True)
    )
    return block_s, count, sort, sort_alone


@on_device_of_first
def sort_by_expert(topk_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> tokens_per_expert (E,), expert_offsets (E + 1,), permutation (S,), inverse_permutation (S,)."""
    indices = topk_indices.contiguous()
    num_slots = indices.numel()
    new = lambda *shape: torch.empty(*shape, dtype=torch.int32, device=indices.device)
    tokens_per_expert, expert_offsets = new(num_experts), new(num_experts + 1)
    permutation, inverse = new(num_slots), new(num_slots)
    results = tokens_per_expert, expert_offsets, permutation, inverse
    block_s, count, sort, sort_alone = _plan(indices.device, num_experts)
    if num_slots <= 4 * block_s:
        sort_alone(1, indices, indices, *results, num_slots, num_slots)
        return results
    programs = min(cdiv(num_slots, block_s), MAX_PROGRAMS)
    run = cdiv(cdiv(num_slots, programs), block_s) * block_s
    counts = new(programs, num_experts)
    count(programs, indices, counts, num_slots, run)
    sort(programs, indices, counts, *results, num_slots, run)
    return results
