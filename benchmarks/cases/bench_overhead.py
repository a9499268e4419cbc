"""What the host spends on one call: python -m benchmarks.cases.bench_overhead

The expert layer and the router at sizes whose arithmetic is nothing: the time of a call is that of checks,
dispatch, autograd and launches. On a GPU it is the wall's, from an idle GPU to an idle GPU: behind a flush of
the L2 as elsewhere the host would be ahead by as long as that takes. The graph timer shows what remains
without the host.
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
