"""Packed weights and adapters (torch; stems experts, grouped_gemm): grouped_mm, or expert by expert.

Where the offsets can be read, on CPUs, an expert's weight is dequantised when its rows are multiplied, and
only of experts that have rows. Elsewhere those of all experts are dequantised for the time of one product.
The formulas are the reference's. Contract: cumo_kernels/ops/adapted.py.
"""

import torch
from torch import Tensor

from cumo_kernels.backends.reference import adapted
from cumo_kernels.backends.reference.adapted import Steps, Weight
from cumo_kernels.backends.reference.grouped_gemm import segments
from cumo_kernels.backends.torch.activation import activate
from cumo_kernels.backends.torch.grouped_gemm import bias_product, product, weight_product
from cumo_kernels.backends.torch.permutation import combine, gather
from cumo_kernels.backends.torch.rows import sorted_positions
from cumo_kernels.hostsync import values_at_hand


def _product(rows: Tensor, weight: Weight, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    if weight.format is None or not values_at_hand(expert_offsets):
        return product(rows, weight.plain(rows.dtype), expert_offsets, bias)
    width = weight.data.shape[2] * 2 if weight.is_transposed else weight.data.shape[1]
    out = rows.new_empty(rows.shape[0], width)
    end = 0
    for expert, begin, end in segments(expert_offsets):
        one = weight.plain(rows.dtype, expert).T
        if bias is None:
            torch.mm(rows[begin:end], one, out=out[begin:end])
        else:
            torch.addmm(bias[expert], rows[begin:end], one, out=out[begin:end])
    out[end:] = 0
    return out


STEPS = Steps(
    gather=lambda x, permutation, inverse_permutation, top_k: gather(x, permutation, top_k),
    product=_product,
    activate=activate,
    combine=combine,
    weight_grad=weight_product,
    bias_grad=bias_product,
)


def adapted_expert_mlp(x: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out (T, O), z, a, u, v; each but `out` empty unless the memory plan keeps it for backward."""
    return adapted.forward(STEPS, x, *rest)


def adapted_expert_mlp_backward(grad: Tensor, *rest) -> tuple[Tensor, ...]:
    """-> gradients in the order of the reference's `backward`, empty where not needed."""
    return adapted.backward(STEPS, grad, *rest)


def packed_grouped_gemm(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """-> (out, pre_activation) of rows times a packed weight; the second is empty without an activation."""
    out, pre = adapted.packed_grouped_gemm(x, *rest, steps=STEPS)
    offsets = rest[5]
    if not values_at_hand(offsets):
        past = (sorted_positions(out.shape[0], offsets) >= offsets[-1])[:, None]
        out, pre = out.masked_fill(past, 0), pre.masked_fill(past, 0) if pre.numel() else pre
    return out, pre
