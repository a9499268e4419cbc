"""permute and combine: from token order to expert order and back; each is the adjoint of the other."""

from torch import Tensor

from cumo_kernels import dispatch
from cumo_kernels.ops.checks import check_bool, check_device, check_float, check_routing, check_shape
from cumo_kernels.ops.define import define
from cumo_kernels.types import Routing


@define("cumo::permute")
def _permute(x: Tensor, permutation: Tensor, inverse_permutation: Tensor, top_k: int, backend: str) -> Tensor:
    return dispatch.implementation(backend, "permute")(x, permutation, inverse_permutation, top_k)


@_permute.register_fake
def _(x, permutation, inverse_permutation, top_k, backend):
    return x.new_empty(permutation.shape[0], x.shape[1])


def _save_permute(ctx, inputs, output):
    _, permutation, inverse_permutation, ctx.top_k, ctx.backend = inputs
    ctx.save_for_backward(permutation, inverse_permutation)


def _permute_backward(ctx, grad):
    # adjoint of a gather: sum each token's slots, i.e. combine with unit weights
    permutation, inverse_permutation = ctx.saved_tensors
    dx = _combine(grad, None, permutation, inverse_permutation, ctx.top_k, ctx.backend)
    return dx, None, None, None, None


_permute.register_autograd(_permute_backward, setup_context=_save_permute)


@define("cumo::combine")
def _combine(
    rows: Tensor,
    topk_weights: Tensor | None,
    permutation: Tensor,
    inverse_permutation: Tensor,
    top_k: int,
    backend: str,
) -> Tensor:
    return dispatch.implementation(backend, "combine")(rows, topk_weights, inverse_permutation, top_k)


@_combine.register_fake
def _(rows, topk_weights, permutation, inverse_permutation, top_k, backend):
    return rows.new_empty(inverse_permutation.shape[0] // top_k, rows.shape[1])


@define("cumo::combine_backward")
def _combine_backward(
    grad: Tensor,
    rows: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(backend, "combine_backward")(
        grad, rows, topk_weights, permutation, inverse_permutation
    )


@_combine_backward.register_fake
def _(grad, rows, topk_weights, permutation, inverse_permutation, backend):
    return rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape)


def _save_combine(ctx, inputs, output):
    rows, topk_weights, permutation, inverse_permutation, ctx.top_k, ctx.backend = inputs
    ctx.save_for_backward(
        None if topk_weights is None else rows, topk_weights, permutation, inverse_permutation
    )


def _combine_vjp(ctx, grad):
    rows, topk_weights, permutation, inverse_permutation = ctx.saved_tensors
    if topk_weights is None:
        drows, dweights = _permute(grad, permutation, inverse_permutation, ctx.top_k, ctx.backend), None
    else:
        drows, dweights = _combine_backward(
            grad, rows, topk_weights, permutation, inverse_permutation, ctx.backend
        )
    return drows, dweights, None, None, None, None


_combine.register_autograd(_combine_vjp, setup_context=_save_combine)


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Copy token rows into expert order.

    Args:
        x: (T, H) float tensor.
        routing: plan for these T tokens, from `route` or `routing_from_topk`.

    Returns:
        (S, H), dtype of `x`; expert e owns rows [expert_offsets[e], expert_offsets[e + 1]). Rows of
        dropped slots, past the last expert, are zero.

    Raises:
        ValueError: `x` is not float (T, H) for this plan, or `routing` is no plan.
    """
    check_float("x", x)
    check_routing("routing", routing)
    check_shape("x", x, routing.num_tokens, "H")
    check_device("routing", routing.permutation, "x", x)
    backend = dispatch.choose("permute", x, with_backward=dispatch.trains(x))
    return _permute(x, routing.permutation, routing.inverse_permutation, routing.top_k, backend)


def combine(rows: Tensor, routing: Routing, *, weighted: bool = True) -> Tensor:
    """Sum every token's rows, weighted by its routing weights; a gather in fixed order, hence deterministic.

    Args:
        rows: (S, H) float tensor in expert order.
        routing: the plan that made that order.
        weighted: False sums with unit weights, the adjoint of `permute`.

    Returns:
        (T, H), dtype of `rows`, accumulated in fp32.

    Raises:
        ValueError: `rows` is not float (S, H) for this plan, or `routing` is no plan.
    """
    check_float("rows", rows)
    check_routing("routing", routing)
    check_bool("weighted", weighted)
    check_shape("rows", rows, routing.num_slots, "H")
    check_device("routing", routing.permutation, "rows", rows)
    weights = routing.topk_weights if weighted else None
    backend = dispatch.choose("combine", rows, with_backward=dispatch.trains(rows, weights))
    return _combine(rows, weights, routing.permutation, routing.inverse_permutation, routing.top_k, backend)
