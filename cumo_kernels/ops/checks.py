"""Checks of public arguments: every error names the argument, what was wanted and what was passed."""

import torch
from torch import Tensor

from cumo_kernels.hostsync import values_at_hand
from cumo_kernels.tracing import is_autocast_on

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_shape(name: str, tensor: Tensor, *wanted: int | str) -> None:
    """`wanted` has one entry per dimension: an exact size, or a letter that stands for any size."""
    check_tensor(name, tensor)
    shape = tensor.shape
    if len(shape) == len(wanted) and all(
        isinstance(want, str) or got == want for want, got in zip(wanted, shape, strict=True)
    ):
        return
    comma = "," if len(wanted) == 1 else ""
    raise ValueError(f"{name} must be ({', '.join(map(str, wanted))}{comma}), got {tuple(shape)}")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` shares dtype and device with `like`."""
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}")
    check_device(name, tensor, like_name, like)


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def check_float(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_int32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {tensor.dtype}")


def check_top_k(top_k: int, num_experts: int) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the {num_experts} experts, got {top_k!r}")


def check_offsets(name: str, offsets: Tensor, last: int, first: int | None = None) -> None:
    """Check ascent from `first` (None: any) to at most `last`, where reading values needs no sync."""
    if not values_at_hand(offsets):
        return
    values = offsets.tolist()
    start = values[0] if first is None else first
    if values != sorted(values) or values[0] != start or start < 0 or values[-1] > last:
        begin = "0 or more" if first is None else first
        raise ValueError(f"{name} must ascend from {begin} to at most {last}, got {values}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, the tensors in autocast's dtype, as nn.Linear would cast them; else unchanged."""
    device = tensors[0].device.type
    if not is_autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # like torch's own autocast, fp64 stays fp64
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
