"""activate: python -m benchmarks.cases.bench_activation [--shape NAME] [--backend NAME] [--full]"""

import torch

from benchmarks.cases.eager import activate as plain
from benchmarks.cases.shapes import Shape, chosen
from benchmarks.harness import Case, Workload, main
from cumo_kernels import ops
from cumo_kernels.backends import reference

OP = "activate"


def cases(device: str, full: bool) -> list[Case]:
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    return [Case(shape, dtype) for shape in chosen(device, full) for dtype in dtypes]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    x = torch.randn(shape.slots, shape.width, dtype=dtype, device=device)
    size = x.element_size() * shape.slots
    return Workload(
        run=lambda x: ops.activate(x, shape.activation),
        reference=lambda x: reference.activate(x, shape.activation),
        inputs=(x,),
        bytes=size * (shape.width + shape.I),  # read z, write a
        backward_bytes=size * (shape.I + 2 * shape.width),  # read da and z, write dz
        peers={"torch-plain": lambda x: plain(x, shape.activation)},
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
