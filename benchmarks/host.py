"""python -m benchmarks.host: the host's work for one call of a layer, up to the driver, without a GPU.

A stub driver that runs nothing (stub_driver.c) replaces libcuda.so.1. Everything above it is real: checks,
dispatch, autograd, tile choice, allocation (with the CPU's allocator), Triton's launcher. Reports the lower
quartile of one thread's processor time. The driver's own work is not included.

Gate: every cached launch passes the same arguments to a kernel as Triton's own first launch.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# one folder for all processes: Triton's key of a library linked with the driver has the driver's folder
STUB = Path(__file__).parents[1] / "build" / "stub-driver"
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 256, 512, 4, 2


def load_stub() -> ctypes.CDLL:
    """Load the stub under the name that Triton uses for the driver."""
    STUB.mkdir(parents=True, exist_ok=True)
    library, part = STUB / "libcuda.so.1", STUB / f"{os.getpid()}.so"
    source = Path(__file__).with_name("stub_driver.c")
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", part, source]
    subprocess.run(command, check=True)
    part.replace(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(STUB)
    stub = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = ctypes.c_long
    return stub


class Notes(list):
    """A list of launches, recorded while `on`."""

    on = False


def use_stub() -> Notes:
    """Make Triton launch for an H100 on CPU tensors, and record the launches."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    notes = Notes()

    class Launcher(nvidia.CudaLauncher):
        def __call__(self, *args):
            if notes.on:
                # grid; warps, clusters and shared memory; the kernel's arguments
                notes.append((args[:3], args[5], *map(_value, args[9:])))
            super().__call__(*args)

    class Driver(nvidia.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = nvidia.CudaUtils(), Launcher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    return notes


def _value(arg) -> object:
    """What a kernel sees of an argument, except a tensor's address."""
    if isinstance(arg, Tensor):
        return tuple(arg.shape), arg.dtype
    if hasattr(arg, "block_shape"):
        return tuple(arg.base.shape), tuple(arg.shape), tuple(arg.strides), tuple(arg.block_shape)
    return arg


def make_calls(gated: bool) -> dict[str, Callable[[], object]]:
    """Calls by name; the layer is router and experts, with biases if not gated."""
    from cumo_kernels import dispatch, expert_mlp, route, testing
    from cumo_kernels.ops import checks, routing
    from cumo_kernels.tiles import hardware

    hardware._assumed = hardware.find("nvidia_h100")
    dispatch.BACKENDS = (dispatch.Backend("triton", lambda *_: None),)
    # the outputs are garbage here; on a GPU no code reads them on the host
    checks.values_at_hand = routing.values_at_hand = lambda tensor: False

    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator).bfloat16().requires_grad_()
    x, gate = draw(TOKENS, HIDDEN), draw(EXPERTS, HIDDEN)
    up, down = draw(EXPERTS, INTERMEDIATE * (1 + gated), HIDDEN), draw(EXPERTS, HIDDEN, INTERMEDIATE)
    biases = () if gated else (draw(EXPERTS, INTERMEDIATE), draw(EXPERTS, HIDDEN))
    leaves, grad = (x, gate, up, down, *biases), torch.randn(TOKENS, HIDDEN).bfloat16()
    plan, name = testing.make_routing("uniform", TOKENS, EXPERTS, TOP_K), "swiglu" if gated else "quick_gelu"
    experts = lambda plan: expert_mlp(x, plan, up, down, *biases, activation=name)
    layer = lambda: experts(route(x, TOP_K, gate))

    def inference(call):
        with torch.no_grad():
            return call()

    return {
        "route": lambda: inference(lambda: route(x, TOP_K, gate)),
        "experts": lambda: inference(lambda: experts(plan)),
        "layer": lambda: inference(layer),
        "layer, graph kept": layer,
        "layer, forward and backward": lambda: torch.autograd.grad(layer(), leaves, grad),
    }


def check(call: Callable[[], object], notes: Notes) -> None:
    """Check that the second call's launches equal the first's, which Triton bound and compiled."""
    rounds = []
    for _ in range(2):
        notes.clear()
        notes.on = True
        call()
        notes.on = False
        rounds.append(list(notes))
    first, second = rounds
    if not first or first != second:
        raise SystemExit(f"cached launches differ from Triton's own:\n{first}\n{second}")


def measure(call: Callable[[], object], repeats: int) -> float:
    """Lower quartile of the thread's processor time, in us."""
    times = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        call()
        times.append(time.thread_time_ns() - start)
    return statistics.quantiles(times, n=4)[0] / 1e3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--repeats", type=int, default=500)
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        parser.error("this machine has a GPU: python -m benchmarks.cases.bench_overhead includes the driver")
    torch.set_num_threads(1)
    stub, notes = load_stub(), use_stub()
    print("| call | experts | launches | us |\n|---|---|---|---|")
    for gated in (False, True):
        for name, call in make_calls(gated).items():
            check(call, notes)
            before = stub.stub_launches()
            call()
            launches = stub.stub_launches() - before
            kind = "gated" if gated else "with biases"
            print(f"| {name} | {kind} | {launches} | {measure(call, args.repeats):.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
