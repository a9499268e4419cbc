"""Balancing without a loss: the update of the bias by which `route` chooses experts."""

import math
import numbers

import torch
from torch import Tensor

from cumo_kernels.ops.checks import check_device, check_shape, check_tensor, shown


@torch.no_grad()
def update_selection_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float = 0.001) -> None:
    """Add rate * sign(mean load - load) to the bias of each expert, in place and without a host sync.

    An expert with fewer tokens than the mean is chosen more often after it, one with more tokens less often
    (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Call it once after each
    optimizer step, with the load of all tokens of the step, on all processes.

    Args:
        bias: (E,) fp32 or fp64, the `selection_bias` of `route`. A bf16 bias near 1 would not change.
        tokens_per_expert: (E,) or (G, E) integers, the slots of each expert; rows are added up. Signs are
            computed in integers, so that an expert at the mean keeps its bias exactly.
        rate: the step, finite and not negative.

    Raises:
        ValueError: an argument is wrong.
    """
    check_tensor("bias", bias)
    check_shape("bias", bias, "E")
    if bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"bias must be float32 or float64, which hold small steps, got {bias.dtype}")
    check_tensor("tokens_per_expert", tokens_per_expert)
    num_experts = bias.shape[0]
    if tokens_per_expert.ndim not in (1, 2) or tokens_per_expert.shape[-1] != num_experts:
        raise ValueError(
            f"tokens_per_expert must be ({num_experts},) or (G, {num_experts}) like bias, "
            f"got {tuple(tokens_per_expert.shape)}"
        )
    if tokens_per_expert.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens_per_expert must be int32 or int64, got {tokens_per_expert.dtype}")
    check_device("tokens_per_expert", tokens_per_expert, "bias", bias)
    if not isinstance(rate, numbers.Real) or isinstance(rate, bool):
        raise ValueError(f"rate must be a number, got {shown(rate)}")
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate must be finite and not negative, got {rate}")
    load = tokens_per_expert.reshape(-1, num_experts).sum(0, dtype=torch.int64)
    bias.add_((load.sum() - num_experts * load).sign().to(bias.dtype), alpha=float(rate))
