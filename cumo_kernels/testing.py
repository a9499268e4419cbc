"""What tests and users need to check a backend: routings, the accuracy rule, poisoned memory.

The rule, which nobody types a tolerance for: an op may be at most twice as wrong as plain PyTorch in the
same dtype, both measured against fp64, plus one rounding of the result.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cumo_kernels.ops.checks import check_top_k
from cumo_kernels.ops.routing import routing_from_topk
from cumo_kernels.types import Routing

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


def _run(op: Callable, inputs: Sequence[Tensor], upstream_seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """-> float outputs and the gradients of all float inputs, in fp64, under random upstream gradients."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
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


def assert_as_accurate_as_torch(op: Callable, reference: Callable, *inputs: Tensor, seed: int = 0) -> None:
    """`op` is at most twice as far from fp64 as `reference` run in the dtype of the inputs, plus an ulp.

    Both the root mean square and the largest error must obey. Tensors of a few elements say little about
    either, so then several draws (inputs with random signs, new upstream gradients) are pooled.

    Args:
        op: function of `inputs`, returning one tensor or several; all float outputs are compared.
        reference: plain differentiable PyTorch for the same thing.
        inputs: tensors; float ones get gradients, all of which are compared.

    Raises:
        AssertionError: naming the output or gradient, its error and what the rule allows.
    """
    floats = [t.dtype for t in inputs if t.is_floating_point()]
    # the coarsest dtype in play: fp32 statistics of bf16 logits are as good as bf16 inputs allow
    eps = max(torch.finfo(dtype).eps for dtype in floats)
    generator = torch.Generator().manual_seed(seed)
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    rounds, done = 1, 0
    while done < rounds:
        drawn = inputs
        if done:
            signs = [torch.randint(2, t.shape, generator=generator).to(t) * 2 - 1 for t in inputs]
            drawn = [t * s if t.is_floating_point() else t for t, s in zip(inputs, signs, strict=True)]
        wide = [t.double() if t.is_floating_point() else t for t in drawn]
        got, native, truth = (
            _run(function, tensors, seed + done)
            for function, tensors in ((op, drawn), (reference, drawn), (reference, wide))
        )
        for kind, index in (("output", 0), ("gradient", 1)):
            if len(got[index]) != len(truth[index]):
                raise AssertionError(f"op has {len(got[index])} {kind}s, the reference {len(truth[index])}")
            for i, row in enumerate(zip(got[index], native[index], truth[index], strict=True)):
                if row[0].shape != row[2].shape:
                    raise AssertionError(f"{kind} {i} is {tuple(row[0].shape)}, wanted {tuple(row[2].shape)}")
                pooled.setdefault(f"{kind} {i}", []).append(row)
        done += 1
        if min(t.numel() for rows in pooled.values() for t in rows[0]) < SMALL:
            rounds = ROUNDS
    for name, rows in pooled.items():
        _assert_close(name, *(torch.stack(tensors) for tensors in zip(*rows, strict=True)), eps)


SMALL, ROUNDS = 64, 8  # fewer elements than SMALL: pool ROUNDS draws


def _assert_close(name: str, got: Tensor, native: Tensor, truth: Tensor, eps: float) -> None:
    if got.numel() == 0:
        return
    if not torch.equal(got.isfinite(), truth.isfinite()):
        raise AssertionError(f"{name} has {int((~got.isfinite()).sum())} non-finite values that fp64 has not")
    for measure, of in (
        ("at most", lambda t: t.abs().max()),
        ("in the mean square", lambda t: t.norm() / t.numel() ** 0.5),
    ):
        error, allowed = of(got - truth), 2 * of(native - truth) + eps * of(truth)
        if error > allowed:
            worst = torch.unravel_index((got - truth).abs().argmax(), got.shape)
            raise AssertionError(
                f"{name} is off {measure} by {error:.3e}, allowed {allowed:.3e} (torch itself "
                f"{of(native - truth):.3e}); worst at index "
                f"{[int(i) for i in worst[1:]]} of {tuple(got.shape[1:])}"
            )


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
