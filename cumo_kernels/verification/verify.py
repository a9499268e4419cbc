"""python -m cumo_kernels verify: compare every op, backend and dtype of this machine with fp64.

Errors are judged by the rule of accuracy.py. Every case also checks that results repeat bit for bit, also on
memory full of NaN; that nothing outside the tensors is read or written; that integers are exact; and on a GPU
that nothing synchronises with the host and that a captured graph replays to the same bits.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from cumo_kernels import dispatch, use_backend
from cumo_kernels.files import write_whole
from cumo_kernels.tiles.hardware import gpu_of
from cumo_kernels.tiles.problems import DTYPES
from cumo_kernels.verification import cases, verified
from cumo_kernels.verification.accuracy import Yardstick
from cumo_kernels.verification.beside import Beside, elsewhere
from cumo_kernels.verification.cases import FEW, Call, Case, build, parse
from cumo_kernels.verification.fuzz import Late, draw, shrink, time_limit
from cumo_kernels.verification.guards import guarded_memory
from cumo_kernels.verification.progress import Progress, time_left
from cumo_kernels.verification.shards import Job, Shards, serve
from cumo_kernels.verification.verdicts import Result, record, rehearses, switches, table

REPEATS = 3
NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # with it no graph can be captured
FLUSH = 5.0  # seconds between two updates of the --json file


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
    yardstick = Yardstick(call.reference, call.inputs, case.seed)
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
            result.failures.append("the result depends on uninitialised memory")


def excused(case: Case, backend: str, device: str) -> bool:
    """Whether `backend` is documented to synchronise with the host in such a case."""
    return dispatch.asks_host(backend, case.op, torch.device(device), DTYPES[case.dtype]) is not None


def _check_sync(call: Call, case: Case, result: Result) -> None:
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
        if not excused(case, result.backend, result.device):
            result.failures.append(f"synchronises with the host: {str(error).splitlines()[0]}")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _check_graph(call: Call, result: Result) -> None:
    """Capture once, replay on other values and another routing; compare bit for bit with an eager run."""
    leaves, upstream = _leaves(call)
    if NO_CACHE in os.environ:
        return  # torch cannot capture without its caching allocator
    if not result.sync_free:
        result.graph = False  # a capture that synchronises cannot succeed
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
        result.failures.append("a replayed graph differs from an eager run")


def is_lost(device: str) -> bool:
    """Whether a kernel left the device in a state in which this process can no longer use it."""
    try:
        return device == "cuda" and torch.ones(1, device="cuda").item() != 1
    except RuntimeError:
        return True


def check(case: Case, backend: str, device: str, family: str = "") -> Result:
    """Run every check that applies; an exception is a failure with its text."""
    result = Result(str(case), backend, device, family)
    torch.manual_seed(case.seed)
    try:
        with use_backend(backend):
            call = build(case, device)
            _check_accuracy(call, case, result)
            _check_integers(call, result)
            _check_repeats(call, result)
            if device == "cuda":
                _check_sync(call, case, result)
                _check_graph(call, result)
    except Exception as error:
        result.failures.append(f"{type(error).__name__}: {str(error).strip()[:500]}")
        result.lost = is_lost(device)
    return result


def backends_of(device: str) -> tuple[list[str], list[str]]:
    """-> the backends that run in some dtype on `device`, and a message for each of the others."""
    names, missing = [], []
    for row in dispatch.BACKENDS:
        reason = row.refuse("expert_mlp", device, torch.float32)
        if reason is None:
            names.append(row.name)
        else:
            missing.append(f"{row.name} on {device}: {reason}")
    return names, missing


def fuzz(
    backends: list[str],
    dtypes: tuple[str, ...],
    device: str,
    seconds: float,
    seed: int,
    names: tuple[str, ...] = cases.OPS,
) -> Iterator[Result]:
    """Run random cases for so many seconds; a failure is shrunk, yielded, and ends the search.

    The case that runs at the end is given up. Shrinking has a limit of its own.
    """
    generator, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        case = draw(generator, dtypes, device == "cuda", names)
        for backend in (name for name in backends if verified.has(name, case.op)):
            try:
                with time_limit(end - time.monotonic()):
                    result = check(case, backend, device, "fuzz")
            except Late:
                return
            if result.failures and not result.lost:
                fails = lambda other, backend=backend: bool(check(other, backend, device).failures)
                small = check(shrink(case, fails), backend, device, "fuzz")
                if small.failures:
                    result = small
                else:  # an intermittent failure is a failure too
                    result.failures.append("intermittent: the same case passed when repeated")
            yield result
            if result.failures:
                return


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [row.name for row in dispatch.BACKENDS]
    parser.add_argument("--backend", choices=names, action="append", help="default: all that run here")
    parser.add_argument("--op", choices=cases.OPS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--case", help="run only this case, as printed by a failure")
    parser.add_argument("--few", action="store_true", help="only awkward shapes, and on a GPU aligned ones")
    parser.add_argument("--tiny", action="store_true", help="one small family, for a rehearsal")
    parser.add_argument(
        "--fuzz",
        type=float,
        metavar="SECONDS",
        help="run random cases for so many seconds in all, on every backend; a failure is then simplified, "
        "which may take 90 seconds more",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of --fuzz")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no case starts; with --workers, running ones soon end",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: only this one")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=60,
        metavar="SECONDS",
        help="with --workers: time limit of a case; 0: no limit, default %(default)g",
    )
    parser.add_argument(
        "--record",
        nargs="?",
        const=str(verified.PATH),
        metavar="FILE",
        help="write what passed on this GPU into verified.json; to rehearse (--tiny on a CPU), FILE",
    )
    parser.add_argument("--serve", metavar="BACKEND", help=argparse.SUPPRESS)  # run as a worker of --workers
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)  # end of --fuzz
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)  # no progress
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)  # index of the first case
    parser.add_argument("--no-interpreter", action="store_true", help="omit Triton if there is no GPU")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write all results as JSON; FILE.lines gets one line per case as it ends; - is standard output",
    )


def _survey(
    args: argparse.Namespace,
    backends: list[str],
    device: str,
    note: Callable[[Result], None],
    log: Callable,
    show: Callable[[str, float | None], None],
) -> list[str]:
    """Run every case of the families -> messages about those that were not checked."""
    dtypes, names = tuple(args.dtype or DTYPES), tuple(args.op or cases.OPS)
    todo = cases.survey(device, args.few, dtypes, names, args.tiny)
    begin = time.monotonic()
    if args.workers is not None:
        take = lambda row: note(Result(**row))
        shards = Shards(device, args.workers, args.case_seconds, begin + args.budget, take, log)
        pairs = [(row, name) for row in todo for name in backends if verified.has(name, row[1].op)]
        return shards.run(Job(name, *row) for row, name in pairs)
    for i, (family, case) in enumerate(todo[args.begin :], args.begin):
        left = args.budget - (time.monotonic() - begin)
        if left <= 0:
            return [f"{len(todo) - i} of {len(todo)} cases: --budget was spent"]
        for at, backend in enumerate(backends, 1):
            if not verified.has(backend, case.op):
                continue
            result = check(case, backend, device, family)
            note(result)
            if result.lost:
                log(f"the device is lost: the other {len(todo) - i - 1} cases run in a new process")
                words = ["--device", device, "--begin", str(i + 1)]
                words += [f"--{name}" for name in ("few", "tiny") if getattr(args, name)]
                words += [] if left == math.inf else ["--budget", str(left)]
                for option, values in (("--backend", backends), ("--dtype", dtypes), ("--op", names)):
                    words += [word for value in values for word in (option, value)]
                results, missing = elsewhere(words, {}) if i + 1 < len(todo) else ([], [])
                for other in results:
                    note(other)
                skipped = [f"{name} {case}: the device was lost before" for name in backends[at:]]
                return skipped + [line for line in missing if "budget" in line or "lost" in line]
        done, total = i + 1 - args.begin, len(todo) - args.begin
        show(f"{i + 1} of {len(todo)} cases", time_left(done, total, begin))
    return []


def _check_options(args: argparse.Namespace, device: str) -> None:
    alone = [f"--{name}" for name in ("case", "fuzz") if getattr(args, name)]
    if args.fuzz is not None and not args.fuzz > 0:
        raise ValueError(f"--fuzz must be positive, got {args.fuzz:g}")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {args.workers}")
    if args.workers is not None and alone:
        raise ValueError(f"--workers must go with all families, got {alone[0]}")
    if args.case_seconds < 0:
        raise ValueError(f"--case-seconds must be at least 0, got {args.case_seconds:g}")
    if args.record and not rehearses(args, device):
        others = [
            *alone,
            *(["--few"] if args.few else []),
            *(["--tiny"] if args.tiny else []),
            *(["--begin"] if args.begin else []),
        ]
        others += verified.other_code()
        others += [f"{NO_CACHE}={os.environ[NO_CACHE]}"] if NO_CACHE in os.environ else []
        if device != "cuda" or others:
            got = others[0] if others else f"--device {device}"
            raise ValueError(f"--record must go with all families on a CUDA device, got {got}")
        verified.check_known(gpu_of(torch.device("cuda")))


def _interpreted(args: argparse.Namespace) -> tuple[Beside, int | None, str]:
    """Start Triton's interpreter -> its process, its number of cases if known, what it does not check."""
    asked = args.backend and "triton" in args.backend and not args.few
    few = not (args.case or args.fuzz or asked)
    options = ["--backend", "triton", "--device", "cpu"] + (["--few"] if few else [])
    if args.case:
        options += ["--case", args.case]
    if args.fuzz:
        options += [
            "--fuzz",
            str(args.fuzz),
            "--seed",
            str(args.seed),
            "--until",
            str(time.time() + args.fuzz),
        ]
    dtypes = args.dtype or ("fp32", "fp16")  # the interpreter truncates fp32 to bf16 where a GPU rounds
    for name, values in (("--op", args.op or ()), ("--dtype", dtypes)):
        options += [word for value in values for word in (name, value)]
    total = len(cases.survey("cpu", few, tuple(dtypes), tuple(args.op or cases.OPS)))
    less = f", of {len(FEW)} awkward families (--backend triton: of all)" if few else ""
    less += "" if args.dtype else ", without bf16"
    return Beside(options, {"TRITON_INTERPRET": "1"}), None if args.case or args.fuzz else total, less


