"""Packed weights and adapters (Triton; stems experts, grouped_gemm): launches of experts.py and thin ones.

With V = scaling * B, per expert, each of the two layers is one product with one rounding,

    x W^T + u V^T + bias        u = x A^T        W (N, K) plain or in four bits   A (R, K)   V (N, R)

whose kernel reads W in its loop and adds the second term to the same sums (packed.py). u, and in backward
c = g V_down and d = dz V_up, are GEMMs with R columns. The products of the gradients are

    h = g W_down + c A_down                 dz W_up + d A_up
    d V_down = g^T (w v)     d A_down = c^T (w a)     d V_up = dz^T u     d A_up = d^T x

with the routing weight w applied to the narrower operand. A weight in four bits is never dequantised in
memory: at T = 1 a product reads a quarter of the bytes of bf16, plus the scales. W + V A is never formed.

Contract: cumo_kernels/ops/adapted.py. Reference: cumo_kernels/backends/reference/adapted.py.
"""

from torch import Tensor

from cumo_kernels.backends.triton.bias_grad import launch_bias_grad
from cumo_kernels.backends.triton.experts import (
    multiply_and_combine,
    sorted_rows,
    topk_weights_grad,
    weigh_rows,
)
from cumo_kernels.backends.triton.grad_hidden import launch_grad_hidden
from cumo_kernels.backends.triton.grouped_gemm import launch_gemm, multiply
from cumo_kernels.backends.triton.launch import on_device_of_first
from cumo_kernels.backends.triton.packed import LowRank, packed_or_plain
from cumo_kernels.backends.triton.tiles import sum_rows
from cumo_kernels.backends.triton.weight_grad import launch_weight_grad


@on_device_of_first
def packed_grouped_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    is_transposed: bool,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """`grouped_gemm` with a 4-bit weight (E, N, K), or with `is_transposed` its transpose (E, K, N)."""
    weight = packed_or_plain(packed, scales, zeros, format)
    weight = weight.transpose(1, 2) if is_transposed else weight
    return multiply(x, weight, expert_offsets, bias, permutation, top_k, activation)


