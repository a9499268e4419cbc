"""Compiles every Triton kernel for given GPUs, which need not be present, and inspects the machine code.

    python -m cumo_kernels.tiles.codegen --write benchmarks/results/codegen.md
    python -m cumo_kernels.tiles.codegen --gpu nvidia_h100 --shape clip --dtype bf16 --kernel route
    python -m cumo_kernels.tiles.codegen --gpu this --workers 16    fills Triton's cache on a GPU's machine

The launchers run on meta tensors with a stub driver, and each launch is compiled instead of run, with the
same specialisation, tile sizes and options as on the GPU. Registers, stack and SASS come from cuobjdump.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cumo_kernels.activations import get_activation
from cumo_kernels.tiles import hardware, packed_layers, problems
from cumo_kernels.tiles.hardware import Gpu

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TARGETS = ("nvidia_a100", "nvidia_h100", "nvidia_b200", "nvidia_rtx_pro_6000")  # sm_80, 90, 100, 120
# CuMo's layers, and those that no file in configs/ has
MANY = {E: (1024, 512, 1024, E, K, True, (4096,)) for E, K in ((256, 8), (384, 8), (512, 10), (1024, 32))}
ROUTERS = {f"experts-{E}": MANY[E] for E in (384, 512, 1024)}
GATES = ["relu2", "reglu", "swiglu_clamped(limit=10.0)", "clamped_swiglu(limit=10.0)"]
GATES += [f"swiglu_oai(alpha=1.702,limit=7.0{order})" for order in ("", ",interleaved")]
PARTS = dict.fromkeys(ROUTERS, ("route", "sort"))  # the calls of a layer that is not compiled as a whole
PARTS |= dict.fromkeys(GATES, ("activate", "expert_mlp, preact", "expert_mlp backward, preact"))
SHAPES = {**problems.SHAPES, "many": MANY[256], **ROUTERS, **packed_layers.SHAPES}
SHAPES |= {name: (1024, 512, 1024, 8, 2, get_activation(name).is_gated, (4096,)) for name in GATES}
ACTIVATION = {"clip": "quick_gelu", "mlp": "gelu", "llm": "swiglu"} | {name: name for name in GATES}
DTYPES = {**problems.DTYPES, "tf32": torch.float32}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "OMMA")
ASYNC_COPY = ("LDGSTS", "UTMALDG", "UBLKCP")
SPILL = ("LDL", "STL")
PARKED = 64  # bytes of stack that a program may use once per tile: about 0.1 % of the tile's instructions
# these only move whole rows: they must do so 16 bytes at a time
STREAMING = ("_permute_kernel", "_combine_kernel", "_combine_backward_kernel", "_activate_kernel")


HEAD = """# Machine code of every Triton kernel

Made by `python -m cumo_kernels.tiles.codegen` with Triton {} and torch {}: compiled, not run, so nothing
here is a measurement. {} kernels, {} with a problem. Requirements: no local loads or stores in a loop over
operands, and at most 64 bytes of stack around it, none in kernels without such a loop; tensor cores in
every 16-bit dot; asynchronous copies in every loop over operands; 16-byte accesses in kernels that only move
rows; no more shared memory than the chip has. `stack` is bytes per thread and local accesses.

