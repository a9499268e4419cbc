"""expert_mlp: the whole expert layer as one autograd node with its own backward.

One node, so that a backend can fuse its steps, skip gradients that are not needed, and choose what to save.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cumo_kernels import dispatch
from cumo_kernels.activations import ACTIVATIONS, get_activation, resolve
from cumo_kernels.ops.activation import activate
from cumo_kernels.ops.adapted import _adapted_expert_mlp
from cumo_kernels.ops.adapters import check_adapters, drops, joined, tensors_of
from cumo_kernels.ops.checks import (
    autocast,
    check_bool,
    check_choice,
    check_device,
    check_float,
    check_like,
    check_optional,
    check_routing,
    check_shape,
    check_tensor,
)
from cumo_kernels.ops.define import define
from cumo_kernels.ops.grouped_gemm import check_packed, grouped_gemm
from cumo_kernels.ops.permutation import combine
from cumo_kernels.packing.tensor import PackedWeight
from cumo_kernels.types import Adapter, Routing

DEFAULT_ACTIVATION = "swiglu"
MEMORY_PLANS = ("x", "preact", "all")


@define("cumo::expert_mlp")
def _expert_mlp(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    memory: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.implementation(backend, "expert_mlp")(
        x,
        topk_weights,
        permutation,
        inverse_permutation,
        expert_offsets,
        up_proj,
        down_proj,
        up_bias,
        down_bias,
        activation,
        memory,
    )


@_expert_mlp.register_fake
def _(
    x, topk_weights, permutation, inverse_permutation, expert_offsets, up_proj, down_proj, up_bias, down_bias,
    activation, memory, backend,
):  # fmt: skip
    num_slots = permutation.shape[0]
    out = x.new_empty(x.shape[0], down_proj.shape[1])
    z = x.new_empty(num_slots, up_proj.shape[1]) if memory in ("preact", "all") else x.new_empty(0)
    a = x.new_empty(num_slots, down_proj.shape[2]) if memory == "all" else x.new_empty(0)
    return out, z, a


@define("cumo::expert_mlp_backward")
def _expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    z: Tensor,
    a: Tensor,
    activation: str,
    memory: str,
    need_x: bool,
    need_weights: bool,
    need_up: bool,
    need_up_bias: bool,
    need_down: bool,
    need_down_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return dispatch.implementation(backend, "expert_mlp_backward")(
        grad,
        x,
        topk_weights,
        permutation,
        inverse_permutation,
        expert_offsets,
        up_proj,
        down_proj,
        up_bias,
        down_bias,
        z,
        a,
        activation,
        memory,
        need_x,
        need_weights,
        need_up,
        need_up_bias,
        need_down,
        need_down_bias,
    )


@_expert_mlp_backward.register_fake
def _(
    grad, x, topk_weights, permutation, inverse_permutation, expert_offsets, up_proj, down_proj, up_bias,
    down_bias, z, a, activation, memory, need_x, need_weights, need_up, need_up_bias, need_down,
    need_down_bias, backend,
):  # fmt: skip
    def like(tensor, needed):
        return tensor.new_empty(tensor.shape) if needed and tensor is not None else x.new_empty(0)

    return (
        like(x, need_x),
        topk_weights.new_empty(topk_weights.shape if need_weights else 0),
        like(up_proj, need_up),
        like(up_bias, need_up_bias),
        like(down_proj, need_down),
        like(down_bias, need_down_bias),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.activation, ctx.memory, ctx.backend = inputs
    _, z, a = output
    ctx.save_for_backward(*tensors, z, a)
    ctx.mark_non_differentiable(z, a)
    ctx.set_materialize_grads(False)  # else autograd allocates zeros of the size of z, which are never read


def _backward(ctx, grad, _z, _a):
    if grad is None:
        return (None,) * 12
    x, topk_weights, permutation, inverse_permutation, expert_offsets, *rest = ctx.saved_tensors
    need_x, need_weights, _, _, _, need_up, need_down, need_up_bias, need_down_bias = ctx.needs_input_grad[:9]
    dx, dweights, dup, dup_bias, ddown, ddown_bias = _expert_mlp_backward(
        grad.contiguous(),
        x,
        topk_weights,
        permutation,
        inverse_permutation,
        expert_offsets,
        *rest,
        ctx.activation,
        ctx.memory,
        need_x,
        need_weights,
        need_up,
        need_up_bias,
        need_down,
        need_down_bias,
        ctx.backend,
    )
    return (
        dx if need_x else None,
        dweights if need_weights else None,
        None,
        None,
        None,
        dup if need_up else None,
        ddown if need_down else None,
        dup_bias if need_up_bias else None,
        ddown_bias if need_down_bias else None,
        None,
        None,
        None,
    )


_expert_mlp.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.cumo.expert_mlp)
def _flops(*shapes, out_shape=None, **kwargs):
    """2 * S * (rows of up_proj * H + O * I), so that torch's FlopCounterMode sees the layer."""
    _, topk_weights, _, _, _, up_proj, down_proj = shapes[:7]
    num_slots = math.prod(topk_weights)
    return 2 * num_slots * (math.prod(up_proj[1:]) + math.prod(down_proj[1:]))


