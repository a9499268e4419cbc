"""python -m cumo_kernels tune: find tile sizes for this GPU and write them to cumo_kernels/configs/.

Every GEMM of a layer, forward and backward, is timed by itself on balanced routing with cold caches, starting
from the shipped choice. What may be timed next is compiled by all cores first.
"""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from cumo_kernels import tuning
from cumo_kernels.problems import DTYPES, SHAPES, launcher, layer_problems
from cumo_kernels.tuning import Config, Problem

IDLE_CYCLES = 1_000_000  # half a millisecond: several times what the host takes for a launch


def measure_ms(run: Callable[[], None], repeats: int = 20) -> float:
    """Median of single runs, each after the caches were overwritten.

    The GPU idles before each until the host has launched it, which would be measured otherwise.
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


def time_ms(launch: Callable[[Config], None], config: Config) -> float:
    """Milliseconds with `config`; inf, and the reason printed, where it does not compile or fit."""
    try:
        return measure_ms(lambda: launch(config))
    except Exception as error:
        print(f"    {config}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return math.inf


def compile_for_this(problem: Problem, config: Config) -> None:
    """A worker's task: leave the kernel in Triton's cache."""
    from cumo_kernels.codegen import compiling

    with compiling(tuning.gpu_of(torch.device("cuda"))):
        launcher(problem, "meta")(config)


def ready(
    pool: ProcessPoolExecutor, problem: Problem, launch: Callable[[Config], None], configs: Iterable[Config]
) -> None:
    """Compile on all cores, then load; what cannot be compiled is `time_ms`'s to report."""
    wait([pool.submit(compile_for_this, problem, config) for config in configs])
    for config in configs:
        with contextlib.suppress(Exception):
            launch(config)
            torch.cuda.synchronize()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of timing for one GEMM; compiling comes on top"
    )
    cores = min(os.cpu_count() or 1, 16)
    parser.add_argument(
        "--workers", type=int, default=cores, help="processes that compile, default %(default)s"
    )


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device, and torch sees none on this machine")
        return 1
    gpu = tuning.gpu_of(torch.device("cuda"))
    problems = dict.fromkeys(
        problem
        for shape in args.shape or SHAPES
        for num_tokens in SHAPES[shape][-1]
        for problem in layer_problems(shape, num_tokens, DTYPES[args.dtype])
    )
    card = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    kept = 0
    with ProcessPoolExecutor(max(args.workers, 1), get_context("spawn")) as pool:
        for problem in problems:
            launch = launcher(problem, "cuda")
            measure = lambda config, launch=launch: time_ms(launch, config)
            prepare = lambda configs, problem=problem, launch=launch: ready(pool, problem, launch, configs)
            entry = tuning.search(problem, gpu, measure, args.seconds, prepare)
            if not math.isfinite(entry.ms):
                print(f"{entry.problem}\n    nothing tried ran, so nothing is saved")
                continue
            flops = 2 * problem.rows * problem.columns * problem.k
            print(
                f"{entry.problem}\n    {entry.config} {entry.ms:.4f} ms, {flops / entry.ms / 1e9:.0f} TFLOPS"
            )
            # after each problem: a search that is cut short keeps what it found
            path = tuning.save(gpu.name, [entry], f"measured by python -m cumo_kernels tune on {card}")
            kept += 1
    print(f"tune: {kept} of {len(problems)} GEMMs" + (f", written to {path}" if kept else ""))
    return 0 if kept == len(problems) else 1
