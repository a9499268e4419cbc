"""The table of known GPUs: one row each, with data-sheet values and the sizes that tile choices depend on.

Peaks are dense (no sparsity) at boost clock, accumulating in fp32. `gpu_of` returns the row of a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    name: str  # also the name of its file in configs/
    match: str  # lower-case part of the name that the driver reports
    capability: int  # 90 is compute capability 9.0
    sms: int
    shared_memory: int  # bytes available to one block
    tflops_16: float | None = None  # bf16 and fp16
    tflops_tf32: float | None = None
    tflops_fp32: float | None = None
    gb_per_s: float | None = None
    tiles_of: str | None = None  # the GPU with the same multiprocessors whose tile sizes are used

    @property
    def has_tma(self) -> bool:
        """Whether operands are loaded by the copy engine that reads tensor descriptors.

        Workstation Blackwell has one too, but with Triton 3.6's descriptors every GEMM there spills in its
        main loop; with cp.async none does (codegen.py).
        """
        return 90 <= self.capability < 120

    @property
    def has_warpgroup_mma(self) -> bool:
        """Tensor cores that read both operands from shared memory (Hopper, data-centre Blackwell)."""
        return self.capability in (90, 100, 103)


# the first match wins, so a longer name comes before a shorter one
GPUS = (
    Gpu("nvidia_gh200", "gh200", 90, 132, 227 * KIB, gb_per_s=4000, tiles_of="nvidia_h100"),  # 96 GB of HBM3
    Gpu("nvidia_h200", "h200", 90, 132, 227 * KIB, 989, 494, 67, 4800, tiles_of="nvidia_h100"),
    Gpu("nvidia_h100_pcie", "h100 pcie", 90, 114, 227 * KIB, 756, 378, 51, 2000, tiles_of="nvidia_h100"),
    Gpu("nvidia_h100", "h100", 90, 132, 227 * KIB, 989, 494, 67, 3350),
    Gpu("nvidia_b200", "b200", 100, 148, 227 * KIB, 2250, 1100, 75, 8000),
    Gpu("nvidia_a100", "a100", 80, 108, 163 * KIB, 312, 156, 19.5, 2039),
    Gpu("nvidia_rtx_pro_6000", "rtx pro 6000", 120, 188, 99 * KIB, 252, 126, 126, 1792),
    Gpu(
        "nvidia_rtx_5090", "rtx 5090", 120, 170, 99 * KIB, 210, 105, 105, 1792, tiles_of="nvidia_rtx_pro_6000"
    ),
    Gpu("nvidia_l40s", "l40s", 89, 142, 99 * KIB, 362, 183, 91.6, 864),
    Gpu("nvidia_rtx_4090", "rtx 4090", 89, 128, 99 * KIB, 165, 83, 82.6, 1008, tiles_of="nvidia_l40s"),
)

# CPU tensors under Triton's interpreter: few programs, so that each runs several tiles, and descriptors
INTERPRETER = Gpu("interpreter", "", 90, 2, 227 * KIB)

_assumed: Gpu = INTERPRETER


def find(name: str) -> Gpu:
    """The row called `name`.

    Raises:
        ValueError: there is no such row.
    """
    for gpu in GPUS:
        if gpu.name == name:
            return gpu
    raise ValueError(f"name must be one of {[gpu.name for gpu in GPUS]}, got {name!r}")


def match(reported: str, capability: int, sms: int, shared_memory: int) -> Gpu:
    """The row whose name is part of `reported`, with this card's own sizes; an unknown card has no peaks."""
    for gpu in GPUS:
        if gpu.match in reported.lower() and gpu.capability == capability:
            return replace(gpu, sms=sms, shared_memory=shared_memory)
    name = "".join(c if c.isalnum() else "_" for c in reported.lower())
    return Gpu(name, reported.lower(), capability, sms, shared_memory)


@cache
def _cuda(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return match(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def gpu_of(device: torch.device) -> Gpu:
    """The row of `device`; for CPU or meta tensors the interpreter's, or that of `assume`."""
    if device.type != "cuda":
        return _assumed
    return _cuda(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def assume(gpu: Gpu) -> Iterator[None]:
    """Launchers treat CPU and meta tensors as on `gpu`: for ahead-of-time compilation and tests."""
    global _assumed
    previous = _assumed
    _assumed = gpu
    try:
        yield
    finally:
        _assumed = previous
