"""Which backend was faster where: the one table, measured.json, that the automatic choice looks at.

    {gpu: [{"op": ..., "dtype": "bfloat16", "rows": ..., "ms": {"triton": ..., "cuda": ...}}, ...]}

gpu is a name of hardware.py, rows the length of the op's first tensor. Written by measurements on that GPU
behind a green check, never by hand; for a GPU without entries, and in graphs that are being compiled, the
first backend of dispatch.BACKENDS that can run wins.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cumo_kernels.hardware import gpu_of

TABLE: dict[str, list[dict]] = json.loads(Path(__file__).with_name("measured.json").read_text())


def fastest(op: str, x: torch.Tensor, among: Sequence[str]) -> tuple[str, str] | None:
    """The backend that took least for the nearest number of rows, and the reason; None without such data."""
    if not TABLE or x.ndim == 0 or torch.compiler.is_compiling():
        return None
    gpu, dtype = gpu_of(x.device).name, str(x.dtype).removeprefix("torch.")
    rows = [
        row
        for row in TABLE.get(gpu, ())
        if row["op"] == op and row["dtype"] == dtype and all(name in row["ms"] for name in among)
    ]
    if not rows:
        return None
    # as far as ratios go: 500 rows are nearer to 1000 than to 100
    distance = lambda row: max(row["rows"] + 1, x.shape[0] + 1) / min(row["rows"] + 1, x.shape[0] + 1)
    nearest = min(rows, key=distance)
    times = {name: nearest["ms"][name] for name in among}
    best = min(times, key=times.get)
    spoken = ", ".join(f"{name} {ms:.4g} ms" for name, ms in times.items())
    return best, f"measured on {gpu}, {nearest['rows']} rows: {spoken}"
