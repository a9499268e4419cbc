"""python -m cumo_kernels self-check: check the default backends on this GPU, before the first call.

For container images, and for code that is compiled from its first call. proofs.py also runs it in a separate
process at a first call. It runs the checks of `verify` on aligned and awkward sizes of each op.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import torch

from cumo_kernels import dispatch, explained
from cumo_kernels.tiles import hardware
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification import cases, proofs, shards, verdict_file
from cumo_kernels.verification.verdicts import Result
from cumo_kernels.verification.verified import COVERS, has

WORKERS = 8  # processes at most
PARALLEL = 2  # minimum number of processes even with few CPUs: they also wait for imports
AWKWARD = {name: cases.FEW[name] for name in ("awkward", "awkward-packed")}  # sizes that no tile divides
MANY = cases.GPU_FAMILIES["1024-experts"]
FAMILIES = {  # and sizes that copy engines and tensor cores accept
    "cuda": {
        "aligned": cases.ALIGNED["aligned"],
        "aligned-router": cases.ALIGNED["aligned-router"],
        "aligned-swiglu": cases.ALIGNED["aligned-swiglu"] | {"ops": cases.LAYERS},
        "1024-experts": MANY,
        **AWKWARD,
    },
    # used when CPU tensors replace CUDA tensors, in tests
    "cpu": cases.TINY | {"1024-experts": MANY | {"ops": ("route", "permute"), "T": 4}, **AWKWARD},
}
KILLED = "signal SIGKILL"  # so small a case does not run out of memory by itself


def _processes(jobs: int, memory: float) -> int:
    """Number of concurrent processes; 0 if the GPU has no memory left for one."""
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
    """For each of `groups`: whether all its cases passed; for failures a reason and a command to repeat it.

    "passed" is None if inconclusive: a GPU without memory, processes that do not start, a time limit.
    "kept" is for how many seconds a row is valid, 0 for ever: a slow machine may pass later.
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

    why = "the GPU has no memory left for a separate process"
    if processes := _processes(len(jobs), memory):
        stop = time.monotonic() + seconds
        shards.Shards(device, processes, case_seconds, stop, note, lambda line: None).run(jobs)
        why = f"not all of its cases ended within {seconds:.0f} s"
    rows = []
    for (backend, op), found in results.items():
        row = {"backend": backend, "op": op, "passed": True, "cases": len(found), "kept": 0}
        bad = [result for result in found if result.failures]
        excused = lambda failures: shards.of_the_machine(failures) and KILLED not in failures[0]
        wrong = [result for result in bad if not excused(result.failures)]
        if wrong:
            reason = wrong[0].failures[0]
            kept = proofs.DAY if shards.is_late([reason]) else 0
            row |= {"passed": False, "reason": reason, "command": wrong[0].command, "kept": kept}
        elif bad or len(found) < sum((job.backend, job.case.op) == (backend, op) for job in jobs):
            row |= {"passed": None, "reason": bad[0].failures[0] if bad else why, "kept": proofs.SOON}
        else:
            row |= {"reason": "", "command": ""}
        rows.append(row)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), action="append", help="default: all three"
    )
    parser.add_argument("--op", choices=COVERS, action="append", help="default: all")
    parser.add_argument("--again", action="store_true", help="check again what has a saved verdict")
    # a rehearsal, under TRITON_INTERPRET=1 or CUMO_EMULATE=1: CPU tensors replace those of an H100
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=json.loads, metavar="GROUPS", help=argparse.SUPPRESS)
    limits = {"memory": math.inf, "seconds": proofs.SECONDS, "case-seconds": proofs.CASE_SECONDS}
    for name, default in limits.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=argparse.SUPPRESS)


def _end_with_caller() -> None:
    """End this process group when the caller ends; the caller holds our standard input open."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os.killpg(os.getpgid(0), signal.SIGKILL)

    if os.getpgid(0) == os.getpid():  # not the process group of a user's shell
        threading.Thread(target=watch, daemon=True).start()


def _check(device: torch.device, dtype: torch.dtype, asked: Sequence[str], again: bool) -> bool:
    """Print which backend runs `asked` in `dtype` and why -> whether all available backends are trusted."""
    x = torch.empty(1, 1, dtype=dtype, device=device)
    rows = [row for row in dispatch.BACKENDS if row.needs_proof]
    able = tuple(row.name for row in rows if row.refuse("route", device, dtype) is None)
    if again and able:
        if groups := [(name, case) for name in able for case in asked if has(name, case)]:
            proofs.check_again(groups, dtype, device)
    calls = [op for op in dispatch.OPS if any(op in COVERS[case] for case in asked)]
    calls = [op for op in calls if op != "sort_by_expert" or set(asked) == set(COVERS)]
    able_of = {op: tuple(row.name for row in rows if row.refuse(op, device, dtype) is None) for op in calls}
    found = [proofs.proofs(able, op, dtype, device, may_check=True) for op, able in able_of.items() if able]
    print(f"{explained.table(calls, x)}\n", flush=True)
    return bool(found) and all(proof.passed for answers in found for proof in answers)


def main(args: argparse.Namespace) -> int:
    if args.only:
        _end_with_caller()
        groups = [tuple(group) for group in args.only]
        limits = args.memory, args.seconds, args.case_seconds
        print(json.dumps(verdicts(groups, args.dtype[0], args.device, *limits)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("self-check: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with hardware.assume(hardware.find("nvidia_h100")):
        dtypes = [DTYPES[short] for short in args.dtype or ("bf16", "fp16", "fp32")]
        passed = [_check(device, dtype, args.op or list(COVERS), args.again) for dtype in dtypes]
    where = " or ".join(str(folder / verdict_file.NAME) for folder in verdict_file.folders())
    verdict = (
        "all available backends passed" if all(passed) else "not all available backends passed: see above"
    )
    print(f"self-check: {verdict}; saved in {where or 'no file'}")
    return 0 if all(passed) else 1