"""


@dataclass
class Report:
    """One compiled kernel; `cases` names the calls that launch it."""

    kernel: str
    gpu: Gpu
    dtype: str
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]  # number of occurrences in the SASS
    wide: int  # 16-byte accesses of global memory
    has_dot: bool
    has_loop_dot: bool  # deeper than the function's top level
    loop_spills: int = 0  # local accesses inside the loops that multiply
    loop_dots: int = 0  # tensor core instructions there
    loop_instructions: int = 0  # all instructions there
    gathers: bool = False  # an operand's rows are gathered by a permutation
    failure: str | None = None  # the compiler's error, if it failed
    cases: list[str] = field(default_factory=list)

    def count(self, names: Iterable[str]) -> int:
        return sum(self.opcodes.get(name, 0) for name in names)

    @property
    def problems(self) -> list[str]:
        """The requirements that this kernel violates, as text."""
        if self.failure:
            return [f"does not compile: {self.failure}"]
        found = []
        allowed = PARKED if self.has_loop_dot else 0
        if self.stack > allowed or self.loop_spills or (self.count(SPILL) and not self.has_loop_dot):
            found.append(
                f"spills: {self.stack} bytes of stack, {self.count(SPILL)} local accesses, "
                f"{self.loop_spills} in a loop over operands"
            )
        if self.shared > self.gpu.shared_memory:
            found.append(
                f"{self.shared} bytes of shared memory, {self.gpu.name} has {self.gpu.shared_memory}"
            )
        if self.has_dot and self.dtype != "fp32" and not self.count(TENSOR_CORE):
            found.append("a dot without tensor cores")
        if self.has_loop_dot and self.num_stages > 1 and not self.count(ASYNC_COPY):
            found.append("a loop over operands without asynchronous copies")
        # the copy engine cannot gather rows: its instructions only show that the other operand is copied
        elif self.has_loop_dot and self.num_stages > 1 and self.gathers and not self.count(("LDGSTS",)):
            found.append("gathered rows without asynchronous copies")
        if self.kernel in STREAMING and not self.wide:
            found.append("no 16-byte access")
        return found

    @property
    def tile(self) -> str:
        return " ".join(
            f"{name.removeprefix('BLOCK_').lower()}{value}"
            for name, value in self.constants.items()
            if value is not None and (name.startswith("BLOCK_") or name == "SPLITS")
        )


class _Driver:
    """A stub driver from which Triton chooses a target; kernels are cached per `device`."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.capability, 32)

    def get_current_device(self) -> str:
        return self.gpu.name

    def get_current_stream(self, device: str) -> int:
        return 0


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """-> registers, stack bytes, SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, sass


def _count_in_loops(sass: str) -> tuple[int, int, int]:
    """-> local accesses, tensor core instructions and all instructions inside the innermost loops that
    multiply: on tensor cores, or in fp32 without any.

    A loop ends with a conditional branch back. An unconditional branch back closes the loop over tiles,
    returns from an out-of-line barrier wait, or, apart from all loops that multiply, closes one of them.
    """
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z0-9_]+)(.*)", sass, re.M)
    code = [(int(address, 16), bool(predicate), name, rest) for address, predicate, name, rest in lines]
    back = [
        (int(target[1], 16), address, conditional or " P" in rest or "!P" in rest)
        for address, conditional, name, rest in code
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", rest)) and int(target[1], 16) < address
    ]
    inside = lambda loop, names: sum(
        name in names and loop[0] <= address <= loop[1] for address, _, name, _ in code
    )
    cores = TENSOR_CORE if any(name in TENSOR_CORE for _, _, name, _ in code) else ("FFMA", "FFMA2")
    multiply = [loop for loop in back if inside(loop, cores)]
    sure = [loop for loop in multiply if loop[2]]
    apart = lambda loop: all(loop[1] < other[0] or other[1] < loop[0] for other in sure)
    loops = [loop for loop in multiply if loop[2] or apart(loop)]
    innermost = [
        loop
        for loop in loops
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in loops)
    ]
    every = {name for _, _, name, _ in code}
    return tuple(sum(inside(loop, names) for loop in innermost) for names in (SPILL, TENSOR_CORE, every))


def _dtype(types: set[str], ttir: str) -> str:
    if "bf16" in types or "f16" in types:
        return "bf16" if "bf16" in types else "fp16"
    return "tf32" if re.search(r"tt\.dot .*inputPrecision = tf32", ttir) else "fp32"


@contextmanager
def _switch(dtype: str) -> Iterator[None]:
    """Set torch's switch for tf32, which decides how an fp32 dot is compiled."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _report(kernel: JITFunction, compiled, gpu: Gpu, constants: dict[str, object]) -> Report:
    registers, stack, sass = _disassemble(compiled.asm["cubin"])
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)((?:\.[\w:]+)*)", sass, re.M)
    opcodes: dict[str, int] = {}
    for name, _ in mnemonics:
        opcodes[name] = opcodes.get(name, 0) + 1
    ttir = compiled.asm["ttir"]
    types = {name for pair in re.findall(r"!tt\.ptr<(\w+)>|tensordesc<[^>]*x(\w+)>", ttir) for name in pair}
    indents = [len(space) for space in re.findall(r"^( *)\S.* = tt\.dot", ttir, re.M)]
    return Report(
        kernel.fn.__name__,
        gpu,
        _dtype(types, ttir),
        constants,
        compiled.metadata.num_warps,
        compiled.metadata.num_stages,
        registers,
        stack,
        compiled.metadata.shared,
        opcodes,
        sum(name in ("LDG", "STG", "LDGSTS") and ".128" in rest for name, rest in mnemonics),
        bool(indents),
        any(indent > 4 for indent in indents),
        *_count_in_loops(sass),
    )


