"""The host's time for one call: python -m benchmarks.cases.bench_overhead

The expert layer and the router at sizes with negligible arithmetic: the time of a call is that of checks,
dispatch, autograd and launches. On a GPU it is wall-clock time, from an idle GPU to an idle GPU: after a
flush of the L2, as in other benchmarks, the host would run ahead for the time of the flush. The graph timer
shows the time without the host.
"""

from dataclasses import replace

import torch

from benchmarks.cases import bench_layer
from benchmarks.cases.shapes import Shape
from benchmarks.harness import Case, Workload, main

OP = "overhead"
TINY = Shape("tiny", 8, 64, 64, 64, 4, 2, "quick_gelu", True)


def cases(device: str, full: bool) -> list[Case]:
    return [Case(TINY, "bf16" if device == "cuda" else "fp32", modes=("forward", "both"))]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    return replace(bench_layer.setup(shape, dtype, device, pattern), host=True)


if __name__ == "__main__":
    raise SystemExit(main(__name__))
