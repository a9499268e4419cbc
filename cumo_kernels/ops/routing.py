"""route: from router logits to a routing plan with the statistics the auxiliary losses need."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cumo_kernels import dispatch
from cumo_kernels.hostsync import values_at_hand
from cumo_kernels.ops.capacity import DROPS, within
from cumo_kernels.ops.checks import (
    autocast,
    check_bool,
    check_choice,
    check_count,
    check_device,
    check_float,
    check_int,
    check_int32,
    check_offsets,
    check_optional,
    check_routing,
    check_shape,
    check_top_k,
    check_topk_indices,
    shown,
)
from cumo_kernels.ops.define import define
from cumo_kernels.ops.forward_mode import refuse_forward_mode
from cumo_kernels.ops.gate import backward_flops, empty_gradients, empty_plan, flops
from cumo_kernels.ops.noise import check_seed, check_share, jittered
from cumo_kernels.ops.scores import check_given, check_scoring, check_selection_bias, scored_route
from cumo_kernels.types import RouterStats, Routing, Scoring, accumulate_dtype

_PLAIN = ("softmax", 1, None, "max", 1)  # score, expert_groups, top_groups, group_score, scale
COMPAT = (None, "cumo", "cumo_llm")


@define("cumo::route")
def _route(
    x: Tensor,
    gate_weight: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
    compat: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (x, gate_weight, group_offsets, num_groups, top_k, renormalize)
    if compat is not None:  # torch.topk's own order of ties, which no kernel reproduces
        return dispatch.implementation("torch", "route")(*arguments, compat)
    return dispatch.implementation(backend, "route")(*arguments)


@_route.register_fake
def _(x, gate_weight, group_offsets, num_groups, top_k, renormalize, compat, backend):
    return empty_plan(x, gate_weight, num_groups, top_k)


@define("cumo::route_backward")
def _route_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(backend, "route_backward")(
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
    )


@_route_backward.register_fake
def _(
    grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets, renormalize, need_x,
    need_gate, backend,
):  # fmt: skip
    return empty_gradients(x, gate_weight, need_x, need_gate)


def _save(ctx, inputs, output):
    x, gate_weight, group_offsets, _, _, ctx.renormalize, _, ctx.backend = inputs
    _, topk_indices, _, top1_density, _ = output
    ctx.save_for_backward(x, gate_weight, topk_indices, group_offsets)
    ctx.mark_non_differentiable(topk_indices, top1_density)


def _backward(ctx, grad_weights, _indices, grad_mean_probs, _density, grad_z):
    x, gate_weight, topk_indices, group_offsets = ctx.saved_tensors
    need_x, need_gate = ctx.needs_input_grad[:2]
    dx, dgate = _route_backward(
        grad_weights,
        grad_mean_probs,
        grad_z,
        x,
        gate_weight,
        topk_indices,
        group_offsets,
        ctx.renormalize,
        need_x,
        need_gate,
        ctx.backend,
    )
    return dx if need_x else None, dgate if need_gate else None, None, None, None, None, None, None


_route.register_autograd(_backward, setup_context=_save)


register_flop_formula(torch.ops.cumo.route)(flops)
register_flop_formula(torch.ops.cumo.route_backward)(backward_flops)


@define("cumo::sort_by_expert")
def _sort_by_expert(
    topk_indices: Tensor, num_experts: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dispatch.implementation(backend, "sort_by_expert")(topk_indices, num_experts)


@_sort_by_expert.register_fake
def _(topk_indices, num_experts, backend):
    new, num_slots = topk_indices.new_empty, topk_indices.numel()
    return new(num_experts), new(num_experts + 1), new(num_slots), new(num_slots)


def _check_groups(groups: int | Tensor, num_tokens: int, x: Tensor) -> tuple[Tensor | None, int]:
    if isinstance(groups, Tensor):
        check_shape("groups", groups, "G+1")
        check_int32("groups", groups)
        check_device("groups", groups, "x", x)
        if groups.shape[0] < 2:
            raise ValueError(
                f"groups must hold the G + 1 offsets of at least one group, got {tuple(groups.shape)}"
            )
        check_offsets("groups", groups, num_tokens)
        return groups.contiguous(), groups.shape[0] - 1
    groups = check_int("groups", groups, also=" or an int32 tensor")
    if groups < 1 or num_tokens % groups:
        raise ValueError(f"groups must divide the {num_tokens} tokens evenly, got {groups}")
    return None, groups


def route(
    x: Tensor,
    top_k: int,
    gate_weight: Tensor | None = None,
    *,
    groups: int | Tensor = 1,
    renormalize: bool = True,
    compat: str | None = None,
    score: str = "softmax",
    selection_bias: Tensor | None = None,
    expert_groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "max",
    scale: float = 1,  # an int: a compiler takes a float for a variable
    capacity: int | None = None,
    drop: str = "position",
    jitter: float = 0,
    seed: int | Tensor | None = None,
    topk_indices: Tensor | None = None,
) -> Routing:
    """Scores, top-k, weights, loss statistics, and the stable sort of slots by expert.

    By default softmax and weights that sum to 1, as the code of CuMo computes section 3.1 of its paper (arXiv
    2405.05949). Ties go to the lowest expert index; with `compat`, to the one that torch.topk chooses on this
    device.

    Args:
        x: (T, E) router logits, or (T, H) hidden states when `gate_weight` is given.
        top_k: experts per token, 1 <= top_k <= E.
        gate_weight: (E, H) float; logits are x @ gate_weight.T. If its dtype is not that of `x`, such as an
            fp32 gate in a bf16 model, torch computes the logits in the wider of the two (fp32 for bf16 and
            fp16), and the kernels start from them.
        groups: the sets of tokens over which a balance loss averages. An int G: G equal runs of consecutive
            tokens (crops, images). A (G + 1,) int32 tensor of offsets: runs of any length; tokens outside
            all runs are not counted.
        renormalize: divide each token's weights by their sum.
        compat: None computes in fp32; "cumo" repeats the original's rounding in CLIP and connector,
            "cumo_llm" that in Mixtral. Both choose and round with torch's own operators under every backend;
            the backend then sorts and computes the gradients.
        score: "softmax", "sigmoid" (DeepSeek-V3, arXiv 2412.19437 section 2.1.2) or "sqrtsoftplus", the root
            of softplus(logits). The last two are divided by their sum + 1e-20 for `mean_probs`, and for the
            weights if `renormalize`.
        selection_bias: (E,) float, finite: experts are chosen by score + bias, and weighed by the score alone
            (balancing without a loss, arXiv 2408.15664). It gets no gradient. Scores and bias are added in
            fp32, so that a backend may choose another expert where two sums differ by a rounding.
        expert_groups: runs of E / expert_groups consecutive experts (devices of DeepSeek-V2 and V3); not the
            sets of tokens `groups`.
        top_groups: groups from which a token's experts are chosen, by their score + bias; ties to the lowest
            group. None: all of them.
        group_score: of a group's score + bias: "max", or "top2" for the sum of the two largest.
        scale: a factor of the weights, after `renormalize`, between 1e-30 and 1e30.
        capacity: slots that an expert keeps, and `drop` which go first, as in `with_capacity`.
        drop: "position" or "weight".
        jitter: each element of `x` is multiplied by a number in (1 - jitter, 1 + jitter) before the gate
            (Switch Transformers, arXiv 2101.03961); pass 0 outside of training. The product is rounded to the
            dtype of `x`, so that in bf16 a jitter below 2^-9 has no effect.
        seed: of the jitter, an int or a () int64 tensor; the noise depends on it, the token's row and the
            column only.
        topk_indices: (T, K) int32 or int64 in [0, E]: the experts of each token, each at most once, where
            another pass or another engine has chosen; E drops a slot. Nothing is chosen then: the weights
            are the scores of these experts, and 0 for E. With the experts that `route` would choose the
            result is the same, bit for bit. Excludes `compat`, `selection_bias` and `expert_groups`.

    Returns:
        Routing with `stats`. Weights and statistics are fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: a shape, dtype or value is wrong. On the CPU also when a row of logits has no finite
            maximum (NaN, +inf, or only -inf); on a GPU such a row yields NaN weights instead of a sync.
    """
    check_float("x", x)
    check_optional("gate_weight", gate_weight)
    check_bool("renormalize", renormalize)
    check_choice("compat", compat, COMPAT)
    check_choice("drop", drop, DROPS)
    if seed is not None:
        check_seed(seed)
    numbers = {"scale": scale, "jitter": jitter, "expert_groups": expert_groups, "top_groups": top_groups}
    for name, value in numbers.items():  # before any comparison, which of an array is one
        if isinstance(value, Tensor | np.ndarray):
            raise ValueError(f"{name} must be a number, got {shown(value)}")
    trains = dispatch.trains(x, gate_weight)
    if jitter != 0:
        check_share("jitter", jitter)
        if gate_weight is None:
            raise ValueError(f"jitter must be 0 without a gate_weight, whose input it changes, got {jitter}")
        check_shape("x", x, "T", "H")
        x = jittered(x, jitter, check_seed(seed))
    if gate_weight is None:
        check_shape("x", x, "T", "E")
        num_experts = x.shape[1]
    else:
        x, gate_weight = autocast(x, gate_weight)
        check_shape("x", x, "T", "H")
        check_shape("gate_weight", gate_weight, "E", x.shape[1])
        check_float("gate_weight", gate_weight)
        check_device("gate_weight", gate_weight, "x", x)
        num_experts = gate_weight.shape[0]
        if gate_weight.dtype != x.dtype:  # kernels read one dtype
            wide = torch.promote_types(x.dtype, gate_weight.dtype)
            x, gate_weight = x.to(wide) @ gate_weight.to(wide).T, None
    top_k = check_top_k(top_k, num_experts)
    group_offsets, num_groups = _check_groups(groups, x.shape[0], x)
    check_optional("selection_bias", selection_bias)
    how = (score, expert_groups, top_groups, group_score, scale)
    is_plain = how == _PLAIN  # then nothing is checked, which would make guards of a graph
    check_optional("topk_indices", topk_indices)
    is_plain &= selection_bias is None and topk_indices is None
    scoring = None if is_plain else check_scoring(num_experts, top_k, *how)
    if scoring is None or (selection_bias is None and topk_indices is None and scoring == Scoring()):
        backend = dispatch.choose("route", x, num_experts, trains)
        found = _route(x, gate_weight, group_offsets, num_groups, top_k, renormalize, compat, backend)
    else:
        if topk_indices is not None:
            topk_indices = check_given(
                topk_indices, num_experts, top_k, x, compat=compat, selection_bias=selection_bias,
                expert_groups=expert_groups,
            )  # fmt: skip
        if compat is not None:
            raise ValueError(f"compat must be None unless a plain softmax chooses and weighs, got {compat!r}")
        bias = None if selection_bias is None else check_selection_bias(selection_bias, num_experts, x)
        backend = dispatch.choose("scored_route", x, num_experts, trains)
        found = scored_route(
            x, gate_weight, bias, group_offsets, num_groups, top_k, renormalize, str(scoring), topk_indices,
            backend,
        )  # fmt: skip
    weights, indices, mean_probs, top1_density, z = found
    if values_at_hand(weights) and not weights.isfinite().all():
        token = int((~weights.detach().isfinite()).any(1).nonzero()[0])
        logits = x[token] if gate_weight is None else x[token] @ gate_weight.T
        raise ValueError(
            f"router logits must have a finite maximum in every row, got {logits.tolist()} for token {token}"
        )
    stats = RouterStats(mean_probs, top1_density, z)
    routing = Routing(weights, indices, *_sort_by_expert(indices, num_experts, backend), stats)
    return routing if capacity is None else with_capacity(routing, capacity, drop)


def with_capacity(routing: Routing, capacity: int, drop: str = "position") -> Routing:
    """`routing` in which every expert keeps at most `capacity` slots; the others are dropped.

    A dropped slot has expert index E and weight 0, and gives no gradient. The weights of the other slots of
    its token stay as they are. The statistics stay those before the drop.

    Args:
        routing: a plan of `route` or `routing_from_topk`; slots may already be dropped.
        capacity: slots that an expert keeps.
        drop: which go first: "position", the last in order of tokens, or "weight", those of the smallest
            weight, and of equal ones the last.

    Raises:
        ValueError: an argument is wrong.
    """
    check_routing("routing", routing)
    capacity = check_count("capacity", capacity)
    check_choice("drop", drop, DROPS)
    refuse_forward_mode("with_capacity", routing.topk_weights)
    kept = within(routing, capacity, drop)
    indices = torch.where(kept, routing.topk_indices, routing.num_experts)
    weights = torch.where(kept, routing.topk_weights, 0.0)
    backend = dispatch.choose("sort_by_expert", weights, routing.num_experts)
    return Routing(weights, indices, *_sort_by_expert(indices, routing.num_experts, backend), routing.stats)


def routing_from_topk(topk_weights: Tensor, topk_indices: Tensor, num_experts: int) -> Routing:
    """The plan for experts that other code has chosen (a transformers router, a fixed assignment).

    Args:
        topk_weights: (T, K) float; gradients flow back into it.
        topk_indices: (T, K) integer expert ids in [0, E]; E itself drops the slot.
        num_experts: E.

    Returns:
        Routing without `stats`; weights in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape or dtype is wrong; on the CPU also an id outside [0, E].
    """
    check_float("topk_weights", topk_weights)
    check_shape("topk_weights", topk_weights, "T", "K")
    check_shape("topk_indices", topk_indices, *topk_weights.shape)
    num_experts = check_count("num_experts", num_experts)
    check_topk_indices(topk_indices, num_experts, "topk_weights", topk_weights)
    refuse_forward_mode("routing_from_topk", topk_weights)
    weights = topk_weights.to(accumulate_dtype(topk_weights.dtype))
    indices = topk_indices.int()
    backend = dispatch.choose("sort_by_expert", topk_weights, num_experts)
    return Routing(weights, indices, *_sort_by_expert(indices, num_experts, backend))
