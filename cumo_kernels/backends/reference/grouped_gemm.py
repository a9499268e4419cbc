"""Grouped GEMM (reference): rows of expert e times the weight of expert e.

    rows of e = [expert_offsets[e], expert_offsets[e + 1])
    out[p] = act(x[p] @ weight[e].T + bias[e])         x (S, K)   weight (E, N, K)   out (S, N)

With `permutation`, x is (T, K) in token order and row p is x[permutation[p] // top_k]. Rows past the
last expert's end belong to dropped slots and are zero. 2 * S * N * K FLOPs.
"""

from itertools import pairwise

import torch
from torch import Tensor

from cumo_kernels.backends.reference.activation import activate
from cumo_kernels.backends.reference.permutation import permute
from cumo_kernels.types import accumulate_dtype


def segments(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    offsets = expert_offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(offsets)) if b > a]


def linear(x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """(S, K) rows in expert order -> (S, N)."""
    present = segments(expert_offsets)
    end = present[-1][2] if present else 0
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        outs = [_rows(x[a:b], weight[e], None if bias is None else bias[e]) for e, a, b in present]
        return torch.cat([*outs, x.new_zeros(x.shape[0] - end, weight.shape[1])])
    # without torch.cat, whose copy takes a tenth of a CPU training step
    out = x.new_empty(x.shape[0], weight.shape[1])
    for e, a, b in present:
        _rows(x[a:b], weight[e], None if bias is None else bias[e], out=out[a:b])
    out[end:] = 0
    return out


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """-> (out, pre_activation); without an activation the second is empty."""
    rows = x if permutation is None else permute(x, permutation, inverse_permutation, top_k)
    out = linear(rows, weight, expert_offsets, bias)
    if activation is None:
        return out, x.new_empty(0)
    return activate(out, activation), out


def grouped_gemm_weight_grad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The k-grouped form: grad_weight[e] = grad_e.T @ x_e (E, N, K), grad_bias[e] = sum of grad_e (E, N).

    An expert without rows gets exact zeros. Without `need_bias` the second is empty.
    """
    rows = x if permutation is None else permute(x, permutation, inverse_permutation, top_k)
    num_experts = expert_offsets.shape[0] - 1
    present = segments(expert_offsets)
    make = torch.empty if len(present) == num_experts else torch.zeros
    grad_weight = make(num_experts, grad.shape[1], rows.shape[1], dtype=grad.dtype, device=grad.device)
    size = (num_experts, grad.shape[1]) if need_bias else (0,)
    grad_bias = make(size, dtype=grad.dtype, device=grad.device)
    for e, begin, end in present:
        torch.mm(grad[begin:end].T, rows[begin:end], out=grad_weight[e])
        if need_bias:
            grad_bias[e] = grad[begin:end].sum(0, dtype=accumulate_dtype(grad.dtype))
    return grad_weight, grad_bias
