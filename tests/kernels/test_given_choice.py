"""route with experts that the caller has chosen, such as those of another pass."""

import re

import pytest
import torch

from cumo_kernels import route, routing_from_topk, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.ops.routing import with_capacity
from cumo_kernels.testing import Yardstick
from cumo_kernels.types import Scoring
from cumo_kernels.verification.scored_cases import keywords
from tests.rounding import assert_same_formula

SHAPES = [  # num_tokens, num_experts, top_k, groups
    pytest.param(0, 8, 2, 1, id="no-token"),
    pytest.param(1, 8, 2, 1, id="one-token"),
    pytest.param(42, 7, 3, 6, id="odd"),
    pytest.param(33, 4, 4, 3, id="all-experts"),
    pytest.param(24, 384, 8, 1, id="many-experts"),
]
HOW = [  # scoring, renormalize
    pytest.param(Scoring(), True, id="softmax"),
    pytest.param(Scoring("softmax", scale=3.0), False, id="softmax-raw"),
    pytest.param(Scoring("sigmoid", scale=2.5), True, id="sigmoid"),
    pytest.param(Scoring("sqrtsoftplus"), False, id="sqrtsoftplus-raw"),
]


def outputs(routing):
    return routing.topk_weights, routing.stats.mean_probs, routing.stats.mean_squared_logsumexp


def any_choice(num_tokens, num_experts, top_k):
    """Different experts of each token, a third of them dropped, and all of the last token's."""
    chosen = torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k]
    chosen[torch.rand(chosen.shape) < 1 / 3] = num_experts
    chosen[-1:] = num_experts
    return chosen


