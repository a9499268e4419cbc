"""Comparisons of two correct computations of the same result, with derived tolerances.

`assert_as_accurate_as_torch` (cumo_kernels/testing.py) compares a kernel with a reference. This module is
for tests that compare two whole computations (two models, two engines, a compiled and an eager step):

- fp64: `assert_same_formula`. Rounding errors are 2^-29 times those of fp32. Results that differ by rounding
  only agree in far more than half of their digits; results that differ in a formula, a term or a token do
  not. Prefer this. Models compute norms, softmaxes and losses in fp32 even if their weights are fp64, except
  inside `in_fp64`.
- fp32: `rounding_of` estimates how much the results of a run change if all sums are computed in one chain,
  which is the largest effect of another BLAS or another order of summation. `assert_same_sums` uses it as
  tolerance.
- a small, known number of roundings: `assert_close_after`.
- random numbers: `assert_spread`.

Use bitwise equality only for the same calls on the same shapes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_kernels.verification.rounding import UnsplitSums

ROUNDS = 3  # random draws of the rounding errors; the largest is used

Results = Tensor | float | Sequence | Mapping | None


def _named(results: Results) -> dict[str, Tensor]:
    """Flatten mappings and sequences of tensors and numbers to path -> tensor; None is an empty tensor."""
    if isinstance(results, Tensor):
        return {"": results.detach()}
    if results is None:
        return {"": torch.empty(0)}
    if isinstance(results, int | float):
        return {"": torch.tensor(results, dtype=torch.float64)}
    assert isinstance(results, Mapping | Sequence), f"cannot be compared twice: {type(results)}"
    items = results.items() if isinstance(results, Mapping) else enumerate(results)
    return {f"/{key}{rest}": value for key, part in items for rest, value in _named(part).items()}


def _pairs(got: Results, wanted: Results) -> list[tuple[str, Tensor, Tensor]]:
    mine, others = _named(got), _named(wanted)
    assert any(t.numel() for t in others.values()), "there is nothing to compare"
    assert mine.keys() == others.keys(), sorted(mine.keys() ^ others.keys())
    for name, value in mine.items():
        assert value.shape == others[name].shape, (name, value.shape, others[name].shape)
    return [(name, value.double(), others[name].double()) for name, value in mine.items()]


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _hold(name: str, error: float, allowed: float, what: str) -> None:
    # an infinite or NaN error always fails
    assert error <= allowed < math.inf, f"{name or 'it'} is off by {error:.3e}, {what} allow {allowed:.3e}"


def assert_same_formula(got: Results, wanted: Results) -> None:
    """Check that fp64 results agree in half of their digits, relative to each tensor's largest element.

    Args:
        got: tensors or numbers, or mappings or sequences of them; None for an absent value.
        wanted: as `got`.
    """
    half = math.sqrt(torch.finfo(torch.float64).eps)
    for kind in (got, wanted):
        for name, value in _named(kind).items():
            assert not value.is_floating_point() or value.dtype == torch.float64 or not value.numel(), (
                f"{name or 'it'} was computed in {value.dtype}, which has too few digits for this comparison"
            )
    for name, mine, other in _pairs(got, wanted):
        _hold(name, _largest(mine - other), half * _largest(other), "half of fp64's digits")


class _Wide(TorchFunctionMode):
    """Replaces fp32 by fp64 in calls of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        if func is Tensor.float:
            func = Tensor.double
        elif func is Tensor.to:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        out = func(*args, **kwargs)
        if not torch.compiler.is_compiling() and isinstance(out, Tensor) and out.dtype == torch.float32:
            given = {value.dtype for value in args if isinstance(value, Tensor)}
            assert torch.float64 not in given, f"{func} made fp32 of fp64"
        return out


@contextmanager
def in_fp64() -> Iterator[None]:
    """On this thread, create tensors and models in fp64, and keep fp64 where code converts to fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def assert_close_after(
    roundings: int, got: Results, wanted: Results, dtype: torch.dtype = torch.float32
) -> None:
    """Check that results agree up to a number of roundings, each at most half an eps of the largest element.

    Args:
        roundings: number of roundings in `got` and `wanted` together. Each rounded value must be at most as
            large as the largest element of `wanted`. A comment at the call must list these roundings.
        got: as in `assert_same_formula`.
        wanted: as in `assert_same_formula`.
        dtype: dtype of the roundings.
    """
    for name, mine, other in _pairs(got, wanted):
        allowed = roundings * torch.finfo(dtype).eps / 2 * _largest(other)
        _hold(name, _largest(mine - other), allowed, f"{roundings} roundings")


def assert_spread(drawn: Tensor, std: float) -> None:
    """Check the standard deviation of random numbers, to three standard errors of a normal sample."""
    found, error = float(drawn.detach().std()), 1 / math.sqrt(2 * drawn.numel())
    assert abs(found / std - 1) <= 3 * error, (found, std, error)


def rounding_of(run: Callable[[], Results], seed: int = 0) -> dict[str, float]:
    """Estimate the largest change of each result of `run` by unsplit sums in fp32.

    Args:
        run: recomputes the results from the same inputs on this thread, backward included, in fp32.
    """
    plain, moved = run(), {}
    for draw in range(ROUNDS):
        mode = UnsplitSums(torch.finfo(torch.float32).eps, torch.Generator().manual_seed(seed + draw))
        with mode, torch.autograd.set_multithreading_enabled(False):
            again = run()
        for name, one, other in _pairs(again, plain):
            moved[name] = max(moved.get(name, 0.0), _largest(one - other))
    return moved


def assert_same_sums(got: Results, wanted: Results, rounding: Mapping[str, float]) -> None:
    """Check that results agree up to twice the effect of unsplit sums on each side and one rounding.

    Args:
        got: as in `assert_same_formula`, in fp32.
        wanted: as in `assert_same_formula`, in fp32.
        rounding: output of `rounding_of` for a run with the results `wanted`.
    """
    for name, mine, other in _pairs(got, wanted):
        allowed = 4 * rounding[name] + torch.finfo(torch.float32).eps * _largest(other)
        _hold(name, _largest(mine - other), allowed, "order and rounding")


def assert_outputs_of_fp32(op: Callable, reference: Callable, dtype: torch.dtype, *inputs: Tensor) -> None:
    """Check that fp32 outputs of an op with inputs in `dtype` are as accurate as those of torch.

    Gradients are not checked. Used for statistics, because the accuracy rule assumes 16-bit outputs for
    16-bit inputs.
    """
    narrow = lambda *wide: op(*(t.to(dtype) for t in wide))
    with torch.no_grad():
        assert_as_accurate_as_torch(narrow, reference, *(t.float() for t in inputs))
