"""The only list of activations: name, plain torch function, its derivative, and whether it is gated.

A gated activation takes [gate, up] side by side, width 2I, and returns act(gate) * g(up), width I; g is the
identity but for the clamped ones. Every function computes in the dtype of its input; callers pass the
accumulate dtype. A name can carry parameters, as in "swiglu_oai(alpha=1.702,limit=7.0)", and the word
`interleaved` for a gate and an up part that alternate: [g0, u0, g1, u1, ...].
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cumo_kernels.tracing import constant

QUICK_GELU_ALPHA = 1.702  # the sigmoid approximation of Hendrycks & Gimpel 2016 that CLIP was trained with
INTERLEAVED = "interleaved"


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


def _relu2(z: Tensor) -> Tensor:
    return torch.relu(z).square()


def _relu2_backward(grad: Tensor, z: Tensor) -> Tensor:
    return grad * (2 * torch.relu(z))


def _below(z: Tensor, limit: float) -> Tensor:
    # not torch.clamp, whose slope at the bound is 1 in torch 2.11 and 0 in 2.15
    return torch.where(z > limit, limit, z)


def _within(z: Tensor, limit: float) -> Tensor:
    return torch.where(z < -limit, -limit, _below(z, limit))


def _clamped_silu(z: Tensor, limit: float) -> Tensor:
    return torch.nn.functional.silu(_below(z, limit))


def _clamped_silu_backward(grad: Tensor, z: Tensor, limit: float) -> Tensor:
    return torch.ops.aten.silu_backward(torch.where(z <= limit, grad, 0), _below(z, limit))


def _oai(z: Tensor, alpha: float, limit: float) -> Tensor:
    z = _below(z, limit)
    return z * torch.sigmoid(alpha * z)


def _oai_backward(grad: Tensor, z: Tensor, alpha: float, limit: float) -> Tensor:
    # z sigmoid(alpha z) = silu(alpha z) / alpha
    return torch.ops.aten.silu_backward(torch.where(z <= limit, grad, 0), alpha * _below(z, limit))


def _silu_clamped(z: Tensor, limit: float) -> Tensor:
    return _below(torch.nn.functional.silu(z), limit)


def _silu_clamped_backward(grad: Tensor, z: Tensor, limit: float) -> Tensor:
    return torch.ops.aten.silu_backward(torch.where(torch.nn.functional.silu(z) <= limit, grad, 0), z)


@dataclass(frozen=True)
class Activation:
    name: str
    function: Callable[..., Tensor]  # elementwise part, act; takes the parameters too
    vjp: Callable[..., Tensor]  # (grad, z) -> grad * act'(z)
    is_gated: bool = False
    alpha: float | None = None  # a parameter of the row if not None
    limit: float | None = None  # the same; up is clamped to +-limit, with slope 1 at the bounds
    shift: float = 0.0  # added to the clamped up
    is_interleaved: bool = False  # gate and up alternate

    @property
    def parameters(self) -> dict[str, float]:
        named = {"alpha": self.alpha, "limit": self.limit}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def kind(self) -> str:
        """The name without parameters."""
        return self.name.partition("(")[0]

    @property
    def spelled(self) -> str:
        """The name with all parameters, as kernels read it."""
        words = [f"{name}={value!r}" for name, value in self.parameters.items()]
        words += [INTERLEAVED] if self.is_interleaved else []
        return f"{self.kind}({','.join(words)})" if words else self.kind

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2I) -> gate and up, views (..., I)."""
        return (z[..., ::2], z[..., 1::2]) if self.is_interleaved else z.chunk(2, dim=-1)

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """The reverse of `split`, a new tensor."""
        if self.is_interleaved:
            return torch.stack([gate, up], dim=-1).flatten(-2)
        return torch.cat([gate, up], dim=-1)

    def forward(self, z: Tensor) -> Tensor:
        """(..., I) or, gated, (..., 2I) -> (..., I)."""
        if not self.is_gated:
            return self.function(z, **self.parameters)
        gate, up = self.split(z)
        return self.function(gate, **self.parameters) * self._linear(up)

    def backward(self, grad: Tensor, z: Tensor) -> Tensor:
        """Gradient of the output (..., I) and the input z -> gradient of z."""
        if not self.is_gated:
            return self.vjp(grad, z, **self.parameters)
        gate, up = self.split(z)
        dgate = self.vjp(grad * self._linear(up), gate, **self.parameters)
        dup = grad * self.function(gate, **self.parameters)
        if self.limit is not None:
            dup = torch.where((up >= -self.limit) & (up <= self.limit), dup, 0)
        return self.joined(dgate, dup)

    def _linear(self, up: Tensor) -> Tensor:
        if self.limit is not None:
            up = _within(up, self.limit)
        return up + self.shift if self.shift else up


