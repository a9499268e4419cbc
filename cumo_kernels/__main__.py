"""python -m cumo_kernels: `verify` the backends, `explain` which one runs, `self-check`, `bench`, `tune`."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from cumo_kernels import __version__, explained, interrupts
from cumo_kernels.dispatch import OPS
from cumo_kernels.tiles import tune
from cumo_kernels.verification import self_check, verify

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def _bench(words: list[str]) -> int:
    """Run the benchmarks, which are in the checkout above this package, in a subprocess."""
    if not (ROOT / "benchmarks" / "__main__.py").exists():
        print(f"bench: {ROOT} has no benchmarks/: it is part of a checkout, not of the installed package")
        return 1
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=ROOT).returncode


def main(argv: list[str] | None = None) -> int:
    """Run a command -> its exit code.

    Args:
        argv: its words; None: those of this process, which a signal then ends with code 130.
    """
    return interrupts.stoppable(lambda: _run(None)) if argv is None else _run(argv)


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cumo-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"cumo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("explain", help="print each op's backend and why others are not used")
    command.add_argument("--op", choices=sorted(OPS), help="explain only this op")
    command.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    command.add_argument(
        "--rows", type=int, default=4096, metavar="N", help="rows of the tensors, default %(default)d"
    )
    command.add_argument("--columns", type=int, default=1024, metavar="N", help="default %(default)d")
    command.add_argument("--forward", action="store_true", help="explain calls without a backward pass")
    command.add_argument("--json", action="store_true", help="print JSON: one object per op and backend")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    verify.add_arguments(commands.add_parser("verify", help="check every op and backend of this machine"))
    self_check.add_arguments(
        commands.add_parser("self-check", help="check the default backends on this GPU, once")
    )
    commands.add_parser("bench", add_help=False, help="measure speed; options: bench --help")
    tune.add_arguments(commands.add_parser("tune", help="find tile sizes on this GPU and write its file"))
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["bench"]:
        return _bench(words[1:])
    args = parser.parse_args(words)
    if (command := {"tune": tune, "verify": verify, "self-check": self_check}.get(args.command)) is not None:
        return command.main(args)
    for option in ("rows", "columns"):
        if getattr(args, option) < 0:
            parser.error(f"--{option} must be at least 0, got {getattr(args, option)}")
    try:
        x = torch.empty(args.rows, args.columns, dtype=DTYPES[args.dtype], device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    ops = [args.op] if args.op else list(OPS)
    say = explained.as_json if args.json else explained.table
    print(say(ops, x, with_backward=not args.forward))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
