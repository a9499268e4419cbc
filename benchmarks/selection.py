"""The command line of a benchmark, and the cases that it selects."""

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from benchmarks import record
from benchmarks.cases.shapes import SHAPES, tiny
from cumo_kernels import dispatch
from cumo_kernels.testing import PATTERNS
from cumo_kernels.tiles.problems import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [row.name for row in dispatch.BACKENDS]
    parser.add_argument("--full", action="store_true", help="every shape and dtype, not the first few")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="only these shapes")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append")
    parser.add_argument("--pattern", choices=PATTERNS, action="append", help="routing patterns")
    parser.add_argument("--tiny", action="store_true", help="reduce every shape, for a rehearsal")
    parser.add_argument("--backend", choices=names, action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help="timing per case and mode")
    parser.add_argument(
        "--budget", type=float, help="seconds; no case starts that will not end in time; 210 on a CPU"
    )
    parser.add_argument(
        "--variant-seconds", type=float, help="skip a variant as broken if its first runs take longer"
    )
    folder = parser.add_mutually_exclusive_group()
    ignored = f"folder of the CSV files; default: {record.LOCAL.relative_to(record.ROOT)}, which git ignores"
    folder.add_argument("--results", type=Path, default=record.LOCAL, metavar="FOLDER", help=ignored)
    folder.add_argument(
        "--save", dest="results", action="store_const", const=record.RESULTS, help="the committed folder"
    )
    parser.add_argument("--dry", action="store_true", help="write no file")
    # for a run that continues in a new process after a variant broke the device
    for name, options in (("--begin", {"type": int, "default": 0}), ("--without", {"action": "append"}),
                          ("--run", {})):  # fmt: skip
        parser.add_argument(name, help=argparse.SUPPRESS, **options)


def cases_of(file: ModuleType, device: str, args: argparse.Namespace) -> list:
    """The cases of a benchmark file that the command line selects."""
    cases = file.cases(device, args.full)
    if args.shape:
        every, first = [*cases, *file.cases(device, True)], cases[0]
        found = []
        for name in args.shape:
            known = list(dict.fromkeys(case for case in every if case.shape.name == name))
            # layers may have any shape; whole models and sweeps have their own
            found += known or ([replace(first, shape=SHAPES[name])] if first.shape.name in SHAPES else [])
        cases = found
    if args.pattern:
        cases = list(dict.fromkeys(replace(case, pattern=p) for case in cases for p in args.pattern))
    if args.tiny:
        cases = list(dict.fromkeys(replace(case, shape=tiny(case.shape)) for case in cases))
    found = [replace(case, dtype=dtype) for case in cases for dtype in args.dtype or [case.dtype]]
    return list(dict.fromkeys(found))


def in_turns(files: Iterable[ModuleType], device: str, args: argparse.Namespace) -> list[tuple]:
    """The first case of every file, then the second: an interrupted run has some of each."""
    columns = [[(file, case) for case in cases_of(file, device, args)] for file in files]
    return [entry for row in itertools.zip_longest(*columns) for entry in row if entry is not None]
