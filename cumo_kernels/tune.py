"""python -m cumo_kernels tune: find tile sizes for this GPU and write them to cumo_kernels/configs/.

Every GEMM of a layer, forward and backward, is timed by itself on balanced routing with cold caches, starting
from the shipped choice. Whoever wants to run or compile one GEMM as a Problem says uses `launcher`.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from cumo_kernels import tuning
from cumo_kernels.tuning import Config, Problem

SHAPES = {  # hidden, intermediate, output size, experts, top_k, gated, numbers of tokens
    "clip": (1024, 4096, 1024, 4, 2, False, (577, 4616, 41544)),
    "mlp": (2048, 4096, 4096, 4, 2, False, (576, 2304, 18432)),
    "llm": (4096, 14336, 4096, 8, 2, True, (1, 16, 64, 512, 4096, 16384)),
}
IDLE_CYCLES = 1_000_000  # half a millisecond: several times what the host takes for a launch
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def layer_problems(shape: str, num_tokens: int, dtype: torch.dtype) -> Iterator[Problem]:
    """The six GEMMs of one expert layer: two forward, four backward."""
    hidden, intermediate, output, experts, top_k, gated, _ = SHAPES[shape]
    width = intermediate * (1 + gated)
    rows = tuning.bucket(num_tokens * top_k)
    yield Problem("gemm", dtype, rows, intermediate, hidden, experts, gated, gathered=True)
    yield Problem("gemm", dtype, rows, output, intermediate, experts, can_split=True)
    yield Problem("grad_hidden", dtype, rows, intermediate, output, experts, gathered=True)
    yield Problem("weight_grad", dtype, rows, output, intermediate, experts, gathered=True, can_split=True)
    yield Problem("weight_grad", dtype, rows, width, hidden, experts, gathered=True, can_split=True)
    yield Problem("gemm", dtype, rows, hidden, width, experts, can_split=True)


def launcher(
    problem: Problem, device: str | torch.device, activation: str | None = None, transposed: bool = False
) -> Callable[[Config | None], object]:
    """A function that runs `problem` once with a config (None: the chosen one), on balanced random data.

    On the meta device nothing runs: that is for compiling ahead of time. `transposed` stores the weight with
    its inputs and outputs exchanged, as the input gradient reads it.
    """
    from cumo_kernels.backends.triton.grad_hidden import launch_grad_hidden
    from cumo_kernels.backends.triton.grouped_gemm import launch_gemm
    from cumo_kernels.backends.triton.weight_grad import launch_weight_grad

    rows, n, k, experts = problem.rows, problem.n, problem.k, problem.experts
    draw = lambda *size: torch.randn(size, device=device, dtype=problem.dtype)
    integers = lambda values: values.to(device=device, dtype=torch.int32)
    offsets = integers(torch.arange(experts + 1) * rows // experts)
    # stable within an expert, as a sort by expert leaves it: neighbours in x stay neighbours
    parts = torch.randperm(rows).tensor_split((torch.arange(experts + 1) * rows // experts)[1:-1])
    permutation = integers(torch.cat([part.sort().values for part in parts]))
    if problem.kind == "gemm":
        name = activation or ("swiglu" if problem.gated else None if problem.can_split else "quick_gelu")
        width = n * (1 + problem.gated)
        x, biases = draw(rows, k), None if transposed else draw(experts, width)
        weight = draw(experts, k, width).transpose(1, 2) if transposed else draw(experts, width, k)
        order = permutation if problem.gathered else None
        return lambda config: launch_gemm(
            x, weight, offsets, biases, order, 1, name,
            keep_pre=name is not None, zero_tail=False, config=config,
        )  # fmt: skip
    weights = torch.rand(rows, 1, device=device)
    if problem.kind == "grad_hidden":
        grad, weight, z = draw(rows, k), draw(experts, k, n), draw(rows, n)
        return lambda config: launch_grad_hidden(
            grad, weights, permutation, offsets, weight, z, activation or "quick_gelu",
            need_dz=True, need_weighted=True, need_dots=True, config=config,
        )  # fmt: skip
    grad, x = draw(rows, n), draw(rows, k)
    order = permutation if problem.gathered else None
    # the gradient of down_proj, whose output is the narrower side, gathers the upstream gradient
    gather, row_weights = ("grad", weights) if n < k else ("x", None)
    return lambda config: launch_weight_grad(
        grad, x, offsets, order, 1, True, gather=gather,
        row_weights=row_weights if problem.gathered else None, config=config,
    )  # fmt: skip


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


def ready(launch: Callable[[Config], None], config: Config) -> None:
    """Compile; what cannot be compiled is `time_ms`'s to report."""
    with contextlib.suppress(Exception):
        launch(config)
        torch.cuda.synchronize()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of timing for one GEMM; compiling comes on top"
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
    for problem in problems:
        launch = launcher(problem, "cuda")
        measure = lambda config, launch=launch: time_ms(launch, config)
        entry = tuning.search(
            problem, gpu, measure, args.seconds, lambda config, launch=launch: ready(launch, config)
        )
        if not math.isfinite(entry.ms):
            print(f"{entry.problem}\n    nothing tried ran, so nothing is saved")
            continue
        flops = 2 * problem.rows * problem.n * problem.k * (1 + problem.gated)
        print(f"{entry.problem}\n    {entry.config} {entry.ms:.4f} ms, {flops / entry.ms / 1e9:.0f} TFLOPS")
        # after each problem: a search that is cut short keeps what it found
        path = tuning.save(gpu.name, [entry], f"measured by python -m cumo_kernels tune on {card}")
        kept += 1
    print(f"tune: {kept} of {len(problems)} GEMMs" + (f", written to {path}" if kept else ""))
    return 0 if kept == len(problems) else 1
