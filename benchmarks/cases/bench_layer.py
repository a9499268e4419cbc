"""The whole MoE layer: python -m benchmarks.cases.bench_layer [--shape NAME] [--backend NAME] [--full]

Gate, routing, both losses and experts, as in cumo_model's MoELayer, compared with the original's loops.
"""

import torch

from benchmarks.cases import eager
from benchmarks.cases.shapes import Shape, chosen
from benchmarks.harness import Case, Workload, main
from benchmarks.peers.table import compared_as_experts
from cumo_kernels import ops
from cumo_kernels.backends import reference

OP = "moe_layer"


def cases(device: str, full: bool) -> list[Case]:
    if device == "cpu":
        return [Case(shape, "fp32", modes=("forward", "both")) for shape in chosen(device, full)]
    return [Case(shape, "bf16") for shape in chosen(device, full)]


def separated(shape: Shape, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x whose first E columns are its logits, 1/8 apart, and the gate that reads them.

    Rounded logits of random data have ties that fp64 logits do not have, and a different choice of experts is
    not an error. Small multiples of 1/8 are exact in every dtype.
    """
    order = torch.rand(shape.T, shape.E, device=x.device).argsort(1).to(x.dtype)
    gate = torch.zeros(shape.E, shape.H, dtype=x.dtype, device=x.device)
    gate[:, : shape.E] = torch.eye(shape.E, dtype=x.dtype, device=x.device)
    return torch.cat([(order + 1) / 8, x[:, shape.E :]], 1), gate


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    draw = lambda *size: torch.randn(*size, dtype=dtype, device=device)
    x, gate = separated(shape, draw(shape.T, shape.H))
    up = draw(shape.E, shape.width, shape.H) / shape.H**0.5
    down = draw(shape.E, shape.O, shape.I) / shape.I**0.5
    biases = (draw(shape.E, shape.width), draw(shape.E, shape.O)) if shape.bias else ()

    def losses(mean_probs, density, z):
        return (mean_probs * density).sum(-1).mean() * shape.E, z.mean()

    def run(x, gate, up, down, *b):
        routing = ops.route(x, shape.K, gate, groups=shape.groups)
        stats = routing.stats
        out = ops.expert_mlp(x, routing, up, down, *b, activation=shape.activation)
        return out, *losses(stats.mean_probs, stats.top1_density, stats.mean_squared_logsumexp)

    def expected(x, gate, up, down, *b):
        weights, indices, mean_probs, density, z = reference.route(x, gate, None, shape.groups, shape.K, True)
        _, offsets, permutation, inverse = reference.sort_by_expert(indices, shape.E)
        both = b or (None, None)
        plan = (weights, permutation, inverse, offsets)
        out = reference.expert_mlp(x, *plan, up, down, *both, shape.activation, "none")[0]
        return out, *losses(mean_probs, density, z)

    def original(x, gate, up, down, *b):
        return eager.moe_layer(
            x, gate, up, down, *b, activation=shape.activation, groups=shape.groups, top_k=shape.K
        )

    def dense(x, up, down):
        return eager.activate(x @ up.T, shape.activation) @ down.T

    rows = draw(shape.slots, shape.H)
    ends = (draw(shape.width, shape.H) / shape.H**0.5, draw(shape.O, shape.I) / shape.I**0.5)
    size, used = x.element_size(), min(shape.E, shape.slots) * shape.weights // shape.E
    return Workload(
        run=run,
        reference=expected,
        inputs=(x, gate, up, down, *biases),
        flops=shape.gemm_flops + 2 * shape.T * shape.H * shape.E,
        bytes=size * (2 * x.numel() + used + shape.slots * (2 * shape.I + 2 * shape.O) + shape.T * shape.O),
        backward_bytes=size
        * (
            3 * shape.T * (shape.H + shape.O)
            + 3 * shape.weights
            + shape.slots * (3 * shape.width + 2 * shape.I + 2 * shape.H)
        ),
        peers={"cumo-original": original},
        gaps=compared_as_experts(),
        dense=(dense, (rows, *ends)),
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
