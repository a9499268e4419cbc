"""scored_route: the op behind `route` for a given choice and for routers other than a plain softmax.

An op of its own, so that a backend without it refuses these calls only, and is verified for them apart.
"""

import numbers

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cumo_kernels import dispatch
from cumo_kernels.hostsync import values_at_hand
from cumo_kernels.ops.checks import (
    check_choice,
    check_count,
    check_device,
    check_float,
    check_shape,
    check_topk_indices,
    shown,
)
from cumo_kernels.ops.define import define
from cumo_kernels.ops.gate import backward_flops, empty_gradients, empty_plan, flops
from cumo_kernels.types import GROUP_SCORES, SCORES, Scoring, accumulate_dtype

LIMITS = 1e-30, 1e30  # of `scale`


@define("cumo::scored_route")
def scored_route(
    x: Tensor,
    gate_weight: Tensor | None,
    selection_bias: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
    scoring: str,
    topk_indices: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dispatch.implementation(backend, "scored_route")(
        x, gate_weight, selection_bias, group_offsets, num_groups, top_k, renormalize, scoring, topk_indices
    )


@scored_route.register_fake
def _(
    x, gate_weight, selection_bias, group_offsets, num_groups, top_k, renormalize, scoring, topk_indices,
    backend,
):  # fmt: skip
    return empty_plan(x, gate_weight, num_groups, top_k)


@define("cumo::scored_route_backward")
def _scored_route_backward(
    grad_weights: Tensor,
    grad_mean_probs: Tensor,
    grad_z: Tensor,
    x: Tensor,
    gate_weight: Tensor | None,
    topk_indices: Tensor,
    group_offsets: Tensor | None,
    renormalize: bool,
    need_x: bool,
    need_gate: bool,
    scoring: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(backend, "scored_route_backward")(
        grad_weights,
        grad_mean_probs,
        grad_z,
        x,
        gate_weight,
        topk_indices,
        group_offsets,
        renormalize,
        need_x,
        need_gate,
        scoring,
    )


@_scored_route_backward.register_fake
def _(
    grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets, renormalize, need_x,
    need_gate, scoring, backend,
):  # fmt: skip
    return empty_gradients(x, gate_weight, need_x, need_gate)


def _save(ctx, inputs, output):
    x, gate_weight, _, group_offsets, _, _, ctx.renormalize, ctx.scoring, _, ctx.backend = inputs
    _, topk_indices, _, top1_density, _ = output
    ctx.save_for_backward(x, gate_weight, topk_indices, group_offsets)
    ctx.mark_non_differentiable(topk_indices, top1_density)


def _backward(ctx, grad_weights, _indices, grad_mean_probs, _density, grad_z):
    x, gate_weight, topk_indices, group_offsets = ctx.saved_tensors
    need_x, need_gate = ctx.needs_input_grad[:2]
    dx, dgate = _scored_route_backward(
        grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets, ctx.renormalize,
        need_x, need_gate, ctx.scoring, ctx.backend,
    )  # fmt: skip
    return dx if need_x else None, dgate if need_gate else None, *[None] * 8


scored_route.register_autograd(_backward, setup_context=_save)


register_flop_formula(torch.ops.cumo.scored_route)(flops)
register_flop_formula(torch.ops.cumo.scored_route_backward)(backward_flops)


def check_scoring(
    num_experts: int,
    top_k: int,
    score: str,
    expert_groups: int,
    top_groups: int | None,
    group_score: str,
    scale: float,
) -> Scoring:
    """The arguments of `route` of the same names, checked; groups that exclude no expert become one group."""
    check_choice("score", score, SCORES)
    check_choice("group_score", group_score, GROUP_SCORES)
    expert_groups = check_count("expert_groups", expert_groups)
    if num_experts % expert_groups:
        raise ValueError(f"expert_groups must divide the {num_experts} experts evenly, got {expert_groups}")
    size = num_experts // expert_groups
    if group_score == "top2" and expert_groups > 1 and size < 2:
        raise ValueError(f"group_score must be 'max' for groups of one expert, got {group_score!r}")
    top_groups = expert_groups if top_groups is None else check_count("top_groups", top_groups)
    if top_groups > expert_groups:
        raise ValueError(f"top_groups must be at most the {expert_groups} expert_groups, got {top_groups}")
    if top_groups * size < top_k:
        raise ValueError(
            f"top_groups must hold the {top_k} experts of a token, got {top_groups} groups of {size} experts"
        )
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
        raise ValueError(f"scale must be a number, got {shown(scale)}")
    if not LIMITS[0] <= scale <= LIMITS[1]:  # else weights overflow or vanish in fp32
        raise ValueError(f"scale must be between {LIMITS[0]} and {LIMITS[1]}, got {scale}")
    if top_groups == expert_groups:
        return Scoring(score, scale=float(scale))
    return Scoring(score, expert_groups, top_groups, group_score, float(scale))


def check_selection_bias(bias: Tensor, num_experts: int, x: Tensor) -> Tensor:
    """The bias (E,) as the backends read it: without gradient, contiguous, in the dtype of the scores."""
    check_shape("selection_bias", bias, num_experts)
    check_float("selection_bias", bias)
    check_device("selection_bias", bias, "x", x)
    used = bias.detach().to(accumulate_dtype(x.dtype)).contiguous()
    if values_at_hand(used) and not used.isfinite().all():
        raise ValueError(f"selection_bias must be finite in {used.dtype}, got {bias.tolist()}")
    return used


def check_given(
    topk_indices: Tensor,
    num_experts: int,
    top_k: int,
    x: Tensor,
    *,
    compat: str | None,
    selection_bias: Tensor | None,
    expert_groups: int,
) -> Tensor:
    """The given choice (T, K) as the backends read it: contiguous int32; and nothing else chooses."""
    check_shape("topk_indices", topk_indices, x.shape[0], top_k)
    check_topk_indices(topk_indices, num_experts, "x", x)
    if top_k > 1 and values_at_hand(topk_indices):
        ordered = topk_indices.sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < num_experts)
        if twice.any():
            token = int(twice.any(1).nonzero()[0])
            raise ValueError(
                f"topk_indices must name an expert once in a row, got {topk_indices[token].tolist()} "
                f"for token {token}"
            )
    if expert_groups != 1:
        raise ValueError(f"expert_groups must be 1 where topk_indices choose, got {expert_groups}")
    for name, value in (("compat", compat), ("selection_bias", selection_bias)):
        if value is not None:
            raise ValueError(f"{name} must be None where topk_indices choose, got {shown(value)}")
    return topk_indices.int().contiguous()
