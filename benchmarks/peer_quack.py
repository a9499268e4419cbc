"""An expert layer assembled from quack-kernels' GEMMs: gather, bias and SwiGLU inside of them.

quack has neither quick-GELU nor the exact GELU, so those activations run between two GEMMs. It takes its
default tile sizes, unless CUMO_PEERS_TUNED=1 lets it search at the first call of each GEMM, for minutes.
Every call is one of `quack.gemm_interface`: gemm, gemm_act, gemm_dact.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.eager import activate
from benchmarks.shapes import Shape
from cumo_kernels import Routing


@dataclass(frozen=True)
class Plan:
    """Where rows come from and go to; integers are int32, as quack wants them."""

    offsets: Tensor  # (E + 1,)
    tokens: Tensor  # (S,) token of each sorted row
    permutation: Tensor  # (S,) slot of each sorted row
    inverse: Tensor  # (S,) sorted row of each slot
    member: Tensor | None  # (S, E) one-hot, for the gradients of biases
    top_k: int
    activation: str


def make(shape: Shape, routing: Routing, member: Tensor | None) -> Callable[..., Tensor]:
    """-> a layer for one routing plan; `member` as in Plan, needed where there are biases."""
    plan = Plan(
        routing.expert_offsets.int(),
        routing.token_indices.int(),
        routing.permutation.long(),
        routing.inverse_permutation.long(),
        member,
        routing.top_k,
        shape.activation,
    )
    kind = _Fused if shape.activation == "swiglu" and not shape.bias else _Composed
    return lambda x, weights, up, down, *biases: kind.apply(plan, x, weights, up, down, *biases)


def _kernels():
    from quack import gemm_interface

    return gemm_interface, {"tuned": os.environ.get("CUMO_PEERS_TUNED") == "1"}


def _weighted(plan: Plan, rows: Tensor, weights: Tensor) -> Tensor:
    by_slot = rows.index_select(0, plan.inverse).unflatten(0, (-1, plan.top_k))
    return (by_slot * weights[..., None].to(by_slot)).sum(1)


def _of_slots(plan: Plan, rows: Tensor) -> Tensor:
    """(S,) in expert order -> (T, K)."""
    return rows.index_select(0, plan.inverse).unflatten(0, (-1, plan.top_k))


class _Fused(torch.autograd.Function):
    """SwiGLU without biases. Weights keep gate rows before up rows: `concat_layout` tells quack so; what it
    writes in between has them in turns."""

    @staticmethod
    def forward(ctx, plan: Plan, x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        quack, options = _kernels()
        z, a = quack.gemm_act(
            x, up.mT, activation="swiglu", cu_seqlens_m=plan.offsets, A_idx=plan.tokens, concat_layout=("B",),
            **options,
        )  # fmt: skip
        y = quack.gemm(a, down.mT, cu_seqlens_m=plan.offsets, **options)
        ctx.plan = plan
        ctx.save_for_backward(x, weights, up, down, z)
        return _weighted(plan, y, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        quack, options = _kernels()
        x, weights, up, down, z = ctx.saved_tensors
        plan, grad = ctx.plan, grad.contiguous()
        scale = weights.flatten().index_select(0, plan.permutation).float()
        # dz and the activation come back scaled; the sum over columns is before the scale
        dz, scaled, reduced = quack.gemm_dact(
            grad, down, z, activation="swiglu", colvec_scale=scale, colvec_reduce=True,
            cu_seqlens_m=plan.offsets, A_idx=plan.tokens, dynamic_scheduler=False, **options,
        )  # fmt: skip
        down_grad, up_grad = torch.empty_like(down), torch.empty_like(up)
        quack.gemm(grad.mT, scaled, out=down_grad, cu_seqlens_k=plan.offsets, A_idx=plan.tokens, **options)
        quack.gemm(
            x.mT, dz, out=up_grad.mT, cu_seqlens_k=plan.offsets, A_idx=plan.tokens, concat_layout=("out",),
            **options,
        )  # fmt: skip
        dx = quack.gemm(dz, up, cu_seqlens_m=plan.offsets, concat_layout=("B",), **options)
        dx = dx.index_select(0, plan.inverse).unflatten(0, (-1, plan.top_k)).sum(1)
        return None, dx, _of_slots(plan, reduced).to(weights), up_grad, down_grad


class _Composed(torch.autograd.Function):
    """Any activation, with biases or without, as torch computes it between two GEMMs of quack."""

    @staticmethod
    def forward(
        ctx, plan: Plan, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor
    ) -> Tensor:
        quack, options = _kernels()
        up_bias, down_bias = biases or (None, None)
        z = quack.gemm(x, up.mT, bias=up_bias, cu_seqlens_m=plan.offsets, A_idx=plan.tokens, **options)
        a = activate(z, plan.activation)
        y = quack.gemm(a, down.mT, bias=down_bias, cu_seqlens_m=plan.offsets, **options)
        ctx.plan = plan
        ctx.save_for_backward(x, weights, up, down, z, y)
        return _weighted(plan, y, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        quack, options = _kernels()
        x, weights, up, down, z, y = ctx.saved_tensors
        plan = ctx.plan
        rows = grad.index_select(0, plan.tokens)
        weights_grad = _of_slots(plan, (rows.float() * y).sum(-1)).to(weights)
        dy = rows * weights.flatten().index_select(0, plan.permutation)[:, None].to(rows)
        da = quack.gemm(dy, down, cu_seqlens_m=plan.offsets, **options)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            a = activate(leaf, plan.activation)
        (dz,) = torch.autograd.grad(a, leaf, da)
        down_grad, up_grad = torch.empty_like(down), torch.empty_like(up)
        quack.gemm(dy.mT, a.detach(), out=down_grad, cu_seqlens_k=plan.offsets, **options)
        quack.gemm(x.mT, dz, out=up_grad.mT, cu_seqlens_k=plan.offsets, A_idx=plan.tokens, **options)
        dx = quack.gemm(dz, up, cu_seqlens_m=plan.offsets, **options)
        dx = dx.index_select(0, plan.inverse).unflatten(0, (-1, plan.top_k)).sum(1)
        biases = ()
        if len(ctx.needs_input_grad) > 5:
            member = plan.member.to(dz).mT
            biases = (member @ dz, member @ dy)
        return None, dx, weights_grad, up_grad, down_grad, *biases
