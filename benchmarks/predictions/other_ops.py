"""Predictions from compiled code and data sheet for the ops around the GEMMs: routing, permute, activation.

These ops are memory bound, so the prediction is their bytes at the data sheet's bandwidth, each operand moved
once. The other columns show what limits the real bandwidth: programs, waves, registers, blocks per SM. The
launch itself, a few microseconds on any GPU, is not included.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from triton.runtime.jit import JITFunction

from benchmarks.cases.shapes import Shape
from cumo_kernels.tiles import codegen, problems
from cumo_kernels.tiles.hardware import KIB, Gpu

ALIGNED = {  # name of codegen.calls -> (our name, elements moved, bytes moved besides)
    "route from x": ("route", lambda s: s.T * s.H + s.E * s.H, lambda s: 8 * s.slots),
    "route backward": ("grad of route", lambda s: 2 * s.T * s.H + 2 * s.E * s.H, lambda s: 12 * s.slots),
    "sort": ("sort", lambda s: 0, lambda s: 12 * s.slots),
    "permute": ("permute", lambda s: s.T * s.H + s.slots * s.H, lambda s: 4 * s.slots),
    "combine": ("combine", lambda s: s.slots * s.O + s.T * s.O, lambda s: 8 * s.slots),
    "combine, unit": ("grad of permute", lambda s: s.slots * s.H + s.T * s.H, lambda s: 4 * s.slots),
    "combine backward": (
        "grad of combine",
        lambda s: s.T * s.O + 2 * s.slots * s.O,
        lambda s: 12 * s.slots,
    ),
    "activate": ("activate", lambda s: s.slots * (s.width + s.I), lambda s: 0),
    "activate backward": ("grad of activate", lambda s: s.slots * (2 * s.width + s.I), lambda s: 0),
}


@contextmanager
def grids() -> Iterator[list[int]]:
    """Inside `codegen.compiling`: the number of programs of each launch, in order."""
    found: list[int] = []
    run = JITFunction.run

    def recording(self, *args, grid, **kwargs):
        size = grid({**dict(zip(self.arg_names, args, strict=False)), **kwargs}) if callable(grid) else grid
        found.append(math.prod(size))
        return run(self, *args, grid=grid, **kwargs)

    JITFunction.run = recording
    try:
        yield found
    finally:
        JITFunction.run = run


def survey(
    gpu: Gpu,
    shapes: Iterable[Shape],
    dtype: str,
    family: Callable[[Shape], str],
    blocks_per_sm: Callable[[Gpu, int, int, int], int],
    mix: Callable[[dict[str, int]], str],
    log: Callable[[str], None],
) -> Iterator[dict]:
    """The columns of a Prediction of every op of every layer; of an op of several kernels, the widest's."""
    kind = problems.DTYPES[dtype]
    with codegen.compiling(gpu) as launched, grids() as programs:
        for shape in shapes:
            for name, call in codegen.calls(family(shape), shape.T, kind):
                if name not in ALIGNED:
                    continue
                launched.clear()
                programs.clear()
                call()
                op, elements, more = ALIGNED[name]
                report, tiles = max(
                    zip((report for report, _ in launched), programs, strict=True), key=lambda pair: pair[1]
                )
                resident = blocks_per_sm(gpu, report.registers, report.shared, report.num_warps)
                waves = tiles / (gpu.sms * resident)
                floor = (elements(shape) * kind.itemsize + more(shape)) / gpu.gb_per_s / 1e6
                log(f"  {shape.name} {op}: {floor:.4f} ms")
                yield {
                    "gpu": gpu.name, "shape": shape.name, "tokens": shape.T, "dtype": dtype, "gemm": op,
                    "size": f"{len(launched)} kernels, {report.kernel}", "tile":
                    f"{report.tile} w{report.num_warps}".strip(), "registers": report.registers,
                    "stack": max(r.stack for r, _ in launched),
                    "shared_kib": math.ceil(report.shared / KIB), "blocks_per_sm": resident, "tiles": tiles,
                    "waves": waves, "tile_use": 1.0, "wave_use": waves / math.ceil(waves), "ms": floor,
                    "floor_ms": floor, "share_of_floor": 1.0, "mix": mix(report.opcodes),
                }  # fmt: skip
