"""python -m cumo_kernels verify: every op, backend and dtype of this machine against fp64.

The rule for errors is that of cumo_kernels/testing.py. Besides, on every case: results repeat bit for bit,
also on memory full of NaN; nothing is read or written outside of the tensors; integers are exact; on a GPU
nothing waits for the host, and a captured graph replays to the same bits.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch import Tensor

from cumo_kernels import cases, dispatch, use_backend
from cumo_kernels.cases import FAMILIES, FEW, GPU_FAMILIES, Call, Case, build, parse
from cumo_kernels.guards import guarded_memory
from cumo_kernels.problems import DTYPES
from cumo_kernels.testing import Yardstick

REPEATS = 3
EXCUSED = "reference"  # written to be read: it asks the host where experts begin


@dataclass
class Result:
    """What one case on one backend showed; None where a check does not apply or did not run."""

    case: str
    backend: str
    device: str
    family: str = ""
    output: float | None = None  # worst error of an output, in units of torch's own
    gradient: float | None = None
    worst_gradient: str | None = None
    repeats: bool | None = None
    guards: bool | None = None
    exact: bool | None = None
    sync_free: bool | None = None
    graph: bool | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        interpreter = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return (
            f"{interpreter}python -m cumo_kernels verify --backend {self.backend} --device {self.device} "
            f"--case '{self.case}'"
        )


def _outputs(call: Call, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    outs = call.run(*leaves)
    return (outs,) if isinstance(outs, Tensor) else outs


def _step(call: Call, leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of one forward and backward pass."""
    outs = _outputs(call, leaves)
    found = torch.autograd.grad(outs, leaves, upstream, allow_unused=True)
    return [*(o.detach() for o in outs), *(g for g in found if g is not None)]