def bare(kernel: JITFunction, compiled, gpu: Gpu, constants: dict[str, object]) -> Report:
    """A report with only the name, for `compiling` if only the cache is needed."""
    numbers = dict.fromkeys(("num_warps", "num_stages", "registers", "stack", "shared", "wide"), 0)
    return Report(
        kernel.fn.__name__, gpu, "-", constants, **numbers, opcodes={}, has_dot=False, has_loop_dot=False
    )


@contextmanager
def compiling(
    gpu: Gpu, wanted: Callable[[str], bool] = bool, describe: Callable[..., Report] = _report
) -> Iterator[list[tuple[Report, bool]]]:
    """Inside, launches compile for `gpu` instead of running; each appends its report, and whether it is new.

    Only kernels whose name `wanted` accepts are compiled. `describe` makes the report: the default
    disassembles, which takes nearly as long as compiling; `bare` does not.
    """
    launched: list[tuple[Report, bool]] = []
    known: dict[str, Report] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if not wanted(self.fn.__name__):
            return
        constants = {name: value for name, value in kwargs.items() if name.isupper()}
        try:
            compiled, failure = run(self, *args, grid=grid, warmup=True, **kwargs), None
            if compiled is None:  # a hook of Triton rejected it
                return
            if describe is _report and "ttir" not in compiled.asm:  # unpacked by benchmarks.gpu.artifacts
                self.device_caches.pop(gpu.name)
                with triton.knobs.compilation.scope():
                    triton.knobs.compilation.always_compile = True
                    compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            compiled, failure = None, str(error).strip().splitlines() or [repr(error)]
        key = f"{self.fn.__name__} {constants}" if failure else compiled.hash
        is_new = key not in known
        if is_new and failure:
            known[key] = bare(self, None, gpu, constants)
            known[key].failure = failure[-1]
        elif is_new:
            known[key] = describe(self, compiled, gpu, constants)
            known[key].gathers = kwargs.get("permutation_ptr") is not None and not kwargs.get("SORTED")
        launched.append((known[key], is_new))

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 disables compilation: unset it")
    JITFunction.run = compile_only
    driver.set_active(_Driver(gpu))
    try:
        with hardware.assume(gpu):
            yield launched
    finally:
        # None: the next launch looks for the machine's own driver, which may not exist
        driver.set_active(None)
        JITFunction.run = run


