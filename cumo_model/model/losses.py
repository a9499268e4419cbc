"""The two auxiliary losses as CuMo defines them, and how they average over layers and scales.

For one call of one layer, over G groups of tokens (crops, images, or the whole batch):

    balance = E * mean_g sum_e density[g, e] * probs[g, e]      1 when uniform, E when collapsed
    z       = mean_g mean_{t in g} logsumexp(logits[t])^2

density counts first choices only and carries no gradient; probs is the mean softmax probability. Both
statistics come with every `Routing`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cumo_kernels import RouterStats


def _balance(mean_probs: Tensor, top1_density: Tensor) -> Tensor:
    """(..., G, E), (..., G, E) -> (..., G)."""
    return (mean_probs * top1_density).sum(-1) * mean_probs.shape[-1]


def load_balancing_loss(stats: RouterStats | tuple[Tensor, Tensor]) -> Tensor:
    """RouterStats, or (mean_probs, top1_density), both (G, E) -> scalar fp32."""
    mean_probs, density = (stats.mean_probs, stats.top1_density) if isinstance(stats, RouterStats) else stats
    return _balance(mean_probs, density).mean()


def router_z_loss(stats: RouterStats) -> Tensor:
    """Mean over the groups of the mean squared logsumexp -> scalar fp32."""
    return stats.mean_squared_logsumexp.mean()


def place_losses(
    layers: Sequence[RouterStats], group_counts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Balance and z-loss of one place: mean over its layers, and over scales if there are several.

    Args:
        layers: statistics of each layer, all of the same G groups and E experts.
        group_counts: groups of each scale, in order, summing to G. Scales weigh the same, however many groups
            they have. None: one scale.

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
