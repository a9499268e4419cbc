"""with_capacity: drops the slots of an expert beyond a number (arXiv 2006.16668, GShard)."""

from dataclasses import replace

import torch
from torch import Tensor

from cumo_kernels import dispatch
from cumo_kernels.ops.checks import check_choice, check_count, check_routing
from cumo_kernels.ops.routing import _sort_by_expert
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


def with_capacity(routing: Routing, capacity: int, drop: str = "position") -> Routing:
    """`routing` in which every expert keeps at most `capacity` slots; the others are dropped.

    A dropped slot has expert index E and weight 0, and gives no gradient. The weights of the other slots of
    its token stay as they are. The statistics stay those before the drop.

    Args:
        routing: a plan of `route` or `routing_from_topk`; slots may already be dropped.
        capacity: slots that an expert keeps.
        drop: which go first: "position", the last in order of tokens, or "weight", those of the smallest
            weight, and of equal ones the last.

    Raises:
        ValueError: an argument is wrong.
    """
    check_routing("routing", routing)
    capacity = check_count("capacity", capacity)
    check_choice("drop", drop, DROPS)
    indices, num_experts = routing.topk_indices, routing.num_experts
    places = routing.inverse_permutation.long() if drop == "position" else _rank_by_weight(routing)
    begins = routing.expert_offsets.index_select(0, indices.flatten())  # E + 1 of them
    kept = ((places - begins < capacity) & (indices.flatten() < num_experts)).view_as(indices)
    indices = torch.where(kept, indices, num_experts)
    weights = torch.where(kept, routing.topk_weights, 0.0)
    backend = dispatch.choose("sort_by_expert", weights, num_experts)
    names = ("tokens_per_expert", "expert_offsets", "permutation", "inverse_permutation")
    plan = dict(zip(names, _sort_by_expert(indices, num_experts, backend), strict=True))
    return replace(routing, topk_weights=weights, topk_indices=indices, **plan)
