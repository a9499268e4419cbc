"""The public edge: every error names the argument, what was wanted and what was got."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(name: str, tensor: Tensor, *wanted: int | str) -> None:
    """`wanted` has one entry per dimension: an exact size, or a letter that stands for any size."""
    shape = tensor.shape
    if len(shape) == len(wanted) and all(
        isinstance(want, str) or got == want for want, got in zip(wanted, shape, strict=True)
    ):
        return
    raise ValueError(f"{name} must be ({', '.join(map(str, wanted))}), got {tuple(shape)}")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` shares dtype and device with `like`."""
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {tensor.dtype}")
    check_device(name, tensor, like_name, like)


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_int32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {tensor.dtype}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, the tensors in autocast's dtype, as nn.Linear would see them; else unchanged."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # like torch's own autocast, fp64 stays fp64
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
