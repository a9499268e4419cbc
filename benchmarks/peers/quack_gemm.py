"""An expert layer made of quack-kernels' GEMMs, which include gather, bias and activation.

It uses quack's default tile sizes, unless CUMO_PEERS_TUNED=1 enables a search at the first call of each GEMM,
which takes minutes. All calls are from `quack.gemm_interface`: gemm, gemm_act, gemm_dact.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.shapes import Shape
from cumo_kernels import Routing

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu_erf", "swiglu": "swiglu"}  # ours -> quack's


@dataclass(frozen=True)
class Plan:
    """The source and destination of rows; integers are int32, as quack needs."""

    offsets: Tensor  # (E + 1,)
    tokens: Tensor  # (S,) token of each sorted row
    permutation: Tensor  # (S,) slot of each sorted row
    inverse: Tensor  # (S,) sorted row of each slot
    experts: Tensor  # (T, K)
    member: Tensor | None  # (S, E) one-hot, for the gradients of biases
    activation: str
    gated: bool


def make(shape: Shape, routing: Routing, member: Tensor | None) -> Callable[..., Tensor]:
    """-> a layer for one routing plan; `member` as in Plan, needed if there are biases."""
    plan = Plan(
        routing.expert_offsets.int(),
        routing.token_indices.int(),
        routing.permutation.long(),
        routing.inverse_permutation.long(),
        routing.topk_indices.long(),
        member,
        ACTIVATIONS[shape.activation],
        shape.is_gated,
    )
    return lambda x, weights, up, down, *biases: _Layer.apply(plan, x, weights, up, down, *biases)


def _kernels():
    from quack import gemm_interface

    return gemm_interface, {"tuned": os.environ.get("CUMO_PEERS_TUNED") == "1"}


def _of_slots(plan: Plan, rows: Tensor) -> Tensor:
    """(S, ...) in expert order -> (T, K, ...)."""
    return rows.index_select(0, plan.inverse).unflatten(0, plan.experts.shape)


class _Layer(torch.autograd.Function):
    """Weights keep gate rows before up rows: `concat_layout` tells quack so; its intermediate results
    alternate gate and up."""

    @staticmethod
    def forward(
        ctx, plan: Plan, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor
    ) -> Tensor:
        quack, options = _kernels()
        up_bias, down_bias = biases or (None, None)
        halves = {"concat_layout": ("B", "bias") if biases else ("B",)} if plan.gated else {}
        z, a = quack.gemm_act(
            x, up.mT, bias=up_bias, activation=plan.activation, cu_seqlens_m=plan.offsets,
            A_idx=plan.tokens, **halves, **options,
        )  # fmt: skip
        y = quack.gemm(a, down.mT, bias=down_bias, cu_seqlens_m=plan.offsets, **options)
        ctx.plan = plan
        ctx.save_for_backward(x, weights, up, down, z, down_bias)
        by_slot = _of_slots(plan, y)
        return (by_slot * weights[..., None].to(by_slot)).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        quack, options = _kernels()
        x, weights, up, down, z, down_bias = ctx.saved_tensors
        plan, grad = ctx.plan, grad.contiguous()
        halves = lambda name: {"concat_layout": (name,)} if plan.gated else {}
        scale = weights.flatten().index_select(0, plan.permutation).float()
        # dz and the activation are returned scaled; the sum over columns is not
        dz, scaled, reduced = quack.gemm_dact(
            grad, down, z, activation=plan.activation, colvec_scale=scale, colvec_reduce=True,
            cu_seqlens_m=plan.offsets, A_idx=plan.tokens, dynamic_scheduler=False, **options,
        )  # fmt: skip
        down_grad, up_grad = torch.empty_like(down), torch.empty_like(up)
        quack.gemm(grad.mT, scaled, out=down_grad, cu_seqlens_k=plan.offsets, A_idx=plan.tokens, **options)
        quack.gemm(
            x.mT, dz, out=up_grad.mT, cu_seqlens_k=plan.offsets, A_idx=plan.tokens, **halves("out"), **options
        )
        dx = quack.gemm(dz, up, cu_seqlens_m=plan.offsets, **halves("B"), **options)
        dx = _of_slots(plan, dx).sum(1)
        weights_grad = _of_slots(plan, reduced)
        bias_grads = ()
        if down_bias is not None:
            # the sum over columns is only of the activation: add the bias's part of y
            weights_grad = weights_grad + (grad.float() @ down_bias.float().mT).gather(1, plan.experts)
            up_bias_grad = plan.member.to(dz).mT @ dz
            if plan.gated:
                up_bias_grad = up_bias_grad.unflatten(-1, (-1, 2)).mT.flatten(-2)
            by_expert = weights.new_zeros(len(grad), len(down)).scatter(1, plan.experts, weights)
            bias_grads = (up_bias_grad, by_expert.to(grad).mT @ grad)
        return None, dx, weights_grad.to(weights), up_grad, down_grad, *bias_grads
