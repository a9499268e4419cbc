"""Low-rank additions to expert weights: their checks, several as one, and one applied by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cumo_kernels.ops.checks import check_device, check_float, check_shape, shown
from cumo_kernels.types import Adapter


def check_adapters(
    name: str, adapters: Sequence[Adapter], x: Tensor, num_experts: int, rows: int, columns: int
) -> None:
    """Each is an Adapter of weights (num_experts, rows, columns) on the device of `x`."""
    if not isinstance(adapters, Sequence):
        raise ValueError(f"{name} must be a sequence of Adapter, got {shown(adapters)}")
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise ValueError(f"{name} must be a sequence of Adapter, got one of {type(adapter).__name__}")
        a, b = adapter.a, adapter.b
        for part, tensor in (("a", a), ("b", b)):
            check_float(f"{part} of {name}", tensor)
            check_device(f"{part} of {name}", tensor, "x", x)
        check_shape(f"a of {name}", a, num_experts, "R", columns)
        check_shape(f"b of {name}", b, num_experts, rows, a.shape[1])
        if not isinstance(adapter.scaling, int | float) or isinstance(adapter.scaling, bool):
            raise ValueError(f"scaling of {name} must be a number, got {shown(adapter.scaling)}")
        dropout = adapter.dropout
        if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"dropout of {name} must be from 0 to below 1, got {shown(dropout)}")


def tensors_of(adapters: Sequence[Adapter]) -> list[Tensor]:
    """Their parameters, for `dispatch.trains`."""
    return [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]


def drops(adapters: Sequence[Adapter]) -> bool:
    """Whether any of them sets elements of its input to 0."""
    return any(adapter.dropout for adapter in adapters)


def joined(adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """All of them as one a (E, R, K) and b (E, N, R) of `dtype`; b includes the scaling.

    None without adapters. Ranks add up.
    """
    if not adapters:
        return None, None
    a = [adapter.a.to(dtype) for adapter in adapters]
    b = [(adapter.b * adapter.scaling).to(dtype) for adapter in adapters]
    a, b = (a[0], b[0]) if len(adapters) == 1 else (torch.cat(a, 1), torch.cat(b, 2))
    return a.contiguous(), b.contiguous()