def _run(
    args: argparse.Namespace,
    note: Callable[[Result], None],
    log: Callable[[str], None],
    show: Callable[[str, float | None], None],
) -> list[str]:
    """Pass every result to `note` -> messages about what was not checked."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device on this machine")
    _check_options(args, device)
    runnable, missing = backends_of(device)
    refused = [name for name in args.backend or () if name not in runnable]
    interpret = device == "cpu" and "triton" not in runnable and not args.no_interpreter
    interpret = interpret and not dispatch._TRITON_MISSING and (not args.backend or "triton" in args.backend)
    backends = [name for name in args.backend or runnable if name in runnable]
    if not backends and not interpret:
        raise ValueError(f"--backend {', '.join(refused)} does not run here: {'; '.join(missing)}")
    beside, begin = None, time.monotonic()
    try:
        if interpret:
            log("triton in the interpreter, in a second process (about a second per case)")
            beside, total, less = _interpreted(args)
            missing = [m for m in missing if not m.startswith("triton ")]
        if args.case:
            for backend in backends:
                note(check(parse(args.case), backend, device))
        elif args.fuzz:
            number, seconds = 0, min(args.fuzz, args.until - time.time())
            dtypes, names = tuple(args.dtype or DTYPES), tuple(args.op or cases.OPS)
            for result in fuzz(backends, dtypes, device, seconds, args.seed, names) if backends else ():
                note(result)
                number += 1
                show(f"{number} random cases", seconds - (time.monotonic() - begin))
            log(f"{number} random cases from seed {args.seed}")
        else:
            missing += _survey(args, backends, device, note, log, show)
        if beside is not None:
            while beside.is_running:
                time.sleep(0.05)
                if total is not None:
                    left = time_left(beside.done, total, begin)
                    show(f"triton in the interpreter: {beside.done} of {total} cases", left)
            found, _ = beside.results()
            for result in found:
                note(result)
            if found:
                missing.append(f"triton on a GPU: only its arithmetic was checked, in the interpreter{less}")
            else:
                missing.append("triton: no case ended in the interpreter within the time of --fuzz")
    finally:
        if beside is not None:
            beside.stop()
    if device != "cuda":
        missing.append("sync-free and graph: they need a CUDA device")
    return missing


def _report(results: list[Result], missing: list[str], begin: float) -> dict:
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "switches": switches(),
        "failed": sum(bool(result.failures) for result in results),
        "not_checked": missing,
        "results": [asdict(result) for result in results],
    }


def _write(report: dict, path: str) -> None:
    write_whole(Path(path), json.dumps(report, indent=1))


def main(args: argparse.Namespace) -> int:
    progress = Progress()
    log = progress.log
    show = (lambda done, seconds_left: None) if args.quiet else progress.show
    if args.serve:
        checked = lambda job: asdict(check(job.case, job.backend, args.device, job.family))
        serve(checked, args.device, args.case_seconds)
    begin = written = time.monotonic()
    results: list[Result] = []
    path = None if args.json == "-" else args.json

    def note(result: Result) -> None:
        nonlocal written
        results.append(result)
        if path:  # each result is saved however this process ends
            with open(f"{path}.lines", "a" if len(results) > 1 else "w") as file:
                print(json.dumps(asdict(result)), file=file)
        if result.failures:
            log(f"FAILED {result.backend} {result.case}: {result.failures[0]}")
        # an interrupted run leaves its results so far
        if path and time.monotonic() - written > FLUSH:
            _write(_report(results, ["the rest: this run has not ended"], begin), path)
            written = time.monotonic()

    try:
        missing = _run(args, note, log, show)
    except ValueError as error:
        log(f"verify: {error}")
        return 2
    except KeyboardInterrupt:
        failures = sum(bool(result.failures) for result in results)
        log(f"verify: {len(results)} checks had ended, {failures} of them failed")
        raise
    finally:
        progress.clear()
    failed = [result for result in results if result.failures]
    report = _report(results, missing, begin)
    if args.json == "-":
        print(json.dumps(report))
    elif path:
        _write(report, path)
        Path(f"{path}.lines").unlink(missing_ok=True)
    if args.record:
        record(results, args, log)
    if args.json == "-":
        return 1 if failed or not results else 0
    print(table(results))
    print("output, gradient: largest error compared with fp64, in units of torch's error in that dtype")
    for line in missing:
        print(f"not checked: {line}")
    for result in failed:
        print(f"\nFAILED {result.backend}: {'; '.join(result.failures)}\n  {result.command}")
    if not results:
        print("verify: no case fits these arguments, so nothing was checked")
        return 1
    is_cut = any("--budget was spent" in line for line in missing)
    verdict = f"all {len(results)} cases passed"
    if failed:
        verdict = f"{len(failed)} of {len(results)} cases FAILED"
    elif is_cut:
        verdict = f"the {len(results)} cases that ended passed, the others did not run"
    print(f"verify: {verdict} in {report['seconds']} s")
    return 1 if failed or (is_cut and args.record) else 0