def _leaves(call: Call) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in call.inputs]
    return leaves, [torch.randn_like(o) for o in _outputs(call, leaves)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _check_accuracy(call: Call, case: Case, result: Result) -> None:
    yardstick = Yardstick(call.truth, call.inputs, case.seed)
    result.guards = False
    with guarded_memory():
        found = yardstick.measure(call.run)
    result.guards = True
    result.failures += [row.reason for row in found if row.reason is not None]
    result.output = max(row.ratio for row in found if row.name.startswith("output"))
    gradients = [row for row in found if row.name.startswith("gradient")]
    worst = max(gradients, key=lambda row: row.ratio)
    result.gradient, result.worst_gradient = worst.ratio, worst.name


def _check_integers(call: Call, result: Result) -> None:
    if call.integers is not None:
        found = call.integers(*call.inputs)
        result.exact = _same([t.long() for t in found], [t.long() for t in call.true_integers])
        if not result.exact:
            result.failures.append("the routing plan differs from the reference's")


def _check_repeats(call: Call, result: Result) -> None:
    leaves, upstream = _leaves(call)
    first = _step(call, leaves, upstream)
    result.repeats = all(_same(first, _step(call, leaves, upstream)) for _ in range(REPEATS - 1))
    if not result.repeats:
        result.failures.append("repeats differ")
    with guarded_memory():
        if not _same(first, _step(call, leaves, upstream)):
            result.guards = False
            result.failures.append("the result depends on what uninitialised memory holds")


def _check_sync(call: Call, result: Result) -> None:
    leaves, upstream = _leaves(call)
    _step(call, leaves, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(call, leaves, upstream)
        result.sync_free = True
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        result.sync_free = False
        if result.backend != EXCUSED:
            result.failures.append(f"waits for the host: {str(error).splitlines()[0]}")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _check_graph(call: Call, result: Result) -> None:
    """Captured once, replayed on other values and another routing: the bits of an eager run on those."""
    leaves, upstream = _leaves(call)
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1":
        return  # torch cannot capture without its allocator
    if not result.sync_free:
        result.graph = False  # a capture that waits for the host cannot succeed
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _step(call, leaves, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(call, leaves, upstream)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    if call.reroute is not None:
        call.reroute()
    graph.replay()
    torch.cuda.synchronize()
    result.graph = _same([t.clone() for t in captured], _step(call, leaves, upstream))
    if not result.graph:
        result.failures.append("a replayed graph gives other bits than an eager run")


def check(case: Case, backend: str, device: str, family: str = "") -> Result:
    """Every check that applies; whatever is raised on the way is a failure with its text."""
    result = Result(str(case), backend, device, family)
    torch.manual_seed(case.seed)
    try:
        with use_backend(backend):
            call = build(case, device)
            _check_accuracy(call, case, result)
            _check_integers(call, result)
            _check_repeats(call, result)
            if device == "cuda":
                _check_sync(call, result)
                _check_graph(call, result)
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {str(error).strip()[:500]}")
    return result


def backends_of(device: str) -> tuple[list[str], list[str]]:
    """-> names that run in some dtype of ours on `device`, and a sentence for each other one."""
    names, missing = [], []
    for row in dispatch.BACKENDS:
        reason = row.refuse("expert_mlp", device, torch.float32)
        if reason is None:
            names.append(row.name)
        else:
            missing.append(f"{row.name} on {device}: {reason}")
    return names, missing


def draw(generator: random.Random, dtypes: tuple[str, ...], big: bool) -> Case:
    """A random case; half of its fields keep to small or ordinary values."""
    rand, choice = generator.randint, generator.choice
    size = lambda top: choice((1, 2, 8, 16, 32, 64, rand(1, top), rand(1, top)))
    experts = choice((1, 2, 4, 4, 8, rand(1, 16), 64))
    groups = choice((1, 1, 2, 3))
    dtype = choice(dtypes)
    op = choice(cases.OPS)
    case = Case(
        op,
        T=groups * choice((0, 1, rand(2, 9), rand(10, 80), rand(10, 3000 if big else 150))),
        H=size(520 if big else 130),
        I=size(300 if big else 100),
        O=size(300 if big else 100),
        E=experts,
        K=rand(1, min(experts, 8)),
        activation=choice(sorted(cases.ACTIVATIONS)),
        bias=choice((True, False)),
        gated=choice((True, False)) and not (op == "route" and dtype != "fp32"),
        memory=choice(("x", "preact", "all")),
        groups=groups,
        pattern=choice((*cases.PATTERNS, "dropped")),
        layout=choice(cases.LAYOUTS),
        dtype=dtype,
        seed=rand(0, 999_999),
    )
    return cases.used(case)


def smaller(case: Case, name: str) -> Iterator[Case]:
    """`case` with a simpler value of one field, the boldest first."""
    value = getattr(case, name)
    if isinstance(value, bool | str):
        steps = [getattr(Case(case.op), name)]
    else:
        least = 0 if name in ("T", "seed") else 1
        steps = [step for step in (least, value // 2, value - 1) if least <= step < value]
    for step in dict.fromkeys(steps):
        other = cases.used(replace(case, **{name: step}))
        if other != case and other.problem is None:
            yield other


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 90) -> Case:
    """The simplest case found in `seconds` that still `fails`."""
    stop = time.monotonic() + seconds
    improved = True
    while improved:
        improved = False
        for row in fields(case)[1:]:
            for other in smaller(case, row.name):
                if time.monotonic() > stop:
                    return case
                if fails(other):
                    case, improved = other, True
                    break
    return case


def fuzz(
    backends: list[str], dtypes: tuple[str, ...], device: str, seconds: float, seed: int
) -> Iterator[Result]:
    """Random cases until the time is up; a failure is shrunk before it is yielded, and ends the search."""
    generator = random.Random(seed)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        case = draw(generator, dtypes, device == "cuda")
        for backend in backends:
            result = check(case, backend, device, "fuzz")
            if result.failures:
                fails = lambda other, backend=backend: bool(check(other, backend, device).failures)
                yield check(shrink(case, fails), backend, device, "fuzz")
                return
            yield result


def interpreted(options: list[str], log: Callable[[str], None]) -> list[Result]:
    """The Triton backend in Triton's interpreter, which only a process of its own can choose."""
    command = [sys.executable, "-m", "cumo_kernels", "verify", "--backend", "triton", "--device", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("CUMO_BACKEND", None)
    log("triton in the interpreter (a process of its own, a second or so a case)")
    done = subprocess.run(
        [*command, "--json", "-", *options], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        return [Result(**row) for row in json.loads(done.stdout)["results"]]
    except (json.JSONDecodeError, KeyError):
        failure = f"the interpreter's process ended with {done.returncode} and no result"
        return [Result("expert_mlp", "triton", "cpu", failures=[failure])]


def table(results: Iterable[Result]) -> str:
    """A line for each op, backend and dtype: its worst error and whether all its cases passed each check."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        case = parse(result.case)
        groups.setdefault((result.backend, case.op, case.dtype), []).append(result)
    head = (
        "backend", "op", "dtype", "cases", "output", "gradient", "worst in", "repeats", "guards", "exact",
        "sync-free", "graph", "",
    )  # fmt: skip
    lines = [head]
    for (backend, op, dtype), rows in groups.items():
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [row.name for row in dispatch.BACKENDS]
    parser.add_argument("--backend", choices=names, action="append", help="default: all that run here")
    parser.add_argument("--op", choices=cases.OPS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--case", help="one case only, as a failure prints it")
    parser.add_argument("--few", action="store_true", help="one awkward family of shapes, not all")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="random cases until the time is up")
    parser.add_argument("--seed", type=int, default=0, help="of --fuzz")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; no case begins after them")
    parser.add_argument(
        "--no-interpreter", action="store_true", help="leave Triton out where there is no GPU"
    )
    parser.add_argument("--json", metavar="FILE", help="write every case's result; - is the screen, alone")


def _run(args: argparse.Namespace, log: Callable[[str], None]) -> tuple[list[Result], list[str]]:
    """-> results, and sentences for what was not checked."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    runnable, missing = backends_of(device)
    refused = [name for name in args.backend or () if name not in runnable]
    interpret = device == "cpu" and "triton" not in runnable and not args.no_interpreter
    interpret = interpret and not dispatch._TRITON_MISSING and (not args.backend or "triton" in args.backend)
    backends = [name for name in args.backend or runnable if name in runnable]
    if not backends and not interpret:
        raise ValueError(f"--backend {', '.join(refused)} does not run here: {'; '.join(missing)}")
    dtypes = tuple(args.dtype or DTYPES)
    results: list[Result] = []

    def note(result: Result) -> None:
        results.append(result)
        if result.failures:
            log(f"FAILED {result.backend} {result.case}: {result.failures[0]}")

    passed_on: list[str] = []
    if args.case:
        passed_on = ["--case", args.case]
        for backend in backends:
            note(check(parse(args.case), backend, device))
    elif args.fuzz:
        passed_on = ["--fuzz", str(args.fuzz), "--seed", str(args.seed)]
        if backends:
            for result in fuzz(backends, dtypes, device, args.fuzz, args.seed):
                note(result)
        log(f"{len(results)} random cases from seed {args.seed}")
    else:
        families = FEW if args.few else FAMILIES | (GPU_FAMILIES if device == "cuda" else {})
        todo = list(cases.all_cases(families, dtypes, tuple(args.op or cases.OPS)))
        begin, late = time.monotonic(), 0
        for i, (family, case) in enumerate(todo):
            if time.monotonic() - begin > args.budget:
                late = len(todo) - i
                break
            for backend in backends:
                note(check(case, backend, device, family))
            if (i + 1) % 50 == 0:
                log(f"{i + 1} of {len(todo)} cases")
        if late:
            missing.append(f"{late} of {len(todo)} cases: --budget was spent")
    if interpret:
        asked = args.backend and "triton" in args.backend and not args.few
        passed_on += passed_on or ([] if asked else ["--few"])
        passed_on += [word for op in args.op or () for word in ("--op", op)]
        # the interpreter cuts fp32 to bf16 where a GPU rounds
        passed_on += [word for dtype in args.dtype or ("fp32", "fp16") for word in ("--dtype", dtype)]
        results += interpreted(passed_on, log)
        missing = [m for m in missing if not m.startswith("triton ")]
        missing.append("triton on a GPU: only its arithmetic was checked, in the interpreter")
    if device != "cuda":
        missing.append("sync-free and graph: they need a CUDA device")
    return results, missing


def main(args: argparse.Namespace) -> int:
    log = lambda line: print(line, file=sys.stderr, flush=True)
    begin = time.monotonic()
    try:
        results, missing = _run(args, log)
    except ValueError as error:
        log(f"verify: {error}")
        return 2
    failed = [result for result in results if result.failures]
    report = {
        "seconds": round(time.monotonic() - begin, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "failed": len(failed),
        "not_checked": missing,
        "results": [asdict(result) for result in results],
    }
    if args.json == "-":
        print(json.dumps(report))
        return 1 if failed or not results else 0
    if args.json:
        part = f"{args.json}.part"
        with open(part, "w") as file:
            json.dump(report, file, indent=1)
        os.replace(part, args.json)
    print(table(results))
    print("output, gradient: the worst error in units of torch's own in that dtype, both against fp64")
    for line in missing:
        print(f"not checked: {line}")
    for result in failed:
        print(f"\nFAILED {result.backend}: {'; '.join(result.failures)}\n  {result.command}")
    if not results:
        print("verify: no case fits these arguments, so nothing was checked")
        return 1
    verdict = (
        f"{len(failed)} of {len(results)} cases FAILED" if failed else f"all {len(results)} cases passed"
    )
    print(f"verify: {verdict} in {report['seconds']} s")
    return 1 if failed else 0
