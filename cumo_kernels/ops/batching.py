"""The rule of torch.vmap for an op: one call for each element of the batch."""

from collections.abc import Callable

import torch
from torch import Tensor


def _element(value, dim: int | None, i: int):
    if dim is None or not isinstance(value, Tensor):
        return value
    if value.shape[dim]:
        return value.select(dim, i)
    return value.sum(dim, dtype=value.dtype)  # of an empty batch: zeros that gradients can flow through


def call_each(function: Callable, batch_size: int, in_dims: tuple[int | None, ...], args: tuple):
    """Call `function` on each element of a batch -> stacked outputs, their batch dimensions.

    Args:
        function: takes `args` without their batch dimensions; returns a tensor or a tuple of them.
        batch_size: number of elements; may be 0.
        in_dims: for each argument its batch dimension, None if all elements share it.
        args: tensors and other values.
    """
    outputs = [
        function(*(_element(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(max(1, batch_size))
    ]
    stack = lambda parts: torch.stack(parts)[:batch_size]
    if isinstance(outputs[0], Tensor):
        return stack(outputs), 0
    return tuple(map(stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])
