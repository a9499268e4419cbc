"""route with other scores than softmax, a selection bias, groups of experts and a scale."""

import math
import re

import pytest
import torch

from cumo_kernels import dispatch, route, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import Yardstick, assert_as_accurate_as_torch
from cumo_kernels.types import Scoring
from cumo_kernels.verification.scored_cases import apart, keywords
from tests.rounding import assert_outputs_of_fp32, assert_same_formula

HOW = [  # scoring, renormalize, bias
    pytest.param(Scoring("sigmoid"), True, False, id="sigmoid"),
    pytest.param(Scoring("sigmoid", scale=2.5), False, True, id="sigmoid-bias-raw"),
    pytest.param(Scoring("sigmoid", 4, 2, "top2", 2.5), True, True, id="deepseek-v3"),
    pytest.param(Scoring("softmax", 4, 2, "max", 16.0), False, False, id="deepseek-v2"),
    pytest.param(Scoring("softmax", 2, 1, "top2"), True, True, id="softmax-two-groups-bias"),
    pytest.param(Scoring("sqrtsoftplus", scale=1.5), True, True, id="deepseek-v4"),
    pytest.param(Scoring("sqrtsoftplus", 4, 3, "max"), False, False, id="sqrtsoftplus-groups"),
]
SHAPES = [  # num_tokens, num_experts, top_k, groups; experts divisible by 4
    pytest.param(0, 8, 2, 1, id="no-token"),
    pytest.param(1, 8, 2, 1, id="one-token"),
    pytest.param(54, 12, 3, 6, id="odd-groups"),
    pytest.param(33, 8, 4, 3, id="as-many-as-the-groups-hold"),
    pytest.param(64, 256, 8, 1, id="many-experts"),
    # 16 and 32 experts per lane in csrc/
    pytest.param(5, 512, 32, 1, id="512-experts"),
    pytest.param(20, 384, 8, 1, marks=pytest.mark.large, id="384-experts"),
    pytest.param(19, 1000, 32, 1, marks=pytest.mark.large, id="1000-experts"),
]


def outputs(routing):
    return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp


