"""The only list of activations: name, plain torch function, its derivative, and whether it is gated.

A gated activation takes [gate, up] side by side, width 2I, and returns act(gate) * up, width I. Every
function computes in the dtype of its input; callers pass the accumulate dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

QUICK_GELU_ALPHA = 1.702  # the sigmoid approximation of Hendrycks & Gimpel 2016 that CLIP was trained with


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(QUICK_GELU_ALPHA * z)


def _quick_gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    # quick_gelu(z) = silu(1.702 z) / 1.702, so its derivative at z is silu'(1.702 z)
    return torch.ops.aten.silu_backward(grad, QUICK_GELU_ALPHA * z)


def _gelu_tanh(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")


def _relu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return torch.where(z > 0, grad, 0)


@dataclass(frozen=True)
class Activation:
    name: str
    function: Callable[[Tensor], Tensor]  # elementwise part, act
    vjp: Callable[[Tensor, Tensor], Tensor]  # (grad, z) -> grad * act'(z)
    is_gated: bool = False

    def forward(self, z: Tensor) -> Tensor:
        """(..., I) or, gated, (..., 2I) -> (..., I)."""
        if not self.is_gated:
            return self.function(z)
        gate, up = z.chunk(2, dim=-1)
        return self.function(gate) * up

    def backward(self, grad: Tensor, z: Tensor) -> Tensor:
        """Gradient of the output (..., I) and the input z -> gradient of z."""
        if not self.is_gated:
            return self.vjp(grad, z)
        gate, up = z.chunk(2, dim=-1)
        return torch.cat([self.vjp(grad * up, gate), grad * self.function(gate)], dim=-1)


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("quick_gelu", _quick_gelu, _quick_gelu_backward),
        Activation("gelu", torch.nn.functional.gelu, torch.ops.aten.gelu_backward),
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_backward),
        Activation("relu", torch.relu, _relu_backward),
        Activation("silu", torch.nn.functional.silu, torch.ops.aten.silu_backward),
        Activation("swiglu", torch.nn.functional.silu, torch.ops.aten.silu_backward, is_gated=True),
        Activation("geglu", torch.nn.functional.gelu, torch.ops.aten.gelu_backward, is_gated=True),
        Activation("geglu_tanh", _gelu_tanh, _gelu_tanh_backward, is_gated=True),
    )
}


def get_activation(name: str, argument: str = "activation") -> Activation:
    """The row of that name; ValueError about `argument` if there is none."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        got = repr(name) if isinstance(name, str | None) else type(name).__name__
        raise ValueError(f"{argument} must be one of {sorted(ACTIVATIONS)}, got {got}")
    return ACTIVATIONS[name]
