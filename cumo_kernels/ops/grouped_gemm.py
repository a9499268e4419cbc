"""grouped_gemm: the rows of every expert times that expert's weight; the number of rows varies by expert.

The gradient of the input is the same op with transposed weights. The gradient of weight and bias is the
k-grouped form, in which the reduction runs over an expert's rows. A weight that is packed in 4 bits has an op
of its own, whose gradient of the input is itself, with the weight read in the other direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cumo_kernels import dispatch
from cumo_kernels.activations import get_activation, resolve
from cumo_kernels.ops.activation import _activate_backward, activate
from cumo_kernels.ops.adapters import check_adapters, drops, joined
from cumo_kernels.ops.checks import (
    autocast,
    check_device,
    check_float,
    check_int32,
    check_like,
    check_offsets,
    check_optional,
    check_routing,
    check_shape,
    check_tensor,
)
from cumo_kernels.ops.define import define
from cumo_kernels.ops.permutation import _combine, permute
from cumo_kernels.packing.tensor import PackedWeight
from cumo_kernels.types import Adapter, Routing


@define("cumo::grouped_gemm")
def _grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(backend, "grouped_gemm")(
        x, weight, expert_offsets, bias, permutation, inverse_permutation, top_k, activation
    )


@_grouped_gemm.register_fake
def _(x, weight, expert_offsets, bias, permutation, inverse_permutation, top_k, activation, backend):
    num_rows = x.shape[0] if permutation is None else permutation.shape[0]
    width = weight.shape[1]
    if activation is None:
        return x.new_empty(num_rows, width), x.new_empty(0)
    out_width = width // 2 if get_activation(activation).is_gated else width
    return x.new_empty(num_rows, out_width), x.new_empty(num_rows, width)


@define("cumo::grouped_gemm_weight_grad")
def _grouped_gemm_weight_grad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(backend, "grouped_gemm_weight_grad")(
        grad, x, expert_offsets, permutation, inverse_permutation, top_k, need_bias
    )


@_grouped_gemm_weight_grad.register_fake
def _(grad, x, expert_offsets, permutation, inverse_permutation, top_k, need_bias, backend):
    num_experts = expert_offsets.shape[0] - 1
    width = grad.shape[1]
    bias = grad.new_empty(num_experts, width) if need_bias else grad.new_empty(0)
    return grad.new_empty(num_experts, width, x.shape[1]), bias


def _save(ctx, inputs, output):
    x, weight, expert_offsets, _, permutation, inverse_permutation, top_k, activation, backend = inputs
    pre_activation = output[1]
    ctx.top_k, ctx.activation, ctx.backend = top_k, activation, backend
    ctx.save_for_backward(x, weight, expert_offsets, permutation, inverse_permutation, pre_activation)
    ctx.mark_non_differentiable(pre_activation)
    ctx.set_materialize_grads(False)  # else autograd allocates zeros of its size, which are never read


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    x, weight, expert_offsets, permutation, inverse_permutation, pre_activation = ctx.saved_tensors
    need_x, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    if ctx.activation is not None:
        grad = _activate_backward(grad, pre_activation, ctx.activation, ctx.backend)
    dx = dweight = dbias = None
    if need_x:
        dx, _ = _grouped_gemm(
            grad, weight.transpose(1, 2), expert_offsets, None, None, None, 1, None, ctx.backend
        )
        if permutation is not None:
            dx = _combine(dx, None, permutation, inverse_permutation, ctx.top_k, ctx.backend)
    if need_weight or need_bias:
        # only the bias: with the smallest weight gradient that a backend can compute
        columns = x if need_weight else x[:, :1]
        dweight, dbias = _grouped_gemm_weight_grad(
            grad, columns, expert_offsets, permutation, inverse_permutation, ctx.top_k, need_bias, ctx.backend
        )
    dweight, dbias = dweight if need_weight else None, dbias if need_bias else None
    return dx, dweight, None, dbias, None, None, None, None, None


_grouped_gemm.register_autograd(_backward, setup_context=_save)


@define("cumo::packed_grouped_gemm")
def _packed_grouped_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    is_transposed: bool,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(backend, "packed_grouped_gemm")(
        x,
        packed,
        scales,
        zeros,
        format,
        is_transposed,
        expert_offsets,
        bias,
        permutation,
        inverse_permutation,
        top_k,
        activation,
    )


@_packed_grouped_gemm.register_fake
def _(
    x, packed, scales, zeros, format, is_transposed, expert_offsets, bias, permutation, inverse_permutation,
    top_k, activation, backend,
):  # fmt: skip
    num_rows = x.shape[0] if permutation is None else permutation.shape[0]
    width = 2 * packed.shape[2] if is_transposed else packed.shape[1]
    if activation is None:
        return x.new_empty(num_rows, width), x.new_empty(0)
    out_width = width // 2 if get_activation(activation).is_gated else width
    return x.new_empty(num_rows, out_width), x.new_empty(num_rows, width)


def _save_packed(ctx, inputs, output):
    _, packed, scales, zeros, ctx.format, ctx.is_transposed, expert_offsets, _, *rest = inputs
    permutation, inverse_permutation, ctx.top_k, ctx.activation, ctx.backend = rest
    ctx.save_for_backward(packed, scales, zeros, expert_offsets, permutation, inverse_permutation, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _packed_backward(ctx, grad, _):
    nothing = (None,) * 13
    if grad is None:
        return nothing
    packed, scales, zeros, expert_offsets, permutation, inverse_permutation, pre_activation = (
        ctx.saved_tensors
    )
    need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    if ctx.activation is not None:
        grad = _activate_backward(grad, pre_activation, ctx.activation, ctx.backend)
    dx = dbias = None
    if need_x:
        dx, _ = _packed_grouped_gemm(
            grad, packed, scales, zeros, ctx.format, not ctx.is_transposed, expert_offsets, None, None,
            None, 1, None, ctx.backend,
        )  # fmt: skip
        if permutation is not None:
            dx = _combine(dx, None, permutation, inverse_permutation, ctx.top_k, ctx.backend)
    if need_bias:
        _, dbias = _grouped_gemm_weight_grad(
            grad, grad[:, :1], expert_offsets, None, None, 1, True, ctx.backend
        )
    return dx, *nothing[:6], dbias, *nothing[:5]


_packed_grouped_gemm.register_autograd(_packed_backward, setup_context=_save_packed)


def check_packed(name: str, weight: PackedWeight, x: Tensor) -> None:
    """`weight` is on the device of `x`, and is not to be trained."""
    check_device(name, weight, "x", x)
    if weight.requires_grad:
        raise ValueError(f"{name} must not require a gradient: weights in 4 bits are frozen")


def _low_rank(x: Tensor, adapters: Sequence[Adapter], offsets: Tensor, gather: Routing | None) -> Tensor:
    """The sum of what the adapters add, (S, N), of rows that are dropped differently for each."""
    if not drops(adapters):
        a, b = joined(adapters, x.dtype)
        return grouped_gemm(grouped_gemm(x, a, offsets, gather=gather), b, offsets)
    rows, total = x if gather is None else permute(x, gather), None
    for adapter in adapters:
        kept = torch.nn.functional.dropout(rows, adapter.dropout)
        a, b = joined([adapter], x.dtype)
        added = grouped_gemm(grouped_gemm(kept, a, offsets), b, offsets)
        total = added if total is None else total + added
    return total


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    gather: Routing | None = None,
    activation: str | None = None,
    adapters: Sequence[Adapter] = (),
) -> Tensor:
    """act(x[p] @ weight[e].T + bias[e]) for the rows p of every expert e.

    Args:
        x: (S, K) float rows in expert order, or (T, K) in token order when `gather` is given.
        weight: (E, N, K), as E stacked torch.nn.Linear weights; for a gated activation N is 2I, gate first.
            Or a PackedWeight, which is dequantised to the dtype of `x` and gets no gradient.
        expert_offsets: (E + 1,) int32, starts with 0; expert e owns rows [offsets[e], offsets[e + 1]).
            Rows past the last offset give zeros.
        bias: (E, N).
        gather: take row p from x[gather.permutation[p] // top_k] instead of a permuted copy.
        activation: name from `cumo_kernels.ACTIVATIONS`, with parameters as in `activate`, applied after
            the bias.
        adapters: low-rank additions to the weight; computed in the dtype of `x`.

    Returns:
        (S, N), or (S, N / 2) for a gated activation; dtype of `x`, or autocast's.

    Raises:
        ValueError: a shape, dtype or device is wrong, or, on the CPU, the offsets do not ascend from 0
            to at most S; the message names the argument.
    """
    check_float("x", x)
    check_tensor("weight", weight)
    check_optional("bias", bias)
    if gather is not None:
        check_routing("gather", gather)
    is_packed = isinstance(weight, PackedWeight)
    if is_packed:
        x, bias = autocast(x, bias)
    else:
        x, weight, bias = autocast(x, weight, bias)
    check_shape("x", x, "S" if gather is None else gather.num_tokens, "K")
    check_shape("weight", weight, "E", "N", x.shape[1])
    if is_packed:
        check_packed("weight", weight, x)
    else:
        check_like("weight", weight, "x", x)
    check_shape("expert_offsets", expert_offsets, weight.shape[0] + 1)
    check_int32("expert_offsets", expert_offsets)
    check_device("expert_offsets", expert_offsets, "x", x)
    rows = x.shape[0] if gather is None else gather.num_slots
    check_offsets("expert_offsets", expert_offsets, rows, first=0)
    expert_offsets = expert_offsets.contiguous()
    if bias is not None:
        check_shape("bias", bias, weight.shape[0], weight.shape[1])
        check_like("bias", bias, "x", x)
    if activation is not None:
        activation, is_gated = resolve(activation)
        if is_gated and weight.shape[1] % 2:
            raise ValueError(f"weight must be (E, 2I, K) for {activation}, got {tuple(weight.shape)}")
    check_adapters("adapters", adapters, x, *weight.shape)
    if adapters:
        z = grouped_gemm(x, weight, expert_offsets, bias=bias, gather=gather)
        z = z + _low_rank(x, adapters, expert_offsets, gather)
        return z if activation is None else activate(z, activation)
    permutation, inverse_permutation, top_k = None, None, 1
    if gather is not None:
        check_device("gather", gather.permutation, "x", x)
        permutation, inverse_permutation, top_k = gather.permutation, gather.inverse_permutation, gather.top_k
    rest = (expert_offsets, bias, permutation, inverse_permutation, top_k, activation)
    if is_packed:
        has_backward = dispatch.trains(x, bias)
        backend = dispatch.choose("packed_grouped_gemm", x, weight.shape[0], has_backward)
        out, _ = _packed_grouped_gemm(x, *weight.parts(), weight.format, weight.is_transposed, *rest, backend)
        return out
    has_backward = dispatch.trains(x, weight, bias)
    backend = dispatch.choose("grouped_gemm", x, weight.shape[0], has_backward)
    out, _ = _grouped_gemm(x, weight, *rest, backend)
    return out
