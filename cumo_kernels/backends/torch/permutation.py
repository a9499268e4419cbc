"""Permutation (torch): gathers; dropped slots are masked. Contract: cumo_kernels/ops/permutation.py."""

import torch
from torch import Tensor

from cumo_kernels.backends.reference.permutation import to_slots
from cumo_kernels.backends.torch.rows import dropped, parts
from cumo_kernels.types import accumulate_dtype


def gather(x: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """(T, H) -> (S, H) in expert order; rows of dropped slots hold their tokens' rows."""
    return x.index_select(0, permutation // top_k)


def permute(x: Tensor, permutation: Tensor, inverse_permutation: Tensor, top_k: int) -> Tensor:
    rows, lost = gather(x, permutation, top_k), dropped(inverse_permutation)
    return rows if lost is None else rows.masked_fill_(lost.index_select(0, permutation)[:, None], 0)


def combine(
    rows: Tensor,
    topk_weights: Tensor | None,
    inverse_permutation: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:
    """The contract's combine, of rows + bias[expert] if `bias` (E, H) is given; `experts` is (S,) by slot."""
    wide, lost = accumulate_dtype(rows.dtype), dropped(inverse_permutation)
    out = rows.new_empty(inverse_permutation.shape[0] // top_k, rows.shape[1])
    if rows.shape[0] == 0:
        return out.zero_()
    table = lambda of: None if of is None else of.view(-1, top_k)
    positions, lost, experts = map(table, (inverse_permutation.clamp(min=0), lost, experts))
    for part in parts(*out.shape, rows.device):
        total = None
        for k in range(top_k):
            row = rows.index_select(0, positions[part, k]).to(wide)
            if bias is not None:
                row += bias.index_select(0, experts[part, k])
            if lost is not None:
                row.masked_fill_(lost[part, k, None], 0)
            weight = None if topk_weights is None else topk_weights[part, k, None].to(wide)
            if total is None:
                total = row if weight is None else row.mul_(weight)
            else:
                total = total.add_(row) if weight is None else total.addcmul_(row, weight)
        out[part] = total
    return out


def combine_backward(
    grad: Tensor, rows: Tensor, topk_weights: Tensor, permutation: Tensor, inverse_permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the output (T, H) -> gradients of rows (S, H) and topk_weights (T, K)."""
    top_k, wide = topk_weights.shape[1], accumulate_dtype(rows.dtype)
    lost = dropped(inverse_permutation)
    lost = None if lost is None else lost.index_select(0, permutation)[:, None]
    weights = topk_weights.flatten().index_select(0, permutation).to(wide)[:, None]
    grad_rows, dots = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=wide, device=rows.device)
    for part in parts(*rows.shape, rows.device):
        row_grads = gather(grad, permutation[part], top_k).to(wide)
        if lost is not None:
            row_grads.masked_fill_(lost[part], 0)
        torch.linalg.vecdot(row_grads, rows[part].to(wide), out=dots[part])
        grad_rows[part] = row_grads.mul_(weights[part])
    return grad_rows, to_slots(dots, inverse_permutation).view_as(topk_weights).to(topk_weights.dtype)
