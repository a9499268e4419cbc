"""adapted_expert_mlp: the expert layer over weights that may be packed in 4 bits and may have adapters.

One autograd node, as expert_mlp, whose public function calls it. With adapters each of the two layers is

    x W^T + u V^T        u = x A^T is (S, R), thin; V is scaling * B

so that W + scaling * B A is never formed, neither forward nor backward.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cumo_kernels import dispatch
from cumo_kernels.ops.define import define

# positions of the inputs whose gradients backward returns, in its order
TRAINABLE = (0, 1, 5, 8, 11, 12, 13, 14, 15, 16)
NUM_INPUTS = 22


@define("cumo::adapted_expert_mlp")
def _adapted_expert_mlp(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    up_scales: Tensor | None,
    up_zeros: Tensor | None,
    down_proj: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_format: str | None,
    down_format: str | None,
    activation: str,
    memory: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dispatch.implementation(backend, "adapted_expert_mlp")(
        x,
        topk_weights,
        permutation,
        inverse_permutation,
        expert_offsets,
        up_proj,
        up_scales,
        up_zeros,
        down_proj,
        down_scales,
        down_zeros,
        up_bias,
        down_bias,
        up_a,
        up_b,
        down_a,
        down_b,
        up_format,
        down_format,
        activation,
        memory,
    )


def _shape(weight: Tensor, format: str | None) -> tuple[int, int, int]:
    """(E, N, K) of a weight, packed or plain."""
    experts, rows, columns = weight.shape
    return experts, rows, columns if format is None else 2 * columns


@_adapted_expert_mlp.register_fake
def _(
    x, topk_weights, permutation, inverse_permutation, expert_offsets, up_proj, up_scales, up_zeros,
    down_proj, down_scales, down_zeros, up_bias, down_bias, up_a, up_b, down_a, down_b, up_format,
    down_format, activation, memory, backend,
):  # fmt: skip
    num_slots = permutation.shape[0]
    width = _shape(down_proj, down_format)[2]

    def rows(columns: int | None, kept: bool) -> Tensor:
        return x.new_empty(num_slots, columns) if kept and columns is not None else x.new_empty(0)

    trains = memory != "none"
    return (
        x.new_empty(x.shape[0], down_proj.shape[1]),
        rows(up_proj.shape[1], memory in ("preact", "all")),
        rows(width, memory == "all"),
        rows(None if up_a is None else up_a.shape[1], trains),
        rows(None if down_a is None else down_a.shape[1], trains),
    )


@define("cumo::adapted_expert_mlp_backward")
def _adapted_expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    up_scales: Tensor | None,
    up_zeros: Tensor | None,
    down_proj: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    z: Tensor,
    a: Tensor,
    u: Tensor,
    v: Tensor,
    up_format: str | None,
    down_format: str | None,
    activation: str,
    memory: str,
    needs: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dispatch.implementation(backend, "adapted_expert_mlp_backward")(
        grad,
        x,
        topk_weights,
        permutation,
        inverse_permutation,
        expert_offsets,
        up_proj,
        up_scales,
        up_zeros,
        down_proj,
        down_scales,
        down_zeros,
        up_bias,
        down_bias,
        up_a,
        up_b,
        down_a,
        down_b,
        z,
        a,
        u,
        v,
        up_format,
        down_format,
        activation,
        memory,
        needs,
    )


@_adapted_expert_mlp_backward.register_fake
def _(
    grad, x, topk_weights, permutation, inverse_permutation, expert_offsets, up_proj, up_scales, up_zeros,
    down_proj, down_scales, down_zeros, up_bias, down_bias, up_a, up_b, down_a, down_b, z, a, u, v, up_format,
    down_format, activation, memory, needs, backend,
):  # fmt: skip
    given = (x, topk_weights, up_proj, down_proj, up_bias, down_bias, up_a, up_b, down_a, down_b)
    return tuple(
        x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape if need == "1" else 0)
        for tensor, need in zip(given, needs, strict=True)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.up_format, ctx.down_format, ctx.activation, ctx.memory, ctx.backend = inputs
    kept = output[1:]
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    given = [None] * NUM_INPUTS
    if grad is None:
        return tuple(given)
    needs = "".join("1" if ctx.needs_input_grad[i] else "0" for i in TRAINABLE)
    found = _adapted_expert_mlp_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.up_format, ctx.down_format, ctx.activation, ctx.memory,
        needs, ctx.backend,
    )  # fmt: skip
    for position, need, gradient in zip(TRAINABLE, needs, found, strict=True):
        given[position] = gradient if need == "1" else None
    return tuple(given)


_adapted_expert_mlp.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.cumo.adapted_expert_mlp)
def _flops(*shapes, out_shape=None, **kwargs):
    """2 * S * (rows of up_proj * H + O * I), and of every adapter 2 * S * R * (rows + columns)."""
    x, topk_weights, up_proj, down_proj = shapes[0], shapes[1], shapes[5], shapes[8]
    rows, out_width = up_proj[1], down_proj[1]
    inner = down_proj[2] * (1 if shapes[9] is None else 2)
    total = rows * x[1] + out_width * inner
    for a, columns, width in ((shapes[13], x[1], rows), (shapes[15], inner, out_width)):
        total += 0 if a is None else a[1] * (columns + width)
    return 2 * math.prod(topk_weights) * total


@register_flop_formula(torch.ops.cumo.adapted_expert_mlp_backward)
def _flops_backward(*shapes, out_shape=None, **kwargs):
    """That of the forward: frozen weights get no gradient; the gradients of adapters are not counted."""
    return _flops(*shapes[1:18])
