"""activate: an elementwise activation, plain or gated, of tensors of any shape."""

from torch import Tensor

from cumo_kernels import dispatch
from cumo_kernels.activations import get_activation, resolve
from cumo_kernels.ops.checks import check_float
from cumo_kernels.ops.define import define


@define("cumo::activate")
def _activate(x: Tensor, name: str, backend: str) -> Tensor:
    return dispatch.implementation(backend, "activate")(x, name)


@_activate.register_fake
def _(x, name, backend):
    width = x.shape[-1] // 2 if get_activation(name).is_gated else x.shape[-1]
    return x.new_empty(*x.shape[:-1], width)


@define("cumo::activate_backward")
def _activate_backward(grad: Tensor, x: Tensor, name: str, backend: str) -> Tensor:
    return dispatch.implementation(backend, "activate_backward")(grad, x, name)


@_activate_backward.register_fake
def _(grad, x, name, backend):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, ctx.name, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return _activate_backward(grad, x, ctx.name, ctx.backend), None, None


_activate.register_autograd(_backward, setup_context=_save)


def activate(x: Tensor, name: str) -> Tensor:
    """Apply an activation, computed in fp32 inside.

    Args:
        x: (..., I), or (..., 2I) with the gate first when the activation is gated; float.
        name: a row of `cumo_kernels.ACTIVATIONS`, with its parameters if others than their defaults are
            wanted: "swiglu_oai(alpha=1.702,limit=7.0)"; with the word interleaved, columns of gate and up
            alternate: "swiglu_oai(limit=7.0,interleaved)".

    Returns:
        (..., I), dtype of `x`.

    Raises:
        ValueError: no activation has that name, `x` is not float, or a gated width is odd.
    """
    spelled, is_gated = resolve(name, "name")
    check_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if is_gated and x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension for {name} (gate and up), got {tuple(x.shape)}")
    return _activate(x, spelled, dispatch.choose("activate", x, with_backward=dispatch.trains(x)))
