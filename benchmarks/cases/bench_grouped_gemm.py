"""grouped_gemm: python -m benchmarks.cases.bench_grouped_gemm [--shape NAME] [--backend NAME] [--full]

The first GEMM of a layer: gathered rows in token order, bias, activation; its backward runs both adjoints.
"""

import torch

from benchmarks.cases.eager import activate
from benchmarks.cases.shapes import Shape, chosen
from benchmarks.harness import Case, Workload, main
from benchmarks.peers.table import grouped_mm_first
from cumo_kernels import ops
from cumo_kernels.backends import reference
from cumo_kernels.testing import make_routing

OP = "grouped_gemm"


def cases(device: str, full: bool) -> list[Case]:
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    patterns = ("uniform", "skewed", "one_expert") if full else ("uniform",)
    shapes = chosen(device, full)
    return [Case(shape, kind, pattern) for shape in shapes for kind in dtypes for pattern in patterns]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    routing = make_routing(pattern, shape.T, shape.E, shape.K, device)
    draw = lambda *size: torch.randn(*size, dtype=dtype, device=device)
    x, weight = draw(shape.T, shape.H), draw(shape.E, shape.width, shape.H) / shape.H**0.5
    bias = (draw(shape.E, shape.width),) if shape.bias else ()
    offsets, permutation, inverse = routing.expert_offsets, routing.permutation, routing.inverse_permutation

    def run(x, w, b=None):
        return ops.grouped_gemm(x, w, offsets, bias=b, gather=routing, activation=shape.activation)

    def expected(x, w, b=None):
        plan = (permutation, inverse, shape.K)
        return reference.grouped_gemm(x, w, offsets, b, *plan, shape.activation)[0]

    rows, dense_weight = draw(shape.slots, shape.H), draw(shape.width, shape.H) / shape.H**0.5
    size, used = x.element_size(), int((routing.tokens_per_expert > 0).sum())
    return Workload(
        run=run,
        reference=expected,
        inputs=(x, weight, *bias),
        flops=2 * shape.slots * shape.width * shape.H,
        # tokens once, the weights of the experts with rows, the activation written
        bytes=size * (x.numel() + used * shape.width * shape.H + shape.slots * shape.I),
        backward_bytes=size
        * (shape.slots * (shape.I + shape.width) + 2 * x.numel() + 2 * shape.E * shape.width * shape.H),
        peers={"torch-grouped_mm": grouped_mm_first(shape, routing)},
        dense=(lambda x, w: activate(x @ w.T, shape.activation), (rows, dense_weight)),
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
