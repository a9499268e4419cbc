"""The original CuMo's computation, written from its formulas (arXiv 2405.05949, section 3): the baseline.

    p = softmax(gate(x)) in fp32, rounded;   (v, idx) = topk(p, K);   w = v / sum(v)
    y[t] = sum_k w[t, k] * expert[idx[t, k]](x[t]),  a Python loop over crops and experts
    balance = E^2 * mean_{crop, e}(share of first choices * mean of p),   z = mean(logsumexp(gate(x))^2)

Like the original, it rounds to the dtype of x after every step and sums in place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def activate(z: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    if name == "gelu":
        return F.gelu(z)
    if name == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    raise ValueError(f"name must be quick_gelu, gelu or swiglu, got {name!r}")


def expert(x: Tensor, e: int, up: Tensor, down: Tensor, biases: tuple[Tensor, ...], name: str) -> Tensor:
    up_bias, down_bias = (biases[0][e], biases[1][e]) if biases else (None, None)
    return F.linear(activate(F.linear(x, up[e], up_bias), name), down[e], down_bias)


def experts_loop(
    x: Tensor,
    topk_weights: Tensor,
    topk_indices: Tensor,
    up: Tensor,
    down: Tensor,
    *biases: Tensor,
    activation: str,
    groups: int,
) -> Tensor:
    """x (T, H), weights and indices (T, K) -> (T, O); T tokens are `groups` equal crops."""
    crops = x.unflatten(0, (groups, -1))
    weights = topk_weights.to(x.dtype).unflatten(0, (groups, -1))
    indices = topk_indices.unflatten(0, (groups, -1))
    results = x.new_zeros(groups, crops.shape[1], down.shape[1])
    for crop in range(groups):
        for e in range(up.shape[0]):
            token, choice = torch.where(indices[crop] == e)
            rows = expert(crops[crop][token], e, up, down, biases, activation)
            results[crop][token] += weights[crop][token, choice, None] * rows
    return results.flatten(0, 1)


def moe_layer(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *biases: Tensor,
    activation: str,
    groups: int,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, H) -> (T, O), balance loss, z-loss."""
    logits = F.linear(x, gate)
    num_experts = gate.shape[0]
    z = logits.logsumexp(-1).square().mean()
    probs = logits.softmax(-1, dtype=torch.float32).to(x.dtype)
    values, indices = probs.topk(top_k, dim=-1)
    weights = values / values.sum(-1, keepdim=True)
    first = F.one_hot(indices[:, 0], num_experts).float().unflatten(0, (groups, -1)).mean(1)
    mean_probs = probs.unflatten(0, (groups, -1)).mean(1)
    balance = (first * mean_probs).mean() * num_experts**2
    out = experts_loop(x, weights, indices, up, down, *biases, activation=activation, groups=groups)
    return out, balance, z
