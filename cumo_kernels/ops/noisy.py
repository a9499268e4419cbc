"""Routers with noise, in plain torch on top of `route`: noisy top-k gating and SparseMixer."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cumo_kernels.hostsync import values_at_hand
from cumo_kernels.ops.checks import check_device, check_float, check_shape, check_top_k
from cumo_kernels.ops.forward_mode import refuse_forward_mode
from cumo_kernels.ops.noise import check_seed, check_share, normal, uniform
from cumo_kernels.ops.routing import route, routing_from_topk
from cumo_kernels.types import Routing, accumulate_dtype

SPREAD = 1e-10  # the smallest standard deviation of the noise in the load loss


@dataclass(frozen=True)
class NoisyRouting:
    """A plan of `noisy_top_k` with its two balance losses, each a () tensor to be multiplied by a weight."""

    routing: Routing
    importance_loss: Tensor  # squared coefficient of variation of the experts' sums of weights
    load_loss: Tensor  # the same of the experts' expected numbers of tokens


def _squared_variation(values: Tensor) -> Tensor:
    """Population variance over squared mean; 0 of zeros."""
    mean = values.mean()
    return (values - mean).square().mean() / (mean.square() + torch.finfo(values.dtype).tiny)


def noisy_top_k(
    x: Tensor, top_k: int, gate_weight: Tensor, noise_weight: Tensor, *, seed: int | Tensor | None
) -> NoisyRouting:
    """Noisy top-k gating (Shazeer et al., arXiv 1701.06538, section 2.1 and appendix A).

    With h = x Wg + n * softplus(x Wn) and n standard normal, the K largest h choose, and weigh by their
    softmax. importance[e] is the sum of the weights of e; load[e] sums over tokens the probability that e is
    chosen if its own noise is drawn again: cdf((x Wg - the K-th largest of the other h) / softplus(x Wn)).

    Args:
        x: (T, H) float.
        top_k: experts per token.
        gate_weight: (E, H), dtype of x.
        noise_weight: (E, H), dtype of x.
        seed: int or () int64 tensor; the noise depends on it, on the token's row and on the expert only. None
            adds no noise, for evaluation; `load_loss` then compares logits without noise.

    Raises:
        ValueError: an argument is wrong; on the CPU also if `noise_weight` or logits are not finite.
    """
    for name, weight in (("gate_weight", gate_weight), ("noise_weight", noise_weight)):
        check_float("x", x)
        check_shape("x", x, "T", "H")
        check_shape(name, weight, "E", x.shape[1])
        check_float(name, weight)
        check_device(name, weight, "x", x)
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, got {weight.dtype}")
    check_shape("noise_weight", noise_weight, *gate_weight.shape)
    refuse_forward_mode("noisy_top_k", x, gate_weight, noise_weight)
    if values_at_hand(noise_weight) and not noise_weight.isfinite().all():
        expert = int((~noise_weight.detach().isfinite()).any(1).nonzero()[0])
        raise ValueError(f"noise_weight must be finite, got NaN or infinity for expert {expert}")
    top_k = check_top_k(top_k, gate_weight.shape[0])
    return noisy_plan(x @ gate_weight.T, x @ noise_weight.T, top_k, seed)


def noisy_plan(
    clean: Tensor,
    raw: Tensor,
    top_k: int,
    seed: int | Tensor | None,
    *,
    groups: int = 1,
    counted: Tensor | None = None,
    topk_indices: Tensor | None = None,
) -> NoisyRouting:
    """`noisy_top_k` from its two products.

    Args:
        clean: (T, E) float, x Wg.
        raw: (T, E) float, x Wn.
        top_k: experts per token.
        seed: as there.
        groups: as in `route`, for the statistics, which are those of the logits with noise.
        counted: (T,) bool: tokens that count in the losses. None: all tokens.
        topk_indices: (T, K) experts that are chosen already, as in `route`.

    Raises:
        ValueError: on the CPU, if `raw` is not finite where `clean` is.
    """
    if values_at_hand(raw) and (wrong := (clean.isfinite() & ~raw.isfinite()).any(0)).any():
        raise ValueError(
            "noise_weight must be finite and give finite products, "
            f"got NaN or infinity for expert {int(wrong.nonzero()[0])}"
        )
    wide = accumulate_dtype(clean.dtype)
    clean, spread = clean.to(wide), softplus(raw.to(wide))
    noisy = clean if seed is None else clean + normal(check_seed(seed), clean).to(wide) * spread
    routing = route(noisy, top_k, groups=groups, topk_indices=topk_indices)
    num_tokens, num_experts = clean.shape
    kept = lambda values: values if counted is None else values.where(counted[:, None], 0.0)
    # by token, as index_add into the experts has no fixed order on a GPU
    by_token = noisy.new_zeros(num_tokens, num_experts + 1)
    by_token = by_token.scatter(1, routing.topk_indices.long(), kept(routing.topk_weights))
    importance = by_token[:, :num_experts].sum(0)
    if top_k < num_experts:
        largest = noisy.topk(top_k + 1).values
        is_chosen = noisy >= largest[:, top_k - 1 : top_k]  # of a tie both thresholds are the same
        threshold = torch.where(is_chosen, largest[:, top_k:], largest[:, top_k - 1 : top_k])
        # a spread that underflows would give 0 * inf as gradient
        load = kept(torch.special.ndtr((clean - threshold) / spread.clamp(min=SPREAD))).sum(0)
    else:
        load = torch.full_like(importance, num_tokens)
    return NoisyRouting(routing, _squared_variation(importance), _squared_variation(load))


def sparsemixer(logits: Tensor, *, jitter: float = 0.01, seed: int | Tensor | None = None) -> Routing:
    """Two experts per token by SparseMixer (Liu et al., arXiv 2409.12136), as PhiMoE routes.

    For each of two choices in turn: logits further than 2 * jitter below the largest (relative to the larger
    magnitude) are left out, and the weight is the softmax over the others; weights do not sum to 1. In
    training the expert is sampled by that softmax, and where it is not the likeliest its weight is divided by
    3 in three of four cases, the midpoint rule of the paper's gradient.

    Args:
        logits: (T, E) float, E >= 2.
        jitter: relative distance.
        seed: int or () int64 tensor, for training; None takes the largest, for evaluation.

    Raises:
        ValueError: an argument is wrong; on the CPU also if logits are not finite.
    """
    check_float("logits", logits)
    check_shape("logits", logits, "T", "E")
    if logits.shape[1] < 2:
        raise ValueError(f"logits must have at least two experts, got {tuple(logits.shape)}")
    check_share("jitter", jitter)
    refuse_forward_mode("sparsemixer", logits)
    seed = None if seed is None else check_seed(seed)
    scores = logits.to(accumulate_dtype(logits.dtype))
    left, weights, chosen = scores, [], []
    for turn in range(2):
        with torch.no_grad():  # in the dtype of the logits, as PhiMoE decides
            raw, (top, best) = logits.detach(), left.detach().to(logits.dtype).max(-1, keepdim=True)
            far = (top - raw) / torch.maximum(raw.abs(), top) > 2 * jitter
        masked = left.masked_fill(far, -torch.inf)
        probs, expert = masked.softmax(-1), best
        if seed is not None:
            gumbel = -(-uniform(seed, scores, 2 * turn).log()).log()
            expert = (masked.detach() + gumbel).argmax(-1, keepdim=True)
        weight = probs.gather(1, expert)
        if seed is not None:
            whole = (expert == probs.argmax(-1, keepdim=True)) | (
                uniform(seed, scores[:, :1], 2 * turn + 1) > 0.75
            )
            # the gradient is that of the whole weight
            weight = weight + (torch.where(whole, weight, weight / 3) - weight).detach()
        weights.append(weight)
        chosen.append(expert)
        left = left.scatter(1, expert, -torch.inf)
    joined = torch.cat(weights, 1)
    if values_at_hand(joined) and not joined.isfinite().all():
        token = int((~joined.detach().isfinite()).any(1).nonzero()[0])
        raise ValueError(f"logits must be finite, got {logits[token].tolist()} for token {token}")
    return routing_from_topk(joined, torch.cat(chosen, 1), logits.shape[1])
