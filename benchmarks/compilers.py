"""Compare two releases of Triton on the same kernels: registers, stack, shared memory, instructions.

    python -m benchmarks.compilers --other .venv-latest/bin/python --write benchmarks/results/compilers.md

The kernels are compiled for a GPU that need not be present, as in `cumo_kernels.tiles.codegen`, by this
Python and by `--other`, whose environment has the other Triton; both use the current tree. Nothing is timed.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import torch
import triton

from cumo_kernels.tiles import codegen, hardware

TOKENS = {"clip": 4616, "mlp": 2304, "llm": 8192}  # one batch of each of CuMo's layers
COLUMNS = {
    "registers": "registers",
    "stack": "stack",
    "shared": "shared bytes",
    "loop_instructions": "in loops",
    "loop_dots": "of them multiply",
    "instructions": "instructions",
}
HEAD = """# Two releases of Triton on the same kernels

Made by `python -m benchmarks.compilers`: compiled for {gpu}, {dtype}, not run, so nothing here is a
measurement. Triton {0[triton]} with torch {0[torch]}, then Triton {1[triton]} with torch {1[torch]}; one
number where both agree. `stack` is bytes per thread; `in loops` counts the instructions of the innermost
loops over operands, `of them multiply` those for tensor cores. {same} of {all} kernels agree in every column.

"""


def rows(gpu: str, dtype: str, shapes: list[str], kernel: str = "") -> dict[str, object]:
    """Versions, and a row per kernel: its identification, and the numbers of COLUMNS."""
    reports = codegen.survey(
        hardware.find(gpu), shapes, [dtype], lambda shape, _: (TOKENS[shape],), lambda name: kernel in name
    )
    found = [
        {
            "kernel": r.kernel,
            "tile": r.tile,
            "warps": f"{r.num_warps} x {r.num_stages}",
            "case": r.cases[0],
            "instructions": sum(r.opcodes.values()),
            **{name: getattr(r, name) for name in COLUMNS if name != "instructions"},
            "problems": "; ".join(r.problems),
        }
        for r in reports
    ]
    return {"triton": triton.__version__, "torch": torch.__version__, "rows": found}


def _of(python: str, options: list[str]) -> dict[str, object]:
    """`rows`, run by another Python."""
    command = [python, "-m", "benchmarks.compilers", "--rows", *options]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)


def _by_name(found: list[dict]) -> dict[tuple, dict]:
    """Number the kernels that one call launches with one tile but different constants (the last field)."""
    named: dict[tuple, dict] = {}
    for row in found:
        name = (row["kernel"], row["case"], row["tile"], row["warps"])
        named[(*name, sum(key[:4] == name for key in named))] = row
    return named


def table(first: dict, second: dict, gpu: str, dtype: str) -> str:
    """Markdown: a row per kernel, "first > second" where the releases differ.

    Raises:
        ValueError: the releases did not compile the same kernels.
    """
    pair = [_by_name(side["rows"]) for side in (first, second)]
    if pair[0].keys() != pair[1].keys():
        odd = sorted(pair[0].keys() ^ pair[1].keys())
        raise ValueError(f"first and second must have the same kernels, got only in one: {odd}")
    lines = [
        f"| kernel | first used by | tile | warps x stages | {' | '.join(COLUMNS.values())} | problems |",
        "|---" * (5 + len(COLUMNS)) + "|",
    ]
    same = 0
    for key in sorted(pair[0]):
        old, new = pair[0][key], pair[1][key]
        cells = [old[n] if old[n] == new[n] else f"{old[n]} > {new[n]}" for n in COLUMNS]
        same += all(old[n] == new[n] for n in COLUMNS)
        kernel, case, tile, warps, _ = key
        said = "; ".join(
            f"{s['triton']}: {r['problems']}" for s, r in ((first, old), (second, new)) if r["problems"]
        )
        lines.append(f"| {' | '.join(map(str, (f'`{kernel}`', case, tile, warps, *cells, said or '-')))} |")
    head = HEAD.format(first, second, gpu=hardware.find(gpu).name, dtype=dtype, same=same, all=len(pair[0]))
    return head + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compilers", description=__doc__)
    parser.add_argument("--other", help="Python of an environment with the other Triton")
    parser.add_argument("--gpu", default="nvidia_h100", help="a name in cumo_kernels/tiles/hardware.py")
    parser.add_argument("--dtype", default="bf16", choices=tuple(codegen.DTYPES))
    parser.add_argument("--shape", nargs="+", default=list(TOKENS), choices=tuple(TOKENS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--rows", action="store_true", help="print only this Triton's numbers, as JSON")
    parser.add_argument("--write", type=Path, help="file for the table instead of standard output")
    args = parser.parse_args(argv)
    own = rows(args.gpu, args.dtype, args.shape, args.kernel)
    if args.rows:
        print(json.dumps(own))
        return 0
    if not args.other:
        parser.error("--other: give the Python of an environment with the other Triton")
    options = ["--gpu", args.gpu, "--dtype", args.dtype, "--kernel", args.kernel, "--shape", *args.shape]
    text = table(own, _of(args.other, options), args.gpu, args.dtype)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main())