def loop(logits, bias, top_k, renormalize, how):
    """Token by token in Python floats; -> weights, experts, mean_probs."""
    scores_of = {
        "softmax": lambda row: [math.exp(v) / sum(map(math.exp, row)) for v in row],
        "sigmoid": lambda row: [1 / (1 + math.exp(-v)) for v in row],
        "sqrtsoftplus": lambda row: [math.log(1 + math.exp(v)) ** 0.5 for v in row],
    }[how.score]
    weights, experts, means = [], [], [0.0] * logits.shape[1]
    for row in logits.tolist():
        scores = scores_of(row)
        ranks = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = len(row) // how.expert_groups
        parts = [sorted(ranks[g * size : (g + 1) * size])[::-1] for g in range(how.expert_groups)]
        value = [part[0] if how.group_score == "max" else part[0] + part[1] for part in parts]
        best = sorted(range(how.expert_groups), key=lambda g: (-value[g], g))[: how.top_groups]
        allowed = [e for e in range(len(row)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: (-ranks[e], e))[:top_k]
        total = sum(scores[e] for e in chosen) if renormalize else 1
        weights.append([how.scale * scores[e] / total for e in chosen])
        experts.append(chosen)
        means = [m + s / sum(scores) / len(logits) for m, s in zip(means, scores, strict=True)]
    return weights, experts, means


@pytest.mark.parametrize("how, renormalize, biased", HOW)
def test_reference_is_the_loop(how, renormalize, biased):
    logits = torch.randn(40, 12, dtype=torch.float64)
    bias = torch.randn(12, dtype=torch.float64) / 4 * biased
    found = route(
        logits, 3, renormalize=renormalize, selection_bias=bias if biased else None, **keywords(how)
    )
    weights, experts, means = loop(logits, bias, 3, renormalize, how)
    assert found.topk_indices.tolist() == experts
    wanted = [torch.tensor(values, dtype=torch.float64) for values in (weights, [means])]
    assert_same_formula([found.topk_weights, found.stats.mean_probs], wanted)
    assert_same_formula(found.stats.mean_squared_logsumexp, logits.logsumexp(-1).square().mean()[None])
    first = torch.bincount(torch.tensor(experts)[:, 0], minlength=12).double() / 40
    assert_same_formula(found.stats.top1_density, first[None])


@pytest.mark.parametrize("gated", [False, True], ids=["logits", "gate"])
@pytest.mark.parametrize("how, renormalize, biased", HOW)
def test_gradcheck(how, renormalize, biased, gated):
    draw = lambda *size: torch.randn(*size, dtype=torch.float64)
    inputs = [draw(6, 5), draw(8, 5)] if gated else [draw(6, 8)]
    bias = draw(8) / 4 if biased else None
    groups = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    run = lambda x, *gate: outputs(
        route(x, 2, *gate, groups=groups, renormalize=renormalize, selection_bias=bias, **keywords(how))
    )
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("how, renormalize, biased", HOW)
@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_backends(backend, device, dtype, num_tokens, num_experts, top_k, groups, how, renormalize, biased):
    logits = torch.randn(num_tokens, num_experts).to(dtype)
    # multiples of 1/64, in a random order: equal scores have biases far apart
    bias = torch.randperm(num_experts) / 64 / num_experts**0.5 if biased else None
    logits = apart(logits, bias, how).to(device)
    bias = None if bias is None else bias.to(device)
    top_k = min(top_k, how.top_groups * num_experts // how.expert_groups)
    expected = lambda x: reference.scored_route(x, None, bias, None, groups, top_k, renormalize, str(how))
    op = lambda x: route(
        x, top_k, groups=groups, renormalize=renormalize, selection_bias=bias, **keywords(how)
    )
    with use_backend(backend):
        # one draw: with random signs ranks might tie
        rows = Yardstick(lambda x: expected(x)[::2], (logits,), pool=False).measure(lambda x: outputs(op(x)))
        found = op(logits)
    for row in rows:
        assert row.reason is None, row.reason
    exact = expected(logits)
    assert torch.equal(found.topk_indices, exact[1])
    share = torch.finfo(torch.float32).eps * exact[3]
    assert ((found.stats.top1_density - exact[3]).abs() <= 2 * share).all()


@pytest.mark.parametrize("num_tokens, hidden_size, num_experts", [(1, 16, 8), (70, 300, 4), (40, 64, 40)])
@pytest.mark.parametrize("how, renormalize, biased", HOW)
def test_gate(backend, device, dtype, num_tokens, hidden_size, num_experts, how, renormalize, biased):
    """Logits are integers over 8, the same in any order of summation."""
    if how.group_score == "top2" and num_experts // how.expert_groups < 2:
        how = Scoring(how.score, how.expert_groups, how.top_groups, "max", how.scale)
    x = torch.randint(-1, 2, (num_tokens, hidden_size), device=device).to(dtype)
    x[:, 8:] *= torch.rand(hidden_size - 8, device=device) < 8 / hidden_size
    gate = (torch.randint(-1, 2, (num_experts, hidden_size), device=device) / 8).to(dtype)
    bias = (torch.randperm(num_experts) / 61 / num_experts).to(device) if biased else None
    more = (bias, None, 1, 2 if how.top_groups > 1 else 1, renormalize, str(how))
    forward, backward = (
        dispatch.implementation(backend, op) for op in ("scored_route", "scored_route_backward")
    )

    def expected(x, gate):
        logits = x @ gate.T  # exact also inside UnsplitSums
        return reference.scored_route(logits + ((logits * 8).round() / 8 - logits).detach(), None, *more)[::2]

    found = forward(x, gate, *more)
    assert torch.equal(found[1], reference.scored_route(x, gate, *more)[1])
    assert_outputs_of_fp32(lambda *inputs: forward(*inputs, *more)[::2], expected, dtype, x, gate)
    op = lambda x, w: outputs(
        route(x, more[3], w, renormalize=renormalize, selection_bias=bias, **keywords(how))
    )
    with use_backend(backend):
        for row in Yardstick(expected, (x, gate), pool=False).measure(op):
            assert row.reason is None or row.name.startswith("output"), row.reason
    upstream = [torch.randn_like(t) for t in found[::2]]
    needs = ((True, True), (True, False), (False, True))
    both, *one = (backward(*upstream, x, gate, found[1], None, renormalize, *n, str(how)) for n in needs)
    assert [t.dtype for t in both] == [dtype, dtype]
    assert torch.equal(one[0][0], both[0]) and torch.equal(one[1][1], both[1])


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_saturated_scores(backend, device, score):
    """Logits of every size: no NaN in a weight or a gradient, and the rule holds far from zero."""
    spread = torch.tensor([0.0, -1e-3, 1e-3, 9, -9, 17, -17, 30, -30, 88, -88, 200, -200, 1e4, -1e4, -3])
    logits = torch.stack([spread[torch.randperm(16)] for _ in range(40)])[:, :11].to(device)
    expected = lambda x: reference.scored_route(x, None, None, None, 1, 11, False, str(Scoring(score)))[:1]
    op = lambda x: (route(x, 11, score=score, renormalize=False).topk_weights,)
    with use_backend(backend):
        leaf = logits.clone().requires_grad_()
        found = op(leaf)[0]
        found.sum().backward()
        kept = logits.clamp(-100, None)  # below, sqrt(softplus) has no gradient in autograd
        assert_as_accurate_as_torch(op, expected, kept)
    assert found.isfinite().all() and leaf.grad.isfinite().all()


def test_rows_without_a_maximum_stay_in_range(backend, device):
    how, bias = Scoring("sigmoid", 4, 2, "top2"), torch.zeros(8, device=device)
    logits = torch.randn(40, 8, device=device)
    bad = logits.clone()
    bad[3, 2], bad[20], bad[37, 5] = math.copysign(math.nan, -1), math.nan, math.inf
    good = [t for t in range(40) if t not in (3, 20, 37)]
    run = lambda x: dispatch.implementation(backend, "scored_route")(
        x, None, bias, None, 1, 3, True, str(how)
    )
    found, wanted = run(bad), run(logits)
    assert found[1].min() >= 0 and found[1].max() < 8
    assert all(len(set(row)) == 3 for row in found[1].tolist())
    assert found[1][3, 0] == 2 and found[1][37, 0] == 5
    assert not found[0][[3, 20]].isfinite().any()
    assert torch.equal(found[1][good], wanted[1][good]) and torch.equal(found[0][good], wanted[0][good])


def test_zero_bias_and_whole_groups_choose_as_without():
    logits = torch.randn(50, 8)
    plain = route(logits, 3, score="sigmoid")
    for more in (
        {"selection_bias": torch.zeros(8)},
        {"expert_groups": 4, "top_groups": 4},
        {"expert_groups": 2},
    ):
        other = route(logits, 3, score="sigmoid", **more)
        assert torch.equal(plain.topk_weights, other.topk_weights)
        assert torch.equal(plain.topk_indices, other.topk_indices)


def test_a_bias_chooses_and_does_not_weigh():
    logits, bias = torch.zeros(5, 4, requires_grad=True), torch.tensor([0.0, 0, 1, 0.5], requires_grad=True)
    found = route(logits, 2, score="sigmoid", selection_bias=bias, renormalize=False)
    assert found.topk_indices.tolist() == [[2, 3]] * 5
    assert found.topk_weights.eq(0.5).all()
    found.topk_weights.sum().backward()
    assert bias.grad is None and logits.grad.count_nonzero() == 10


def test_plain_calls_use_the_plain_op(monkeypatch):
    reached, plain = set(), dispatch.implementation
    monkeypatch.setattr(dispatch, "implementation", lambda b, op: reached.add(op) or plain(b, op))
    route(torch.randn(5, 4), 2, expert_groups=2, top_groups=2, scale=1, group_score="top2")
    assert "scored_route" not in reached
    route(torch.randn(5, 4), 2, scale=2)
    assert "scored_route" in reached


X = torch.randn(6, 8)
WRONG = [
    ({"score": "relu"}, "score must be one of ('softmax', 'sigmoid', 'sqrtsoftplus'), got 'relu'"),
    ({"group_score": "mean"}, "group_score must be one of ('max', 'top2'), got 'mean'"),
    ({"expert_groups": 16}, "expert_groups must divide the 8 experts evenly, got 16"),
    ({"expert_groups": 0}, "expert_groups must be at least 1, got 0"),
    ({"expert_groups": 4, "top_groups": 5}, "top_groups must be at most the 4 expert_groups, got 5"),
    (
        {"expert_groups": 4, "top_groups": 1},
        "top_groups must hold the 3 experts of a token, got 1 groups of 2",
    ),
    ({"expert_groups": 8, "group_score": "top2"}, "group_score must be 'max' for groups of one expert, got"),
    ({"scale": math.nan}, "scale must be between 1e-30 and 1e+30, got nan"),
    ({"scale": "2"}, "scale must be a number, got '2'"),
    ({"selection_bias": torch.zeros(7)}, "selection_bias must be (8,), got (7,)"),
    ({"selection_bias": torch.zeros(8, dtype=torch.int32)}, "selection_bias must be float32"),
    (
        {"selection_bias": torch.full((8,), math.nan)},
        "selection_bias must be finite in torch.float32, got [nan",
    ),
    ({"selection_bias": 0.5}, "selection_bias must be a tensor or None, got float"),
    ({"score": "sigmoid", "compat": "cumo"}, "compat must be None unless a plain softmax chooses and weighs"),
]


@pytest.mark.parametrize("more, words", WRONG)
def test_wrong_arguments(more, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        route(X, 3, **more)


def test_nan_logits_are_named():
    bad = X.clone()
    bad[4, 1] = math.nan
    with pytest.raises(ValueError, match=r"finite maximum in every row, got .*nan.* for token 4"):
        route(bad, 3, score="sigmoid")
