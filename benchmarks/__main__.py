"""python -m benchmarks: measure this machine, each number behind a correctness gate, then draw the report."""

import argparse
import os
import sys

# one thread unless told otherwise: on a shared machine the numbers of several mean little
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import (
    bench_activation,
    bench_experts,
    bench_grouped_gemm,
    bench_layer,
    bench_model,
    bench_overhead,
    bench_permutation,
    bench_routing,
    bench_scaling,
    harness,
    plot,
)

# by value: a run that is cut off has the layer before its parts
FILES = (
    bench_experts,
    bench_layer,
    bench_model,
    bench_overhead,
    bench_grouped_gemm,
    bench_routing,
    bench_permutation,
    bench_activation,
    bench_scaling,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    harness.add_arguments(parser)
    known = [file.__name__.removeprefix("benchmarks.bench_") for file in FILES]
    parser.add_argument("--only", choices=known, action="append", help="these files only; default: all")
    parser.add_argument("--no-report", action="store_true", help="leave pictures and REPORT.md as they are")
    args = parser.parse_args(argv)
    files = [f for f, name in zip(FILES, known, strict=True) if not args.only or name in args.only]
    code = harness.run_all(files, args)
    if not args.dry and not args.no_report:
        print(f"bench: {plot.report(args.results)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
