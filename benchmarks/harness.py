"""Runs a case: build it, compare every variant with fp64, time the correct ones alternately, append rows.

A benchmark file has an op's name, its cases and one `setup`; everything else is here.
"""

import argparse
import contextlib
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import record, timing
from benchmarks.cases.shapes import Shape
from benchmarks.record import Gap, Row, is_fault, is_ours
from benchmarks.selection import add_arguments, in_turns
from benchmarks.steps import captured, peak_bytes, room, said, saved_bytes, steps_of, watching
from cumo_kernels import dispatch, use_backend
from cumo_kernels.testing import Yardstick
from cumo_kernels.tiles import hardware
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification.verify import is_lost

MODES = ("forward", "backward", "both")
LAYER = "expert_mlp"
DENSE = (LAYER, "moe_layer", "grouped_gemm")  # ops whose time is proportional to the layer's FLOPs


@dataclass
class Workload:
    """One case, ready to run. FLOPs and bytes are those of the task, independent of the implementation."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]  # through our public names, on the forced backend
    reference: Callable[..., Tensor | tuple[Tensor, ...]]  # plain PyTorch: the gate
    inputs: tuple[Tensor, ...]
    flops: int = 0  # forward; backward is `backward_flops`, twice that unless given
    bytes: int = 0  # forward: every operand once
    backward_flops: int | None = None
    backward_bytes: int | None = None
    peers: dict[str, Callable] = field(default_factory=dict)
    forward_only: dict[str, str] = field(default_factory=dict)  # peer -> why it has no backward
    gaps: dict[str, str] = field(default_factory=dict)  # peer -> why it is not timed
    dense: tuple[Callable, tuple[Tensor, ...]] | None = None  # equal FLOPs without experts: an upper limit
    parameters: tuple[Tensor, ...] = ()  # more tensors that need gradients, besides the inputs
    constants: tuple[Tensor, ...] = ()  # tensors without gradients, which do not count as saved
    op: str = LAYER  # the op that a backend of ours must have to run this
    note: str = ""  # what was reduced to fit
    host: bool = False  # measures the host's time: nothing else may run on the GPU

    def cost(self, mode: str) -> tuple[int, int]:
        forward = (self.flops, self.bytes)
        backward = (
            2 * self.flops if self.backward_flops is None else self.backward_flops,
            2 * self.bytes if self.backward_bytes is None else self.backward_bytes,
        )
        if mode == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if mode == "forward" else backward


@dataclass(frozen=True)
class Case:
    """The case of one call of `measure`."""

    shape: Shape
    dtype: str = "bf16"
    pattern: str = "uniform"
    modes: tuple[str, ...] = MODES
    gate_dtype: str | None = None  # default: the timed dtype
    gate_shape: Shape | None = None  # default: that of `gate_shape`


Setup = Callable[[Shape, torch.dtype, str, str], Workload]


def backends(device: str, wanted: Iterable[str] | None = None, op: str = LAYER) -> list[str]:
    """Our backends that run `op` on `device`, including those that run only if forced."""
    names = [row.name for row in dispatch.BACKENDS if row.refuse(op, device, torch.bfloat16) is None]
    return [name for name in names if wanted is None or name in wanted]


def _forced(backend: str, run: Callable) -> Callable:
    def call(*inputs: Tensor):
        with use_backend(backend):
            return run(*inputs)

    return call


def _variants(workload: Workload, device: str, wanted: Iterable[str] | None) -> dict[str, Callable]:
    names = backends(device, wanted, workload.op)
    ours = {record.ours(name): _forced(name, workload.run) for name in names}
    return ours | workload.peers


def gate_shape(shape: Shape, device: str) -> Shape:
    """`shape`, or a smaller one where fp64 copies of its weights and rows would not fit or take minutes."""
    allowed, flops = room(device), 2e13 if device == "cuda" else 6e11
    # fp64 leaves, their copies and the gradients of the op, torch and fp64; about eight tensors of rows
    needed = lambda s: 8 * (6 * s.weights + 8 * s.slots * (s.width + s.H))
    while needed(shape) > allowed or 9 * shape.gemm_flops > flops:
        if 8 * 6 * shape.weights > allowed / 2:
            shape = replace(shape, I=shape.I // 2)
        elif shape.groups % 2 == 0:
            shape = replace(shape, T=shape.T // 2, groups=shape.groups // 2)
        elif shape.groups > 1:
            shape = replace(shape, T=shape.T // shape.groups, groups=1)
        elif shape.T > 16:
            shape = replace(shape, T=shape.T // 2)
        else:
            break
    return shape


@dataclass(frozen=True)
class Verdict:
    error: float | None = None  # largest error of an output, in units of torch's own
    gradient_error: float | None = None
    refusal: str | None = None  # why it is not timed at all
    backward_refusal: str | None = None  # why its backward is not timed


class DeviceLost(Exception):
    """A variant left the GPU in a state in which this process can no longer use it."""

    def __init__(self, variant: str, error: Exception):
        super().__init__(f"{variant} broke the device: {said(error)}")
        self.variant = variant


def gate(
    variants: dict[str, Callable],
    workload: Workload,
    device: str,
    watch: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, Verdict]:
    """Compare every variant with fp64 by the rule of cumo_kernels/testing.py."""
    yardstick = Yardstick(workload.reference, workload.inputs, pool=False)
    verdicts = {}
    for name, run in variants.items():
        try:
            with watch(name):
                found = yardstick.measure(run)
        except Exception as error:  # a third-party package may raise anything; then it is not timed
            if is_lost(device):
                raise DeviceLost(name, error) from error
            verdicts[name] = Verdict(refusal=said(error))
            continue
        outputs = [row for row in found if row.name.startswith("output")]
        gradients = [row for row in found if row.name.startswith("gradient")]
        worst = lambda rows: max((row.ratio for row in rows), default=None)
        reason = lambda rows: next((row.reason for row in rows if row.reason is not None), None)
        backward = workload.forward_only.get(name) or reason(gradients)
        verdicts[name] = Verdict(worst(outputs), worst(gradients), reason(outputs), backward)
    return verdicts


def floor_ms(flops: int, bytes_: int, dtype: torch.dtype, device: str) -> float | None:
    """The data sheet's minimum: the larger of arithmetic time and memory time; None if unknown."""
    if device != "cuda":
        return None
    gpu = hardware.gpu_of(torch.device("cuda"))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    peak = (gpu.tflops_tf32 if tf32 else gpu.tflops_fp32) if dtype == torch.float32 else gpu.tflops_16
    if peak is None or gpu.gb_per_s is None:
        return None
    return max(flops / peak / 1e9, bytes_ / gpu.gb_per_s / 1e6)


