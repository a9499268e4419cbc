"""Which slots of a plan remain when an expert takes a limited number (arXiv 2006.16668, GShard)."""

import torch
from torch import Tensor

from cumo_kernels.types import Routing

DROPS = ("position", "weight")


def _rank_by_weight(routing: Routing) -> Tensor:
    """(S,) int64: how many slots of the same expert weigh more, or as much and come before."""
    slots, weights = routing.topk_indices.flatten(), routing.topk_weights.detach().flatten()
    by_weight = weights.sort(descending=True, stable=True).indices
    order = by_weight[slots[by_weight].sort(stable=True).indices]
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    return places


def within(routing: Routing, capacity: int, drop: str) -> Tensor:
    """(T, K) bool: the slots that every expert keeps, at most `capacity`; those dropped already stay so."""
    slots = routing.topk_indices.flatten()
    places = routing.inverse_permutation.long() if drop == "position" else _rank_by_weight(routing)
    begins = routing.expert_offsets.index_select(0, slots)  # E + 1 of them
    return ((places - begins < capacity) & (slots < routing.num_experts)).view_as(routing.topk_indices)
