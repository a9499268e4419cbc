"""lora_expert_mlp: python -m benchmarks.cases.bench_lora [--shape NAME] [--backend NAME] [--full]

LoRA of rank 16 on the frozen weights of a layer: the factors in the layer's kernels, compared with what peft
computes, the same layer with W + scaling * B A of all experts, on the same backend.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.harness import Case, Workload, backends, main
from cumo_kernels import Adapter, ops, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import make_routing

OP = "lora_expert_mlp"
NEEDS = "adapted_expert_mlp"  # the op that a backend must have
RANK, SCALING = 16, 0.5


def cases(device: str, full: bool) -> list[Case]:
    if device == "cpu":
        eighth = replace(SHAPES["mixtral-quarter"], name="mixtral-eighth", T=64, H=512, I=1792, O=512)
        return [Case(eighth, "bf16", modes=("forward", "both"))]
    names = ("mixtral-train", "mixtral-prefill", "qwen3-30b-a3b") if full else ("mixtral-train",)
    return [Case(SHAPES[name], "bf16", modes=("forward", "both")) for name in names]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    shape = replace(shape, bias=False)
    routing = make_routing(pattern, shape.T, shape.E, shape.K, device)
    draw = lambda *size: torch.randn(*size, dtype=dtype, device=device)
    x = draw(shape.T, shape.H)
    up, down = (
        draw(shape.E, rows, columns) / columns**0.5
        for rows, columns in ((shape.width, shape.H), (shape.O, shape.I))
    )
    factors = []
    for rows, columns in ((shape.width, shape.H), (shape.O, shape.I)):
        factors += [draw(shape.E, RANK, columns) / columns**0.5, draw(shape.E, rows, RANK) / RANK**0.5]
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)

    def run(x: Tensor, topk_weights: Tensor, up_a: Tensor, up_b: Tensor, down_a: Tensor, down_b: Tensor):
        given = replace(routing, topk_weights=topk_weights)
        first, second = Adapter(up_a, up_b, SCALING), Adapter(down_a, down_b, SCALING)
        return ops.expert_mlp(
            x, given, up, down, activation=shape.activation, up_adapters=[first], down_adapters=[second]
        )

    def summed(x: Tensor, *adapters: Tensor) -> tuple[Tensor, Tensor]:
        up_a, up_b, down_a, down_b = adapters
        return tuple(
            torch.baddbmm(weight.to(x.dtype), b, a, alpha=SCALING)
            for weight, a, b in ((up, up_a, up_b), (down, down_a, down_b))
        )

    def expected(x, topk_weights, *adapters):
        biases = (None, None)
        sums = summed(x, *adapters)
        return reference.expert_mlp(x, topk_weights, *plan, *sums, *biases, shape.activation, "none")[0]

    def of_peft(backend: str):
        def layer(x, topk_weights, *adapters):
            given = replace(routing, topk_weights=topk_weights)
            with use_backend(backend):
                return ops.expert_mlp(x, given, *summed(x, *adapters), activation=shape.activation)

        return layer

    size, hit = x.element_size(), int((routing.tokens_per_expert > 0).sum())
    thin = RANK * (shape.H + shape.width + shape.I + shape.O)  # elements of an expert's factors
    rows = shape.slots * (2 * shape.I + 2 * shape.O) + shape.T * (shape.H + shape.O)
    return Workload(
        run=run,
        reference=expected,
        inputs=(x, routing.topk_weights, *factors),
        op=NEEDS,
        flops=shape.gemm_flops + 2 * shape.slots * thin,
        bytes=size * (rows + hit * (shape.weights // shape.E + thin)),
        # the gradient of x, and the two products of each factor and of its input
        backward_flops=shape.gemm_flops + 4 * shape.slots * thin,
        peers={f"{name} (peft's sum)": of_peft(name) for name in backends(device) if name != "reference"},
        constants=(up, down),
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