def measure(
    op: str,
    setup: Setup,
    case: Case,
    device: str,
    run_id: str,
    seconds: float = 1.0,
    wanted: Iterable[str] | None = None,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    without: Iterable[str] = (),
    watch: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
    log_gaps: bool = True,
) -> tuple[list[Row], list[Gap]]:
    """Check one case, then time it -> a row for each timed variant and mode, a gap for each of the others.

    Args:
        wanted: names of our backends; None: all that run here.
        without: variants that broke the device before.
        watch: context around the first runs of each variant.
        log_gaps: whether to log each gap.

    Raises:
        DeviceLost: another variant did.
    """
    shape, dtype, gate_dtype = case.shape, DTYPES[case.dtype], DTYPES[case.gate_dtype or case.dtype]
    facts = record.machine(device) | record.versions() | {"commit": record.commit()}
    small = case.gate_shape or gate_shape(shape, device)
    gaps: list[Gap] = []

    def gap(variant: str, mode: str, reason: str) -> None:
        gaps.append(gap_of(op, case, variant, mode, reason, device, run_id))
        if log_gaps:
            log(f"  {variant}: NOT TIMED ({mode}): {reason}")

    log(f"{op} {shape.name} T={shape.T} {case.dtype} {case.pattern}")
    torch.manual_seed(0)
    gated = setup(small, gate_dtype, device, case.pattern)
    present = lambda load: {n: f for n, f in _variants(load, device, wanted).items() if n not in without}
    verdicts = gate(present(gated), gated, device, watch)
    gone = dict.fromkeys(without, "it broke the device earlier in this run")
    same = small == shape and gate_dtype == dtype
    workload = gated if same else setup(shape, dtype, device, case.pattern)
    # a variant that runs at the gate's size may fail at this one
    absent = gated.gaps | workload.gaps | gone
    for name, reason in absent.items():
        gap(name, "all", reason)
    for name, verdict in verdicts.items():
        if name in absent:
            continue
        if verdict.refusal is not None:
            gap(name, "all", f"the gate refuses it: {verdict.refusal}")
        elif verdict.backward_refusal is not None and set(case.modes) - {"forward"}:
            gap(name, "backward", f"the gate refuses it: {verdict.backward_refusal}")
    remarks = [workload.note] if workload.note else []
    gated_note = f", {gated.note}" if gated.note else ""
    remarks += [f"gate at T{small.T} {small.sizes}{gated_note}"] if small != shape else []
    remarks += [f"gate in {case.gate_dtype}"] if gate_dtype != dtype else []
    variants = {n: f for n, f in present(workload).items() if n not in absent and verdicts[n].refusal is None}
    del gated
    _collect(device)

    saved: dict[str, int] = {}

    def ready(name: str, run: Callable, inputs: tuple[Tensor, ...]) -> dict[str, timing.Step]:
        forward_only = name in verdicts and verdicts[name].backward_refusal is not None
        modes = [mode for mode in case.modes if mode == "forward" or not forward_only]
        parameters = () if name == "dense" else workload.parameters
        try:
            with watch(name):
                steps = steps_of(run, inputs, modes, parameters)
                for step in steps.values():
                    step()
                if device == "cuda":
                    torch.cuda.synchronize()
            if name != "dense" and set(modes) - {"forward"}:
                saved[name] = saved_bytes(run, inputs, (*parameters, *workload.constants))
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # out of memory, or any error of a peer at this size
            if is_lost(device):
                raise DeviceLost(name, error) from error
            gap(name, "all", f"it cannot run: {said(error)}")
            return {}
        return steps

    steps = {name: ready(name, run, workload.inputs) for name, run in variants.items()}
    if workload.dense is not None:
        steps["dense"] = ready("dense", *workload.dense)
    # one clock for all modes, since each is allowed a warm-up time
    clocks = tuple(timing.clock_of(device, host) for host in dict.fromkeys((workload.host, False)))
    rows: list[Row] = []
    for mode in case.modes:
        try:
            rows += _timed(
                op, case, mode, workload, steps, verdicts, saved, "; ".join(remarks), facts, device, run_id,
                seconds, log, clocks, gap,
            )  # fmt: skip
        except Exception as error:  # the other modes' results stay
            gap("all", mode, f"timing broke off: {said(error)}")
            if is_lost(device):
                break
    _collect(device)
    return rows, gaps


