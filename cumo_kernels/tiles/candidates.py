"""Candidate tile sizes of a GEMM, which `tune` compiles and times before it searches neighbours.

They depend on the kind of GEMM and the rows per expert; what does not fit the GPU or the problem is omitted.
A line is BLOCK_M x BLOCK_N x BLOCK_K, warps, stages, GROUP_M, PER_SM, and whether the tiles are flattened.
"""

from collections.abc import Iterator
from dataclasses import replace

from cumo_kernels.tiles import tuning
from cumo_kernels.tiles.tuning import Config, Gpu, Problem, refuse

FEW_ROWS, SOME_ROWS = 8, 400  # rows per expert: decoding, and up to a few tiles

_MANY = {
    "gated": """
        128x128x64 8 4 8 1 flatten
        128x128x64 8 4 8 1
        128x64x64 4 4 8 2
        128x64x64 4 3 8 2 flatten
        256x64x64 8 4 8 1 flatten
        128x128x64 8 4 16 1 flatten
    """,
    "plain": """
        128x256x64 8 4 8 1 flatten
        128x256x64 8 3 8 1 flatten
        128x128x64 4 4 8 2
        128x128x64 4 3 8 2 flatten
        256x128x64 8 4 8 1 flatten
        128x256x64 8 4 16 1 flatten
    """,
    "grad_hidden": """
        128x128x64 8 4 8 1
        128x128x64 4 3 8 2
        128x256x64 8 3 8 1
        128x256x64 8 4 8 1
        128x128x64 8 3 8 1 flatten
        128x64x64 4 4 8 2
    """,
    "weight_grad": """
        64x128x256 8 4 8 1
        64x128x256 8 3 8 1
        64x256x128 8 4 8 1
        64x128x128 4 4 8 2
        64x128x128 4 3 8 2
        128x128x128 8 3 8 1
    """,
}

_SOME = {
    "gated": """
        64x64x64 4 4 1 2
        64x64x128 4 3 1 2
        64x128x64 4 4 4 2
        64x128x64 8 4 4 1 flatten
    """,
    "plain": """
        64x256x64 4 4 4 2
        64x128x64 4 4 4 2
        64x128x128 4 3 4 2
        64x256x64 8 4 4 1 flatten
        64x64x64 4 5 4 4
        128x64x64 4 4 4 2
    """,
    "grad_hidden": """
        64x128x64 4 4 4 2
        64x256x64 8 4 4 1
        64x64x64 4 4 4 4
        64x128x128 4 3 4 2
        128x64x64 4 3 4 2
    """,
    "weight_grad": """
        32x128x128 4 4 8 2
        32x128x256 8 4 8 1
        64x128x128 8 3 8 2
        16x128x128 4 4 8 2
    """,
}

_FEW = {
    "gated": """
        16x32x128 4 4 1 2
        16x64x128 4 4 1 2
        16x32x256 4 4 1 2
        16x32x128 4 5 1 4
        16x64x64 4 5 1 4
        16x128x64 4 4 1 2
    """,
    "plain": """
        16x64x128 4 4 1 2
        16x128x128 4 4 1 2
        16x64x256 4 4 1 2
        16x64x128 4 5 1 4
        16x32x256 4 4 1 4
        16x128x64 4 5 1 2
    """,
    "grad_hidden": """
        16x64x128 4 4 1 2
        16x128x128 4 4 1 2
        16x128x64 4 5 1 2
        16x32x128 4 5 1 4
    """,
    "weight_grad": """
        32x128x128 4 4 8 2
        16x128x128 4 4 8 2
        16x128x256 8 3 8 1
        16x128x128 4 3 8 2
    """,
}


def _parse(line: str) -> Config:
    tile, *words = line.split()
    return Config(*map(int, tile.split("x")), *map(int, words[:4]), FLATTEN="flatten" in words)


def _kind(problem: Problem) -> str:
    if problem.kind == "gemm":
        return "gated" if problem.gated else "plain"
    return problem.kind


def listed(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """The current choice, then the other candidates, each once and with its splits."""
    kind, rows = _kind(problem), problem.rows / problem.experts
    tables = (_FEW,) if rows <= FEW_ROWS else (_SOME, _MANY) if rows <= SOME_ROWS else (_MANY,)
    lines = [line for table in tables for line in table[kind].splitlines() if line.strip()]
    configs = [tuning.get_config(problem, gpu), *map(_parse, lines)]
    configs = [replace(config, SPLITS=tuning.splits(problem, config, gpu)) for config in configs]
    yield from (config for config in dict.fromkeys(configs) if refuse(config, problem, gpu) is None)
