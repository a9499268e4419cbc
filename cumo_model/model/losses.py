"""The two auxiliary losses of CuMo, and their averages over layers and scales.

For one call of one layer, over G groups of tokens (crops, images, or the whole batch):

    balance = E * mean_g sum_e density[g, e] * probs[g, e]      1 when uniform, E when collapsed
    z       = mean_g mean_{t in g} logsumexp(logits[t])^2

density is the share of tokens whose first choice is expert e; it carries no gradient. probs is the mean
softmax probability. Both are part of every `Routing`. Sources: the load balancing loss of Switch Transformer
(arXiv 2101.03961) and the router z-loss of ST-MoE (arXiv 2202.08906), as used by CuMo (arXiv 2405.05949).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cumo_kernels import RouterStats


def _balance(mean_probs: Tensor, top1_density: Tensor) -> Tensor:
    """(..., G, E), (..., G, E) -> (..., G)."""
    return (mean_probs * top1_density).sum(-1) * mean_probs.shape[-1]


def load_balancing_loss(stats: RouterStats | tuple[Tensor, Tensor]) -> Tensor:
    """Load balancing loss: the mean over the groups of E * sum_e density[g, e] * probs[g, e].

    Args:
        stats: RouterStats, or the pair (mean_probs, top1_density), both (G, E) fp32.

    Returns:
        Scalar fp32, differentiable in mean_probs; 1 for uniform routing, E if one expert gets all tokens.
    """
    mean_probs, density = (stats.mean_probs, stats.top1_density) if isinstance(stats, RouterStats) else stats
    return _balance(mean_probs, density).mean()


def router_z_loss(stats: RouterStats) -> Tensor:
    """Router z-loss: the mean over the groups of the mean squared logsumexp of the router logits.

    Args:
        stats: RouterStats of G groups.

    Returns:
        Scalar fp32, differentiable.
    """
    return stats.mean_squared_logsumexp.mean()


def place_losses(
    layers: Sequence[RouterStats], group_counts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Balance loss and z-loss of one place (tower, connector or language model).

    Each is the mean over the layers of the place, and over the scales if there are several.

    Args:
        layers: statistics of each layer, all with the same G groups and E experts.
        group_counts: number of groups of each scale, in order; they sum to G. Each scale has the same weight,
            independent of its number of groups. None: one scale.

    Returns:
        (balance, z), scalars fp32, differentiable.
    """
    mean_probs = torch.stack([stats.mean_probs for stats in layers])  # (L, G, E)
    density = torch.stack([stats.top1_density for stats in layers])
    z = torch.stack([stats.mean_squared_logsumexp for stats in layers])  # (L, G)
    losses = torch.stack([_balance(mean_probs, density), z]).mean(1)  # (2, G)
    if group_counts is None or len(group_counts) == 1:
        balance, z = losses.mean(1).unbind()
    else:
        balance, z = (
            torch.stack([scale.mean(1) for scale in losses.split(list(group_counts), 1)]).mean(0).unbind()
        )
    return balance, z


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the predicted tokens; position t predicts labels[:, t + 1].

    Args:
        logits: (B, S, V), converted to fp32.
        labels: (B, S) int64; -100 is ignored.

    Returns:
        Scalar fp32; 0 if no token is predicted.
    """
    check_labels(labels, logits)
    targets = nn.functional.pad(
        labels[:, 1:], (0, 1), value=-100
    ).flatten()  # shifting the labels avoids a copy of the logits
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def check_labels(labels: Tensor, rows: Tensor) -> None:
    if labels.shape != rows.shape[:2]:
        raise ValueError(f"labels must be {tuple(rows.shape[:2])} like input_ids, got {tuple(labels.shape)}")
