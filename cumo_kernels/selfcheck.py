"""python -m cumo_kernels self-check: try on this GPU what would run there unasked, before a first call does.

For images of containers, and for code that is compiled from its start. It is also what proofs.py runs in a
process of its own at a first call: the checks of `verify`, on aligned and on awkward sizes of each op.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

import torch

from cumo_kernels import cases, dispatch, explained, hardware, proofs, shards
from cumo_kernels.cases import ALIGNED, FEW, TINY
from cumo_kernels.problems import DTYPES
from cumo_kernels.verdicts import Result
from cumo_kernels.verified import COVERS

WORKERS = 8  # processes at most
PARALLEL = 2  # processes even where there are few CPUs: they also wait for imports
AWKWARD = {"awkward": FEW["awkward"]}  # sizes that nothing divides
FAMILIES = {  # and sizes that copy engines and tensor cores take
    "cuda": {
        "aligned": ALIGNED["aligned"],
        "aligned-router": ALIGNED["aligned-router"],
        "aligned-swiglu": ALIGNED["aligned-swiglu"] | {"ops": ("expert_mlp",)},
    }
    | AWKWARD,
    "cpu": TINY | AWKWARD,  # where CPU tensors stand for a GPU's, in tests
}


def _processes(jobs: int, memory: float) -> int:
    """How many at a time; 0 where the GPU has no memory left for one."""
    number = min(WORKERS, jobs, max(PARALLEL, len(os.sched_getaffinity(0)) // 2))
    return int(min(number, memory // (2 * shards.CONTEXT)))


def verdicts(
    groups: Sequence[proofs.Group],
    dtype: str,
    device: str,
    memory: float,
    seconds: float,
    case_seconds: float,
) -> list[dict]:
    """For each of `groups` whether all its cases passed, and of what failed a reason and a command to see it.

    Or, where there is no telling, {"why": ...}: a GPU without memory, processes that do not start, time.
    """
    jobs = [
        shards.Job(backend, family, case)
        for family, case in cases.all_cases(FAMILIES[device], (dtype,))
        for backend in dict(groups)
        if (backend, case.op) in groups
    ]
    results: dict[proofs.Group, list[Result]] = {group: [] for group in groups}

    def note(row: dict) -> None:
        result = Result(**row)
        results[result.backend, cases.parse(result.case).op].append(result)

    missing = ["the GPU has no memory left for a process of its own"]
    if processes := _processes(len(jobs), memory):
        stop = time.monotonic() + seconds
        missing = shards.Shards(device, processes, case_seconds, stop, note, lambda line: None).run(jobs)
    rows = []
    for (backend, op), found in results.items():
        row = {"backend": backend, "op": op, "passed": True, "cases": len(found), "reason": "", "command": ""}
        bad = [result for result in found if result.failures]
        wrong = [result for result in bad if not shards.of_the_machine(result.failures)]
        if wrong:
            row |= {"passed": False, "reason": wrong[0].failures[0], "command": wrong[0].command}
        elif bad or len(found) < sum((job.backend, job.case.op) == (backend, op) for job in jobs):
            row = {"backend": backend, "op": op, "why": bad[0].failures[0] if bad else "; ".join(missing)}
        rows.append(row)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), action="append", help="default: all three"
    )
    parser.add_argument("--op", choices=COVERS, action="append", help="default: all")
    parser.add_argument("--again", action="store_true", help="check also what a verdict is kept of")
    # a rehearsal, under TRITON_INTERPRET=1 or CUMO_EMULATE=1: CPU tensors stand for an H100's
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=json.loads, metavar="GROUPS", help=argparse.SUPPRESS)
    for name, default in (("memory", float("inf")), ("seconds", proofs.SECONDS), ("case-seconds", 60.0)):
        parser.add_argument(f"--{name}", type=float, default=default, help=argparse.SUPPRESS)


def _check(device: torch.device, dtype: torch.dtype, asked: Sequence[str], again: bool) -> int:
    """Print what runs `asked` in `dtype` and why -> how many answers are failures."""
    x = torch.empty(1, 1, dtype=dtype, device=device)
    rows = [row for row in dispatch.BACKENDS if row.needs_proof]
    able = tuple(row.name for row in rows if row.refuse("route", device, dtype) is None)
    if again and able:
        proofs.check_again([(name, case) for name in able for case in asked], dtype, device)
    calls = [op for op in dispatch.OPS if any(op in COVERS[case] for case in asked)]
    calls = [op for op in calls if op != "sort_by_expert" or set(asked) == set(COVERS)]
    found = [proofs.proofs(able, op, dtype, device, may_check=True) for op in calls if able]
    print(f"{explained.table(calls, x)}\n", flush=True)
    return sum(proof.passed is False for answers in found for proof in answers)


def main(args: argparse.Namespace) -> int:
    if args.only:
        groups = [tuple(group) for group in args.only]
        limits = args.memory, args.seconds, args.case_seconds
        print(json.dumps(verdicts(groups, args.dtype[0], args.device, *limits)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("self-check: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    device = (
        torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    )
    with hardware.assume(hardware.find("nvidia_h100")):
        dtypes = [DTYPES[short] for short in args.dtype or ("bf16", "fp16", "fp32")]
        failed = sum(_check(device, dtype, args.op or list(COVERS), args.again) for dtype in dtypes)
    print(f"kept in {proofs.file()}")
    return 1 if failed else 0