@register_flop_formula(torch.ops.cumo.expert_mlp_backward)
def _flops_backward(*shapes, out_shape=None, **kwargs):
    """Twice the forward, assuming that all gradients are needed; recomputation is not counted."""
    return 2 * _flops(*shapes[1:8])  # the forward's arguments follow the upstream gradient


def _refuse_widths(activation: str, up: torch.Size, down: torch.Size) -> None:
    """Raise ValueError: the weights do not fit each other; with the activations that they would fit."""
    row = get_activation(activation)
    is_gated = row.is_gated
    if is_gated and up[1] % 2:
        wanted, got = f"up_proj must be (E, 2I, H) for {activation}", up
    else:
        wanted, got = f"down_proj must be ({down[0]}, O, {up[1] // (1 + is_gated)})", down
    kind, rows = ("gated", "2I") if is_gated else ("plain", "I")
    default = ", the default," if activation == DEFAULT_ACTIVATION else ""
    why = f"activation {row.name!r}{default} is {kind}, so that up_proj has {rows} = {up[1]} rows"
    if up[1] == (down[2] if is_gated else 2 * down[2]):
        others = [name for name, row in ACTIVATIONS.items() if row.is_gated != is_gated]
        why += f"; the weights fit activation {', '.join(map(repr, others[:-1]))} or {others[-1]!r}"
    raise ValueError(f"{wanted}, got {tuple(got)}: {why}")


