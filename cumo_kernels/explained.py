"""python -m cumo_kernels explain: a table of ops and backends, and below it each reason once.

expert_mlp           chosen 1       refused 2      able           able 3
1  verified on nvidia_h100, 2026-11-28, torch 2.11, triton 3.6, 36 cases
"""

import json
from collections.abc import Iterable

import torch

from cumo_kernels import dispatch
from cumo_kernels.tiles.hardware import gpu_of
from cumo_kernels.verification import verified


def machine(device: torch.device) -> str:
    """The device and software versions that the verdicts apply to, as text."""
    name = gpu_of(device).name if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {verified.triton_version()}"


def table(ops: Iterable[str], x: torch.Tensor, with_backward: bool = True) -> str:
    """A row per op and a column per backend, for tensors like `x`; numbers refer to the reasons below."""
    notes: dict[str, int] = {}
    rows = [(str(x.dtype).removeprefix("torch."), *(row.name for row in dispatch.BACKENDS))]
    for op in ops:
        cells = [op]
        for verdict in dispatch.judge(op, x, with_backward=with_backward):
            number = f" {notes.setdefault(verdict.reason, len(notes) + 1)}" if verdict.reason else ""
            cells.append(f"{verdict.state}{number}")
        rows.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    reasons = [f"{number:>2}  {reason}" for reason, number in notes.items()]
    size = " x ".join(map(str, x.shape))
    calls = f"{machine(x.device)}; tensors of {size}, {'with' if with_backward else 'without'} backward"
    return "\n".join([calls, "", *lines, "", *reasons]).rstrip()


def as_json(ops: Iterable[str], x: torch.Tensor, with_backward: bool = True) -> str:
    """The same as JSON: an object per op and backend; `source` is the hash that a proof must have."""
    rows = [
        {
            "machine": machine(x.device),
            "shape": list(x.shape),
            "with_backward": with_backward,
            "op": op,
            "dtype": str(x.dtype).removeprefix("torch."),
            "backend": verdict.backend,
            "state": verdict.state,
            "reason": verdict.reason,
            "source": verified.source_of(verdict.backend) if verdict.backend in verified.SOURCES else None,
        }
        for op in ops
        for verdict in dispatch.judge(op, x, with_backward=with_backward)
    ]
    return json.dumps(rows, indent=1)
