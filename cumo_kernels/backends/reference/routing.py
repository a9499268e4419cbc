"""Routing (reference): softmax, top-k, renormalised weights, loss statistics, and the sort by expert.

    p = softmax(logits)            idx = the K largest logits, ties to the lowest index
    w = p[idx] / sum(p[idx])       (or p[idx] when not renormalised)
    mean_probs[g] = mean of p, top1_density[g] = share of idx[:, 0], over the tokens of group g
    mean_squared_logsumexp[g] = mean of logsumexp(logits)^2

`compat` repeats the original CuMo in the dtype d of the logits (cumo_spec.md 2.4). Both variants choose with
torch.topk of p, whose order of ties is that of this device, and compute logsumexp and its square in d. "cumo"
(CLIP, connector) rounds p to d before the top-k and computes the rest in d. "cumo_llm" rounds only the final
weights.
"""

import torch
from torch import Tensor

from cumo_kernels.types import accumulate_dtype


def _group_of_tokens(num_tokens: int, group_offsets: Tensor) -> Tensor:
    """(T,): the group of each token; G for tokens before the first and after the last group."""
    tokens = torch.arange(num_tokens, device=group_offsets.device, dtype=group_offsets.dtype)
    group = torch.searchsorted(group_offsets, tokens, right=True) - 1
    return torch.where(group < 0, group_offsets.shape[0] - 1, group)


def group_mean(values: Tensor, group_offsets: Tensor | None, num_groups: int) -> Tensor:
    """(T, ...) -> (G, ...): the mean over each group's tokens, zero for a group without tokens."""
    if values.shape[0] == 0:
        return values.new_zeros(num_groups, *values.shape[1:])
    if group_offsets is None:
        return values.unflatten(0, (num_groups, -1)).mean(1)
    group = _group_of_tokens(values.shape[0], group_offsets)
    counts = (group_offsets[1:] - group_offsets[:-1]).clamp(min=1)
    sums = values.new_zeros(num_groups + 1, *values.shape[1:])
    if values.device.type == "cuda":  # there index_add has no fixed order; index_put sorts first
        sums = sums.index_put((group,), values, accumulate=True)
    else:
        sums = sums.index_add(0, group, values)
    return sums[:num_groups] / counts.view(-1, *[1] * (values.ndim - 1))


def spread_group_grad(grad: Tensor, num_tokens: int, group_offsets: Tensor | None) -> Tensor:
    """Adjoint of `group_mean`: (G, ...) -> (T, ...)."""
    num_groups = grad.shape[0]
    if num_tokens == 0:
        return grad.new_zeros(0, *grad.shape[1:])
    if group_offsets is None:
        size = num_tokens // num_groups
        return (grad / size).repeat_interleave(size, dim=0)
    group = _group_of_tokens(num_tokens, group_offsets)
    counts = (group_offsets[1:] - group_offsets[:-1]).clamp(min=1)
    scaled = grad / counts.view(-1, *[1] * (grad.ndim - 1))
    return torch.cat([scaled, scaled.new_zeros(1, *grad.shape[1:])]).index_select(0, group)


def route(
    x: Tensor,
    gate_weight: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
    compat: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> topk_weights (T, K), topk_indices (T, K) int32, mean_probs (G, E), top1_density (G, E), z (G,)."""
    logits = x if gate_weight is None else x @ gate_weight.T
    dtype, wide = logits.dtype, accumulate_dtype(logits.dtype)
    num_experts = logits.shape[1]
    probs = logits.to(wide).softmax(-1)
    if compat == "cumo":
        probs = probs.to(dtype)
    if compat:
        indices = probs.detach().topk(top_k).indices
    else:  # ranked by logits, so that the experts do not depend on the rounding of a backend's exp()
        indices = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probs.gather(1, indices)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if compat == "cumo_llm":
        weights = weights.to(dtype)

    mean_probs = group_mean(probs, group_offsets, num_groups).to(wide)
    first = (indices[:, :1] == torch.arange(num_experts, device=x.device)).to(wide)  # one_hot would sync
    top1_density = group_mean(first, group_offsets, num_groups)
    lse = (logits if compat else logits.to(wide)).logsumexp(-1)
    z = group_mean(lse.square().to(wide), group_offsets, num_groups)
    indices = indices.to(torch.int32, memory_format=torch.contiguous_format)  # also without tokens
    return weights.to(wide), indices, mean_probs, top1_density, z


def route_backward(
    grad_weights: Tensor,
    grad_mean_probs: Tensor,
    grad_z: Tensor,
    x: Tensor,
    gate_weight: Tensor | None,
    topk_indices: Tensor,
    group_offsets: Tensor | None,
    renormalize: bool,
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of topk_weights, mean_probs and z -> gradients of x and gate_weight, empty where not needed.

    With v = p[idx] and s = sum(v): dv = (dw - <dw, w>) / s. Then dp sums dv and the groups' share,
    and dlogits = p * (dp - <dp, p>) + 2 * lse * p * (the groups' share of dz). The rounding of `compat` is
    treated as the identity.
    """
    logits = x if gate_weight is None else x @ gate_weight.T
    wide = accumulate_dtype(logits.dtype)
    logits32 = logits.to(wide)
    probs = logits32.softmax(-1)
    indices = topk_indices.long()
    grad_values = grad_weights.to(wide)
    if renormalize:
        values = probs.gather(1, indices)
        total = values.sum(-1, keepdim=True)
        grad_values = (grad_values - (grad_values * values / total).sum(-1, keepdim=True)) / total
    num_tokens = logits.shape[0]
    grad_probs = spread_group_grad(grad_mean_probs.to(wide), num_tokens, group_offsets)
    grad_probs = grad_probs.scatter_add(1, indices, grad_values)
    grad_logits = probs * (grad_probs - (grad_probs * probs).sum(-1, keepdim=True))
    lse = logits32.logsumexp(-1)
    grad_logits = (
        grad_logits
        + probs * (2 * lse * spread_group_grad(grad_z.to(wide), num_tokens, group_offsets))[:, None]
    )
    grad_logits = grad_logits.to(logits.dtype)
    nothing = x.new_empty(0)
    if gate_weight is None:
        return grad_logits if need_x else nothing, nothing
    return grad_logits @ gate_weight if need_x else nothing, grad_logits.T @ x if need_gate else nothing


def sort_by_expert(topk_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> tokens_per_expert (E,), expert_offsets (E + 1,), permutation (S,), inverse_permutation (S,)."""
    slots = topk_indices.flatten()
    experts, permutation = slots.sort(stable=True)
    tokens_per_expert = torch.bincount(slots, minlength=num_experts + 1)[:num_experts].int()
    expert_offsets = torch.nn.functional.pad(tokens_per_expert.cumsum(0, dtype=torch.int32), (1, 0))
    positions = torch.arange(slots.shape[0], dtype=torch.int32, device=slots.device)
    inverse = torch.empty_like(positions)
    inverse[permutation] = torch.where(experts < num_experts, positions, -1)
    return tokens_per_expert, expert_offsets, permutation.int(), inverse
