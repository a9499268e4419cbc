"""Permutation (torch): gathers, with dropped slots by mask. Contract: cumo_kernels/ops/permutation.py."""

import torch
from torch import Tensor

from cumo_kernels.backends.torch.rows import parts
from cumo_kernels.types import accumulate_dtype


def gather(x: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """(T, H) -> (S, H) in the order of the experts; rows of dropped slots hold what their tokens do."""
    return x.index_select(0, permutation // top_k)


def permute(x: Tensor, permutation: Tensor, inverse_permutation: Tensor, top_k: int) -> Tensor:
    dropped = inverse_permutation.index_select(0, permutation) < 0
    return gather(x, permutation, top_k).masked_fill_(dropped[:, None], 0)


def combine(
    rows: Tensor,
    topk_weights: Tensor | None,
    inverse_permutation: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:
    """As the contract, of rows + bias[expert] where there is a `bias`: (E, H), `experts` (S,) by slot."""
    wide = accumulate_dtype(rows.dtype)
    positions = inverse_permutation.view(-1, top_k)
    out = rows.new_empty(positions.shape[0], rows.shape[1])
    if rows.shape[0] == 0:
        return out.zero_()
    for part in parts(*out.shape, rows.device):
        total = torch.zeros(out[part].shape, dtype=wide, device=rows.device)
        for k in range(top_k):
            position = positions[part, k]
            row = rows.index_select(0, position.clamp(min=0)).to(wide)
            if bias is not None:
                row += bias.index_select(0, experts.view(-1, top_k)[part, k])
            row.masked_fill_(position[:, None] < 0, 0)
            if topk_weights is None:
                total += row
            else:
                total.addcmul_(row, topk_weights[part, k, None].to(wide))
        out[part] = total
    return out


def combine_backward(
    grad: Tensor, rows: Tensor, topk_weights: Tensor, permutation: Tensor, inverse_permutation: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient at the output (T, H) -> gradients at rows (S, H) and topk_weights (T, K)."""
    top_k, wide = topk_weights.shape[1], accumulate_dtype(rows.dtype)
    dropped = (inverse_permutation.index_select(0, permutation) < 0)[:, None]
    weights = topk_weights.flatten().index_select(0, permutation).to(wide)[:, None]
    grad_rows, dots = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=wide, device=rows.device)
    for part in parts(*rows.shape, rows.device):
        row_grads = gather(grad, permutation[part], top_k).to(wide).masked_fill_(dropped[part], 0)
        torch.linalg.vecdot(row_grads, rows[part].to(wide), out=dots[part])
        grad_rows[part] = row_grads.mul_(weights[part])
    return grad_rows, to_slots(dots, inverse_permutation).view_as(topk_weights).to(topk_weights.dtype)


def to_slots(by_position: Tensor, inverse_permutation: Tensor) -> Tensor:
    """(S,) per sorted position -> (S,) per slot, zero for dropped slots."""
    return by_position.index_select(0, inverse_permutation.clamp(min=0)).masked_fill_(
        inverse_permutation < 0, 0
    )