_silu, _silu_backward = torch.nn.functional.silu, torch.ops.aten.silu_backward

ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("quick_gelu", _quick_gelu, _quick_gelu_backward),
        Activation("gelu", torch.nn.functional.gelu, torch.ops.aten.gelu_backward),
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_backward),
        Activation("relu", torch.relu, _relu_backward),
        Activation("relu2", _relu2, _relu2_backward),  # So et al. 2021; Nemotron-H
        Activation("silu", _silu, _silu_backward),
        Activation("swiglu", _silu, _silu_backward, is_gated=True),
        Activation("geglu", torch.nn.functional.gelu, torch.ops.aten.gelu_backward, is_gated=True),
        Activation("geglu_tanh", _gelu_tanh, _gelu_tanh_backward, is_gated=True),
        Activation("reglu", torch.relu, _relu_backward, is_gated=True),
        # DeepSeek-V4: silu(min(gate, limit)) * clamp(up)
        Activation("swiglu_clamped", _clamped_silu, _clamped_silu_backward, is_gated=True, limit=10.0),
        # gpt-oss: g sigmoid(alpha g) * (clamp(up) + 1), g = min(gate, limit)
        Activation("swiglu_oai", _oai, _oai_backward, is_gated=True, alpha=1.702, limit=7.0, shift=1.0),
        # Step-3.7: min(silu(gate), limit) * clamp(up)
        Activation("clamped_swiglu", _silu_clamped, _silu_clamped_backward, is_gated=True, limit=10.0),
    )
}


def _fail(argument: str, wanted: str, got: object) -> None:
    got = repr(got) if isinstance(got, str | None) else type(got).__name__
    raise ValueError(f"{argument} must be {wanted}, got {got}")


@functools.lru_cache(maxsize=1024)
def _parsed(name: str, argument: str) -> Activation:
    kind, opened, rest = name.partition("(")
    row = ACTIVATIONS.get(kind)
    if row is None or (opened and not rest.endswith(")")):
        _fail(argument, f"one of {sorted(ACTIVATIONS)}", name)
    values, is_interleaved = row.parameters, False
    words = [word.strip() for word in rest.removesuffix(")").split(",")] if rest.strip(" )") else []
    keys = [word.partition("=")[0].strip() for word in words]
    if len(set(keys)) < len(keys):
        _fail(argument, f"{kind} with each of its parameters once", name)
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if word == INTERLEAVED and row.is_gated:
            is_interleaved = True
            continue
        if key not in values or not equals:
            known = [*(f"{key}=..." for key in values), *([INTERLEAVED] if row.is_gated else [])]
            _fail(argument, f"{kind} with {' and '.join(known) or 'no parameter'}", name)
        try:
            values[key] = float(value)
        except ValueError:
            _fail(argument, f"{kind} with a number as {key}", name)
        if not 0 < values[key] < math.inf:
            _fail(argument, f"{kind} with a finite {key} above 0", name)
    row = replace(row, is_interleaved=is_interleaved, **values)
    return replace(row, name=kind if row == ACTIVATIONS[kind] else row.spelled)


def get_activation(name: str, argument: str = "activation") -> Activation:
    """The row of that name, with its parameters; its own name is the same for every spelling of them.

    Args:
        name: a row of `ACTIVATIONS`, as in "swiglu", or with some or all of its parameters and, if it is
            gated, the word interleaved, as in "swiglu_oai(limit=7.0,interleaved)".
        argument: what an error calls it.

    Raises:
        ValueError: no row has that name, or a parameter is unknown, not finite or not above 0.
    """
    if not isinstance(name, str):
        _fail(argument, f"one of {sorted(ACTIVATIONS)}", name)
    row = ACTIVATIONS.get(name)
    return row if row is not None else _parsed(name, argument)


@functools.lru_cache(maxsize=1024)
def _resolved(name: str, argument: str, interleaved: bool) -> tuple[str, bool]:
    row = get_activation(name, argument)
    if interleaved and not row.is_gated:
        raise ValueError(f"interleaved must be False for {name}, which is not gated, got True")
    return replace(row, is_interleaved=interleaved or row.is_interleaved).spelled, row.is_gated


@constant  # a graph holds strings, and cannot trace how they are read
def resolve(name: str, argument: str = "activation", interleaved: bool = False) -> tuple[str, bool]:
    """-> the name with all its parameters, as ops and kernels get it, and whether it is gated.

    Raises:
        ValueError: as `get_activation`, or `interleaved` with an activation that is not gated.
    """
    if not isinstance(name, str):  # and perhaps not hashable
        get_activation(name, argument)
    return _resolved(name, argument, interleaved)
