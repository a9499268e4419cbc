"""The results of a verify run: one Result per case, a table, and entries of verified.json."""

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cumo_kernels import dispatch, extension
from cumo_kernels.tiles import hardware
from cumo_kernels.tiles.hardware import gpu_of
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification import cases, verified
from cumo_kernels.verification.cases import parse
from cumo_kernels.verification.shards import is_late, of_the_machine

SWITCHES = (  # environment variables that change which code a case runs
    "TRITON_INTERPRET", "CUMO_EMULATE", "CUMO_EMULATE_CAPABILITY", "CUMO_EMULATE_SMS",
    "CUMO_EMULATE_COPY_FROM", "CUMO_EMULATE_STRICT_MAPS", "CUMO_JIT", "CUMO_BATCH_INVARIANT", "CUMO_PDL",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
)  # fmt: skip


def switches() -> str:
    """The prefix of a command that repeats a case of this process."""
    return "".join(f"{name}={os.environ[name]} " for name in SWITCHES if name in os.environ)


@dataclass
class Result:
    """The result of one case on one backend; None where a check does not apply or did not run."""

    case: str
    backend: str
    device: str
    family: str = ""
    output: float | None = None  # largest error of an output, in units of torch's own
    gradient: float | None = None
    worst_gradient: str | None = None
    repeats: bool | None = None
    guards: bool | None = None
    exact: bool | None = None
    sync_free: bool | None = None
    graph: bool | None = None
    lost: bool = False  # this process can run nothing on the device any more
    failures: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        return (
            f"{switches()}python -m cumo_kernels verify --backend {self.backend} --device {self.device} "
            f"--case '{self.case}'"
        )


def table(results: Iterable[Result]) -> str:
    """A line for each op, backend and dtype: the largest error, and whether all cases passed each check."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        case = parse(result.case)
        groups.setdefault((result.backend, case.op, case.dtype), []).append(result)
    names = [[row.name for row in dispatch.BACKENDS], cases.OPS, list(DTYPES)]
    place = lambda entry: [known.index(name) for known, name in zip(names, entry[0], strict=True)]
    head = (
        "backend", "op", "dtype", "cases", "output", "gradient", "worst in", "repeats", "guards", "exact",
        "sync-free", "graph", "",
    )  # fmt: skip
    lines = [head]
    for (backend, op, dtype), rows in sorted(groups.items(), key=place):
        number = lambda name, rows=rows: max(
            (v for r in rows if (v := getattr(r, name)) is not None), default=None
        )

        def every(name: str, rows=rows) -> str:
            known = [v for r in rows if (v := getattr(r, name)) is not None]
            return "-" if not known else "yes" if all(known) else "no"

        worst = max(rows, key=lambda r: max(r.output or 0, r.gradient or 0))
        errors = ["-" if number(name) is None else f"{number(name):.2f}" for name in ("output", "gradient")]
        checks = [every(name) for name in ("repeats", "guards", "exact", "sync_free", "graph")]
        bad = sum(bool(r.failures) for r in rows)
        verdict = f"{bad} FAILED" if bad else "ok"
        lines.append((backend, op, dtype, str(len(rows)), *errors, worst.family or "-", *checks, verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def rehearses(args: argparse.Namespace, device: str) -> bool:
    """Whether --record is only a rehearsal: tiny cases, without a GPU, into a file that is not used."""
    return device == "cpu" and args.tiny and Path(args.record).resolve() != verified.PATH


def record(results: list[Result], args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Record each (backend, op, dtype) whose cases all ran and passed, or of which one failed."""
    groups: dict[verified.Group, list[Result]] = {}
    name = lambda dtype: str(DTYPES[dtype]).removeprefix("torch.")
    stale = extension.outdated()
    if stale is not None and any(result.backend == "cuda" for result in results):
        log(f"nothing is recorded for cuda: {stale}")
    for result in results:
        case = parse(result.case)
        if result.backend in verified.SOURCES and not (result.backend == "cuda" and stale):
            groups.setdefault((result.backend, case.op, name(case.dtype)), []).append(result)
    wanted: dict[tuple[str, str], int] = {}
    tiny = rehearses(args, args.device or "cuda")
    dtypes, ops = tuple(args.dtype or DTYPES), tuple(args.op or cases.OPS)
    for _, case in cases.survey("cuda", False, dtypes, ops, tiny):
        wanted[case.op, name(case.dtype)] = wanted.get((case.op, name(case.dtype)), 0) + 1
    ran, failed = {}, {}
    for group, rows in groups.items():
        rows = [row for row in rows if not of_the_machine(row.failures) and not is_late(row.failures)]
        ran[group] = len(rows)
        if number := sum(bool(row.failures) for row in rows):
            failed[group] = number, len(rows)
    passed = {g: number for g, number in ran.items() if number == wanted[g[1:]] and g not in failed}
    gpu = hardware.find("nvidia_h100") if tiny else gpu_of(torch.device("cuda"))
    right, wrong = verified.record(passed, failed, gpu, Path(args.record))
    log(f"recorded for {gpu.name} in {args.record}: {right} that passed, {wrong} that failed")
    for group in groups.keys() - passed.keys() - failed.keys():
        log(f"not recorded, {ran[group]} of {wanted[group[1:]]} cases ran: {' '.join(group)}")
