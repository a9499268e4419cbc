"""Public ops: one file per stem with its checks, torch.library op, fake, adjoint and public docstring."""

from cumo_kernels.ops.activation import activate
from cumo_kernels.ops.balancing import update_selection_bias
from cumo_kernels.ops.experts import expert_mlp
from cumo_kernels.ops.grouped_gemm import grouped_gemm
from cumo_kernels.ops.permutation import combine, permute
from cumo_kernels.ops.routing import route, routing_from_topk

__all__ = [
    "activate",
    "combine",
    "expert_mlp",
    "grouped_gemm",
    "permute",
    "route",
    "routing_from_topk",
    "update_selection_bias",
]
