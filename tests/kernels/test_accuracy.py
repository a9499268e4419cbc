"""The accuracy rule on non-finite values: they neither excuse nor hide an error."""

import pytest
import torch

from cumo_kernels.testing import Yardstick


def reasons(op, reference, x):
    return [row.reason for row in Yardstick(reference, [x], pool=False).measure(op) if row.reason]


def test_an_infinity_in_fp64_does_not_hide_other_errors():
    x = torch.linspace(0, 1, 100)  # 1 / 0 first
    scaled = lambda by: lambda x: torch.cat([1 / x[:1], by / x[1:]]).detach() + 0 * x.sum()
    assert reasons(scaled(1.0), lambda x: (1 / x).detach() + 0 * x.sum(), x) == []
    (reason,) = reasons(scaled(1.001), lambda x: (1 / x).detach() + 0 * x.sum(), x)
    assert reason.startswith("output 0 is off at most by")


@pytest.mark.parametrize("wrong", [float("nan"), -float("inf")])
def test_another_infinity_is_wrong(wrong):
    x = torch.linspace(0, 1, 100)
    expected = lambda x: (1 / x).detach() + 0 * x.sum()
    got = lambda x: expected(x).masked_fill(x == 0, wrong)
    assert reasons(got, expected, x) == ["output 0 has another infinity or NaN than fp64"]
    assert reasons(lambda x: expected(x).masked_fill(x == 0, 5.0), expected, x) == [
        "output 0 has finite values where fp64 is not finite"
    ]
    hole = reasons(lambda x: expected(x).masked_fill(x == 1, wrong), expected, x)
    assert hole == ["output 0 has 1 non-finite values where fp64 is finite"]


def test_an_overflow_in_torch_does_not_excuse_other_errors():
    """Squares of 300 overflow in fp16; a third of them does not."""
    x = torch.full((100,), 300.0, dtype=torch.float16)
    x[:50] = 1.5
    plain = lambda x: (x.detach() * x.detach() / 3) + 0 * x
    careful = lambda x: (x.detach().float().square() / 3).half() + 0 * x
    assert not plain(x).isfinite().all()
    assert reasons(careful, plain, x) == []
    assert "output 0 is off" in reasons(lambda x: careful(x) * 1.05, plain, x)[0]