@pytest.mark.parametrize("gated", [False, True], ids=["logits", "gate"])
@pytest.mark.parametrize("how, renormalize", HOW)
@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_its_own_choice_changes_no_bit(
    backend, device, dtype, num_tokens, num_experts, top_k, groups, how, renormalize, gated
):
    x = torch.randn(num_tokens, 24 if gated else num_experts, device=device).to(dtype)
    gate = (torch.randn(num_experts, 24, device=device) / 5).to(dtype)
    inputs = [t.requires_grad_() for t in ((x, gate) if gated else (x,))]
    kept = torch.randn(num_tokens, top_k, device=device)

    def run(topk_indices):
        more = {"groups": groups, "renormalize": renormalize, "topk_indices": topk_indices}
        found = route(x, top_k, *inputs[1:], **more, **keywords(how))
        return found, torch.autograd.grad((found.topk_weights * kept).sum() + sum(outputs(found)[2]), inputs)

    with use_backend(backend):
        found, grads = run(None)
        again, same = run(found.topk_indices.long())
    assert again.topk_indices.data_ptr() != found.topk_indices.data_ptr() or not num_tokens
    for name in ("topk_weights", "topk_indices", "permutation", "expert_offsets"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    for name in ("mean_probs", "top1_density", "mean_squared_logsumexp"):
        assert torch.equal(getattr(found.stats, name), getattr(again.stats, name)), name
    assert all(map(torch.equal, grads, same))


@pytest.mark.parametrize("how, renormalize", HOW)
@pytest.mark.parametrize("num_tokens, num_experts, top_k, groups", SHAPES)
def test_another_choice(backend, device, dtype, num_tokens, num_experts, top_k, groups, how, renormalize):
    logits = torch.randn(num_tokens, num_experts, device=device).to(dtype)
    given = any_choice(num_tokens, num_experts, top_k).to(device, torch.int32)
    more = (None, None, groups, top_k, renormalize, str(how), given)
    expected = lambda x: reference.scored_route(x, None, *more)
    op = lambda x: route(
        x, top_k, groups=groups, renormalize=renormalize, topk_indices=given.T.contiguous().T, **keywords(how)
    )
    with use_backend(backend):
        rows = Yardstick(lambda x: expected(x)[::2], (logits,)).measure(lambda x: outputs(op(x)))
        found = op(logits)
    for row in rows:
        assert row.reason is None, row.reason
    assert torch.equal(found.topk_indices, given)
    assert found.topk_weights[given == num_experts].eq(0).all()
    plan = reference.sort_by_expert(given, num_experts)
    assert torch.equal(found.tokens_per_expert, plan[0]) and torch.equal(found.inverse_permutation, plan[3])
    share = torch.finfo(torch.float32).eps * expected(logits)[3]
    assert ((found.stats.top1_density - expected(logits)[3]).abs() <= 2 * share).all()


@pytest.mark.parametrize("how, renormalize", HOW)
def test_formula(how, renormalize):
    """Written with a mask over all experts instead of indices."""
    x, gate = torch.randn(9, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    given = any_choice(9, 5, 3)
    inputs = [x.requires_grad_(), gate.requires_grad_()]
    score = {"softmax": lambda t: t.softmax(-1), "sigmoid": torch.sigmoid}.get(
        how.score, lambda t: (1 + t.exp()).log().sqrt()
    )
    kept = torch.nn.functional.one_hot(given, 6)[..., :5].double()
    values = torch.einsum("tke,te->tk", kept, score(x @ gate.T))
    if renormalize:
        values = values / values.sum(1, keepdim=True).where(values.any(1, keepdim=True), 1)
    found = route(x, 3, gate, renormalize=renormalize, topk_indices=given, **keywords(how))
    upstream = torch.randn(9, 3, dtype=torch.float64)
    assert_same_formula(found.topk_weights, values * how.scale)
    wanted = torch.autograd.grad(values * how.scale, inputs, upstream)
    assert_same_formula(torch.autograd.grad(found.topk_weights, inputs, upstream), wanted)
    assert_same_formula(found.stats.top1_density[0], kept[:, 0].mean(0))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_of_zero_are_no_nan(backend, device, score):
    """The chosen experts have become so unlikely that their scores are 0."""
    logits = torch.tensor([[0.0, -200, -200, 3]], device=device).repeat(5, 1).requires_grad_()
    given = torch.tensor([[1, 2]], device=device).repeat(5, 1)
    with use_backend(backend):
        found = route(logits, 2, score=score, topk_indices=given)
        found.topk_weights.sum().backward()
    assert found.topk_weights.eq(0).all() and logits.grad.eq(0).all()


def test_capacity_follows():
    logits, given = torch.randn(40, 4), any_choice(40, 4, 2)
    whole = route(logits, 2, topk_indices=given)
    assert whole.tokens_per_expert.max() > 6
    found = route(logits, 2, topk_indices=given, capacity=6)
    assert found.tokens_per_expert.max() == 6
    assert torch.equal(found.topk_weights, with_capacity(whole, 6).topk_weights)
    other = routing_from_topk(whole.topk_weights, given, 4)
    assert torch.equal(whole.permutation, other.permutation)


def test_the_choice_is_copied():
    given = any_choice(5, 4, 2).int()
    found = route(torch.randn(5, 4), 2, topk_indices=given)
    before = found.topk_indices.clone()
    given.fill_(0)
    assert torch.equal(found.topk_indices, before)


X, GIVEN = torch.randn(6, 8), torch.arange(18).view(6, 3) % 9
WRONG = [
    ({"topk_indices": GIVEN.tolist()}, "topk_indices must be a tensor or None, got list"),
    ({"topk_indices": GIVEN[:5]}, "topk_indices must be (6, 3), got (5, 3)"),
    ({"topk_indices": GIVEN[:, :2]}, "topk_indices must be (6, 3), got (6, 2)"),
    ({"topk_indices": GIVEN.float()}, "topk_indices must be int32 or int64, got torch.float32"),
    ({"topk_indices": GIVEN.to("meta")}, "topk_indices must be on the device of x, cpu, got meta"),
    ({"topk_indices": GIVEN + 1}, "topk_indices must lie in [0, 8], got values from 1 to 9"),
    ({"topk_indices": GIVEN - 1}, "topk_indices must lie in [0, 8], got values from -1 to 7"),
    ({"topk_indices": GIVEN // 2}, "must name an expert once in a row, got [0, 0, 1] for token 0"),
    ({"topk_indices": GIVEN, "compat": "cumo"}, "compat must be None where topk_indices choose, got 'cumo'"),
    (
        {"topk_indices": GIVEN, "selection_bias": torch.zeros(8)},
        "selection_bias must be None where topk_indices choose, got Tensor",
    ),
    (
        {"topk_indices": GIVEN, "expert_groups": 2, "top_groups": 1},
        "expert_groups must be 1 where topk_indices choose, got 2",
    ),
]


@pytest.mark.parametrize("more, words", WRONG)
def test_wrong_arguments(more, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        route(X, 3, **more)


def test_in_a_compiled_graph():
    """One graph for every choice and for int64; x without values gets shapes."""
    x, gate = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (12, 4))

    def run(given):
        found = route(x, 2, gate, topk_indices=given, score="sigmoid", groups=3)
        return found.topk_weights, found.topk_indices, found.stats.top1_density, found.permutation

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(any_choice(12, 4, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            given = any_choice(12, 4, 2)
            upstream = torch.randn(12, 2, dtype=torch.float64)
            assert all(map(torch.equal, compiled(given), run(given)))
            grads = [torch.autograd.grad(f(given)[0], (x, gate), upstream) for f in (compiled, run)]
            assert_same_formula(*grads)
    empty = route(x.to("meta"), 2, gate.to("meta"), topk_indices=given.to("meta"))
    assert empty.topk_weights.shape == (12, 2) and empty.topk_indices.dtype is torch.int32


def test_a_batch_of_choices():
    """Under vmap each element has its own."""
    x, given = torch.randn(3, 5, 4), torch.stack([any_choice(5, 4, 2) for _ in range(3)])
    weights = lambda x, given: route(x, 2, topk_indices=given, renormalize=False).topk_weights
    found = torch.func.vmap(weights)(x, given)
    assert torch.equal(found, torch.stack([weights(*pair) for pair in zip(x, given, strict=True)]))
