"""Routing by scores (reference): other scores, a selection bias, groups of experts, a scale, a given choice.

    s = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
    r = logits without a bias and groups, else s + bias; experts outside of the best groups cannot be chosen
    idx = the K largest r, ties to the lowest index; or the given experts, where s[E] is 0
    w = scale * s[idx] / (sum(s[idx]) + tiny)      (or scale * s[idx] when not renormalised)
    mean_probs[g] = mean of s / (sum(s) + tiny) over the tokens of group g; the rest as in routing.py

tiny is 1e-20, since scores may all be 0. It changes no bit of the sum of the largest probabilities.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from cumo_kernels.backends.reference.routing import group_mean, spread_group_grad
from cumo_kernels.types import TINY, Scoring, accumulate_dtype


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else softplus(logits).sqrt()


def _total(scores: Tensor) -> Tensor:
    return scores.sum(-1, keepdim=True) + TINY


def _scores_at(indices: Tensor, scores: Tensor) -> Tensor:
    """(T, K): the scores of the chosen experts; 0 for index E, a dropped slot."""
    return pad(scores, (0, 1)).gather(1, indices)


def _slope(logits: Tensor, scores: Tensor, score: str) -> Tensor:
    """ds / dlogits of an elementwise score."""
    if score == "sigmoid":
        return scores * (1 - scores)
    return torch.where(scores == 0, 0, logits.sigmoid() / (2 * scores))  # at -inf it would be 0 / 0


def _choose(logits: Tensor, scores: Tensor, bias: Tensor | None, top_k: int, scoring: Scoring) -> Tensor:
    """(T, K) int64."""
    rank = logits  # every score ascends, and logits do not depend on the rounding of a backend's exp()
    if bias is not None or scoring.expert_groups > 1:
        rank = scores if bias is None else scores + bias
    if scoring.expert_groups > 1:
        rank = rank.unflatten(-1, (scoring.expert_groups, rank.shape[-1] // scoring.expert_groups))
        best = rank.amax(-1) if scoring.group_score == "max" else rank.topk(2).values.sum(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, : scoring.top_groups]
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
        rank = rank.masked_fill(outside[..., None], -torch.inf).flatten(-2)
    return rank.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def scored_route(
    x: Tensor,
    gate_weight: Tensor | None,
    selection_bias: Tensor | None,
    group_offsets: Tensor | None,
    num_groups: int,
    top_k: int,
    renormalize: bool,
    scoring: str,
    topk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> topk_weights (T, K), topk_indices (T, K) int32, mean_probs (G, E), top1_density (G, E), z (G,)."""
    how = Scoring.parse(scoring)
    logits = x if gate_weight is None else x @ gate_weight.T
    wide = accumulate_dtype(logits.dtype)
    logits = logits.to(wide)
    scores = _scores(logits, how.score)
    bias = None if selection_bias is None else selection_bias.to(wide)
    if topk_indices is None:
        indices = _choose(logits.detach(), scores.detach(), bias, top_k, how)
    else:
        indices = topk_indices.long()
    weights = _scores_at(indices, scores)
    if renormalize:
        weights = weights / _total(weights)
    weights = weights * how.scale
    probs = scores if how.score == "softmax" else scores / _total(scores)
    first = (indices[:, :1] == torch.arange(logits.shape[1], device=x.device)).to(wide)
    mean_probs, density = (group_mean(t, group_offsets, num_groups) for t in (probs, first))
    z = group_mean(logits.logsumexp(-1).square(), group_offsets, num_groups)
    return weights, indices.to(torch.int32, memory_format=torch.contiguous_format), mean_probs, density, z


def scored_route_backward(
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
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of topk_weights, mean_probs and z -> gradients of x and gate_weight, empty where not needed.

    With v = s[idx], n = sum(v) + tiny and m = sum(s) + tiny: dv = scale * (dw - <dw, v / n>) / n. The groups'
    share dp makes ds = (dp - <dp, s / m>) / m, plus dv where chosen. Then dlogits = s'(logits) * ds, plus the
    z part. For softmax dlogits = s * (dp + dv - <dp + dv, s>).
    """
    how = Scoring.parse(scoring)
    logits = x if gate_weight is None else x @ gate_weight.T
    dtype, num_tokens = logits.dtype, logits.shape[0]
    wide = accumulate_dtype(dtype)
    logits = logits.to(wide)
    scores, indices = _scores(logits, how.score), topk_indices.long()
    grad_values = grad_weights.to(wide) * how.scale
    if renormalize:
        values = _scores_at(indices, scores)
        total = _total(values)
        grad_values = (grad_values - (grad_values * values / total).sum(-1, keepdim=True)) / total
    grad_probs = spread_group_grad(grad_mean_probs.to(wide), num_tokens, group_offsets)
    # with a column for dropped slots
    scattered = lambda grad: pad(grad, (0, 1)).scatter_add(1, indices, grad_values)[:, :-1]
    if how.score == "softmax":
        grad_scores = scattered(grad_probs)
        grad_logits = scores * (grad_scores - (grad_scores * scores).sum(-1, keepdim=True))
    else:
        total = _total(scores)
        grad_scores = scattered((grad_probs - (grad_probs * scores / total).sum(-1, keepdim=True)) / total)
        grad_logits = grad_scores * _slope(logits, scores, how.score)
    grad_lse = 2 * logits.logsumexp(-1) * spread_group_grad(grad_z.to(wide), num_tokens, group_offsets)
    grad_logits = (grad_logits + logits.softmax(-1) * grad_lse[:, None]).to(dtype)
    nothing = x.new_empty(0)
    if gate_weight is None:
        return grad_logits if need_x else nothing, nothing
    return grad_logits @ gate_weight if need_x else nothing, grad_logits.T @ x if need_gate else nothing
