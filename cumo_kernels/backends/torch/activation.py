"""Activation (torch): the reference's formula, applied to a part of the rows at a time.

Contract: cumo_kernels/ops/activation.py.
"""

from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends import reference
from cumo_kernels.backends.torch.rows import PART, parts
from cumo_kernels.types import accumulate_dtype


def activate(x: Tensor, name: str) -> Tensor:
    act, wide = get_activation(name), accumulate_dtype(x.dtype)
    if x.dtype == wide or x.numel() <= PART:  # nothing is converted, or all of it fits in a cache
        return reference.activate(x, name)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], rows.shape[1] // (1 + act.is_gated))
    for part in parts(*rows.shape, x.device):
        out[part] = act.forward(rows[part].to(wide))
    return out.view(*x.shape[:-1], out.shape[1])


def activate_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    act, wide = get_activation(name), accumulate_dtype(x.dtype)
    if x.dtype == wide or x.numel() <= PART:
        return reference.activate_backward(grad, x, name)
    grads, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape)
    for part in parts(*rows.shape, x.device):
        out[part] = act.backward(grads[part].to(wide), rows[part].to(wide))
    return out.view(x.shape)
