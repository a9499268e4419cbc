"""Checks of a backend, for tests and users: routings, the accuracy rule, uninitialised memory set to NaN.

The accuracy rule has no hand-set tolerance. The error of an op, compared with fp64, may be at most twice that
of plain PyTorch in the same dtype, plus one rounding of the result. PyTorch's error is that of its BLAS,
which splits sums. Where unsplit sums, computed in one chain, have a larger error (rounding.py derives it),
twice that error is allowed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cumo_kernels.ops.checks import check_top_k
from cumo_kernels.ops.routing import routing_from_topk
from cumo_kernels.types import Routing, accumulate_dtype
from cumo_kernels.verification.rounding import UnsplitSums

PATTERNS = ("uniform", "skewed", "empty", "one_expert")


def make_routing(
    pattern: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Routing:
    """A plan with random weights that sum to 1.

    Args:
        pattern: "uniform": experts drawn evenly; "skewed": expert e drawn with odds 2^-e; "empty": only the
            odd-numbered experts, as far as top_k allows; "one_expert": expert 0 (and then 1, ...) for all.
        num_tokens: T.
        num_experts: E.
        top_k: K.
        device: device of the plan's tensors.
        seed: seed of the random choices and weights.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}")
    check_top_k(top_k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_tokens, num_experts, generator=generator).clamp(min=1e-9)
    experts = torch.arange(num_experts)
    if pattern == "uniform":
        scores = noise
    elif pattern == "skewed":
        scores = noise.log() * 2.0 ** experts.clamp(max=100)  # log of u^(1/odds); the largest are chosen
    elif pattern == "empty":
        scores = noise + 2 * (experts % 2)
    else:
        scores = -experts.expand(num_tokens, -1).float()
    indices = scores.topk(top_k, dim=1).indices
    weights = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    return routing_from_topk(weights.to(device), indices.to(device), num_experts)


