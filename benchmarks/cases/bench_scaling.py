"""Scaling of expert_mlp over tokens, experts and top-k: python -m benchmarks.cases.bench_scaling [--full]

One parameter changes at a time, starting from CLIP's layer: T from one crop to about 10^6 rows, E from 4 to
256 at equal FLOPs, K from 1 to 8. On a CPU, H and I are an eighth of that, and there are fewer sizes.
"""

from dataclasses import replace

import torch

from benchmarks.cases import bench_experts
from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.harness import Case, Workload, main

OP = "scaling"
CLIP = SHAPES["clip-1-crop"]


def sweep(
    base: Shape, tokens: tuple[int, ...], experts: tuple[int, ...], choices: tuple[int, ...]
) -> list[Shape]:
    middle = replace(base, T=tokens[len(tokens) // 2], groups=1)
    shapes = [replace(base, name="over-tokens", T=T, groups=1) for T in tokens]
    shapes += [replace(middle, name="over-experts", E=E) for E in experts]
    return shapes + [replace(middle, name="over-choices", E=max(experts), K=K) for K in choices]


def cases(device: str, full: bool) -> list[Case]:
    if device == "cpu":
        base = replace(CLIP, H=128, I=512, O=128)
        shapes = sweep(base, (64, 577, 2308), (4, 16, 64), (1, 2, 4))
        return [Case(shape, "fp32", modes=("both",)) for shape in shapes]
    tokens = (577, 1154, 2308, 5770, 23080, 92320, 500_000)
    shapes = sweep(
        CLIP, tokens if full else tokens[::2], (4, 8, 16, 64, 256) if full else (4, 64), (1, 2, 4, 8)
    )
    return [Case(shape, "bf16", modes=("forward", "both")) for shape in shapes]


def setup(shape: Shape, dtype: torch.dtype, device: str, pattern: str) -> Workload:
    return bench_experts.setup(shape, dtype, device, pattern)


if __name__ == "__main__":
    raise SystemExit(main(__name__))
