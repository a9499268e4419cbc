"""What the host spends on one call: python -m benchmarks.bench_overhead

The expert layer and the router at sizes whose arithmetic is nothing: the time of a call is that of checks,
dispatch, autograd and launches. On a GPU the graph timer shows what remains without the host.
"""

import torch

from benchmarks import bench_layer
from benchmarks.harness import Case, Workload, main
from benchmarks.shapes import Shape

OP = "overhead"
TINY = Shape("tiny", 8, 64, 64, 64, 4, 2, "quick_gelu", True)


def cases(device: str, full: bool) -> list[Case]:
    return [Case(TINY, "bf16" if device == "cuda" else "fp32", modes=("forward", "both"))]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    return bench_layer.setup(shape, dtype, device, pattern)


if __name__ == "__main__":
    raise SystemExit(main(__name__))
