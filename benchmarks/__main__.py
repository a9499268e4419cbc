"""python -m benchmarks: run all benchmarks, each behind a correctness gate, then write the report."""

import argparse
import importlib
import os
import sys
from types import ModuleType

# one thread by default: on a shared machine timings with several threads are unreliable
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUMO_SELF_CHECK", "0")  # every timed backend is forced

from cumo_kernels import interrupts  # isort: skip  it must come first: it ends the process at a signal

from benchmarks import harness, plot

# in order of value: one case of each file in turn, so that an interrupted run has measured the layer first
FILES = (
    "experts", "layer", "packed", "lora", "model", "overhead", "grouped_gemm", "routing", "routers",
    "permutation", "activation", "scaling",
)  # fmt: skip


def load(name: str) -> ModuleType | str:
    """The module bench_<name>, or a reason (also printed) if a package that it needs is missing."""
    try:
        return importlib.import_module(f"benchmarks.cases.bench_{name}")
    except ImportError as error:
        print(f"bench_{name}: skipped: {error}", file=sys.stderr)
        return str(error)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks -> exit code; 130 if a signal has stopped them."""
    return interrupts.stoppable(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument("--only", choices=FILES, action="append", help="run only these files; default: all")
    parser.add_argument("--no-report", action="store_true", help="do not write pictures and REPORT.md")
    args = parser.parse_args(argv)
    wanted = [name for name in FILES if not args.only or name in args.only]
    loaded = {name: load(name) for name in wanted}
    absent = {name: file for name, file in loaded.items() if isinstance(file, str)}
    code = harness.run_all([file for name, file in loaded.items() if name not in absent], args, absent)
    if not args.dry and not args.no_report:
        print(f"bench: {plot.report(args.results)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
