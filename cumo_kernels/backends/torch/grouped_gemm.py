"""Grouped GEMM (torch): `torch.nn.functional.grouped_mm`, followed by bias and activation on the rows.

Facts about grouped_mm, from torch's sources (ATen/native/cuda/GroupedBlas.cpp, GroupMM.cu) and from tests on
CPUs; they are the same in 2.11 and 2.15:

- fp32, fp16 and bf16; sums are fp32, the result has the operands' dtype.
- CUDA, bf16, compute capability 9.x and 10.x: one CUTLASS kernel, which reads the offsets on the device, up
  to 1023 groups. Everywhere else (other dtypes and GPUs, CPUs): a loop over matrix products, for which a CUDA
  device synchronises and sends the offsets to the host.
- A group may be empty: with the groups' rows contiguous in memory, as here, its weight gradient is zero.
- Rows past the last group are not written.
- Strides must be multiples of 16 bytes. Operands of other sizes are copied here, padded with zeros.

Contract: cumo_kernels/ops/grouped_gemm.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from cumo_kernels.backends.reference.grouped_gemm import linear
from cumo_kernels.backends.torch.activation import activate
from cumo_kernels.backends.torch.permutation import gather, permute
from cumo_kernels.backends.torch.rows import expert_of, parts, sorted_positions
from cumo_kernels.hostsync import values_at_hand


def _padded(operand: Tensor) -> Tensor:
    """The operand, or a copy whose last two sizes are multiples of 16 bytes, padded with zeros.

    In a two-dimensional operand the rows are those of the groups; their number does not change.
    """
    step = 16 // operand.element_size()
    missing = [-size % step for size in operand.shape[-2:]]
    if operand.ndim == 2:
        missing[0] = 0
    if any(missing):
        return pad(operand, (0, missing[1], 0, missing[0]))
    rows, columns = operand.stride()[-2:]
    by_rows = columns == 1 and rows >= operand.shape[-1] and rows % step == 0
    by_columns = operand.ndim == 3 and rows == 1 and columns >= operand.shape[-2] and columns % step == 0
    whole = operand.ndim == 2 or operand.stride(0) % step == 0
    fits = (by_rows or by_columns) and whole and operand.data_ptr() % 16 == 0
    return operand if fits else operand.clone(memory_format=torch.contiguous_format)


def product(rows: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (S, K) of expert e times weight[e].T (N, K), plus bias[e] -> (S, N); later rows are undefined.

    grouped_mm takes no bias, so the bias is added to the rounded product. Where the offsets can be read, a
    loop adds it before rounding, as the reference does.
    """
    if rows.shape[0] == 0 or rows.shape[1] == 0 or (bias is not None and values_at_hand(expert_offsets)):
        with torch.no_grad():
            return linear(rows, weight, expert_offsets, bias)
    out = grouped_mm(_padded(rows), _padded(weight).transpose(1, 2), offs=expert_offsets[1:])
    out = out[:, : weight.shape[1]].contiguous()  # remove the padding
    if bias is not None:
        position = sorted_positions(out.shape[0], expert_offsets)
        for part in parts(*out.shape, out.device):
            out[part] += bias.index_select(0, expert_of(position[part], expert_offsets))
    return out


def weight_product(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """grad_e.T @ rows_e of every expert: (S, N), (S, K) -> (E, N, K), zeros for an expert without rows."""
    num_experts, shape = expert_offsets.shape[0] - 1, (grad.shape[1], rows.shape[1])
    if grad.shape[0] == 0:
        return grad.new_zeros(num_experts, *shape)
    out = grouped_mm(_padded(grad).T, _padded(rows), offs=expert_offsets[1:])
    return out[:, : shape[0], : shape[1]].contiguous()


def bias_product(grad: Tensor, expert_offsets: Tensor) -> Tensor:
    """Sum of grad_e's rows: (S, N) -> (E, N)."""
    if grad.device.type != "cpu":
        ones = grad.new_ones(grad.shape[0], 16 // grad.element_size())
        return weight_product(grad, ones, expert_offsets)[:, :, 0].contiguous()
    # one chain of sums, too inaccurate in fp32; on other devices index_add_ has no fixed order
    sums = torch.zeros(expert_offsets.shape[0], grad.shape[1], dtype=torch.float64)
    owner = torch.searchsorted(
        expert_offsets[1:], sorted_positions(grad.shape[0], expert_offsets), right=True
    )
    for part in parts(*grad.shape, grad.device):
        sums.index_add_(0, owner[part], grad[part].to(sums.dtype))
    return sums[:-1].to(grad.dtype)


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
    rows = x if permutation is None else gather(x, permutation, top_k)
    pre = product(rows, weight, expert_offsets, bias)
    if not values_at_hand(expert_offsets) or int(expert_offsets[-1]) < pre.shape[0]:
        past = sorted_positions(pre.shape[0], expert_offsets) >= expert_offsets[-1]
        pre.masked_fill_(past[:, None], 0)  # act(0) is 0 for every activation
    return (pre, x.new_empty(0)) if activation is None else (activate(pre, activation), pre)


def grouped_gemm_weight_grad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """grad_weight[e] = grad_e.T @ x_e (E, N, K), grad_bias[e] = sum of grad_e (E, N); zeros without rows.

    Without `need_bias` the second is empty.
    """
    rows = x if permutation is None else permute(x, permutation, inverse_permutation, top_k)
    grad_bias = bias_product(grad, expert_offsets) if need_bias else grad.new_empty(0)
    return weight_product(grad, rows, expert_offsets), grad_bias