def calls(shape: str, num_tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every op of one layer, forward and backward, on meta tensors: name and call."""
    if shape in packed_layers.SHAPES:
        yield from packed_layers.calls(shape, num_tokens, dtype)
        return
    from cumo_kernels.backends.triton import activation, experts, grouped_gemm, permutation, routing, scores

    H, I, O, E, K, gated, _ = SHAPES[shape]
    T, S, W, name = num_tokens, num_tokens * K, I * (1 + gated), ACTIVATION.get(shape, "geglu")
    meta = lambda *size, dtype=dtype: torch.empty(size, dtype=dtype, device="meta")
    ints = lambda *size: meta(*size, dtype=torch.int32)
    wide = lambda *size: meta(*size, dtype=torch.float32)
    x, gate, logits = meta(T, H), meta(E, H), meta(T, E)
    weights, indices, perm, inverse, offsets = wide(T, K), ints(T, K), ints(S), ints(S), ints(E + 1)
    up, down = meta(E, W, H), meta(E, O, I)
    up_bias, down_bias = (None, None) if gated else (meta(E, W), meta(E, O))
    grads = wide(T, K), wide(1, E), wide(1)

    yield "route from x", lambda: routing.route(x, gate, None, 1, K, True)
    yield "route, ragged", lambda: routing.route(x, gate, ints(10), 9, K, True)
    yield "route from logits", lambda: routing.route(logits, None, None, 1, K, True)
    yield "route backward", lambda: routing.route_backward(*grads, x, gate, indices, None, True, True, True)
    yield (
        "route backward, frozen gate",
        lambda: routing.route_backward(*grads, x, gate, indices, None, True, True, False),
    )
    yield (
        "route backward, logits",
        lambda: routing.route_backward(*grads, logits, None, indices, None, True, True, False),
    )
    how = (wide(E), None, 1, K, True, f"sigmoid 2 {1 if 2 * K <= E else 2} top2 2.5")
    yield "route by scores", lambda: scores.scored_route(logits, None, *how)
    given = (None, None, 1, K, True, "softmax 1 1 max 1.0", indices)
    yield "route, given choice", lambda: scores.scored_route(x, gate, *given)
    yield (
        "route by scores, backward",
        lambda: scores.scored_route_backward(*grads, logits, None, indices, None, True, True, False, how[-1]),
    )
    yield "sort", lambda: routing.sort_by_expert(indices, E)
    yield "permute", lambda: permutation.permute(x, perm, inverse, K)
    yield "combine", lambda: permutation.combine(meta(S, O), weights, inverse, K)
    yield "combine, unit", lambda: permutation.combine(meta(S, H), None, inverse, K)
    yield (
        "combine backward",
        lambda: permutation.combine_backward(meta(T, O), meta(S, O), weights, perm, inverse),
    )
    yield "activate", lambda: activation.activate(meta(S, W), name)
    yield "activate backward", lambda: activation.activate_backward(meta(S, I), meta(S, W), name)
    yield (
        "grouped_gemm",
        lambda: grouped_gemm.grouped_gemm(x, up, offsets, up_bias, perm, inverse, K, name),
    )
    yield (
        "grouped_gemm, transposed",
        lambda: grouped_gemm.grouped_gemm(meta(S, W), up.transpose(1, 2), offsets, None, None, None, K, None),
    )
    yield (
        "grouped_gemm_weight_grad",
        lambda: grouped_gemm.grouped_gemm_weight_grad(meta(S, W), x, offsets, perm, inverse, K, not gated),
    )
    layer = (x, weights, perm, inverse, offsets, up, down, up_bias, down_bias)
    for memory in ("none", "x", "preact", "all"):
        yield f"expert_mlp, {memory}", lambda memory=memory: experts.expert_mlp(*layer, name, memory)
        if memory != "none":
            z = meta(S, W) if memory in ("preact", "all") else meta(0)
            a = meta(S, I) if memory == "all" else meta(0)
            yield (
                f"expert_mlp backward, {memory}",
                lambda z=z, a=a, memory=memory: experts.expert_mlp_backward(
                    meta(T, O), *layer, z, a, name, memory, True, True, True, not gated, True, not gated
                ),
            )


def _tokens(shape: str, dtype: str) -> Iterable[int]:
    """All sizes in configs/; fp16 and tf32 use tiles of other dtypes, so one size shows that they compile.

    Of the layers with packed weights one has all dtypes, since dequantising is the same in each format.
    """
    known = SHAPES[shape][6]
    if shape in PARTS:
        return known if dtype == "bf16" or (shape in ROUTERS and dtype == "fp32") else ()
    if shape in packed_layers.SHAPES and dtype != "bf16":
        return known[-1:] if shape == packed_layers.EVERY_DTYPE else ()
    return known[:2][-1:] if dtype in ("fp16", "tf32") else known


def survey(
    gpu: Gpu,
    shapes: Iterable[str],
    dtypes: Iterable[str],
    tokens: Callable[[str, str], Iterable[int]] = _tokens,
    wanted: Callable[[str], bool] = bool,
    describe: Callable[..., Report] = _report,
) -> list[Report]:
    """Every kernel that layers of these shapes launch on `gpu`, each compiled once.

    Args:
        gpu: the GPU to compile for.
        shapes: names of layers in problems.py.
        dtypes: names of dtypes.
        tokens: (shape, dtype) -> the numbers of tokens.
        wanted: whether to compile the kernel of this name.
        describe: as for `compiling`.
    """
    found: list[Report] = []
    with compiling(gpu, wanted, describe) as launched:
        for shape in shapes:
            for dtype in dtypes:
                for num_tokens in tokens(shape, dtype):
                    for name, call in calls(shape, num_tokens, DTYPES[dtype]):
                        if not name.startswith(PARTS.get(shape, "")):
                            continue
                        launched.clear()
                        with _switch(dtype):
                            call()
                        for report, is_new in launched:
                            report.cases.append(f"{shape} T={num_tokens} {dtype}: {name}")
                            if is_new:
                                found.append(report)
                                print(f"{gpu.name} {report.cases[0]}: {report.kernel}", file=sys.stderr)
    return found


def gpu_named(name: str) -> Gpu:
    return hardware.gpu_of(torch.device("cuda")) if name == "this" else hardware.find(name)


def _fill(gpu: str, shape: str, dtype: str, num_tokens: int, kernel: str) -> tuple[int, int]:
    """One worker's share of `fill_cache` -> number of kernels, and how many of them failed to compile."""
    wanted = lambda name: kernel in name
    reports = survey(gpu_named(gpu), [shape], [dtype], lambda *_: (num_tokens,), wanted, bare)
    return len(reports), sum(report.failure is not None for report in reports)


def fill_cache(
    gpus: Iterable[str], shapes: Iterable[str], dtypes: Iterable[str], kernel: str, workers: int
) -> int:
    """Compile in `workers` processes, which fill Triton's cache -> number of kernels that failed."""
    jobs = [(g, s, d, t, kernel) for g in gpus for s in shapes for d in dtypes for t in _tokens(s, d)]
    failed = 0
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        for i, done in enumerate(as_completed([pool.submit(_fill, *job) for job in jobs])):
            count, bad = done.result()
            failed += bad
            print(f"{i + 1} of {len(jobs)} layers compiled: {count} kernels, {bad} failed", flush=True)
    return failed


def table(reports: Iterable[Report]) -> str:
    """Markdown: a row per kernel and GPU."""
    lines = [
        "| kernel | GPU | dtype | tile | warps x stages | registers | stack | shared KiB | tensor core "
        "| async copies | 16-byte | used by | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(reports, key=lambda r: (r.kernel, r.gpu.capability, r.dtype)):
        more = f" and {len(r.cases) - 1} more" if len(r.cases) > 1 else ""
        core = ", ".join(f"{name} {r.opcodes[name]}" for name in TENSOR_CORE if name in r.opcodes) or "-"
        copies = ", ".join(f"{name} {r.opcodes[name]}" for name in ASYNC_COPY if name in r.opcodes) or "-"
        cells = (
            f"`{r.kernel}`", f"sm_{r.gpu.capability}", r.dtype, r.tile, f"{r.num_warps} x {r.num_stages}",
            r.registers, f"{r.stack} / {r.count(SPILL)}", f"{r.shared / 1024:.0f}", core, copies, r.wide,
            r.cases[0] + more, "; ".join(r.problems) or "ok",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cumo_kernels.tiles.codegen", description=__doc__)
    parser.add_argument(
        "--gpu", nargs="+", default=TARGETS, help="names in cumo_kernels/tiles/hardware.py, or this"
    )
    parser.add_argument("--shape", nargs="+", default=tuple(SHAPES), choices=tuple(SHAPES))
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--write", type=Path, help="file for the table instead of standard output")
    parser.add_argument("--workers", type=int, help="only fill Triton's cache, with this number of processes")
    args = parser.parse_args(argv)
    if args.workers:
        return int(fill_cache(args.gpu, args.shape, args.dtype, args.kernel, args.workers) > 0)
    reports = []
    for name in args.gpu:
        gpu = gpu_named(name)
        reports += survey(gpu, args.shape, args.dtype, wanted=lambda kernel: args.kernel in kernel)
    bad = [r for r in reports if r.problems]
    text = HEAD.format(triton.__version__, torch.__version__, len(reports), len(bad)) + table(reports) + "\n"
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)
    else:
        print(text)
    for r in bad:
        print(f"{r.kernel} on {r.gpu.name} ({r.cases[0]}): {'; '.join(r.problems)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main())
