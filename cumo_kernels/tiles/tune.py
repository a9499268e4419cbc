"""python -m cumo_kernels tune: find tile sizes for this GPU and write them to cumo_kernels/tiles/configs/.

Every GEMM of a layer, forward and backward, is timed alone on balanced routing with cold caches. All cores
compile the candidates of candidates.py in order of timing, while compiled ones are timed; with --walk the
search continues from the best of these to its neighbours.
"""

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from cumo_kernels.tiles import hardware, tuning
from cumo_kernels.tiles.candidates import listed
from cumo_kernels.tiles.problems import DTYPES, SHAPES, launcher, layer_problems
from cumo_kernels.tiles.tuning import Config, Entry, Gpu, Problem

IDLE_CYCLES = 1_000_000  # half a millisecond: several times the host time of a launch
# in order of benefit: training sizes first, each shape's smallest last
ORDER = {"clip": (4616, 41544, 577), "llm": (4096, 16, 1, 512, 16384, 64), "mlp": (2304, 18432, 576)}
TINY = Problem("gemm", torch.bfloat16, 64, 64, 64, 2, gathered=True)  # used by a rehearsal


def measure_ms(run: Callable[[], None], repeats: int = 9) -> float:
    """Median of single runs, each after the caches were overwritten.

    The GPU idles before each run until the host has launched it; otherwise the launch would be measured.
    """
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(IDLE_CYCLES)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[repeats // 2]


def measure_on_cpu(run: Callable[[], None]) -> float:
    """Wall-clock time; only for a rehearsal."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def time_ms(launch: Callable[[Config], None], config: Config, device: str = "cuda") -> float:
    """Milliseconds with `config`; inf if it does not compile or fit (the reason is printed)."""
    measure = measure_ms if device == "cuda" else measure_on_cpu
    try:
        return measure(lambda: launch(config))
    except Exception as error:
        print(f"    {config}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return math.inf


def compile_for(gpu: Gpu, problem: Problem, config: Config) -> None:
    """A worker's task: compile the kernel into Triton's cache."""
    from cumo_kernels.tiles.codegen import compiling

    with compiling(gpu):
        launcher(problem, "meta")(config)


def ready(
    pool: Executor, gpu: Gpu, problem: Problem, launch: Callable[[Config], None], configs: Iterable[Config]
) -> None:
    """Compile on all cores, then load; `time_ms` reports what cannot be compiled."""
    wait([pool.submit(compile_for, gpu, problem, config) for config in configs])
    for config in configs:
        with contextlib.suppress(Exception):
            launch(config)
            torch.cuda.synchronize()


def fastest(
    problem: Problem,
    configs: Iterable[Config],
    compiled: Iterable[Future],
    launch: Callable[[Config], None],
    device: str,
) -> Entry:
    """The fastest of `configs`, timed after all are compiled."""
    wait(list(compiled))
    times = {config: time_ms(launch, config, device) for config in configs}
    best = min(times, key=times.get)
    return Entry(problem, replace(best, SPLITS=1), times[best])


def chosen(shapes: Iterable[str], dtype: torch.dtype, has_tma: bool = True) -> list[Problem]:
    """Every GEMM of the layers, once; each shape's first number of tokens first, then the second."""
    counts = {
        shape: [*ORDER[shape], *(t for t in SHAPES[shape][-1] if t not in ORDER[shape])] for shape in shapes
    }
    longest = max(map(len, counts.values()))
    cases = [(shape, counts[shape][i]) for i in range(longest) for shape in counts if i < len(counts[shape])]
    return list(
        dict.fromkeys(p for shape, tokens in cases for p in layer_problems(shape, tokens, dtype, has_tma))
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument(
        "--walk", type=float, metavar="SECONDS", help="search neighbours too, for so many seconds per GEMM"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no GEMM starts")
    cores = min(os.cpu_count() or 1, 16)
    parser.add_argument(
        "--workers", type=int, default=cores, help="number of compiling processes, default %(default)s"
    )
    parser.add_argument("--configs", type=Path, default=tuning.CONFIGS, help="folder of the tile sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for a rehearsal")
    parser.add_argument("--few", action="store_true", help="one tiny GEMM: a rehearsal")


def main(args: argparse.Namespace) -> int:
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("tune: needs a CUDA device, and torch sees none on this machine")
        return 1
    gpu = tuning.gpu_of(torch.device("cuda")) if on_gpu else hardware.INTERPRETER
    problems = [TINY] if args.few else chosen(args.shape or SHAPES, DTYPES[args.dtype], gpu.has_tma)
    card = f"{torch.cuda.get_device_name() if on_gpu else 'a CPU'}, torch {torch.__version__}"
    note = f"measured by python -m cumo_kernels tune on {card}"
    stop, kept, asked = time.monotonic() + args.budget, 0, 0
    with ProcessPoolExecutor(max(args.workers, 1), get_context("spawn")) as pool:
        configs = {problem: list(listed(problem, gpu)) for problem in problems}
        # nothing to compile in the interpreter
        compiled = {
            problem: [pool.submit(compile_for, gpu, problem, c) for c in configs[problem] if on_gpu]
            for problem in problems
        }
        for problem in problems:
            if time.monotonic() > stop:
                break
            asked += 1
            launch = launcher(problem, args.device)
            entry = fastest(problem, configs[problem], compiled[problem], launch, args.device)
            if math.isfinite(entry.ms) and args.walk:
                measure = lambda config, launch=launch: time_ms(launch, config, args.device)
                prepare = lambda c, problem=problem, launch=launch: ready(pool, gpu, problem, launch, c)
                entry = tuning.search(problem, gpu, measure, args.walk, prepare, entry.config)
            if not math.isfinite(entry.ms):
                print(f"{entry.problem}\n    no candidate ran, so nothing is saved")
                continue
            flops = 2 * problem.rows * problem.columns * problem.k
            print(
                f"{entry.problem}\n    {entry.config} {entry.ms:.4f} ms, {flops / entry.ms / 1e9:.0f} TFLOPS"
            )
            # saved after each problem: an interrupted run keeps its results
            path = tuning.save(gpu.name, [entry], note, args.configs)
            kept += 1
        pool.shutdown(cancel_futures=True)
    late = "" if asked == len(problems) else f", {len(problems) - asked} left out: --budget was spent"
    print(f"tune: {kept} of {len(problems)} GEMMs{late}" + (f", written to {path}" if kept else ""))
    return 0 if kept and kept == asked else 1
