"""Routing by scores (Triton): the kernels of routing.py, with other scores or choices.

Contract: cumo_kernels/ops/scores.py. Reference: cumo_kernels/backends/reference/scores.py.
"""

from torch import Tensor

from cumo_kernels.backends.triton.routing import route_by
from cumo_kernels.backends.triton.routing_backward import route_by_backward
from cumo_kernels.types import Scoring


def scored_route(
    x: Tensor,
    gate_weight: Tensor | None,
    selection_bias: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
    scoring: str,
    topk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> topk_weights (T, K), topk_indices (T, K) int32, mean_probs (G, E), top1_density (G, E), z (G,)."""
    how = Scoring.parse(scoring)
    return route_by(
        x, gate_weight, group_offsets, num_groups, top_k, renormalize, selection_bias, topk_indices, how
    )


def scored_route_backward(
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
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and gate_weight, empty where not needed."""
    return route_by_backward(
        grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets, renormalize,
        need_x, need_gate, Scoring.parse(scoring),
    )  # fmt: skip
