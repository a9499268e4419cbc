"""Activation (reference): act(z), or act(gate) * up, computed in the accumulate dtype.

out[s] = act(x[s])                          x (S, I)    out (S, I)
out[s] = act(x[s, :I]) * x[s, I:]           x (S, 2I)   out (S, I)     gated
"""

from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.types import accumulate_dtype


def activate(x: Tensor, name: str) -> Tensor:
    return get_activation(name).forward(x.to(accumulate_dtype(x.dtype))).to(x.dtype)


def activate_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    wide = accumulate_dtype(x.dtype)
    return get_activation(name).backward(grad.to(wide), x.to(wide)).to(x.dtype)
