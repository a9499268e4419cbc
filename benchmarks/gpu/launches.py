"""All launches of the gate as calls on CPU tensors, to compile their kernels without a GPU.

A kernel's cache key has dtypes, alignments and constants, not the device.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cumo_kernels import dispatch
from cumo_kernels.ops import checks, routing
from cumo_kernels.tiles import codegen
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification import cases

# FIRST["cuda"] of cases/shapes.py, a batch of crops, four images, a decode step of one token
LAYERS = (
    ("clip", 5770), ("clip", 577), ("llm", 8192), ("mlp", 4608), ("llm", 16),
    ("clip", 23080), ("mlp", 2304), ("llm", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A unit of work: a case of verify, or one op of a layer in bf16."""

    case: cases.Case | None = None
    layer: tuple[str, int] = ("", 0)
    op: str = ""

    def __str__(self) -> str:
        return str(self.case) if self.case else f"{self.layer[0]} T={self.layer[1]}: {self.op}"

    def run(self) -> None:
        """Make the launches, inside `on_the_cpu`."""
        if self.case is None:
            dict(codegen.calls(*self.layer, torch.bfloat16))[self.op]()
            return
        call = cases.build(self.case)
        leaves = [t.detach().requires_grad_() for t in call.inputs]
        outs = call.run(*leaves)
        outs = (outs,) if isinstance(outs, torch.Tensor) else outs
        torch.autograd.grad(outs, leaves, [torch.zeros_like(o) for o in outs], allow_unused=True)
        if call.integers is not None:
            call.integers(*call.inputs)


def jobs(few: bool = False, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Job]:
    """All launches of the gate, in its order; `few`: only a few, to test the procedure."""
    if few:
        kinds = cases.all_cases(cases.ALIGNED, ("bf16",), ("permute", "activate"))
        return [Job(case) for _, case in kinds]
    smoke = cases.survey("cuda", True, ("bf16",), cases.OPS) if "bf16" in dtypes else []
    layers = [Job(None, layer, op) for layer in LAYERS for op, _ in codegen.calls(*layer, torch.bfloat16)]
    verify = cases.survey("cuda", False, dtypes, cases.OPS)
    first, rest = ([Job(case) for _, case in found] for found in (smoke, verify))
    return list(dict.fromkeys([*first, *(layers if "bf16" in dtypes else ()), *rest]))


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Inside, public ops launch Triton's kernels on CPU tensors, and inputs are zeros that use no memory.

    For launches that are only compiled or go to a stub: outputs hold anything and are not read.
    """
    before = dispatch.BACKENDS, checks.values_at_hand, routing.values_at_hand, torch.randn
    dispatch.BACKENDS = (dispatch.Backend("triton", lambda *_: None),)
    checks.values_at_hand = routing.values_at_hand = lambda tensor: False
    torch.randn = lambda *size, generator=None: torch.zeros(*size)
    try:
        with dispatch.use_backend("triton"):
            yield
    finally:
        dispatch.BACKENDS, checks.values_at_hand, routing.values_at_hand, torch.randn = before
