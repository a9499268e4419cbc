"""Time of each kernel of an expert layer, the host's time per call, and the machine's two ceilings.

    python -m benchmarks.gpu.kernels --device cuda --lines FILE

Writes one JSON line each, as soon as it is known: {"kind": "ceilings" | "kernels", ...}. A separate process
with a time limit runs each layer and backend, so a failure loses only its line. Kernel times come from
torch's profiler with a cold L2. They explain the times of the layers, which are gated and in the CSV files;
they do not replace them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.cases.bench_experts import setup
from benchmarks.cases.shapes import SHAPES, tiny
from benchmarks.steps import steps_of
from cumo_kernels import routing_from_topk, use_backend
from cumo_kernels.testing import make_routing

LAYERS = ("clip-batch4", "mixtral-decode1", "mixtral-train", "clip-1-crop")
REPEATS = {"cuda": 3, "cpu": 1}
CALLS = {"cuda": 12, "cpu": 2}
LIMIT = 40.0  # time limit of one layer and backend, in seconds


def ceilings(device: str) -> dict:
    """TFLOP/s of a large bf16 product, GB/s of a large copy (reads and writes)."""
    size, count = (8192, 1 << 30) if device == "cuda" else (64, 1 << 12)
    clock = timing.clock_of(device)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    steps = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = timing.interleave(steps, clock, 0.5)
    return {
        "kind": "ceilings",
        "tflops": round(2 * size**3 / times["product"].ms_p50 / 1e9, 1),
        "gb_per_s": round(2 * count / times["copy"].ms_p50 / 1e6, 1),
    }


def profiled(step: Callable[[], object], device: str) -> dict[str, list[float]]:
    """Kernel -> microseconds and launches of one `step`, the longest first; on a CPU operators."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    step()
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if on_gpu else None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(REPEATS[device]):
            if flush is not None:
                flush.zero_()
            step()
        if on_gpu:
            torch.cuda.synchronize()
    rows = {}
    for event in found.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        mine = event.device_type.name == "CUDA" if on_gpu else micros > 0
        if mine and micros and "FillFunctor<signed char>" not in event.key:  # that is the L2 flush
            rows[event.key[:100]] = [round(number / REPEATS[device], 2) for number in (micros, event.count)]
    return dict(sorted(rows.items(), key=lambda row: -row[1][0])[:14])


def host_us(step: Callable[[], object], device: str) -> float:
    """Median of the host's time for one call; the GPU is idle before it."""
    times = []
    for _ in range(CALLS[device]):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
        if device == "cuda":
            torch.cuda.synchronize()
    return round(sorted(times)[len(times) // 2] * 1e6, 1)


def layer(name: str, backend: str, device: str) -> dict:
    """Kernels and host time of the layer including its sort by expert, forward and with backward."""
    shape = SHAPES[name] if device == "cuda" else tiny(SHAPES[name])
    workload = setup(shape, torch.bfloat16, device, "uniform")
    routing = make_routing("uniform", shape.T, shape.E, shape.K, device)
    weights, indices = routing.topk_weights, routing.topk_indices

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        with use_backend(backend):
            routing_from_topk(weights, indices, shape.E)
            return workload.run(*inputs)

    steps = steps_of(run, workload.inputs, ("forward", "both"))
    row = {"kind": "kernels", "layer": name, "backend": backend, "host_us": {}, "us": {}}
    for mode, step in steps.items():
        row["us"][mode] = profiled(step, device)
        row["host_us"][mode] = host_us(step, device)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # ceilings, or a layer and a backend
    args = parser.parse_args(argv)
    if args.one:
        row = ceilings(args.device) if len(args.one) == 1 else layer(*args.one, args.device)
        print(json.dumps(row), flush=True)
        os._exit(0)  # no clean-up: the device may be in any state
    layers = LAYERS if args.device == "cuda" else ("mixtral-decode1",)
    jobs = [("ceilings",), *((name, backend) for name in layers for backend in ("triton", "cuda"))]
    broken = 0
    with args.lines.open("a", buffering=1) as file:
        for job in jobs:
            print(f"kernels: {' '.join(job)}", flush=True)
            command = (sys.executable, "-m", "benchmarks.gpu.kernels", "--device", args.device,
                       "--lines", str(args.lines), "--one", *job)  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
                lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
                words = f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
            except subprocess.TimeoutExpired:
                lines, words = [], f"killed after {LIMIT:.0f} s"
            row = json.loads(lines[-1]) if lines else {"kind": "broken", "job": " ".join(job), "why": words}
            broken += not lines
            file.write(json.dumps(row) + "\n")
    print(f"kernels: {len(jobs) - broken} of {len(jobs)} done")
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
