"""Calls of route with other scores, a selection bias, groups of experts or a given choice, for cases.py."""

from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from cumo_kernels import ops
from cumo_kernels.backends import reference
from cumo_kernels.types import Routing, Scoring

OP = "scored_route"
MARGIN = 1e-6  # of the largest rank; scores of two backends differ by less
TRIES = 100  # rows of logits


def _grouped(num_experts: int, top_k: int) -> tuple[int, int]:
    """-> number of groups, the largest divisor of E up to 8; how many may be chosen from, at least half."""
    groups = max(n for n in range(1, min(num_experts, 8) + 1) if num_experts % n == 0)
    return groups, max(-(-top_k * groups // num_experts), (groups + 1) // 2)


ROUTERS = {  # name -> scoring for E experts and K of them, whether it renormalises, what chooses with it
    "sigmoid-groups": (lambda E, K: Scoring("sigmoid", *_grouped(E, K), "top2", 2.5), True, "bias"),
    "softmax-groups": (lambda E, K: Scoring("softmax", *_grouped(E, K), "max", 16.0), False, None),
    "sqrtsoftplus-bias": (lambda E, K: Scoring("sqrtsoftplus", scale=1.5), True, "bias"),
    "sigmoid": (lambda E, K: Scoring("sigmoid"), False, None),
    "softmax-given": (lambda E, K: Scoring("softmax"), True, "caller"),
    "sigmoid-given": (lambda E, K: Scoring("sigmoid", scale=2.5), True, "caller"),
}


def in_turn(op: str, family: str, number: int) -> dict[str, str]:
    """The router of the case of a family with this number."""
    return {"router": [*ROUTERS][(number + crc32(family.encode())) % len(ROUTERS)]} if op == OP else {}


def keywords(how: Scoring) -> dict[str, str | int | float]:
    """The arguments of `route` that ask for `how`."""
    return {
        "score": how.score, "expert_groups": how.expert_groups, "top_groups": how.top_groups,
        "group_score": how.group_score, "scale": how.scale,
    }  # fmt: skip


def near_ties(logits: Tensor, bias: Tensor | None, how: Scoring) -> Tensor:
    """(T,) bool: tokens for which the rounding of scores may decide the choice."""
    wide = logits.double()
    if bias is None and how.expert_groups == 1:  # ranked by the logits
        return torch.zeros_like(wide[:, 0], dtype=torch.bool)
    elementwise = (
        torch.sigmoid if how.score == "sigmoid" else lambda t: torch.nn.functional.softplus(t).sqrt()
    )
    rank = wide.softmax(-1) if how.score == "softmax" else elementwise(wide)
    rank = rank if bias is None else rank + bias.double()
    grouped = rank.unflatten(-1, (how.expert_groups, rank.shape[1] // how.expert_groups))
    best = grouped.amax(-1) if how.group_score == "max" else grouped.topk(2).values.sum(-1)
    allowed = MARGIN * rank.abs().amax(-1, keepdim=True)
    near = torch.zeros_like(wide[:, 0], dtype=torch.bool)
    for ranks in (rank, best):
        gaps = ranks.sort(-1).values.diff(dim=-1)
        # equal logits tie everywhere, unless different biases are added to them
        near |= ((gaps < allowed) & ((gaps > 0) | (bias is not None))).any(-1)
    return near


def apart(logits: Tensor, bias: Tensor | None, how: Scoring) -> Tensor:
    """`logits` (T, E) with the rows that nearly tie replaced by one that does not.

    Raises:
        ValueError: none of many rows is without near ties.
    """
    generator = torch.Generator().manual_seed(0)
    step = 4.0 / logits.shape[1]  # different logits from -2 to 2, in another order each time
    for _ in range(TRIES):
        row = torch.randperm(logits.shape[1], generator=generator)[None] * step - 2.0
        row = row.to(logits)
        if not near_ties(row, bias, how).any():
            return torch.where(near_ties(logits, bias, how)[:, None], row, logits)
    raise ValueError(f"{how}: none of {TRIES} rows of {logits.shape[1]} logits is without near ties")


def given_choice(case, generator: torch.Generator) -> Tensor:
    """(T, K) int32: different experts of each token; a third of the slots is dropped."""
    chosen = torch.rand(case.T, case.E, generator=generator).argsort(1)[:, : case.K]
    dropped = torch.rand(case.T, case.K, generator=generator) < 1 / 3
    return torch.where(dropped, case.E, chosen).int()


def parts(
    case,
    logits: Tensor | None,
    gated: Sequence[Tensor],
    logits_of: Callable,
    place: Callable,
    groups: int | Tensor,
    offsets: Tensor | None,
) -> tuple[Callable, Callable, tuple[Tensor, ...], Callable, tuple[Tensor, ...]]:
    """-> run, reference, inputs, integers, true integers of a Case; `gated` is x and the gate."""
    make, renormalize, chooses = ROUTERS[case.router]
    how = make(case.E, case.K)
    if how.group_score == "top2" and case.E == how.expert_groups:
        how = Scoring(how.score, how.expert_groups, how.top_groups, "max", how.scale)
    if how.expert_groups == how.top_groups:
        how = Scoring(how.score, scale=how.scale)
    inputs, bias, given = tuple(gated) or (logits,), None, None
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(20):  # with a gate the logits are what they are, and the bias must keep them apart
        if chooses == "bias":
            bias = (torch.randperm(case.E, generator=generator) + torch.rand(1, generator=generator)) / 61
            bias = (bias / case.E).to(inputs[0].device, torch.float32)
        if not gated or not near_ties(logits_of(*inputs), bias, how).any():
            break
    if chooses == "caller":
        given = given_choice(case, generator).to(inputs[0].device)
    elif not gated:
        inputs = (apart(logits, bias, how),)
    args = (bias, offsets, case.groups, case.K, renormalize, str(how), given)

    def found(x: Tensor, *gate: Tensor) -> Routing:
        more = {"groups": groups, "renormalize": renormalize, "selection_bias": bias}
        return ops.route(place(x), case.K, *gate, **more, **keywords(how), topk_indices=given)

    def run(x: Tensor, *gate: Tensor) -> tuple[Tensor, ...]:
        routing = found(x, *gate)
        return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp

    expected = lambda *inputs: reference.scored_route(logits_of(*inputs), None, *args)
    return (
        run,
        lambda *inputs: expected(*inputs)[::2],
        inputs,
        lambda *inputs: (found(*inputs).topk_indices,),
        expected(*inputs)[1:2],
    )
