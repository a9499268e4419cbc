"""python -m benchmarks.choose: write cumo_kernels/tiles/measured.json, used by `auto`, from the timings.

An entry is one case whose backends were timed alternately in one run; of several runs the last counts.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks import record
from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.record import Row
from cumo_kernels import dispatch
from cumo_kernels.tiles import hardware, measured
from cumo_kernels.tiles.problems import DTYPES

# benchmark -> the ops that it represents, each with the shape of its first tensor
OPS: dict[str, dict[str, Callable[[Shape], tuple[int, int]]]] = {
    "route": {"route": lambda s: (s.T, s.H)},
    "permute_combine": {
        "permute": lambda s: (s.T, s.H),
        "combine": lambda s: (s.slots, s.H),
        "sort_by_expert": lambda s: (s.T, s.K),
    },
    "activate": {"activate": lambda s: (s.slots, s.width)},
    "grouped_gemm": {"grouped_gemm": lambda s: (s.T, s.H)},
    "expert_mlp": {"expert_mlp": lambda s: (s.T, s.H)},
}
RIVALS = tuple(row.name for row in dispatch.BACKENDS if row.name != "reference")
KERNELS = tuple(name for name in RIVALS if name != "torch")
GPUS = {gpu.name for gpu in hardware.GPUS}
# one table for all CPUs: these two differ in the number of passes over memory
ON_CPU = ("torch", "reference")


def entries(rows: Iterable[Row], rehearses: bool = False) -> dict[str, list[dict]]:
    """GPU or measured.CPU -> the entries from `rows`, in order of cases; in a rehearsal, of any machine."""
    timer = "cpu" if rehearses else "eager"
    cases: dict[tuple, dict[str, dict[str, float]]] = {}  # case -> run -> backend -> milliseconds
    for row in rows:
        rival = row.variant.removeprefix("cumo/")
        machine = measured.CPU if row.machine.startswith("cpu_") and not rehearses else row.machine
        known = rehearses or machine in GPUS or machine == measured.CPU
        if rival not in (ON_CPU if machine == measured.CPU else RIVALS) or row.op not in OPS or not known:
            continue
        # a backward alone is never called, and a graph is captured after the choice
        if (
            row.timer != ("cpu" if machine == measured.CPU else timer)
            or row.mode == "backward"
            or row.pattern != "uniform"
            or row.shape not in SHAPES
        ):
            continue
        case = (machine, row.op, row.mode, row.dtype, replace(SHAPES[row.shape], T=row.tokens))
        cases.setdefault(case, {}).setdefault(row.run, {})[rival] = row.ms_p50
    found: dict[str, list[dict]] = {}
    for (gpu, benchmark, mode, dtype, shape), runs in cases.items():
        needed = set(ON_CPU if gpu == measured.CPU else KERNELS)
        whole = [times for _, times in sorted(runs.items()) if set(times) >= needed]
        for op, size in OPS[benchmark].items() if whole else ():
            name = str(DTYPES[dtype]).removeprefix("torch.")
            entry = {"op": op, "mode": mode, "dtype": name, "shape": list(size(shape)), "ms": whole[-1]}
            found.setdefault(gpu, []).append(entry)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=measured.PATH)
    parser.add_argument("--rehearse", action="store_true", help="use a CPU's rows, to test the procedure")
    args = parser.parse_args(argv)
    if args.rehearse and args.out == measured.PATH:
        parser.error("--rehearse must go with --out: the times of a rehearsal must not be used")
    found = entries(record.read(args.results), args.rehearse)
    if not found:
        print(
            f"choose: {args.results} has no case with {' and '.join(KERNELS)} both timed on a known GPU, "
            f"and none with {' and '.join(ON_CPU)} on a CPU"
        )
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measured.save(found, args.out)
    for gpu, rows in found.items():
        wins = [min(row["ms"], key=row["ms"].get) for row in rows]
        won = ", ".join(f"{name} {wins.count(name)}" for name in sorted(set(wins)))
        print(f"choose: {gpu}: {len(rows)} entries, faster: {won}; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
