"""What tests and users need to check a backend: routings, the accuracy rule, poisoned memory.

The rule, which nobody types a tolerance for: an op may be at most twice as wrong as plain PyTorch in the
same dtype, both measured against fp64, plus one rounding of the result. PyTorch's sums are its BLAS's, which
splits them; where that errs less than sums in one chain do (rounding.py derives how much), the
op may be at most twice as wrong as those.
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
        scores = noise.log() * 2.0 ** experts.clamp(max=100)  # the largest of u^(1/odds), in logs
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
    """-> float outputs and the gradients of all float inputs, in fp64, under random upstream gradients.

    With `wide` the op gets its float inputs in fp64.
    """
    kind = lambda t: torch.float64 if wide and t.is_floating_point() else t.dtype
    leaves = [t.detach().to(kind(t), copy=True).requires_grad_(t.is_floating_point()) for t in inputs]
    outs = op(*leaves)
    outs = [o for o in ([outs] if isinstance(outs, Tensor) else outs) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(upstream_seed)
    # bf16-representable, so that all three runs are given the same upstream gradients
    drawn = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outs]
    traced = [(o, g) for o, g in zip(outs, drawn, strict=True) if o.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    found = [None] * len(wanted)
    if traced:
        ends, upstream = zip(*traced, strict=True)
        found = torch.autograd.grad(ends, wanted, upstream, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
    return [o.detach().double() for o in outs], [g.double() for g in grads]


SMALL = 64  # elements: of fewer several draws are pooled
ROUNDS = 8  # as many at most


@dataclass(frozen=True)
class Accuracy:
    """How far one output or gradient is from fp64."""

    name: str  # "output 0", "gradient 2": gradients are numbered like the float inputs
    ratio: float  # its error in units of torch's own, or of half a rounding where torch makes less
    reason: str | None  # why the rule refuses it, or None


class Yardstick:
    """What plain PyTorch makes of some inputs in their dtype and in fp64; `measure` holds ops against it.

    Tensors of a few elements say little about an error, so then several draws (inputs with random signs, new
    upstream gradients) are pooled.

    Args:
        reference: plain differentiable PyTorch.
        inputs: tensors; float ones get gradients, all of which are compared.
        pool: False makes one draw do, where several would take too long.
    """

    def __init__(self, reference: Callable, inputs: Sequence[Tensor], seed: int = 0, pool: bool = True):
        self.reference, self.seed = reference, seed
        # the coarsest dtype in play: fp32 statistics of bf16 logits are as good as bf16 inputs allow
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
            native, truth = (_run(reference, drawn, seed + len(self.draws), wide) for wide in (False, True))
            self.draws.append((drawn, native, truth))
            rounds = self._rounds() if pool else 1

    def measure(self, op: Callable) -> list[Accuracy]:
        """Every float output and gradient of `op`.

        Raises:
            AssertionError: `op` has another number of them than the reference, or of another shape.
        """
        pooled: dict[str, list[tuple[Tensor, ...]]] = {}
        for round_, (drawn, native, truth) in enumerate(self.draws):
            got = _run(op, drawn, self.seed + round_)
            for kind, mine, torchs, wanted in zip(("output", "gradient"), got, native, truth, strict=True):
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

        One more run in fp64 for all names at once, and only where somebody asks; a single draw of a few
        elements is run several times.
        """
        if not self._unsplit:
            eps = torch.finfo(accumulate_dtype(self.dtype)).eps
            device = self.draws[0][2][0][0].device
            mode = UnsplitSums(eps, torch.Generator(device).manual_seed(self.seed + len(self.draws)))
            times = self._rounds() if len(self.draws) == 1 else 1
            found: dict[str, list[tuple[float, float]]] = {}
            for i, (drawn, _, truth) in [*enumerate(self.draws)] * times:
                # backward on this thread: on another the mode might not be seen
                with mode, torch.autograd.set_multithreading_enabled(False):
                    got = _run(self.reference, drawn, self.seed + i, wide=True)
                for kind, mine, wanted in zip(("output", "gradient"), got, truth, strict=True):
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
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)  # one may be gigabytes: no copy


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
    truth: Tensor,
    eps: float,
    unsplit: Callable[[], tuple[float, float]],
) -> Accuracy:
    """`unsplit` says what unsplit sums err, at most and in the mean square: asked only where it matters."""
    if got.numel() == 0:
        return Accuracy(name, 0.0, None)
    finite = truth.isfinite()
    if not torch.equal(got.isfinite(), finite):
        number = int((~got.isfinite() & finite).sum())
        what = f"{number} non-finite values that fp64 has not" if number else "numbers where fp64 has none"
        return Accuracy(name, math.inf, f"{name} has {what}")
    kinds = [t[~finite].nan_to_num(0.0) for t in (got, truth)]  # infinities become the largest numbers
    if not torch.equal(*kinds):
        return Accuracy(name, math.inf, f"{name} has another infinity or NaN than fp64")
    # an infinite error of torch's own would allow everything, and inf - inf is no error at all
    errors, own = _within(got - truth, finite), _within(native - truth, finite & native.isfinite())
    truth = _within(truth, finite)
    ratio, reason = 0.0, None
    for which, (words, of) in enumerate((("at most", _largest), ("in the mean square", _mean_square))):
        error, torchs, size = of(errors), of(own), of(truth)
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
    """`op` is at most twice as far from fp64 as `reference` run in the dtype of the inputs, plus an ulp.

    Where unsplit sums err more than torch's (rounding.py), twice what `reference` errs with
    them. Both the root mean square and the largest error must obey.

    Args:
        op: function of `inputs`, returning one tensor or several; all float outputs are compared.
        reference: plain differentiable PyTorch for the same thing.
        inputs: tensors; float ones get gradients, all of which are compared.

    Raises:
        AssertionError: naming the output or gradient, its error and what the rule allows.
    """
    for accuracy in Yardstick(reference, inputs, seed).measure(op):
        if accuracy.reason is not None:
            raise AssertionError(accuracy.reason)


@contextmanager
def poisoned_memory():
    """Uninitialised memory is NaN (integers: their maximum), so that a read before a write shows."""
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
