"""The two auxiliary losses of CuMo, and their averages over layers and scales.

For one call of one layer, over G groups of tokens (crops, images, or the whole batch):

    balance = E * mean_g sum_e density[g, e] * probs[g, e]      1 when uniform, E when collapsed
    z       = mean_g mean_{t in g} logsumexp(logits[t])^2

density is the share of tokens whose first choice is expert e; it carries no gradient. probs is the mean
softmax probability. Both are part of every `Routing`. Padding of the language model's rows is in no group,
except with compat. With noisy top-k (routers.py) balance is the sum of its importance and load losses over
all tokens of a call (arXiv 1701.06538). Sources: the load balancing loss of Switch Transformer (arXiv
2101.03961) and the router z-loss of ST-MoE (arXiv 2202.08906), as used by CuMo (arXiv 2405.05949).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from cumo_kernels import RouterStats
from cumo_model.model.recording import PLACES, RoutingRecord


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


def router_losses(
    records: Sequence[RoutingRecord], clip_scales: Sequence[int] | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Balance loss and z-loss of each place that has run, in the order in which the original code adds them.

    Args:
        records: the routing of all layers of one call.
        clip_scales: `group_counts` of the tower.
    """
    found = {}
    for place in PLACES:
        layers = [record for record in records if record.place == place]
        if layers:
            stats = [record.routing.stats for record in layers]
            balance, z = place_losses(stats, clip_scales if place == "clip" else None)
            own = [record.balance for record in layers if record.balance is not None]
            found[place] = (torch.stack(own).mean() if own else balance, z)
    return found


def smoothed_language_loss(smoothing: float) -> Callable[..., Tensor]:
    """A `loss_function` for models of transformers: cross entropy with label smoothing.

    The target of a token has 1 - smoothing for the label and smoothing / V for each of the V words
    (arXiv 1512.00567, section 7), as in transformers' LabelSmoother.
    """

    def loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
        rows, targets = logits.float().view(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
        total = nn.functional.cross_entropy(rows, targets, label_smoothing=smoothing, reduction="sum")
        return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    loss.takes_rows = True
    return loss


def label_count(num_items_in_batch: Tensor | int, device: torch.device) -> Tensor:
    """`num_items_in_batch` as a () tensor, at least 1. nn.DataParallel passes tensors of one element."""
    return torch.as_tensor(num_items_in_batch, device=device).reshape(-1)[0].clamp(min=1)


def share_of_labels(shifted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Weight of a micro-batch in the average over a step: its share of the step's labels.

    Args:
        shifted: labels of this micro-batch, without those of the first position, which nothing predicts.
        num_items_in_batch: labels of the step, as transformers' Trainer counts them; None: the weight is 1.
    """
    if num_items_in_batch is None:
        return 1.0
    return (shifted != -100).sum() / label_count(num_items_in_batch, shifted.device)


@dataclass(frozen=True)
class Targets:
    """What each position predicts, and how the losses of a step are averaged.

    Attributes:
        tokens: (B, S) int64: position t predicts tokens[:, t]; -100 where it predicts nothing.
        labels: (B, S) int64, not shifted; None if only shifted labels are given.
        count: () int64: number of predicted tokens, at least 1.
        share: weight of this call in the average over the step: its labels / `num_items_in_batch`; 1 without.
        num_items: `num_items_in_batch`, at least 1.
    """

    tokens: Tensor
    labels: Tensor | None
    count: Tensor
    share: Tensor | float
    num_items: Tensor | None

    @classmethod
    def of(
        cls,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items: Tensor | int | None,
        image_token: int,
        shape: tuple[int, int],
    ) -> "Targets | None":
        """Targets of labels or already shifted labels, None without either.

        Labels that are image tokens are not predicted, but count in the share, because those who compute
        `num_items_in_batch` (transformers' Trainer) count them.

        Raises:
            ValueError: the labels' shape is not `shape`.
        """
        given, name = (labels, "labels") if shift_labels is None else (shift_labels, "shift_labels")
        if given is None:
            return None
        if tuple(given.shape) != tuple(shape):
            raise ValueError(f"{name} must be {tuple(shape)} like input_ids, got {tuple(given.shape)}")
        if shift_labels is None:  # shifting the labels avoids a copy of the logits
            labels = labels.masked_fill(labels == image_token, -100)
            given = nn.functional.pad(given[:, 1:], (0, 1), value=-100)
        tokens = given.masked_fill(given == image_token, -100)
        share = share_of_labels(given, num_items)
        if num_items is not None:
            num_items = label_count(num_items, given.device)
        return cls(tokens, labels, (tokens != -100).sum().clamp(min=1), share, num_items)

    @property
    def divisor(self) -> Tensor:
        """What the sum over the predicted tokens is divided by."""
        return self.count if self.num_items is None else self.num_items

    def loss(self, loss_function: Callable, logits: Tensor, **kwargs) -> Tensor:
        """Language loss of all logits (B, S, V), as transformers calls a `loss_function`.

        The default one gives the sum over the predicted tokens / `num_items_in_batch`, or their mean without
        it, and 0 if nothing is predicted.
        """
        if self.num_items is not None or takes_rows(loss_function):
            kwargs["num_items_in_batch"] = self.divisor
        if self.labels is None or takes_rows(loss_function):
            kwargs["shift_labels"] = self.tokens
        return loss_function(logits=logits, labels=self.labels, vocab_size=logits.shape[-1], **kwargs)

    def loss_of_rows(self, loss_function: Callable, rows: Tensor) -> Tensor:
        """The same of the logits (n, V) of the predicted tokens only; `loss_function` must take rows."""
        return loss_function(
            logits=rows,
            labels=None,
            shift_labels=self.tokens[self.tokens != -100],
            vocab_size=rows.shape[-1],
            num_items_in_batch=self.divisor,
        )


def takes_rows(loss_function: Callable) -> bool:
    """Whether a loss function reads nothing but logits, shifted labels and their number."""
    return loss_function is ForCausalLMLoss or getattr(loss_function, "takes_rows", False)
