"""Packed weights and adapters (reference; stems experts, grouped_gemm).

With W in its plain form, dequantised if it is packed, and V = scaling * B:

    z[p]   = x[token(p)] @ W_up[e].T + u[p] @ V_up[e].T + up_bias[e]        u = x[token(p)] @ A_up[e].T
    a[p]   = act(z[p])
    y[p]   = a[p] @ W_down[e].T + v[p] @ V_down[e].T + down_bias[e]         v = a[p] @ A_down[e].T
    out[t] = sum_k topk_weights[t, k] * y[position of (t, k)]

Backward, with g[p] = grad[token(p)], w[p] its routing weight, and c = g @ V_down, d = dz @ V_up, both thin:

    h = g @ W_down + c @ A_down            dw = <h, a> + <g, down_bias>        dz = w h act'(z)
    d W_down = (w g)^T a      d V_down = (w g)^T v      d A_down = (w c)^T a      d down_bias = sum w g
    d W_up = dz^T x           d V_up = dz^T u           d A_up = d^T x            d up_bias = sum dz
    dx[t] = sum_k (dz @ W_up + d @ A_up)[position of (t, k)]

The formulas are here once; a backend gives them its products and its row-wise operators (`Steps`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.reference.activation import activate
from cumo_kernels.backends.reference.grouped_gemm import grouped_gemm_weight_grad, linear
from cumo_kernels.backends.reference.permutation import combine, permute, to_slots
from cumo_kernels.packing.formats import unpack
from cumo_kernels.types import accumulate_dtype


@dataclass(frozen=True)
class Weight:
    """A weight of one layer as an op gets it; `format` None: `data` is plain."""

    data: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    format: str | None
    is_transposed: bool = False

    @property
    def T(self) -> "Weight":
        """The same weight for products with its columns."""
        return Weight(self.data, self.scales, self.zeros, self.format, not self.is_transposed)

    def plain(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """(E, N, K) or, transposed, (E, K, N), a view if it is plain; of `expert` alone without E."""
        part = slice(None) if expert is None else slice(expert, expert + 1)
        if self.format is None:
            found = self.data[part]
        else:
            zeros = None if self.zeros is None else self.zeros[part]
            found = unpack(self.data[part], self.scales[part], zeros, self.format, dtype)
        found = found.transpose(1, 2) if self.is_transposed else found
        return found if expert is None else found[0]


@dataclass(frozen=True)
class Steps:
    """What a backend computes with."""

    gather: Callable  # (x, permutation, inverse_permutation, top_k) -> rows
    product: Callable  # (rows, Weight, expert_offsets, bias) -> rows
    activate: Callable  # (z, activation) -> a
    combine: Callable  # (rows, topk_weights, inverse_permutation, top_k) -> tokens
    weight_grad: Callable  # (grad, rows, expert_offsets) -> gradient of the weight
    bias_grad: Callable  # (grad, expert_offsets) -> gradient of the bias


def _product(rows: Tensor, weight: Weight, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return linear(rows, weight.plain(rows.dtype), expert_offsets, bias)


STEPS = Steps(
    gather=permute,
    product=_product,
    activate=activate,
    combine=combine,
    weight_grad=lambda grad, rows, offsets: grouped_gemm_weight_grad(
        grad, rows, offsets, None, None, 1, False
    )[0],
    bias_grad=lambda grad, offsets: grouped_gemm_weight_grad(grad, grad[:, :1], offsets, None, None, 1, True)[
        1
    ],
)


def _thin(weight: Tensor | None) -> Weight:
    return Weight(weight, None, None, None)


def forward(
    steps: Steps,
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
    up = Weight(up_proj, up_scales, up_zeros, up_format)
    down = Weight(down_proj, down_scales, down_zeros, down_format)
    rows = steps.gather(x, permutation, inverse_permutation, top_k)
    z, u = _layer(steps, rows, up, up_a, up_b, expert_offsets, up_bias)
    a = steps.activate(z, activation)
    y, v = _layer(steps, a, down, down_a, down_b, expert_offsets, down_bias)
    out = steps.combine(y, topk_weights, inverse_permutation, top_k)
    keep = lambda tensor, kept: tensor if kept and tensor is not None else x.new_empty(0)
    trains = memory != "none"
    return (
        out,
        keep(z, memory in ("preact", "all")),
        keep(a, memory == "all"),
        keep(u, trains),
        keep(v, trains),
    )


def _layer(
    steps: Steps,
    rows: Tensor,
    weight: Weight,
    low: Tensor | None,
    high: Tensor | None,
    expert_offsets: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """-> rows W^T + (rows A^T) V^T + bias, and rows A^T; the second None without an adapter."""
    out = steps.product(rows, weight, expert_offsets, bias)
    if low is None:
        return out, None
    thin = steps.product(rows, _thin(low), expert_offsets, None)
    return out + steps.product(thin, _thin(high), expert_offsets, None), thin


def backward(
    steps: Steps,
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
    top_k, dtype, wide = topk_weights.shape[1], x.dtype, accumulate_dtype(x.dtype)
    act = get_activation(activation)
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_thin = (
        n == "1" for n in needs
    )
    need_up_a, need_up_b, need_down_a, need_down_b = need_thin
    need_dz = need_x or need_up or need_up_bias or need_up_a or need_up_b
    up = Weight(up_proj, up_scales, up_zeros, up_format)
    down = Weight(down_proj, down_scales, down_zeros, down_format)
    product = lambda rows, weight: steps.product(rows, weight, expert_offsets, None)
    weight_grad = lambda gradient, rows: steps.weight_grad(gradient, rows, expert_offsets)
    found = [x.new_empty(0) for _ in needs]
    found[1] = topk_weights.new_empty(0)

    rows = None
    if memory == "x" or need_up or need_up_a:
        rows = steps.gather(x, permutation, inverse_permutation, top_k)
    if memory == "x":
        z = steps.product(rows, up, expert_offsets, up_bias)
        if up_b is not None:
            z = z + product(u, _thin(up_b))
    g = steps.gather(grad, permutation, inverse_permutation, top_k)
    w = topk_weights.flatten().index_select(0, permutation).to(wide)[:, None]
    if memory != "all" and (need_down or need_down_a or need_weights):
        a = steps.activate(z, activation)
    thin = None
    if down_b is not None and (need_dz or need_weights or need_down_a):
        thin = product(g, _thin(down_b).T)

    if need_down or need_down_bias or need_down_b:
        weighted = (w * g).to(dtype)
        if need_down:
            found[3] = weight_grad(weighted, a)
        if need_down_bias:
            found[5] = steps.bias_grad(weighted, expert_offsets)
        if need_down_b:
            found[9] = weight_grad(weighted, v)
    if need_down_a:
        found[8] = weight_grad((w * thin).to(dtype), a)
    if need_dz or need_weights:
        h = product(g, down.T)
        if thin is not None:
            h = h + product(thin, _thin(down_a).T)
        h = h.to(wide)
        if need_weights:
            dw = torch.linalg.vecdot(h, a.to(wide))
            if down_bias is not None:
                dw = (
                    dw
                    + steps.product(g.to(wide), _thin(down_bias[:, None, :].to(wide)), expert_offsets, None)[
                        :, 0
                    ]
                )
            found[1] = to_slots(dw, inverse_permutation).view_as(topk_weights).to(topk_weights.dtype)
    if need_dz:
        dz = act.backward(h * w, z.to(wide)).to(dtype)
        thin = None if up_b is None or not (need_x or need_up_a) else product(dz, _thin(up_b).T)
        if need_up:
            found[2] = weight_grad(dz, rows)
        if need_up_bias:
            found[4] = steps.bias_grad(dz, expert_offsets)
        if need_up_a:
            found[6] = weight_grad(thin, rows)
        if need_up_b:
            found[7] = weight_grad(dz, u)
        if need_x:
            dx = product(dz, up.T)
            if thin is not None:
                dx = dx + product(thin, _thin(up_a).T)
            found[0] = steps.combine(dx, None, inverse_permutation, top_k)
    return tuple(found)


def adapted_expert_mlp(x: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `forward`."""
    return forward(STEPS, x, *rest)


def adapted_expert_mlp_backward(grad: Tensor, *rest) -> tuple[Tensor, ...]:
    """See `backward`."""
    return backward(STEPS, grad, *rest)


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
    steps: Steps = STEPS,
) -> tuple[Tensor, Tensor]:
    """-> (out, pre_activation) of rows times a packed weight; the second is empty without an activation."""
    rows = x if permutation is None else steps.gather(x, permutation, inverse_permutation, top_k)
    weight = Weight(packed, scales, zeros, format, is_transposed)
    out = steps.product(rows, weight, expert_offsets, bias)
    return (out, x.new_empty(0)) if activation is None else (steps.activate(out, activation), out)
