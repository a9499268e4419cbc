"""permute and combine: python -m benchmarks.cases.bench_permutation [--shape NAME] [--backend NAME] [--full]

One workload, since each is the other's backward: rows into expert order, and weighted back to token order.
"""

import torch

from benchmarks.cases.shapes import Shape, chosen
from benchmarks.harness import Case, Workload, main
from cumo_kernels import ops
from cumo_kernels.backends import reference
from cumo_kernels.testing import make_routing

OP = "permute_combine"


def cases(device: str, full: bool) -> list[Case]:
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16")
    patterns = ("uniform", "skewed", "one_expert") if full else ("uniform",)
    shapes = chosen(device, full)
    return [Case(shape, kind, pattern) for shape in shapes for kind in dtypes for pattern in patterns]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    routing = make_routing(pattern, shape.T, shape.E, shape.K, device)
    indices, permutation, inverse = (
        routing.topk_indices,
        routing.permutation,
        routing.inverse_permutation,
    )
    x = torch.randn(shape.T, shape.H, dtype=dtype, device=device)
    row = x.element_size() * shape.H
    tokens = routing.token_indices

    def run(x, weights):
        plan = ops.routing_from_topk(weights, indices, shape.E)
        return ops.combine(ops.permute(x, plan), plan)

    def expected(x, weights):
        rows = reference.permute(x, permutation, inverse, shape.K)
        return reference.combine(rows, weights, inverse, shape.K)

    def indexed(x, weights):
        rows = x.index_select(0, tokens)
        by_slot = rows.index_select(0, inverse).view(shape.T, shape.K, shape.H)
        return (by_slot * weights[..., None].to(x)).sum(1)

    once = row * (shape.slots + shape.T)  # K rows on one side, one on the other
    return Workload(
        run=run,
        reference=expected,
        inputs=(x, routing.topk_weights),
        bytes=2 * once,
        backward_bytes=2 * once + row * shape.slots,  # the rows again, for the weights' gradient
        peers={"torch-indexing": indexed},
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
