"""What `route` and `scored_route` share: the shapes of their results, and the FLOPs of the gate."""

import math

import torch
from torch import Tensor

from cumo_kernels.types import accumulate_dtype


def empty_plan(
    x: Tensor, gate_weight: Tensor | None, num_groups: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> weights (T, K), indices (T, K) int32, mean_probs (G, E), top1_density (G, E), z (G,), unwritten."""
    num_tokens, num_experts = x.shape[0], (x.shape[1] if gate_weight is None else gate_weight.shape[0])
    wide = accumulate_dtype(x.dtype)
    return (
        x.new_empty(num_tokens, top_k, dtype=wide),
        x.new_empty(num_tokens, top_k, dtype=torch.int32),
        x.new_empty(num_groups, num_experts, dtype=wide),
        x.new_empty(num_groups, num_experts, dtype=wide),
        x.new_empty(num_groups, dtype=wide),
    )


def empty_gradients(
    x: Tensor, gate_weight: Tensor | None, need_x: bool, need_gate: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and of the gate, not written; of size 0 where not needed."""
    return x.new_empty(x.shape if need_x else 0), x.new_empty(gate_weight.shape if need_gate else 0)


def flops(x, gate_weight, *shapes, out_shape=None, **kwargs):
    """2 * T * E * H for the gate; the rest is not a GEMM."""
    return 2 * math.prod(x) * gate_weight[0] if gate_weight is not None else 0


def backward_flops(*shapes, out_shape=None, **kwargs):
    """The needed gradients of the gate's GEMM; the recomputed logits are not counted."""
    need_x, need_gate = shapes[8:10]
    return (need_x + need_gate) * flops(*shapes[3:5])