def gap_of(op: str, case: Case, variant: str, mode: str, reason: str, device: str, run_id: str) -> Gap:
    shape, machine = case.shape, record.machine(device)["machine"]
    return Gap(
        op, variant, mode, shape.name, shape.T, shape.sizes, case.pattern, case.dtype, reason, machine, run_id
    )


def _timed(
    op: str,
    case: Case,
    mode: str,
    workload: Workload,
    steps: dict[str, dict[str, timing.Step]],
    verdicts: dict[str, Verdict],
    saved: dict[str, int],
    remark: str,
    facts: dict[str, str],
    device: str,
    run_id: str,
    seconds: float,
    log: Callable[[str], None],
    clocks: tuple[timing.Clock, ...],
    gap: Callable[[str, str, str], None],
) -> list[Row]:
    """Time all variants of a case in one mode alternately: by the first clock, as graphs by the last."""
    shape, rows = case.shape, []
    flops, bytes_ = workload.cost(mode)
    floor = floor_ms(flops, bytes_, DTYPES[case.dtype], device)
    eager = {name: modes[mode] for name, modes in steps.items() if mode in modes}
    timed = {clocks[0].name: (clocks[0], eager)}
    if device == "cuda" and mode != "backward":  # a backward alone would belong to another graph
        refuse = lambda name, reason: gap(name, record.as_graph(mode), reason)
        timed["graph"] = clocks[-1], captured(eager, refuse)
    peak = {name: peak_bytes(step, device) for name, step in eager.items()}
    for timer, (clock, group) in timed.items():
        times = timing.interleave(group, clock, seconds) if group else {}
        dense = times["dense"].ms_p50 if "dense" in times else None
        for name, t in times.items():
            verdict = verdicts.get(name, Verdict())
            rows.append(
                Row(
                    run=run_id, op=op, variant=name, mode=mode, shape=shape.name, tokens=shape.T,
                    sizes=shape.sizes, pattern=case.pattern, dtype=case.dtype, timer=timer,
                    cache=clock.cache, rounds=t.rounds, ms_p20=t.ms_p20, ms_p50=t.ms_p50, ms_p80=t.ms_p80,
                    tflops=flops / t.ms_p50 / 1e9 if flops else None,
                    gb_per_s=bytes_ / t.ms_p50 / 1e6 if bytes_ else None,
                    floor_ms=floor, share_of_floor=None if floor is None else floor / t.ms_p50,
                    ratio_to_dense=None if dense is None else dense / t.ms_p50,
                    saved_bytes=saved.get(name), peak_bytes=peak.get(name),
                    error=verdict.error, gradient_error=verdict.gradient_error, gate=remark,
                    date=datetime.now(UTC).strftime("%Y-%m-%d"), **facts,
                )
            )  # fmt: skip
            span = f"({t.ms_p20:.4g} .. {t.ms_p80:.4g})"
            log(f"  {mode:<8} {timer:<5} {name:<18} {t.ms_p50:.4g} ms {span}")
    return rows


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(RuntimeError):  # if the device is lost
            torch.cuda.empty_cache()


