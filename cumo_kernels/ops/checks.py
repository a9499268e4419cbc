"""Checks of public arguments: every error names the argument, what was wanted and what was passed."""

import numbers
from collections.abc import Collection
from dataclasses import fields

import torch
from torch import Tensor

from cumo_kernels.hostsync import values_at_hand
from cumo_kernels.tracing import is_autocast_on
from cumo_kernels.types import Routing

WIDE = (torch.float32, torch.float64)
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
    check_tensor(name, tensor)
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {tensor.dtype}")


def check_optional(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor or None, got {type(tensor).__name__}")


def check_int(name: str, value: int, also: str = "") -> int:
    """The value as int, if it is an integer of Python, NumPy or a traced shape; a bool is none.

    `also`: other values that the argument may have, for the message.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be an int{also}, got {shown(value)}")
    return int(value)


def check_count(name: str, value: int) -> int:
    """The value as int, if it is an integer of at least 1."""
    if (value := check_int(name, value)) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_bool(name: str, value: bool) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: str | None, choices: Collection[str | None]) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}")


def check_top_k(top_k: int, num_experts: int) -> int:
    """The value as int, if it is an integer from 1 to the number of experts."""
    top_k = check_int("top_k", top_k, also=f" between 1 and the {num_experts} experts")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the {num_experts} experts, got {top_k}")
    return top_k


def check_topk_indices(topk_indices: Tensor, num_experts: int, like_name: str, like: Tensor) -> None:
    """Experts that a caller has chosen: int32 or int64 in [0, E], on the device of `like`."""
    check_device("topk_indices", topk_indices, like_name, like)
    if topk_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_indices must be int32 or int64, got {topk_indices.dtype}")
    if topk_indices.numel() and values_at_hand(topk_indices):
        low, high = (int(v) for v in topk_indices.aminmax())
        if low < 0 or high > num_experts:
            raise ValueError(f"topk_indices must lie in [0, {num_experts}], got values from {low} to {high}")


def check_routing(name: str, routing: Routing) -> None:
    """`routing` is a plan whose fields have the dtypes and sizes that kernels read without a check."""
    if not isinstance(routing, Routing):
        raise ValueError(
            f"{name} must be a Routing, from route or routing_from_topk, got {type(routing).__name__}"
        )
    if not torch.compiler.is_compiling() and not _is_whole(routing):  # sizes would become guards of a graph
        found = ", ".join(_described(getattr(routing, field.name)) for field in fields(routing)[:6])
        raise ValueError(f"{name} must have fields as cumo_kernels.Routing describes them, got {found}")


def _is_whole(routing: Routing) -> bool:
    weights, indices, permutation = routing.topk_weights, routing.topk_indices, routing.permutation
    inverse, offsets = routing.inverse_permutation, routing.expert_offsets
    try:
        return (
            indices.dtype is permutation.dtype is inverse.dtype is offsets.dtype is torch.int32
            and weights.dtype in WIDE
            and weights.shape == indices.shape
            and permutation.shape == inverse.shape == (weights.shape[0] * weights.shape[1],)
            and offsets.shape == (routing.tokens_per_expert.shape[0] + 1,)
        )
    except (AttributeError, IndexError):  # a field is no tensor, or has too few dimensions
        return False


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return shown(value)


def shown(value: object) -> str:
    """A wrong argument as an error names it: the value of a simple type, else only the type."""
    if isinstance(value, str | bool | int | float | torch.dtype | None):
        return repr(value)
    return type(value).__name__


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
