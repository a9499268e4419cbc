"""Expert MLPs (torch): four calls of grouped_mm, and row-wise operators between them.

The formulas are the reference's (cumo_kernels/backends/reference/experts.py). y + down_bias is never rounded:
the sum over a token's experts adds both in fp32. Contract: cumo_kernels/ops/experts.py.
"""

import torch
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.reference.permutation import to_slots
from cumo_kernels.backends.torch.activation import activate
from cumo_kernels.backends.torch.grouped_gemm import bias_product, product, weight_product
from cumo_kernels.backends.torch.permutation import combine, gather
from cumo_kernels.backends.torch.rows import expert_of, parts, sorted_positions
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
    z = product(gather(x, permutation, top_k), up_proj, expert_offsets, up_bias)
    a = activate(z, activation)
    y = product(a, down_proj, expert_offsets)
    experts = None if down_bias is None else expert_of(inverse_permutation, expert_offsets)
    out = combine(y, topk_weights, inverse_permutation, top_k, down_bias, experts)
    z = z if memory in ("preact", "all") else x.new_empty(0)
    return out, z, a if memory == "all" else x.new_empty(0)


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
    act, wide = get_activation(activation), accumulate_dtype(x.dtype)
    dx, dup, dup_bias, ddown, ddown_bias = (x.new_empty(0) for _ in range(5))
    dweights = topk_weights.new_empty(0)

    rows = gather(x, permutation, top_k) if need_up or memory == "x" else None
    if memory == "x":
        z = product(rows, up_proj, expert_offsets, up_bias)
    g = gather(grad, permutation, top_k)
    w = topk_weights.flatten().index_select(0, permutation).to(wide)[:, None]
    position = sorted_positions(g.shape[0], expert_offsets)

    if memory != "all" and (need_down or need_weights):
        a = activate(z, activation)
    if need_down or need_down_bias:
        weighted = torch.empty_like(g)
        for part in parts(*g.shape, g.device):
            weighted[part] = g[part] * w[part]  # in the wider of the two dtypes
        if need_down:
            ddown = weight_product(weighted, a, expert_offsets)
        if need_down_bias:
            ddown_bias = bias_product(weighted, expert_offsets)
    need_dz = need_x or need_up or need_up_bias
    if need_dz or need_weights:
        h = product(g, down_proj.transpose(1, 2), expert_offsets)
        dw = torch.empty(g.shape[0], dtype=wide, device=g.device)
        dz = torch.empty_like(z) if need_dz else None
        for part in parts(z.shape[0], max(z.shape[1], g.shape[1]), g.device):
            h_wide = h[part].to(wide)
            if need_weights:
                torch.linalg.vecdot(h_wide, a[part].to(wide), out=dw[part])
                if down_bias is not None:
                    biases = down_bias.index_select(0, expert_of(position[part], expert_offsets))
                    dw[part] += torch.linalg.vecdot(g[part].to(wide), biases.to(wide))
            if need_dz:
                dz[part] = act.backward(h_wide.mul_(w[part]), z[part].to(wide))
        if need_weights:
            dweights = to_slots(dw, inverse_permutation).view_as(topk_weights).to(topk_weights.dtype)
    if need_up:
        dup = weight_product(dz, rows, expert_offsets)
    if need_up_bias:
        dup_bias = bias_product(dz, expert_offsets)
    if need_x:
        dz_rows = product(dz, up_proj.transpose(1, 2), expert_offsets)
        dx = combine(dz_rows, None, inverse_permutation, top_k)
    return dx, dweights, dup, dup_bias, ddown, ddown_bias
