"""Expert MLPs (reference): the whole layer, built from the other four stems.

    z[p]   = x[token(p)] @ up_proj[e].T + up_bias[e]             (S, I), or (S, 2I) if gated
    a[p]   = act(z[p])                                           (S, I)
    y[p]   = a[p] @ down_proj[e].T + down_bias[e]                (S, O)
    out[t] = sum_k topk_weights[t, k] * y[position of (t, k)]    (T, O)

Backward, with g[p] = grad[token(p)] and w[p] its routing weight; y is never needed, since
<g, y> = <g @ down_proj, a> + <g, down_bias>:

    h = g @ down_proj          dw = <h, a> + <g, down_bias>      dz = w * h * act'(z)
    d down_proj = (w g)^T a    d down_bias = sum w g             d up_proj = dz^T x    d up_bias = sum dz
    dx[t] = sum_k (dz @ up_proj)[position of (t, k)]
"""

import torch
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.reference.activation import activate
from cumo_kernels.backends.reference.grouped_gemm import grouped_gemm_weight_grad, linear
from cumo_kernels.backends.reference.permutation import combine, permute, to_slots
from cumo_kernels.types import accumulate_dtype


def expert_mlp(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (out (T, O), z, a); z and a are empty unless the memory plan keeps them for backward."""
    top_k = topk_weights.shape[1]
    rows = permute(x, permutation, inverse_permutation, top_k)
    z = linear(rows, up_proj, expert_offsets, up_bias)
    a = activate(z, activation)
    y = linear(a, down_proj, expert_offsets, down_bias)
    out = combine(y, topk_weights, inverse_permutation, top_k)
    z = z if memory in ("preact", "all") else x.new_empty(0)
    return out, z, a if memory == "all" else x.new_empty(0)


def _weight_grad(
    grad: Tensor, rows: Tensor | None, expert_offsets: Tensor, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; without `rows` only that of the bias."""
    columns = grad[:, :1] if rows is None else rows
    weight, bias = grouped_gemm_weight_grad(grad, columns, expert_offsets, None, None, 1, need_bias)
    return grad.new_empty(0) if rows is None else weight, bias


def expert_mlp_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, topk_weights, up_proj, up_bias, down_proj, down_bias; empty where not needed."""
    top_k = topk_weights.shape[1]
    dtype, wide = x.dtype, accumulate_dtype(x.dtype)
    act = get_activation(activation)
    dx, dup, dup_bias, ddown, ddown_bias = (x.new_empty(0) for _ in range(5))
    dweights = topk_weights.new_empty(0)

    rows = permute(x, permutation, inverse_permutation, top_k) if need_up or memory == "x" else None
    if memory == "x":
        z = linear(rows, up_proj, expert_offsets, up_bias)
    g = permute(grad, permutation, inverse_permutation, top_k)
    w = topk_weights.flatten().index_select(0, permutation).to(wide)[:, None]

    if need_down or need_weights:
        a = a if memory == "all" else activate(z, activation)
    if need_down or need_down_bias:
        weighted = (w * g).to(dtype)
        ddown, ddown_bias = _weight_grad(weighted, a if need_down else None, expert_offsets, need_down_bias)
    if need_x or need_up or need_up_bias or need_weights:
        h = linear(g, down_proj.transpose(1, 2), expert_offsets, None).to(wide)
        if need_weights:
            dw = torch.linalg.vecdot(h, a.to(wide))
            if down_bias is not None:
                dw = dw + linear(g.to(wide), down_bias[:, None, :].to(wide), expert_offsets, None)[:, 0]
            dweights = to_slots(dw, inverse_permutation).view_as(topk_weights).to(topk_weights.dtype)
    if need_x or need_up or need_up_bias:
        dz = act.backward(h.mul_(w), z.to(wide)).to(dtype)
        if need_up or need_up_bias:
            dup, dup_bias = _weight_grad(dz, rows if need_up else None, expert_offsets, need_up_bias)
        if need_x:
            dx = combine(
                linear(dz, up_proj.transpose(1, 2), expert_offsets, None), None, inverse_permutation, top_k
            )
    return dx, dweights, dup, dup_bias, ddown, ddown_bias
