"""scored_route: python -m benchmarks.cases.bench_routers [--shape NAME] [--backend NAME] [--full]

Routers of well-known models, from fp32 logits to weights, sort and loss statistics: scores, selection bias,
groups of experts, many experts. Their peer is what transformers computes, and the statistics.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases.shapes import Shape
from benchmarks.harness import Case, Workload, main
from cumo_kernels import ops
from cumo_kernels.backends import reference
from cumo_kernels.types import Scoring
from cumo_kernels.verification.scored_cases import apart, keywords

OP = "scored_route"
ROUTERS = {  # name -> E, K, scoring, renormalised, with a bias
    "deepseek-v3": (256, 8, Scoring("sigmoid", 8, 4, "top2", 2.5), True, True),
    "kimi-k2": (384, 8, Scoring("sigmoid", scale=2.446), True, True),
    "deepseek-v2": (160, 6, Scoring("softmax", 8, 3, "max", 16.0), False, False),
    "deepseek-v4": (256, 6, Scoring("sqrtsoftplus", scale=1.5), True, True),
    "1024-experts": (1024, 16, Scoring("sigmoid"), True, True),
}
TOKENS = {"cuda": (8192, 16), "cpu": (512,)}


def cases(device: str, full: bool) -> list[Case]:
    names = ROUTERS if full or device == "cuda" else list(ROUTERS)[:3]
    return [
        Case(Shape(f"{name}-T{tokens}", tokens, experts, 0, 0, experts, top_k, "", False), "fp32")
        for tokens in TOKENS[device]
        for name in names
        for experts, top_k in [ROUTERS[name][:2]]
    ]


def router_of(shape: Shape) -> tuple[Scoring, bool, bool]:
    """-> scoring, whether weights are renormalised, whether a bias chooses; fitted to a smaller shape."""
    _, _, how, renormalize, has_bias = ROUTERS[shape.name.rpartition("-T")[0]]
    size = max(2, shape.E // how.expert_groups) if how.expert_groups > 1 else shape.E
    groups = shape.E // size
    enough = max(1, min(groups, how.top_groups * groups // how.expert_groups), -(-shape.K // size))
    return replace(how, expert_groups=groups, top_groups=enough), renormalize, has_bias


def _distinct(shape: Shape, how: Scoring, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """fp32 logits and bias of which rounding decides no choice: the scores of a token are a grid."""
    share = (torch.rand(shape.T, shape.E, dtype=torch.float64).argsort(1) + 0.5) / shape.E
    if how.score == "sigmoid":
        logits = torch.logit(share)
    else:
        logits = 4 * share if how.score == "softmax" else torch.expm1((0.2 + share).square()).log()
    logits, bias = logits.float(), None
    if has_bias:  # two experts differ by at least a twentieth of a step of the grid
        bias = ((0.37 * (torch.arange(shape.E) % 8) + 0.05 * torch.rand(shape.E)) / shape.E).float()
    return apart(logits, bias, how), bias  # a few tokens of which groups nearly tie


def _eager(logits: Tensor, bias: Tensor | None, shape: Shape, how: Scoring, renormalize: bool) -> tuple:
    """Weights as in the routers of transformers, the sort that its experts need, and the statistics."""
    if how.score == "softmax":
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid() if how.score == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
    rank = scores.detach() if bias is None else scores.detach() + bias
    if how.expert_groups > 1:
        grouped = rank.view(shape.T, how.expert_groups, -1)
        best = grouped.amax(-1) if how.group_score == "max" else grouped.topk(2).values.sum(-1)
        mask = torch.zeros_like(best).scatter_(1, best.topk(how.top_groups, sorted=False).indices, 1)
        rank = grouped.masked_fill(mask[:, :, None] == 0, -torch.inf).flatten(1)
    indices = rank.topk(shape.K).indices
    torch.argsort(indices.flatten(), stable=True)
    weights = scores.gather(1, indices)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if renormalize else weights
    probs = scores if how.score == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return weights * how.scale, probs.mean(0)[None], logits.logsumexp(-1).square().mean()[None]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    how, renormalize, has_bias = router_of(shape)
    logits, bias = _distinct(shape, how, has_bias)
    logits, bias = logits.to(device, dtype), None if bias is None else bias.to(device)

    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = ops.route(logits, shape.K, renormalize=renormalize, selection_bias=bias, **keywords(how))
        return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp

    def expected(logits: Tensor) -> tuple[Tensor, ...]:
        wide = None if bias is None else bias.to(logits.dtype)
        return reference.scored_route(logits, None, wide, None, shape.groups, shape.K, renormalize, str(how))[
            ::2
        ]

    plan = 4 * (2 * shape.slots + 2 * shape.slots)  # weights and ids, permutation and its inverse
    return Workload(
        run=run,
        reference=expected,
        inputs=(logits,),
        op=OP,
        flops=0,
        bytes=logits.element_size() * logits.numel() + plan,
        backward_flops=0,
        backward_bytes=2 * logits.element_size() * logits.numel() + 4 * 2 * shape.slots,
        peers={"torch-plain": lambda logits: _eager(logits, bias, shape, how, renormalize)},
        constants=() if bias is None else (bias,),
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
