"""The tile sizes of a GEMM: a Problem describes the GEMM, a Config how to run it.

`get_config` is a pure function of the problem and the GPU. It takes the entry of the GPU's file in configs/
with the nearest shape, adapts it to the GPU, and adds split-k where tiles alone would not fill the chip. No
search happens at run time; `search` tries neighbours of that choice on the GPU, and `save` writes the file
(python -m cumo_kernels tune).

    CUMO_PRINT_CONFIG=1      prints every choice once
    CUMO_BATCH_INVARIANT=1   forward, a row's result does not depend on the number of rows; no backend
                             counts as verified with it, so name one (CUMO_BACKEND)
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from cumo_kernels.files import write_whole
from cumo_kernels.tiles.hardware import GPUS, INTERPRETER, KIB, Gpu, gpu_of

__all__ = [
    "Config",
    "Entry",
    "Problem",
    "bucket",
    "forget",
    "get_config",
    "gpu_of",
    "refuse",
    "save",
    "search",
]

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("gemm", "grad_hidden", "weight_grad")
PRINT_CONFIG = os.environ.get("CUMO_PRINT_CONFIG") == "1"
BATCH_INVARIANT = os.environ.get("CUMO_BATCH_INVARIANT") == "1"
INVARIANT_ROWS = 65536
EPILOGUE_SUMS = 32  # sums that a thread finishes at a time; with more the compiler spills at 128 x 256
DEQUANTISED = 160  # sums and dequantised weights that a thread holds; with 192 the compiler spills
MIN_STEPS = 8  # in a shorter sum, filling and draining the pipeline would dominate


@dataclass(frozen=True)
class Problem:
    """One grouped GEMM.

    kind    "gemm": out (rows, n) = x (rows, k) @ weight (E, n, k); "grad_hidden": the same, followed by the
            activation's backward; "weight_grad": out (E, n, k), summed over rows.
    """

    kind: str
    dtype: torch.dtype
    rows: int  # of all experts together
    n: int
    k: int
    experts: int
    gated: bool = False  # the activation: in "gemm" a tile has a gate and an up half, n columns each
    gathered: bool = False  # rows are in token order
    can_split: bool = False  # partial sums over k (over rows in "weight_grad") are allowed
    packed: bool = False  # the weight has 4 bits and is dequantised in registers
    low_rank: bool = False  # a product with a thin second pair follows the loop

    @property
    def halves(self) -> int:
        """Products that share their rows: 2 if gate and up projection are computed together."""
        return 2 if self.kind == "gemm" and self.gated else 1

    @property
    def columns(self) -> int:
        return self.n * self.halves


@dataclass(frozen=True)
class Config:
    """Fields are named like the kernels' constants. In "weight_grad" BLOCK_M rows are one step of the sum."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8  # row tiles that run before the next column tile
    PER_SM: int = 1  # resident programs per multiprocessor
    FLATTEN: bool = False  # fetch the next tile's operands during a tile's epilogue
    SPLITS: int = 1  # set by get_config, not by the files

    def epilogue_parts(self, rows: int, cols: int, sums: int = EPILOGUE_SUMS) -> int:
        """Number of column parts in which a (rows, cols) tile is finished, each with `sums` per thread.

        With four warps half of that: their threads hold twice the addresses.
        """
        sums = sums // 2 if self.num_warps <= 4 else sums
        return max(1, min(rows * cols // (32 * self.num_warps * sums), cols // 16))

    def constants(self, *without: str) -> dict[str, int | bool]:
        """The kernel's keyword arguments."""
        return _constants(self, ("PER_SM", *without))


@cache
def _constants(config: Config, without: tuple[str, ...]) -> dict[str, int | bool]:
    return {name: value for name, value in asdict(config).items() if name not in without}


@dataclass(frozen=True)
class Entry:
    """One line of a file in configs/."""

    problem: Problem
    config: Config
    ms: float | None = None  # None: derived, not measured


def tile_shape(config: Config, problem: Problem) -> tuple[int, int, int]:
    """Rows and columns of the sums a program holds, and the length of one step."""
    if problem.kind == "weight_grad":
        return config.BLOCK_N, config.BLOCK_K, config.BLOCK_M
    return config.BLOCK_M, config.BLOCK_N * problem.halves, config.BLOCK_K


def shared_memory(config: Config, problem: Problem) -> int:
    """Upper bound of the shared memory of a block, in bytes: the stages, and the tile being stored."""
    size = torch.finfo(problem.dtype).bits // 8
    rows, cols, step = tile_shape(config, problem)
    stages = config.num_stages * (rows + cols) * step * size + KIB
    # sums move between threads through shared memory, as fp32 in the worst case
    leaving = rows * cols * 4
    leaving //= config.epilogue_parts(rows, cols)
    return stages + leaving if config.FLATTEN else max(stages, leaving)


def refuse(config: Config, problem: Problem, gpu: Gpu) -> str | None:
    """Why `config` cannot run `problem` on `gpu`, or None; all limits are here."""
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "GROUP_M", "SPLITS"):
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            return f"{name} must be a power of two, got {value}"
    if min(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K) < 16:
        return "tensor cores need tiles of at least 16"
    if max(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K) > 256:
        return "the copy engine copies boxes of at most 256"
    if config.PER_SM < 1 or config.num_stages < 1:
        return "PER_SM and num_stages must be at least 1"
    if config.SPLITS > 1 and not problem.can_split:
        return "this problem's epilogue needs the whole sum"
    if config.FLATTEN and problem.kind == "weight_grad":
        return "sums of unequal length cannot be flattened"
    needed = shared_memory(config, problem)
    if needed > gpu.shared_memory:
        return f"{needed} bytes of shared memory needed, {gpu.shared_memory} available"
    rows, cols, _ = tile_shape(config, problem)
    # with more than 128 sums per thread its 255 registers spill
    if rows * cols > 128 * 32 * config.num_warps:
        return f"{rows * cols} sums do not fit into the registers of {config.num_warps} warps"
    if config.num_warps * config.PER_SM > 16:
        return f"{config.PER_SM} programs of {config.num_warps} warps do not fit into the registers of one SM"
    return None


def bucket(rows: int) -> int:
    """Round `rows` up to three or four significant bits, so that batches of a training run share choices."""
    step = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // step) * step


@cache
def entries(name: str) -> tuple[Entry, ...]:
    """The lines of configs/<name>.json."""
    return read(CONFIGS / f"{name}.json")


def read(path: Path) -> tuple[Entry, ...]:
    rows = json.loads(path.read_text())["entries"]
    return tuple(
        Entry(
            Problem(**{**row["problem"], "dtype": getattr(torch, row["problem"]["dtype"])}),
            Config(**row["config"]),
            row["ms"],
        )
        for row in rows
    )


@cache
def files_of(gpu: Gpu) -> tuple[str, ...]:
    """The files `gpu` chooses from: its own and its sibling's, else those of the nearest older generation.

    The sibling's is used in addition to its own, which may have only one shape or dtype.
    """
    own = tuple(name for name in (gpu.name, gpu.tiles_of) if name and (CONFIGS / f"{name}.json").exists())
    if own:
        return own
    known = [row for row in GPUS if (CONFIGS / f"{row.name}.json").exists()]
    older = [row for row in known if row.capability <= gpu.capability]
    name = max(older or known, key=lambda row: row.capability).name
    warnings.warn(
        f"no tile sizes for {gpu.name}, using those of {name}; `python -m cumo_kernels tune` finds better",
        stacklevel=2,
    )
    return (name,)


def distance(asked: Problem, known: Problem) -> float:
    """Distance of two shapes, in octaves of rows per expert, columns, length of the sum and experts."""
    if (asked.kind, asked.gated, asked.dtype == torch.float32) != (
        known.kind, known.gated, known.dtype == torch.float32,
    ):  # fmt: skip
        return math.inf
    octaves = lambda a, b: abs(math.log2(max(a, 1) / max(b, 1)))
    return (
        octaves(asked.rows / asked.experts, known.rows / known.experts)
        + octaves(asked.n, known.n) / 2
        + octaves(asked.k, known.k) / 2
        + octaves(asked.experts, known.experts) / 4
        + (asked.gathered != known.gathered) / 4
    )


def fit(config: Config, problem: Problem, gpu: Gpu) -> Config:
    """`config` with fewer stages, and then smaller tiles, until it fits `gpu`."""
    while (reason := refuse(config, problem, gpu)) is not None:
        largest = max(("BLOCK_M", "BLOCK_N", "BLOCK_K"), key=lambda name: getattr(config, name))
        if config.PER_SM > 1 and config.num_warps * config.PER_SM > 16:
            config = replace(config, PER_SM=config.PER_SM - 1)
        elif config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif getattr(config, largest) > 16:
            config = replace(config, **{largest: getattr(config, largest) // 2})
        else:
            raise RuntimeError(f"no tile fits: {reason}; {problem}, {gpu}")
    return config


# Hopper's large tiles for dH, and cycles of one multiprocessor for 128 x 256: estimated from the rate of the
# tensor cores, operands' bytes and quick-GELU's instructions (benchmarks/NOTES.md, 2026-11-28), not measured
WIDE = Config(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)
SQUARE = Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=4)
PAIR = Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3, PER_SM=2)
STEP, END = 1024, 8800
MORE_BYTES = 1.2  # a step of half as many columns takes more than half as long


def hide_end(config: Config, problem: Problem, gpu: Gpu) -> Config:
    """`config`, or for a dH with a tile as large as Hopper's the large tile that is estimated fastest.

    A tile that is alone on its multiprocessor leaves the tensor cores idle during its epilogue. Of two
    smaller tiles, in two blocks, one may run its epilogue during the other's products, but they read more
    bytes. That pays where the epilogue is long compared with the sum, or where smaller tiles fill the last
    wave better. How much is hidden has not been measured: the estimate is the mean of all epilogues but one
    and none. In fp16, gated, and with partial tiles, a pair uses more stack than allowed.
    """
    rows, cols, _ = tile_shape(config, problem)
    is_large = problem.kind == "grad_hidden" and rows * cols >= PAIR.BLOCK_M * PAIR.BLOCK_N
    if not is_large or problem.gated or problem.dtype.itemsize != 2 or gpu.capability != 90:
        return config
    if problem.n % PAIR.BLOCK_N:  # with masks, every other of these tiles spills
        return SQUARE
    hit = max(min(problem.experts, problem.rows), 1)
    steps = math.ceil(problem.k / PAIR.BLOCK_K)
    paired = problem.dtype == torch.bfloat16 and problem.k % PAIR.BLOCK_K == 0

    def cycles(config: Config) -> float:
        share = config.BLOCK_N / WIDE.BLOCK_N
        sums, end = steps * STEP * share * (1 if config == WIDE else MORE_BYTES), END * share
        tiles = math.ceil(problem.rows / hit / config.BLOCK_M) * hit * math.ceil(problem.n / config.BLOCK_N)
        each = math.ceil(tiles / gpu.sms)
        return each * sums + (each + 1) / 2 * end if config == PAIR else each * (sums + end)

    return min((WIDE, PAIR if paired else SQUARE), key=cycles)


def splits(problem: Problem, config: Config, gpu: Gpu) -> int:
    """Number of partial sums: as many as run at once with enough work for each."""
    if not problem.can_split:
        return 1
    hit = max(min(problem.experts, problem.rows), 1)
    rows = problem.rows / hit
    if problem.kind == "weight_grad":
        tiles = (
            math.ceil(problem.n / config.BLOCK_N) * math.ceil(problem.k / config.BLOCK_K) * problem.experts
        )
        steps = rows / config.BLOCK_M
    else:
        tiles = math.ceil(rows / config.BLOCK_M) * math.ceil(problem.n / config.BLOCK_N) * hit
        steps = problem.k / config.BLOCK_K
    count = 1
    while 2 * count * tiles <= gpu.sms * config.PER_SM and steps >= 2 * count * MIN_STEPS:
        count *= 2
    return count


def suit(config: Config, problem: Problem) -> Config:
    """`config` for what the files have no entries of: thin, packed and adapted products.

    A tile is not wider than the product. Dequantising holds a step's weights in registers beside the sums, so
    both together have at most DEQUANTISED per thread. The loops of these products are not flattened: that of
    an adapted one is followed by another, and in that of a packed one the compiler spills.
    """
    narrow = lambda block, size: min(block, max(16, 1 << (size - 1).bit_length()))
    config = replace(config, BLOCK_N=narrow(config.BLOCK_N, problem.n))
    if problem.kind == "weight_grad":
        # not 16: with 32 x 128 x 16 the compiler spills on sm_120
        config = replace(config, BLOCK_K=min(config.BLOCK_K, max(32, narrow(config.BLOCK_K, problem.k))))
    if problem.low_rank or problem.packed:
        config = replace(config, FLATTEN=False)
    if problem.packed:
        held = lambda c: c.BLOCK_N * (c.BLOCK_M * problem.halves + c.BLOCK_K)
        while held(config) > DEQUANTISED * 32 * config.num_warps and config.BLOCK_N > 16:
            config = replace(config, BLOCK_N=config.BLOCK_N // 2)
    return config


# for Triton's interpreter: small, so that small tests have several whole tiles and tails
INTERPRETED = Config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=1, num_stages=1, GROUP_M=2)


@cache
def get_config(problem: Problem, gpu: Gpu) -> Config:
    """How to run `problem` on `gpu`."""
    if BATCH_INVARIANT:
        problem = replace(problem, rows=INVARIANT_ROWS, can_split=False)
    if gpu == INTERPRETER:
        config, source = INTERPRETED, "interpreter"
    else:
        known = [(name, entry) for name in files_of(gpu) for entry in entries(name)]
        source, nearest = min(known, key=lambda row: distance(problem, row[1].problem))
        config = nearest.config if nearest.ms is not None else hide_end(nearest.config, problem, gpu)
        config = suit(fit(config, problem, gpu), problem)
    config = replace(config, SPLITS=splits(problem, config, gpu))
    if PRINT_CONFIG:
        print(f"cumo_kernels: {problem} -> {config} (configs/{source})", file=sys.stderr)
    return config


STEPS = {  # fields that `search` changes, one at a time
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "PER_SM": (1, 2, 4),
    "FLATTEN": (False, True),
    "GROUP_M": (1, 4, 8, 16),
}


def neighbours(config: Config, problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Configs one step of one field away, and the change of 4 warps to 8 together with the tile's width."""
    tried = [
        replace(config, **{name: value})
        for name, values in STEPS.items()
        for value in values
        if abs(values.index(value) - values.index(getattr(config, name))) == 1
    ]
    tried += [replace(config, BLOCK_N=config.BLOCK_N // 2, num_warps=4, PER_SM=2, FLATTEN=False)]
    tried += [replace(config, BLOCK_N=config.BLOCK_N * 2, num_warps=8, PER_SM=1)]
    yield from (other for other in dict.fromkeys(tried) if refuse(other, problem, gpu) is None)


def search(
    problem: Problem,
    gpu: Gpu,
    time_ms: Callable[[Config], float],
    seconds: float,
    prepare: Callable[[list[Config]], object] = lambda configs: None,
    begin_at: Config | None = None,
) -> Entry:
    """The fastest config found by moving from `begin_at` (default: the current choice) to better neighbours.

    Args:
        problem: the GEMM.
        gpu: the GPU that runs it.
        time_ms: runs `problem` with a config and returns its milliseconds, inf if it cannot.
        seconds: the longest time spent on timing.
        prepare: compiles what `time_ms` may run next; its time, a hundred timings' or more, is not counted.
    """
    spent = 0.0

    def timed(config: Config) -> float:
        nonlocal spent
        begin = time.monotonic()
        ms = time_ms(config)
        spent += time.monotonic() - begin
        return ms

    best = get_config(problem, gpu) if begin_at is None else begin_at
    best = replace(best, SPLITS=splits(problem, best, gpu))
    prepare([best])
    times = {best: timed(best)}
    improved = True
    while improved and spent <= seconds:
        improved = False
        others = [replace(c, SPLITS=splits(problem, c, gpu)) for c in neighbours(best, problem, gpu)]
        others = [other for other in dict.fromkeys(others) if other not in times]
        prepare(others)
        for other in others:
            if spent > seconds:
                break
            times[other] = timed(other)
            if times[other] < times[best]:
                best, improved = other, True
    return Entry(problem, replace(best, SPLITS=1), times[best])


def save(name: str, found: Iterable[Entry], note: str, folder: Path | None = None) -> Path:
    """Write `found` to configs/<name>.json, replacing entries for the same problems; all or nothing."""
    folder = CONFIGS if folder is None else folder
    path = folder / f"{name}.json"
    known = {entry.problem: entry for entry in read(path)} if path.exists() else {}
    known |= {entry.problem: entry for entry in found}
    if any(entry.ms is None for entry in known.values()):
        note += "; entries without ms are derived, not measured"
    rows = [
        {
            "problem": {**asdict(entry.problem), "dtype": str(entry.problem.dtype).removeprefix("torch.")},
            "config": {key: value for key, value in asdict(entry.config).items() if key != "SPLITS"},
            "ms": entry.ms,
        }
        for entry in known.values()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows)
    text = f'{{"gpu": {json.dumps(name)}, "note": {json.dumps(note)}, "entries": [\n{lines}\n]}}\n'
    write_whole(path, text)
    forget()
    return path


CACHES = [entries, files_of, get_config]  # and caches of the backends that depend on them


def forget() -> None:
    """Clear the caches; to be called after the files or the rules have changed."""
    for remembering in CACHES:
        remembering.cache_clear()
