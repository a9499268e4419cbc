"""python -m benchmarks.predictions.four_bits: what experts in 4 bits, and LoRA on experts, can save on a GPU.

    ms = max(FLOPs / peak, bytes / bandwidth)      every operand moved once, at the data sheet's rates

PREDICTIONS from sizes alone, not measurements, and lower limits: they include neither the work of
dequantising nor tiles and waves. bench_packed and bench_lora measure the same layers. The ways:

    plain            expert_mlp on weights in bf16
    nf4 ... int4     expert_mlp on packed weights, dequantised inside of the products
    dequantise       nf4 to bf16 for all experts of the layer (read 4 bits, write 16), then "plain"
    lora             expert_mlp with adapters, forward and the gradients of x and of the adapters
    lora by peft     W + B A of all experts, then "plain" with the gradients of all weights, then of A and B
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.predictions.layers import FOLDER
from cumo_kernels.files import write_whole
from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.tiles import hardware
from cumo_kernels.tiles.hardware import Gpu

TOKENS = (1, 16, 64, 1024, 8192)
RANK = 16
BF16 = 2  # bytes


@dataclass(frozen=True)
class Prediction:
    """One layer computed in one way; `ms` is computed, not measured."""

    gpu: str
    shape: str
    tokens: int
    way: str
    gflop: float
    mib: float  # bytes moved
    ms: float
    bound: str  # "FLOPs" or "bytes"
    gain: float  # ms of "plain", or of "lora by peft", / ms


def experts_hit(shape: Shape) -> float:
    """The expected number of experts with a token if every token chooses K of E at random."""
    return shape.E * (1 - (1 - shape.K / shape.E) ** shape.T)


def bytes_per_weight(format: str) -> float:
    """Half a byte, and the block's share of its scale, in the default block and dtype."""
    row = FORMATS[format]
    return 0.5 + row.scales[0].itemsize / row.group


def costs(shape: Shape, rank: int = RANK) -> Iterator[tuple[str, float, float]]:
    """-> way, FLOPs, bytes."""
    matrix = shape.width * shape.H + shape.O * shape.I  # weights of one expert
    hit, thin = experts_hit(shape), rank * (shape.width + shape.H + shape.O + shape.I)
    # x, z, a and y, and the output
    rows = BF16 * (shape.T * (shape.H + shape.O) + shape.slots * (shape.width + shape.I + shape.O))
    flops = shape.gemm_flops
    yield "plain", flops, rows + BF16 * hit * matrix
    for name in FORMATS:
        yield name, flops, rows + bytes_per_weight(name) * hit * matrix
    moved = (bytes_per_weight("nf4") + BF16) * shape.E * matrix
    yield "dequantise", flops, rows + moved + BF16 * hit * matrix
    # forward, the products with W^T in backward, and three products for each pair of factors and direction
    pair = 2 * shape.slots * thin
    yield (
        "lora",
        2 * flops + 3 * pair,
        3 * rows + 2 * BF16 * hit * (matrix + thin) + 2 * BF16 * shape.E * thin,
    )
    # the sum reads W and writes W + B A; the gradient of the sum is written, and read twice, for A and for B
    sums = 2 * shape.E * rank * matrix
    every = BF16 * shape.E * matrix
    yield "lora by peft", 3 * flops + 3 * sums, 3 * rows + 2 * BF16 * hit * matrix + (2 + 1 + 2) * every


def survey(gpu: Gpu, shape: Shape) -> list[Prediction]:
    """Every way at every number of tokens."""
    found = []
    for tokens in TOKENS:
        at = replace(shape, T=tokens)
        limits = {
            way: (flops / gpu.tflops_16 / 1e9, moved / gpu.gb_per_s / 1e6, flops, moved)
            for way, flops, moved in costs(at)
        }
        for way, (arithmetic, memory, flops, moved) in limits.items():
            ms, base = max(arithmetic, memory), max(limits["lora by peft" if "lora" in way else "plain"][:2])
            bound = "FLOPs" if arithmetic > memory else "bytes"
            row = (gpu.name, shape.name, tokens, way, flops / 1e9, moved / 2**20, ms, bound, base / ms)
            found.append(Prediction(*row))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions.four_bits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--gpu", default="nvidia_h100", help="a name in cumo_kernels/tiles/hardware.py")
    parser.add_argument("--save", action="store_true", help="write predicted/four_bits/<gpu>.csv")
    args = parser.parse_args(argv)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Prediction))
    shape = replace(SHAPES["mixtral-decode1"], name="mixtral")
    for row in survey(hardware.find(args.gpu), shape):
        writer.writerow(f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values())
    print(text.getvalue(), end="")
    if args.save:
        path = FOLDER / "four_bits" / f"{args.gpu}.csv"
        write_whole(path, text.getvalue())
        print(f"predictions, not measurements, in {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
