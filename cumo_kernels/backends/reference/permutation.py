"""Permutation (reference): token order -> expert order, and the weighted sum back to token order.

    permute:  out[p] = x[permutation[p] // K]                                    x (T, H)     out (S, H)
    combine:  out[t] = sum_k topk_weights[t, k] * rows[inverse[t * K + k]]       rows (S, H)  out (T, H)

Sorted positions of dropped slots (inverse -1) are zero in `permute` and ignored in `combine`.
"""

import torch
from torch import Tensor

from cumo_kernels.types import accumulate_dtype


def permute(x: Tensor, permutation: Tensor, inverse_permutation: Tensor, top_k: int) -> Tensor:
    rows = x.index_select(0, permutation // top_k)
    if (inverse_permutation < 0).any():
        kept = inverse_permutation.index_select(0, permutation) >= 0
        rows = torch.where(kept[:, None], rows, 0)
    return rows


def combine(rows: Tensor, topk_weights: Tensor | None, inverse_permutation: Tensor, top_k: int) -> Tensor:
    wide = accumulate_dtype(rows.dtype)
    positions = inverse_permutation.view(-1, top_k)
    out = torch.zeros(positions.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    dropped = positions < 0
    any_dropped = bool(dropped.any())
    for k in range(top_k):
        row = rows.index_select(0, positions[:, k].clamp(min=0)).to(wide)
        if any_dropped:
            row = torch.where(dropped[:, k, None], 0, row)
        out = (
            out + row if topk_weights is None else torch.addcmul(out, row, topk_weights[:, k, None].to(wide))
        )
    return out.to(rows.dtype)


def combine_backward(
    grad: Tensor, rows: Tensor, topk_weights: Tensor, permutation: Tensor, inverse_permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the output (T, H) -> gradients of rows (S, H) and topk_weights (T, K)."""
    top_k = topk_weights.shape[1]
    wide = accumulate_dtype(rows.dtype)
    row_grads = permute(grad, permutation, inverse_permutation, top_k).to(wide)
    row_weights = topk_weights.flatten().index_select(0, permutation).to(wide)
    grad_rows = row_grads * row_weights[:, None]
    by_position = (row_grads * rows.to(wide)).sum(1)
    return grad_rows.to(rows.dtype), to_slots(by_position, inverse_permutation).view_as(topk_weights).to(
        topk_weights.dtype
    )


def to_slots(by_position: Tensor, inverse_permutation: Tensor) -> Tensor:
    """(S,) per sorted position -> (S,) per slot, zero for dropped slots."""
    by_slot = by_position.index_select(0, inverse_permutation.clamp(min=0))
    return torch.where(inverse_permutation < 0, 0, by_slot)