def _thin(
    rows: Tensor, factor: Tensor, expert_offsets: Tensor, gather: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """(S, R): rows times a factor (E, R, K) of an adapter; rows past the last expert are not written."""
    out, _ = launch_gemm(rows, factor, expert_offsets, None, gather, top_k, None, zero_tail=False)
    return sum_rows(out, rows.dtype) if out.ndim == 3 else out


@on_device_of_first
def adapted_expert_mlp(
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    up_scales: Tensor | None,
    up_zeros: Tensor | None,
    down_proj: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_format: str | None,
    down_format: str | None,
    activation: str,
    memory: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out (T, O), z, a, u, v; each but `out` empty unless the memory plan keeps it for backward."""
    top_k = topk_weights.shape[1]
    up = packed_or_plain(up_proj, up_scales, up_zeros, up_format)
    down = packed_or_plain(down_proj, down_scales, down_zeros, down_format)
    keep_z, trains = memory in ("preact", "all"), memory != "none"
    u = v = up_pair = down_pair = None
    rows, gather = sorted_rows(x, permutation, inverse_permutation, top_k)
    if up_a is not None:
        u = _thin(rows, up_a, expert_offsets, gather, top_k)
        up_pair = LowRank(u, up_b)
    a, z = launch_gemm(
        rows, up, expert_offsets, up_bias, gather, top_k, activation,
        low_rank=up_pair, keep_pre=keep_z, zero_tail=False,
    )  # fmt: skip
    if down_a is not None:
        v = _thin(a, down_a, expert_offsets)
        down_pair = LowRank(v, down_b)
    out = multiply_and_combine(
        a, down, expert_offsets, down_bias, topk_weights.contiguous(), inverse_permutation, top_k, down_pair
    )
    keep = lambda tensor, kept: tensor if kept and tensor is not None else x.new_empty(0)
    return out, z, keep(a, memory == "all"), keep(u, trains), keep(v, trains)


@on_device_of_first
def adapted_expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    inverse_permutation: Tensor,
    expert_offsets: Tensor,
    up_proj: Tensor,
    up_scales: Tensor | None,
    up_zeros: Tensor | None,
    down_proj: Tensor,
    down_scales: Tensor | None,
    down_zeros: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    z: Tensor,
    a: Tensor,
    u: Tensor,
    v: Tensor,
    up_format: str | None,
    down_format: str | None,
    activation: str,
    memory: str,
    needs: str,
) -> tuple[Tensor, ...]:
    """-> gradients of x, topk_weights, up_proj, down_proj, up_bias, down_bias, up_a, up_b, down_a, down_b.

    One that `needs` marks with "0" is empty.
    """
    top_k = topk_weights.shape[1]
    topk_weights = topk_weights.contiguous()
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_thin = (
        need == "1" for need in needs
    )
    need_up_a, need_up_b, need_down_a, need_down_b = need_thin
    up = packed_or_plain(up_proj, up_scales, up_zeros, up_format)
    down = packed_or_plain(down_proj, down_scales, down_zeros, down_format)
    dx, dup, ddown, dup_bias, ddown_bias, dup_a, dup_b, ddown_a, ddown_b = (x.new_empty(0) for _ in range(9))
    dweights = topk_weights.new_empty(0)
    plan = (topk_weights, permutation, expert_offsets)

    x_rows, x_gather = x, permutation
    if memory == "x" or need_up or need_up_bias or need_up_a:
        x_rows, x_gather = sorted_rows(x, permutation, inverse_permutation, top_k)
    if memory == "x":
        _, z = launch_gemm(
            x_rows, up, expert_offsets, up_bias, x_gather, top_k, activation,
            low_rank=None if up_b is None else LowRank(u.contiguous(), up_b),
            keep_out=False, keep_pre=True, zero_tail=False,
        )  # fmt: skip

    need_dz = need_x or need_up or need_up_bias or need_up_a or need_up_b
    need_hidden = need_dz or need_weights
    # the routing weight on `a`, for the gradients of down_proj and down_a, unless it costs less on g and c
    need_weighted = (need_down or need_down_a) and memory != "all"
    g, g_gather = grad, permutation
    if need_hidden or need_weighted or need_down_a or need_down_b:
        g, g_gather = sorted_rows(grad, permutation, inverse_permutation, top_k)
    c = pair = None
    if down_b is not None and (need_hidden or need_down_a):
        c = _thin(g, down_b.transpose(1, 2), expert_offsets, g_gather, top_k)
        pair = LowRank(c, down_a.transpose(1, 2))
    weighted = dz = x.new_empty(0)
    if need_hidden:
        dz, weighted, dots = launch_grad_hidden(
            g, *plan, down, z, activation, low_rank=pair, need_dz=need_dz, need_weighted=need_weighted,
            need_dots=need_weights, is_sorted=g_gather is None,
        )  # fmt: skip
        if need_weights:
            dweights = topk_weights_grad(
                dots, grad, down_bias, inverse_permutation, expert_offsets, topk_weights
            )
    elif need_weighted:
        weighted = weigh_rows(z, *plan, activation)

    weight_grad = lambda gradient, rows: launch_weight_grad(gradient, rows, expert_offsets, None, 1, False)[0]
    from_g = lambda rows: launch_weight_grad(g, rows, expert_offsets, g_gather, top_k, False, gather="grad")[
        0
    ]
    if need_down and memory == "all":
        ddown = weight_grad(weigh_rows(grad, *plan, gather=True), a)
    elif need_down:
        ddown = from_g(weighted)
    if need_down_bias:
        ddown_bias = launch_bias_grad(grad, *plan)
    if need_down_a:
        ddown_a = weight_grad(weigh_rows(c, *plan), a) if memory == "all" else weight_grad(c, weighted)
    if need_down_b:
        ddown_b = from_g(weigh_rows(v, *plan))

    d = pair = None
    if up_b is not None and (need_x or need_up_a):
        d = _thin(dz, up_b.transpose(1, 2), expert_offsets)
        pair = LowRank(d, up_a.transpose(1, 2))
    if need_up or need_up_bias:
        dup, dup_bias = launch_weight_grad(
            dz, x_rows, expert_offsets, x_gather, top_k, need_up_bias, need_weight=need_up
        )
    if need_up_a:
        dup_a, _ = launch_weight_grad(d, x_rows, expert_offsets, x_gather, top_k, False)
    if need_up_b:
        dup_b = weight_grad(dz, u)
    if need_x:
        dx = multiply_and_combine(
            dz, up.transpose(1, 2), expert_offsets, None, None, inverse_permutation, top_k, pair
        )
    return dx, dweights, dup, ddown, dup_bias, ddown_bias, dup_a, dup_b, ddown_a, ddown_b