def _run(
    op: Callable, inputs: Sequence[Tensor], upstream_seed: int, wide: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """-> float outputs and gradients of all float inputs, in fp64, with random upstream gradients.

    With `wide` the op gets its float inputs in fp64.
    """
    kind = lambda t: torch.float64 if wide and t.is_floating_point() else t.dtype
    leaves = [t.detach().to(kind(t), copy=True).requires_grad_(t.is_floating_point()) for t in inputs]
    outs = op(*leaves)
    outs = [o for o in ([outs] if isinstance(outs, Tensor) else outs) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(upstream_seed)
    # bf16-representable, so that all three runs get the same upstream gradients
    drawn = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outs]
    traced = [(o, g) for o, g in zip(outs, drawn, strict=True) if o.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    found = [None] * len(wanted)
    if traced:
        ends, upstream = zip(*traced, strict=True)
        found = torch.autograd.grad(ends, wanted, upstream, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
    return [o.detach().double() for o in outs], [g.double() for g in grads]


SMALL = 64  # elements: with fewer, several draws are pooled
ROUNDS = 8  # the maximum number of draws


@dataclass(frozen=True)
class Accuracy:
    """How far one output or gradient is from fp64."""

    name: str  # "output 0", "gradient 2": gradients are numbered like the float inputs
    ratio: float  # its error divided by torch's, or by half a rounding if torch's error is smaller
    reason: str | None  # why the rule refuses it, or None


class Yardstick:
    """Results of plain PyTorch for given inputs, in their dtype and in fp64; `measure` compares ops with it.

    The error of a tensor with few elements is a poor estimate, so then several draws (inputs with random
    signs, new upstream gradients) are pooled.

    Args:
        reference: plain differentiable PyTorch.
        inputs: tensors; float ones get gradients, all of which are compared.
        seed: of the random signs and upstream gradients.
        pool: False uses a single draw, where several would take too long.
    """

    def __init__(self, reference: Callable, inputs: Sequence[Tensor], seed: int = 0, pool: bool = True):
        self.reference, self.seed = reference, seed
        # the coarsest dtype involved: fp32 statistics of bf16 logits have the accuracy of bf16
        self.dtype = max({t.dtype for t in inputs if t.is_floating_point()}, key=lambda d: torch.finfo(d).eps)
        self.eps = torch.finfo(self.dtype).eps
        self._unsplit: dict[str, tuple[float, float]] = {}
        self.draws = []  # (inputs, (outputs, gradients) in their dtype, the same in fp64)
        generator = torch.Generator().manual_seed(seed)
        rounds = 1
        while len(self.draws) < rounds:
            drawn = inputs
            if self.draws:
                signs = [torch.randint(2, t.shape, generator=generator).to(t) * 2 - 1 for t in inputs]
                drawn = [t * s if t.is_floating_point() else t for t, s in zip(inputs, signs, strict=True)]
            native, fp64 = (_run(reference, drawn, seed + len(self.draws), wide) for wide in (False, True))
            self.draws.append((drawn, native, fp64))
            rounds = self._rounds() if pool else 1

    def measure(self, op: Callable) -> list[Accuracy]:
        """Compare every float output and gradient of `op`.

        Raises:
            AssertionError: the number or a shape of them differs from the reference's.
        """
        pooled: dict[str, list[tuple[Tensor, ...]]] = {}
        for round_, (drawn, native, fp64) in enumerate(self.draws):
            got = _run(op, drawn, self.seed + round_)
            for kind, mine, torchs, wanted in zip(("output", "gradient"), got, native, fp64, strict=True):
                if len(mine) != len(wanted):
                    raise AssertionError(f"op has {len(mine)} {kind}s, the reference {len(wanted)}")
                for i, row in enumerate(zip(mine, torchs, wanted, strict=True)):
                    if row[0].shape != row[2].shape:
                        raise AssertionError(
                            f"{kind} {i} is {tuple(row[0].shape)}, wanted {tuple(row[2].shape)}"
                        )
                    pooled.setdefault(f"{kind} {i}", []).append(row)
        return [
            _accuracy(name, *map(_stack, zip(*rows, strict=True)), self.eps, partial(self.unsplit, name))
            for name, rows in pooled.items()
        ]

    def unsplit(self, name: str) -> tuple[float, float]:
        """The largest and the root mean square error of "output 0" and so on with unsplit sums.

        Costs one more run in fp64 for all names at once, made only when needed; a single draw of a few
        elements is run several times.
        """
        if not self._unsplit:
            eps = torch.finfo(accumulate_dtype(self.dtype)).eps
            device = self.draws[0][2][0][0].device
            mode = UnsplitSums(eps, torch.Generator(device).manual_seed(self.seed + len(self.draws)))
            times = self._rounds() if len(self.draws) == 1 else 1
            found: dict[str, list[tuple[float, float]]] = {}
            for i, (drawn, _, fp64) in [*enumerate(self.draws)] * times:
                # backward on this thread: the mode may not be active on another
                with mode, torch.autograd.set_multithreading_enabled(False):
                    got = _run(self.reference, drawn, self.seed + i, wide=True)
                for kind, mine, wanted in zip(("output", "gradient"), got, fp64, strict=True):
                    for j, (a, b) in enumerate(zip(mine, wanted, strict=True)):
                        error = _within(a - b, a.isfinite() & b.isfinite())
                        found.setdefault(f"{kind} {j}", []).append((_largest(error), _mean_square(error)))
            for key, pairs in found.items():
                largest, squares = zip(*pairs, strict=True)
                self._unsplit[key] = max(largest), math.hypot(*squares) / len(squares) ** 0.5
        return self._unsplit[name]

    def _rounds(self) -> int:
        sizes = [t.numel() for kind in self.draws[0][2] for t in kind if t.numel()]
        return min(ROUNDS, -(-SMALL // min(sizes, default=SMALL)))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)  # may be gigabytes: no copy


def _within(t: Tensor, where: Tensor) -> Tensor:
    return t if where.all() else t.masked_fill(~where, 0.0)


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _mean_square(t: Tensor) -> float:
    return float(t.norm()) / max(t.numel(), 1) ** 0.5


def _accuracy(
    name: str,
    got: Tensor,
    native: Tensor,
    expected: Tensor,
    eps: float,
    unsplit: Callable[[], tuple[float, float]],
) -> Accuracy:
    """`unsplit` returns the largest and the mean square error of unsplit sums; called only if needed."""
    if got.numel() == 0:
        return Accuracy(name, 0.0, None)
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        number = int((~got.isfinite() & finite).sum())
        what = f"{number} non-finite values" if number else "finite values"
        where = "is finite" if number else "is not finite"
        return Accuracy(name, math.inf, f"{name} has {what} where fp64 {where}")
    kinds = [t[~finite].nan_to_num(0.0) for t in (got, expected)]  # infinities become finite
    if not torch.equal(*kinds):
        return Accuracy(name, math.inf, f"{name} has another infinity or NaN than fp64")
    # an infinite error of torch would allow any error, and inf - inf is NaN
    errors, own = _within(got - expected, finite), _within(native - expected, finite & native.isfinite())
    expected = _within(expected, finite)
    ratio, reason = 0.0, None
    for which, (words, of) in enumerate((("at most", _largest), ("in the mean square", _mean_square))):
        error, torchs, size = of(errors), of(own), of(expected)
        unit = max(torchs, eps / 2 * size)
        ratio = max(ratio, error / unit if unit else math.inf if error else 0.0)
        if reason is not None or error <= 2 * torchs + eps * size:
            continue
        chains = unsplit()[which]
        allowed = 2 * max(torchs, chains) + eps * size
        if error > allowed:
            worst = torch.unravel_index(errors.abs().argmax(), got.shape)
            reason = (
                f"{name} is off {words} by {error:.3e}, allowed {allowed:.3e} "
                f"(torch itself {torchs:.3e}, unsplit sums {chains:.3e}); "
                f"worst at index {[int(i) for i in worst[1:]]} of {tuple(got.shape[1:])}"
            )
    return Accuracy(name, ratio, reason)


def assert_as_accurate_as_torch(op: Callable, reference: Callable, *inputs: Tensor, seed: int = 0) -> None:
    """Assert that the error of `op` is at most twice that of `reference` in the inputs' dtype, plus an ulp.

    Both are compared with fp64. Where unsplit sums have a larger error than torch's (rounding.py), twice that
    of `reference` with unsplit sums. The rule holds for the root mean square and for the largest error.

    Args:
        op: function of `inputs`, returning one tensor or several; all float outputs are compared.
        reference: plain differentiable PyTorch for the same function.
        inputs: tensors; float ones get gradients, all of which are compared.
        seed: of the random upstream gradients.

    Raises:
        AssertionError: naming the output or gradient, its error and the allowed error.
    """
    for accuracy in Yardstick(reference, inputs, seed).measure(op):
        if accuracy.reason is not None:
            raise AssertionError(accuracy.reason)


@contextmanager
def poisoned_memory():
    """Set uninitialised memory to NaN (integers: their maximum), to detect reads before writes."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
