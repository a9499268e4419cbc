"""python -m benchmarks.predictions: predict each kernel from compiled code, tiles and waves, without a GPU.

    share = useful part of the tiles * useful part of the waves       a GEMM's wave: a tile per multiprocessor
    ms = max(FLOPs / peak / share, bytes / bandwidth)           of a GEMM; of other ops the bytes alone

PREDICTIONS, not measurements: they include tile and wave quantisation, registers and shared memory, but not
latency, caches, clocks or epilogues. They are used to compare two commits: `--check` compares with the
committed file, so that review shows a change that adds a wave or spills a register.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.plot import _write
from benchmarks.predictions import cuda_kernels, other_ops
from benchmarks.predictions.cuda_kernels import Kernel
from cumo_kernels.tiles import codegen, hardware, problems, tuning
from cumo_kernels.tiles.codegen import Report
from cumo_kernels.tiles.hardware import KIB, Gpu
from cumo_kernels.tiles.tuning import Config, Problem

FOLDER = Path(__file__).resolve().parent / "predicted"
FAMILY = {"clip": "clip", "connector": "mlp", "mixtral": "llm"}  # first word of a shape -> problems.SHAPES
REGISTERS = 65536  # per multiprocessor, in every generation since Volta
GEMMS = ("up", "down", "grad of hidden", "grad of down", "grad of up", "grad of x")  # as in layer_problems
MIX = {  # classes of SASS instructions, by prefix of their names
    "tensor": codegen.TENSOR_CORE,
    "copies": codegen.ASYNC_COPY,
    "shared": ("LDS", "STS", "ATOMS"),
    "global": ("LDG", "STG", "LD", "ST", "RED", "ATOMG"),
    "special": ("MUFU",),
    "waiting": ("BAR", "SYNCS", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "WARPGROUP", "NANOSLEEP"),
}


@dataclass(frozen=True)
class Prediction:
    """One GEMM, or one other op, of one layer on one GPU; `ms` and `floor_ms` are computed, not measured."""

    gpu: str
    shape: str
    tokens: int
    dtype: str
    gemm: str
    size: str
    tile: str
    registers: int
    stack: int
    shared_kib: int
    blocks_per_sm: int
    tiles: int
    waves: float
    tile_use: float
    wave_use: float
    ms: float
    floor_ms: float
    share_of_floor: float
    mix: str  # static instructions by class


def blocks_per_sm(gpu: Gpu, registers: int, shared: int, num_warps: int) -> int:
    """Number of resident blocks per multiprocessor."""
    # registers are allocated in units of 8 per thread; a block uses 1 KiB more shared memory than requested
    by_registers = REGISTERS // (math.ceil(max(registers, 1) / 8) * 8 * 32 * num_warps)
    by_shared = (gpu.shared_memory + KIB) // (shared + KIB)
    by_warps = (64 if gpu.capability in (80, 90, 100, 103) else 48) // num_warps
    return max(1, min(by_registers, by_shared, by_warps, 32))


def tile_count(problem: Problem, config: Config) -> tuple[int, float]:
    """-> tiles with balanced routing, and the useful part of their arithmetic."""
    hit = max(min(problem.experts, problem.rows), 1)
    rows = problem.rows / hit  # of one expert
    if problem.kind == "weight_grad":
        tiles_n, tiles_k = math.ceil(problem.n / config.BLOCK_N), math.ceil(problem.k / config.BLOCK_K)
        steps = math.ceil(rows / config.BLOCK_M)
        padded = tiles_n * config.BLOCK_N * tiles_k * config.BLOCK_K * steps * config.BLOCK_M
        return tiles_n * tiles_k * problem.experts * config.SPLITS, problem.n * problem.k * rows / padded
    tiles_m, tiles_n = math.ceil(rows / config.BLOCK_M), math.ceil(problem.n / config.BLOCK_N)
    steps = math.ceil(problem.k / config.BLOCK_K)
    padded = tiles_m * config.BLOCK_M * tiles_n * config.BLOCK_N * steps * config.BLOCK_K
    return tiles_m * tiles_n * hit * config.SPLITS, rows * problem.n * problem.k / padded


def cost(problem: Problem) -> tuple[int, int]:
    """-> FLOPs, and bytes when every operand moves once."""
    size = torch.finfo(problem.dtype).bits // 8
    n, hit = problem.columns, max(min(problem.experts, problem.rows), 1)
    weights = problem.experts if problem.kind == "weight_grad" else hit
    elements = problem.rows * (n + problem.k) + weights * n * problem.k
    return 2 * problem.rows * n * problem.k, size * elements


def peak_of(gpu: Gpu, dtype: torch.dtype) -> float:
    return gpu.tflops_fp32 if dtype == torch.float32 else gpu.tflops_16


def instruction_mix(opcodes: dict[str, int]) -> str:
    counts = dict.fromkeys((*MIX, "other"), 0)
    for name, number in opcodes.items():
        found = (kind for kind, names in MIX.items() if name in names or name.startswith(names[0] + "M"))
        counts[next(found, "other")] += number
    return " ".join(f"{kind}:{number}" for kind, number in counts.items())


def predict(
    shape: Shape, gemm: str, problem: Problem, config: Config, report: Report, gpu: Gpu
) -> Prediction:
    problem = replace(problem, rows=shape.slots)  # tuning rounds it up
    tiles, tile_use = tile_count(problem, config)
    resident = blocks_per_sm(gpu, report.registers, report.shared, report.num_warps)
    # blocks of one multiprocessor share its tensor cores: the multiprocessor with most tiles ends last
    waves = tiles / gpu.sms
    wave_use = waves / math.ceil(waves)
    flops, bytes_ = cost(problem)
    arithmetic, memory = flops / peak_of(gpu, problem.dtype) / 1e9, bytes_ / gpu.gb_per_s / 1e6
    ms, floor = max(arithmetic / tile_use / wave_use, memory), max(arithmetic, memory)
    size = f"{problem.kind} {problem.columns}x{problem.k}"
    return Prediction(
        gpu.name, shape.name, shape.T, report.dtype, gemm, size, f"{report.tile} w{report.num_warps}",
        report.registers, report.stack, math.ceil(report.shared / KIB), resident, tiles, waves, tile_use,
        wave_use, ms, floor, floor / ms, instruction_mix(report.opcodes),
    )  # fmt: skip


def survey(gpu: Gpu, shapes: Iterable[Shape], dtype: str) -> list[Prediction]:
    """Compile every GEMM and every other op of every layer for `gpu` and predict it; GEMMs come first."""
    found, shapes = [], list(shapes)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    with codegen.compiling(gpu) as launched:
        for shape in shapes:
            dtype_ = problems.DTYPES[dtype]
            layer = problems.layer_problems(family(shape), shape.T, dtype_, gpu.has_tma)
            for gemm, problem in zip(GEMMS, layer, strict=True):
                launched.clear()
                problems.launcher(problem, "meta")(None)
                report = next(report for report, _ in launched if report.has_dot)
                found.append(predict(shape, gemm, problem, tuning.get_config(problem, gpu), report, gpu))
                log(f"  {shape.name} {found[-1].gemm}: {found[-1].ms:.4f} ms")
    ops = other_ops.survey(gpu, shapes, dtype, family, blocks_per_sm, instruction_mix, log)
    return found + [Prediction(**columns) for columns in ops]


def family(shape: Shape) -> str:
    """The name of this kind of layer in tune.py and codegen.py."""
    return FAMILY[shape.name.split("-")[0]]


def to_csv(rows: Iterable[Prediction | Kernel], kind: type = Prediction) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
    for row in rows:
        writer.writerow(f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values())
    return text.getvalue()


def worse(old: str, new: str) -> list[str]:
    """Regressions from the committed file: GEMMs that get slower, spill more, or are missing."""
    key = lambda line: (line["shape"], line["dtype"], line["gemm"])
    before, after = ({key(line): line for line in csv.DictReader(text.splitlines())} for text in (old, new))
    found = []
    for name, was in before.items():
        now = after.get(name)
        if now is None:
            found.append(f"{' '.join(name)}: missing")
        elif float(now["ms"]) > float(was["ms"]) * 1.001:
            tiles = f"{was['tile']} -> {now['tile']}"
            found.append(f"{' '.join(name)}: predicted {was['ms']} -> {now['ms']} ms ({tiles})")
        elif int(now["stack"]) > int(was["stack"]):
            found.append(f"{' '.join(name)}: {was['stack']} -> {now['stack']} bytes of stack")
    return found


def extension(binary: Path, check: bool) -> int:
    """Survey the built extension (the checkout's own: Path()) into extension.csv, or compare with that."""
    if binary == Path():
        built = sorted((FOLDER.parents[2] / "cumo_kernels").glob("_C*.so"))
        if not built:
            print("predict: cumo_kernels._C is not built here: CUMO_BUILD=1 make setup", file=sys.stderr)
            return 2
        binary = built[0]
    text = to_csv(cuda_kernels.survey(binary, blocks_per_sm, instruction_mix), Kernel)
    path = FOLDER / "cuda" / "extension.csv"
    if check:
        rows = lambda text: list(csv.DictReader(text.splitlines()))
        found = cuda_kernels.worse(rows(path.read_text()), rows(text))
        print("\n".join(found) or f"no regression from {path}")
        return int(bool(found))
    _write(path, lambda part: Path(part).write_text(text))
    print(f"{len(text.splitlines()) - 1} compiled kernels, nothing measured, in {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--gpu", action="append", help="names in cumo_kernels/tiles/hardware.py; default nvidia_h100"
    )
    full = [s for s in SHAPES.values() if s.name.split("-")[0] in FAMILY and "quarter" not in s.name]
    parser.add_argument("--shape", action="append", choices=sorted(shape.name for shape in full))
    parser.add_argument("--dtype", default="bf16", choices=sorted(problems.DTYPES))
    parser.add_argument("--check", action="store_true", help="compare with the committed file; write nothing")
    parser.add_argument(
        "--extension", type=Path, nargs="?", const=Path(), help="a built _C instead of Triton's"
    )
    args = parser.parse_args(argv)
    if args.extension is not None:
        return extension(args.extension, args.check)
    shapes = [SHAPES[name] for name in args.shape] if args.shape else full
    code = 0
    for name in args.gpu or ["nvidia_h100"]:
        text = to_csv(survey(hardware.find(name), shapes, args.dtype))
        path = FOLDER / f"{name}_{args.dtype}.csv"
        if args.check:
            old = path.read_text()
            kept = [line for line in old.splitlines() if any(f",{s.name}," in line for s in shapes)]
            found = worse("\n".join([old.splitlines()[0], *kept]), text)
            print("\n".join(found) or f"{name}: no regression from {path}")
            code |= bool(found)
        elif args.shape:
            print(text)
        else:
            _write(path, lambda part, text=text: Path(part).write_text(text))
            print(f"predictions, not measurements, in {path}")
    return code
