"""packed_expert_mlp: python -m benchmarks.cases.bench_packed [--shape NAME] [--backend NAME] [--full]

The expert layer with weights in four bits: each format on each backend, the same weights in full precision
("plain"), bitsandbytes' dequantisation before the product, and grouped-nf4-gemm where it is installed.

Every weight is -1, 0 or 1 times a power of two for its block, which all formats hold exactly, so that one
reference gates all of them. Times do not depend on the values. `bytes` and so GB/s are those of nf4.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.harness import LAYER, Case, Workload, backends, main
from benchmarks.peers import packed as peers
from cumo_kernels import PackedWeight, Routing, ops, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.packing.formats import FORMATS, SYMMETRIC_ZERO, pack_nibbles
from cumo_kernels.testing import make_routing

OP = "packed_expert_mlp"
NEEDS = "adapted_expert_mlp"  # the op that a backend must have
TOKENS = (1, 16, 64, 1024)
BLOCK = 128  # weights with the same scale: the largest of the formats' usual blocks


def cases(device: str, full: bool) -> list[Case]:
    base = SHAPES["mixtral-quarter" if device == "cpu" else "mixtral-decode1"]
    shapes = [replace(base, name=f"{base.name.split('-decode')[0]}-{tokens}", T=tokens) for tokens in TOKENS]
    found = [Case(shape, "bf16", modes=("forward",)) for shape in shapes]
    return found + ([Case(shapes[-1], "bf16", modes=("forward", "both"))] if full else [])


def fitting(shape: Shape) -> Shape:
    """`shape` with H and I of whole blocks."""
    up = lambda size: math.ceil(size / BLOCK) * BLOCK
    return replace(shape, H=up(shape.H), I=up(shape.I), O=up(shape.O), bias=False)


def _packed(signs: Tensor, exponents: Tensor, format: str, dtype: torch.dtype) -> PackedWeight:
    """signs (E, N, K) of -1, 0, 1 times 2 ** exponents (E, N, K / BLOCK), without rounding."""
    row = FORMATS[format]
    if row.codes is None:
        q = signs + SYMMETRIC_ZERO
    else:
        q = torch.tensor([row.codes.index(v) for v in (-1.0, 0.0, 1.0)], device=signs.device)[signs + 1]
    exponents = exponents.repeat_interleave(BLOCK // row.group, -1)
    is_e8m0 = row.scales[0] == torch.uint8
    scales = (exponents + 127).to(torch.uint8) if is_e8m0 else torch.exp2(exponents.float())
    return PackedWeight(pack_nibbles(q.to(torch.uint8)), scales, None, format, dtype)


def weights(
    size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, dict[str, PackedWeight]]:
    """The same weights (E, N, K) plain and in every format."""
    signs = torch.randint(-1, 2, size, dtype=torch.int8, device=device)
    small = round(math.log2(size[2]) / 2)
    exponents = torch.randint(-small - 1, -small + 1, (*size[:2], size[2] // BLOCK), device=device)
    plain = signs.to(dtype) * torch.exp2(exponents.to(dtype)).repeat_interleave(BLOCK, -1)
    return plain, {name: _packed(signs.int(), exponents, name, dtype) for name in FORMATS}


def _layer(shape: Shape, routing: Routing, up: Tensor, down: Tensor, backend: str | None = None):
    def run(x: Tensor, topk_weights: Tensor) -> Tensor:
        plan = replace(routing, topk_weights=topk_weights)
        return ops.expert_mlp(x, plan, up, down, activation=shape.activation)

    def forced(*inputs: Tensor) -> Tensor:
        with use_backend(backend):
            return run(*inputs)

    return run if backend is None else forced


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    given, shape = shape, fitting(shape)
    routing = make_routing(pattern, shape.T, shape.E, shape.K, device)
    x = torch.randn(shape.T, shape.H, dtype=dtype, device=device)
    up, packed_up = weights((shape.E, shape.width, shape.H), dtype, device)
    down, packed_down = weights((shape.E, shape.O, shape.I), dtype, device)
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)

    def expected(x, topk_weights):
        wide = (up.to(x.dtype), down.to(x.dtype), None, None)
        return reference.expert_mlp(x, topk_weights, *plan, *wide, shape.activation, "none")[0]

    fast = lambda op: [name for name in backends(device, op=op) if name != "reference"]
    others = {
        f"{name} ({format})": _layer(shape, routing, packed_up[format], packed_down[format], name)
        for name in fast(NEEDS)
        for format in FORMATS
        if format != "nf4"
    }
    others |= {f"{name} (plain)": _layer(shape, routing, up, down, name) for name in fast(LAYER)}
    layers, forward_only, gaps = peers.available(shape, routing, packed_up["nf4"], packed_down["nf4"], dtype)
    hit = int((routing.tokens_per_expert > 0).sum())  # weights of other experts need not be read
    used = (packed_up["nf4"].nbytes + packed_down["nf4"].nbytes) * hit // shape.E
    size = x.element_size()
    every = [
        part for stack in (packed_up, packed_down) for weight in stack.values() for part in weight.parts()
    ]
    return Workload(
        run=_layer(shape, routing, packed_up["nf4"], packed_down["nf4"]),
        reference=expected,
        inputs=(x, routing.topk_weights),
        op=NEEDS,
        flops=shape.gemm_flops,
        # every operand of the two GEMMs and of the weighted sum once
        bytes=used + size * (x.numel() + shape.slots * (2 * shape.I + 2 * shape.O) + shape.T * shape.O),
        backward_flops=shape.gemm_flops,  # frozen weights: only the gradient of x
        peers=others | layers,
        forward_only=forward_only,
        gaps=gaps,
        constants=(up, down, *(part for part in every if part is not None)),
        note="" if given == shape else f"run at {shape.sizes}, without biases",
    )


if __name__ == "__main__":
    raise SystemExit(main(__name__))
