"""Tests of tests/rounding.py: another order of summation passes, another computation fails."""

import pytest
import torch

from tests.rounding import (
    assert_close_after,
    assert_same_formula,
    assert_same_sums,
    assert_spread,
    in_fp64,
    rounding_of,
)


def network(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
    return draw(9, 256), draw(512, 256) / 16, draw(64, 512) / 512**0.5


def results(x, up, down, lost=0, backwards=False):
    """Output and gradients of two layers, with sums split in halves, or without their first terms."""
    leaves = [t.clone().requires_grad_() for t in (x, up, down)]
    x, up, down = leaves
    order = [slice(128, None), slice(lost, 128)] if backwards else [slice(lost, 128), slice(128, None)]
    hidden = sum(x[:, part] @ up[:, part].T for part in order).relu()
    out = hidden @ down.T
    return {"out": out, "grads": torch.autograd.grad(out.sin().sum(), leaves), "none": None}


def test_another_order_passes_and_a_lost_term_does_not():
    inputs = network()
    rounding = rounding_of(lambda: results(*inputs))
    assert rounding.keys() == {"/out", "/grads/0", "/grads/1", "/grads/2", "/none"}
    assert_same_sums(results(*inputs, backwards=True), results(*inputs), rounding)
    with pytest.raises(AssertionError, match=r"/out is off by .*, order and rounding allow"):
        assert_same_sums(results(*inputs, lost=1), results(*inputs), rounding)


def test_fp64_agrees_in_half_of_its_digits():
    inputs = network(torch.float64)
    assert_same_formula(results(*inputs, backwards=True), results(*inputs))
    with pytest.raises(AssertionError, match="/out is off by"):
        assert_same_formula(results(*inputs, lost=1), results(*inputs))
    coarse = [t.float().double() for t in inputs]
    with pytest.raises(AssertionError, match="/out is off by"):
        assert_same_formula(results(*coarse), results(*inputs))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_close(wrong):
    right = torch.ones(3, dtype=torch.float64)
    bad = right.clone()
    bad[1] = wrong
    for got, wanted in ((bad, right), (right, bad)):
        with pytest.raises(AssertionError):
            assert_same_formula(got, wanted)
        with pytest.raises(AssertionError):
            assert_same_sums(got.float(), wanted.float(), {"": 1.0})


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(AssertionError, match=r"computed in torch.float32"):
        assert_same_formula(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError):
        assert_same_formula({"a": 1.0}, {"b": 1.0})
    with pytest.raises(AssertionError):
        assert_same_formula(torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert_same_formula([1.0, (2, 0.1 + 0.2)], [1.0, (2, 0.3)])


def test_in_fp64_what_asks_for_fp32_stays_in_fp64():
    with in_fp64():
        x = torch.randn(3, dtype=torch.float32)
        made = [x, x.float(), x.to(torch.float32), torch.softmax(x, 0, dtype=torch.float32), torch.ones(2)]
        assert {t.dtype for t in (*made, torch.nn.Linear(2, 2).weight)} == {torch.float64}
        with pytest.raises(AssertionError, match="made fp32 of fp64"):
            x.type("torch.FloatTensor")
    assert torch.ones(2).dtype == x.float().dtype == torch.float32


def test_the_spread_of_draws_is_known_to_three_of_its_errors():
    drawn = torch.randn(5000)
    assert_spread(drawn * 7, 7.0)
    for wrong in (0.93, 1.07):
        with pytest.raises(AssertionError):
            assert_spread(drawn * 7 * wrong, 7.0)


def test_counted_roundings_are_allowed_and_no_more():
    half = torch.finfo(torch.float32).eps / 2
    assert_close_after(3, 4.0 * (1 + 3 * half), 4.0)
    with pytest.raises(AssertionError, match="2 roundings allow"):
        assert_close_after(2, 4.0 * (1 + 3 * half), 4.0)
