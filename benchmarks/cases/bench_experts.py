"""expert_mlp: python -m benchmarks.cases.bench_experts [--shape NAME] [--backend NAME] [--full]

The whole expert layer for a given routing plan, compared with every peer and with a dense MLP of equal FLOPs.
"""

from dataclasses import replace

import torch

from benchmarks.cases.eager import activate
from benchmarks.cases.shapes import SHAPES, Shape, chosen
from benchmarks.harness import Case, Workload, main
from benchmarks.peers.table import available
from cumo_kernels import ops
from cumo_kernels.backends import reference
from cumo_kernels.testing import make_routing

OP = "expert_mlp"


def cases(device: str, full: bool) -> list[Case]:
    if device == "cpu":
        kinds = [(shape, dtype) for shape in chosen(device, full) for dtype in ("fp32", "bf16")]
        return [Case(shape, dtype, modes=("forward", "both")) for shape, dtype in kinds]
    patterns = ("uniform", "skewed", "one_expert") if full else ("uniform", "skewed")
    found = [Case(shape, "bf16", pattern) for pattern in patterns for shape in chosen(device, full)]
    return found + [Case(SHAPES["clip-image"], dtype) for dtype in ("fp16", "fp32") if full]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    routing = make_routing(pattern, shape.T, shape.E, shape.K, device)
    draw = lambda *size: torch.randn(*size, dtype=dtype, device=device)
    x = draw(shape.T, shape.H)
    up = draw(shape.E, shape.width, shape.H) / shape.H**0.5
    down = draw(shape.E, shape.O, shape.I) / shape.I**0.5
    biases = (draw(shape.E, shape.width), draw(shape.E, shape.O)) if shape.bias else ()
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)

    def run(x, weights, up, down, *b):
        # the plan is given: only its weights have a gradient
        given = replace(routing, topk_weights=weights)
        return ops.expert_mlp(x, given, up, down, *b, activation=shape.activation)

    def expected(x, weights, up, down, *b):
        both = b or (None, None)
        return reference.expert_mlp(x, weights, *plan, up, down, *both, shape.activation, "none")[0]

    def dense(x, up, down):
        return activate(x @ up.T, shape.activation) @ down.T

    peers, gaps = available(shape, dtype, device)
    rows = draw(shape.slots, shape.H)
    dense_up, dense_down = draw(shape.width, shape.H), draw(shape.O, shape.I)
    hit = int((routing.tokens_per_expert > 0).sum())  # weights of other experts need not be read
    size, used = x.element_size(), hit * shape.weights // shape.E
    return Workload(
        run=run,
        reference=expected,
        inputs=(x, routing.topk_weights, up, down, *biases),
        flops=shape.gemm_flops,
        # every operand of the two GEMMs and of the weighted sum once
        bytes=size * (x.numel() + used + shape.slots * (2 * shape.I + 2 * shape.O) + shape.T * shape.O),
        backward_bytes=size
        * (
            2 * shape.T * (shape.H + shape.O)
            + 3 * shape.weights
            + shape.slots * (3 * shape.width + 2 * shape.I + 2 * shape.H)
        ),
        peers={peer.name: peer.make(shape, routing) for peer in peers},
        forward_only={peer.name: peer.no_backward for peer in peers if peer.no_backward},
        gaps=gaps,
        dense=(dense, (rows, dense_up / shape.H**0.5, dense_down / shape.I**0.5)),
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
