"""Public ops: one file per stem with its checks, torch.library op, fake, adjoint and public docstring."""

from cumo_kernels.ops.activation import activate
from cumo_kernels.ops.balancing import update_selection_bias
from cumo_kernels.ops.experts import expert_mlp
from cumo_kernels.ops.grouped_gemm import grouped_gemm
from cumo_kernels.ops.noisy import NoisyRouting, noisy_top_k, sparsemixer
from cumo_kernels.ops.permutation import combine, permute
from cumo_kernels.ops.routing import route, routing_from_topk, with_capacity

__all__ = [
    "NoisyRouting",
    "activate",
    "combine",
    "expert_mlp",
    "grouped_gemm",
    "noisy_top_k",
    "permute",
    "route",
    "routing_from_topk",
    "sparsemixer",
    "update_selection_bias",
    "with_capacity",
]