def _restart(words: list[str]) -> None:
    """Continue in a new process, which can use the device. If an option is given twice, the last counts."""
    sys.stdout.flush()
    sys.stderr.flush()
    for name in os.listdir("/proc/self/fd"):  # an open device file would keep this process's GPU memory
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *words])


def run_all(
    files: Iterable[ModuleType], args: argparse.Namespace, absent: dict[str, str] | None = None
) -> int:
    """Measure the cases of benchmark modules (OP, cases, setup), each appended as soon as it is done.

    Args:
        absent: benchmark files that cannot be loaded -> the reason.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run_id = args.run or datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    budget = (210 if device == "cpu" and not args.full else math.inf) if args.budget is None else args.budget
    seconds = 1.0 if args.seconds is None else args.seconds
    stop, done, left, broken = time.monotonic() + budget, 0, 0, 0
    rates: dict[str, float] = {}  # op -> seconds per FLOP of its layer, the slowest case so far
    machine = record.machine(device)["machine"]

    missed: list[Gap] = []

    def keep(rows: list[Row], gaps: list[Gap]) -> None:
        missed.extend(gaps)
        if not args.dry:
            record.append(rows, args.results)
            record.append_gaps(gaps, args.results)

    def say_missed() -> None:
        for line in record.reasons(missed):
            print(line, file=sys.stderr)

    def go_on(words: list[str]) -> None:
        """Continue in a new process, for the rest of the time."""
        say_missed()
        end = [] if stop == math.inf else ["--budget", f"{max(0, stop - time.monotonic()):.0f}"]
        _restart([*words, *end, "--run", run_id])

    ours_refused = 0
    keep([], [Gap(name, "all", "all", "", 0, "", "", "", why, machine, run_id)
              for name, why in (absent or {}).items() if not args.begin])  # fmt: skip
    for at, (file, case) in enumerate(in_turns(files, device, args)):
        if at < args.begin:
            continue
        missing = lambda variant, reason, file=file, case=case: [
            gap_of(file.OP, case, variant, "all", reason, device, run_id)
        ]
        # on a GPU the first cases compile, so their time predicts nothing; a CPU may be shared
        likely = rates.get(file.OP, rates.get(LAYER, 0)) if device == "cpu" and file.OP in DENSE else 0
        begin = time.monotonic()
        if begin + likely * case.shape.gemm_flops > stop:
            left += 1
            keep([], missing("all", record.NO_TIME))
            continue
        again: list[str] | None = None  # continue with these options if the device is lost

        def hung(variant: str, at=at, missing=missing) -> None:
            """Runs in a separate thread: the variant's may wait inside the driver for ever."""
            reason = f"it hung: {args.variant_seconds:.0f} s in its first runs"
            print(f"bench: {variant}: {reason}; continuing without it in a new process", file=sys.stderr)
            keep([], missing(variant, reason))
            go_on(["--begin", str(at), "--without", variant])

        try:
            rows, gaps = measure(
                file.OP, file.setup, case, device, run_id, seconds, args.backend,
                without=args.without or (), watch=watching(args.variant_seconds, hung), log_gaps=False,
            )  # fmt: skip
            ours_refused += sum(is_ours(gap.variant) and is_fault(gap) for gap in gaps)
            keep(rows, gaps)
            done += bool(rows)
            if is_lost(device):
                again = ["--begin", str(at + 1)]
        except DeviceLost as error:
            keep([], missing(error.variant, str(error)))
            again = ["--begin", str(at), "--without", error.variant]
        except Exception as error:  # a failing case must not prevent the following ones
            traceback.print_exc()
            broken += 1
            keep([], missing("all", f"it broke off: {said(error)}"))
            again = ["--begin", str(at + 1)] if is_lost(device) else None
            _collect(device)
        if again is not None:
            print(
                f"bench: the device is lost, continuing in a new process ({' '.join(again)})", file=sys.stderr
            )
            go_on(again)
        rate = (time.monotonic() - begin) / max(1, case.shape.gemm_flops)
        rates[file.OP] = max(rate, rates.get(file.OP, 0))
    say_missed()
    where = "" if args.dry else f", results in {os.path.relpath(args.results)}"
    print(f"bench: {done} cases measured on {machine}{where}", end="")
    print(f", {broken} broke off" if broken else "", end="")
    print(f", {ours_refused} refusals of our own kernels" if ours_refused else "", end="")
    print(f", {left} skipped: the budget was spent" if left else "")
    return 1 if broken or ours_refused or not (done or left or args.begin) else 0


def main(module_name: str) -> int:
    """The command line of one benchmark file."""
    module = sys.modules[module_name]
    parser = argparse.ArgumentParser(description=module.__doc__)
    add_arguments(parser)
    return run_all([module], parser.parse_args())
