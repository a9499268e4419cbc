"""The reference: plain PyTorch, on any device and in any float dtype including fp64.

Forward functions are differentiable by autograd; tests use that to check the hand-written backward functions
next to them. The hand-written ones avoid recomputation on the CPU.
"""

from cumo_kernels.backends.reference.activation import activate, activate_backward
from cumo_kernels.backends.reference.adapted import (
    adapted_expert_mlp,
    adapted_expert_mlp_backward,
    packed_grouped_gemm,
)
from cumo_kernels.backends.reference.experts import expert_mlp, expert_mlp_backward
from cumo_kernels.backends.reference.grouped_gemm import grouped_gemm, grouped_gemm_weight_grad
from cumo_kernels.backends.reference.permutation import combine, combine_backward, permute
from cumo_kernels.backends.reference.routing import route, route_backward, sort_by_expert
from cumo_kernels.backends.reference.scores import scored_route, scored_route_backward

__all__ = [
    "activate",
    "activate_backward",
    "adapted_expert_mlp",
    "adapted_expert_mlp_backward",
    "combine",
    "combine_backward",
    "expert_mlp",
    "expert_mlp_backward",
    "grouped_gemm",
    "grouped_gemm_weight_grad",
    "packed_grouped_gemm",
    "permute",
    "route",
    "route_backward",
    "scored_route",
    "scored_route_backward",
    "sort_by_expert",
]