def expert_mlp(
    x: Tensor,
    routing: Routing,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = DEFAULT_ACTIVATION,
    memory: str = "preact",
    *,
    up_adapters: Sequence[Adapter] = (),
    down_adapters: Sequence[Adapter] = (),
    interleaved: bool = False,
) -> Tensor:
    """sum_k topk_weights[t, k] * (act(x[t] @ up_proj[e].T + up_bias[e]) @ down_proj[e].T + down_bias[e]).

    Here e is topk_indices[t, k]. 2 * S * (rows of up_proj * H + O * I) FLOPs forward, twice that backward.

    Args:
        x: (T, H) float.
        routing: plan for these T tokens and E experts.
        up_proj: (E, I, H), or (E, 2I, H) for a gated activation, gate rows first; dtype of `x`. Or a
            PackedWeight of that shape, which is dequantised to the dtype of `x` and gets no gradient.
        down_proj: (E, O, I), dtype of `x`, or a PackedWeight.
        up_bias: (E, I) or (E, 2I).
        down_bias: (E, O).
        activation: name from `cumo_kernels.ACTIVATIONS`. The default is gated; plain weights need a plain
            one, such as "gelu". With parameters as in `activate`: "swiglu_oai(alpha=1.702,limit=7.0)".
        memory: what is saved for backward: "x" only the input (GEMM 1 runs again), "preact" also the (S, I)
            pre-activation, "all" also the activation.
        up_adapters: low-rank additions to up_proj, computed in the dtype of `x`; the sum with up_proj is
            never formed. With dropout the layer runs as several ops, which save more for backward.
        down_adapters: the same for down_proj.
        interleaved: rows of up_proj and of up_bias are those of gate and up in turns, [g0, u0, g1, u1, ...],
            instead of all rows of the gate first; gradients are in the same order, and nothing is copied.

    Returns:
        (T, O), dtype of `x`, or autocast's.

    Raises:
        ValueError: a shape, dtype, device or name is wrong; the message names the argument.
    """
    check_float("x", x)
    check_routing("routing", routing)
    check_tensor("up_proj", up_proj)
    check_tensor("down_proj", down_proj)
    check_optional("up_bias", up_bias)
    check_optional("down_bias", down_bias)
    packed = [isinstance(weight, PackedWeight) for weight in (up_proj, down_proj)]
    x, up_bias, down_bias = autocast(x, up_bias, down_bias)
    up_proj, down_proj = (
        weight if is_packed else _cast_like(x, weight)
        for weight, is_packed in zip((up_proj, down_proj), packed, strict=True)
    )
    num_experts = routing.num_experts
    check_shape("x", x, routing.num_tokens, "H")
    check_device("routing", routing.permutation, "x", x)
    check_bool("interleaved", interleaved)
    activation, is_gated = resolve(activation, interleaved=interleaved)
    check_shape("up_proj", up_proj, num_experts, "2I" if is_gated else "I", x.shape[1])
    check_shape("down_proj", down_proj, num_experts, "O", "I")
    width = up_proj.shape[1] // 2 if is_gated else up_proj.shape[1]
    if (is_gated and up_proj.shape[1] % 2) or down_proj.shape[2] != width:
        _refuse_widths(activation, up_proj.shape, down_proj.shape)
    for name, weight, is_packed in zip(("up_proj", "down_proj"), (up_proj, down_proj), packed, strict=True):
        if is_packed:
            check_packed(name, weight, x)
            if weight.is_transposed:
                raise ValueError(f"{name} must be packed along its rows, got a transposed one")
        else:
            check_like(name, weight, "x", x)
    if up_bias is not None:
        check_shape("up_bias", up_bias, num_experts, up_proj.shape[1])
        check_like("up_bias", up_bias, "x", x)
    if down_bias is not None:
        check_shape("down_bias", down_bias, num_experts, down_proj.shape[1])
        check_like("down_bias", down_bias, "x", x)
    check_choice("memory", memory, MEMORY_PLANS)
    check_adapters("up_adapters", up_adapters, x, *up_proj.shape)
    check_adapters("down_adapters", down_adapters, x, *down_proj.shape)
    if drops(up_adapters) or drops(down_adapters):
        offsets = routing.expert_offsets
        z = grouped_gemm(x, up_proj, offsets, bias=up_bias, gather=routing, adapters=up_adapters)
        y = grouped_gemm(activate(z, activation), down_proj, offsets, bias=down_bias, adapters=down_adapters)
        return combine(y, routing)
    thin = (*tensors_of(up_adapters), *tensors_of(down_adapters))
    plain = [weight for weight, is_packed in zip((up_proj, down_proj), packed, strict=True) if not is_packed]
    trains = dispatch.trains(x, routing.topk_weights, *plain, up_bias, down_bias, *thin)
    if not (trains and torch.is_grad_enabled()):
        memory = "none"
    plan = (routing.topk_weights, routing.permutation, routing.inverse_permutation, routing.expert_offsets)
    if not (any(packed) or thin):
        backend = dispatch.choose("expert_mlp", x, num_experts, trains)
        out, _, _ = _expert_mlp(x, *plan, up_proj, down_proj, up_bias, down_bias, activation, memory, backend)
        return out
    backend = dispatch.choose("adapted_expert_mlp", x, num_experts, trains)
    out, *_ = _adapted_expert_mlp(
        x,
        *plan,
        *(up_proj.parts() if packed[0] else (up_proj, None, None)),
        *(down_proj.parts() if packed[1] else (down_proj, None, None)),
        up_bias,
        down_bias,
        *joined(up_adapters, x.dtype),
        *joined(down_adapters, x.dtype),
        up_proj.format if packed[0] else None,
        down_proj.format if packed[1] else None,
        activation,
        memory,
        backend,
    )
    return out


def _cast_like(x: Tensor, weight: Tensor) -> Tensor:
    """`weight` as autocast casts it; `x` is on the device whose autocast counts."""
    return autocast(x, weight)[1]
