"""python -m benchmarks: measure this machine, each number behind a correctness gate, then draw the report."""

import argparse
import importlib
import os
import sys
from types import ModuleType

# one thread unless told otherwise: on a shared machine the numbers of several mean little
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import harness, plot

# by value: a run that is cut off has the layer before its parts
FILES = (
    "experts", "layer", "model", "overhead", "grouped_gemm", "routing", "permutation", "activation",
    "scaling",
)  # fmt: skip


def load(name: str) -> ModuleType | None:
    """bench_<name>, or None, said aloud, where a package that it needs is missing."""
    try:
        return importlib.import_module(f"benchmarks.bench_{name}")
    except ModuleNotFoundError as error:
        print(f"bench_{name}: left out: {error}", file=sys.stderr)
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument("--only", choices=FILES, action="append", help="these files only; default: all")
    parser.add_argument("--no-report", action="store_true", help="leave pictures and REPORT.md as they are")
    args = parser.parse_args(argv)
    wanted = [name for name in FILES if not args.only or name in args.only]
    files = [file for name in wanted if (file := load(name))]
    code = harness.run_all(files, args)
    if not args.dry and not args.no_report:
        print(f"bench: {plot.report(args.results)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
