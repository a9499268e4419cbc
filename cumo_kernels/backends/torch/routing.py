"""Routing (torch): the reference's softmax and top-k, and a sort; nothing synchronises.

Contract: cumo_kernels/ops/routing.py.
"""

import torch
from torch import Tensor

from cumo_kernels.backends.reference.routing import route, route_backward

__all__ = ["route", "route_backward", "sort_by_expert"]


def sort_by_expert(topk_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> tokens_per_expert (E,), expert_offsets (E + 1,), permutation (S,), inverse_permutation (S,)."""
    slots = topk_indices.flatten()
    experts, permutation = slots.sort(stable=True)
    every = torch.arange(num_experts + 1, dtype=experts.dtype, device=slots.device)
    expert_offsets = torch.searchsorted(experts, every, out_int32=True)
    positions = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
    kept = torch.where(experts < num_experts, positions, -1)
    inverse = torch.empty_like(positions).scatter_(0, permutation, kept)
    return expert_offsets.diff(), expert_offsets, permutation.int(), inverse
