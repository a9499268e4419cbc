"""How far two right ways to compute the same thing may be apart, with no number typed.

`assert_as_accurate_as_torch` (cumo_kernels/testing.py) holds a kernel against a reference. Where a test has
two whole computations instead (a model and its twin, two engines, a compiled step and a plain one), there is

- fp64: `assert_same_formula`. Its roundings are 2^-29 of fp32's, so what differs in them alone agrees in far
  more than half of the digits, and what differs in a formula, a term or a token does not. Prefer it. Models
  compute norms, softmaxes and losses in fp32 whatever their weights are; inside `in_fp64` they do not.
- fp32: `rounding_of` says how much the results of a run move if all its sums are made in one chain, which is
  the worst that another BLAS or order does to them; `assert_same_sums` allows what two such runs may differ.
- a few roundings that can be counted: `assert_close_after`.
- numbers drawn at random: `assert_spread`.

Bitwise equality is for what makes the same calls on the same shapes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_kernels.verification.rounding import UnsplitSums

ROUNDS = 3  # draws of the roundings, of which the largest counts

Results = Tensor | float | Sequence | Mapping | None


def _named(results: Results) -> dict[str, Tensor]:
    """Tensors and numbers in mappings and sequences, by their path; None is an empty tensor."""
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
    # infinities allow nothing, and a NaN is never small
    assert error <= allowed < math.inf, f"{name or 'it'} is off by {error:.3e}, {what} allow {allowed:.3e}"


def assert_same_formula(got: Results, wanted: Results) -> None:
    """Computed in fp64, and equal to half of its digits, beside the largest element of each tensor.

    Args:
        got, wanted: tensors or numbers, or mappings or sequences of such; None where there is none.
    """
    half = math.sqrt(torch.finfo(torch.float64).eps)
    for kind in (got, wanted):
        for name, value in _named(kind).items():
            assert not value.is_floating_point() or value.dtype == torch.float64 or not value.numel(), (
                f"{name or 'it'} was computed in {value.dtype}: it has not the digits for this comparison"
            )
    for name, mine, other in _pairs(got, wanted):
        _hold(name, _largest(mine - other), half * _largest(other), "half of fp64's digits")


class _Wide(TorchFunctionMode):
    """What asks for fp32 gets fp64."""

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
    """Inside, on this thread, tensors and models are made in fp64, and what casts to fp32 stays in fp64."""
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
    """Equal but for so many roundings in `dtype`, each by half an eps of the largest element at most.

    Args:
        roundings: that `got` and `wanted` together have behind them, and whose results are no larger than
            the largest of `wanted`: say in a comment which they are.
        got, wanted: as in `assert_same_formula`.
    """
    for name, mine, other in _pairs(got, wanted):
        allowed = roundings * torch.finfo(dtype).eps / 2 * _largest(other)
        _hold(name, _largest(mine - other), allowed, f"{roundings} roundings")


def assert_spread(drawn: Tensor, std: float) -> None:
    """Normal draws' standard deviation, to three of its errors; uniform draws' is better known than that."""
    found, error = float(drawn.detach().std()), 1 / math.sqrt(2 * drawn.numel())
    assert abs(found / std - 1) <= 3 * error, (found, std, error)


def rounding_of(run: Callable[[], Results], seed: int = 0) -> dict[str, float]:
    """What unsplit sums in fp32 do to each result of `run`, at most.

    Args:
        run: computes results anew from the same inputs on this thread, backward included, in fp32.
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
    """Each side may be off by twice what unsplit sums do to it, and by one rounding of the result.

    Args:
        got, wanted: as in `assert_same_formula`, in fp32.
        rounding: of `rounding_of`, for a run with the results `wanted`.
    """
    for name, mine, other in _pairs(got, wanted):
        allowed = 4 * rounding[name] + torch.finfo(torch.float32).eps * _largest(other)
        _hold(name, _largest(mine - other), allowed, "order and rounding")


def assert_outputs_of_fp32(op: Callable, reference: Callable, dtype: torch.dtype, *inputs: Tensor) -> None:
    """What an op computes in fp32 from inputs in `dtype` is as accurate as what torch does; no gradients.

    For statistics: from 16-bit inputs the accuracy rule would take 16-bit outputs.
    """
    narrow = lambda *wide: op(*(t.to(dtype) for t in wide))
    with torch.no_grad():
        assert_as_accurate_as_torch(narrow, reference, *(t.float() for t in inputs))
