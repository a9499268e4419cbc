"""The machine code of csrc/, read from the built extension: a row per kernel and architecture.

Blocks per SM are an upper limit from registers, threads and static shared memory, on the GPU that hardware.py
has for the architecture; the file does not contain dynamic shared memory. No GPU is needed.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cumo_kernels.tiles import hardware
from cumo_kernels.tiles.codegen import CUOBJDUMP
from cumo_kernels.tiles.hardware import KIB, Gpu

RESERVED = KIB  # shared memory reserved by the system since sm_80, which the compiler includes
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel; `blocks_per_sm` is an upper limit, `threads` that of its launch bounds."""

    architecture: str
    gpu: str
    kernel: str
    threads: int
    registers: int
    stack: int
    static_shared: int
    blocks_per_sm: int
    mix: str


def _dump(binary: Path, *flags: str) -> str:
    return subprocess.run([CUOBJDUMP, *flags, binary], capture_output=True, text=True, check=True).stdout


def _parts(text: str, head: str) -> dict[str, str]:
    """Name matched by `head` in a line -> the text after that line."""
    found = re.split(head, text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def _readable(names: list[str]) -> dict[str, str]:
    """Mangled -> demangled function with its template arguments; unchanged without a demangler."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return {name: name for name in names}
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = lambda line: re.sub(r"\(.*", "", line.replace("(anonymous namespace)::", "")).removeprefix(
        "void "
    )
    return {name: short(line) for name, line in zip(names, lines.splitlines(), strict=True)}


def _gpu_of(architecture: str) -> Gpu:
    capability = int(re.match(r"sm_(\d+)", architecture)[1])
    tuned = {path.stem for path in (Path(hardware.__file__).parent / "configs").glob("*.json")}
    return min(hardware.GPUS, key=lambda gpu: (abs(gpu.capability - capability), gpu.name not in tuned))


def survey(
    binary: Path, blocks_per_sm: Callable[[Gpu, int, int, int], int], classify: Callable[[dict], str]
) -> list[Kernel]:
    """Every kernel in a shared library or object file.

    Args:
        binary: the file that setup.py built.
        blocks_per_sm: (GPU, registers, shared bytes, warps) -> blocks per multiprocessor.
        classify: counts of the instructions of a kernel -> text.

    Raises:
        ValueError: it contains no compiled kernel.
    """
    usage: dict[tuple[str, str], tuple[int, int, int]] = {}
    for section in _dump(binary, "-res-usage").split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", section)[1]
        rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", section)
        usage |= {(architecture, name): tuple(map(int, numbers)) for name, *numbers in rows}
    if not usage:
        raise ValueError(f"{binary} must hold compiled kernels, got none")
    readable = _readable(sorted({name for _, name in usage}))
    found = []
    for architecture in sorted({a for a, _ in usage}):
        gpu = _gpu_of(architecture)
        code = _parts(_dump(binary, "-sass", "-arch", architecture), r"^\s*Function : (\S+)$")
        facts = _parts(_dump(binary, "-elf", "-arch", architecture), r"^\.nv\.info\.(\S+)$")
        for name in sorted((n for a, n in usage if a == architecture), key=readable.get):
            registers, stack, shared = usage[architecture, name]
            bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x\w+)", facts.get(name, ""))
            threads = int(bounds[1], 16) if bounds else 1024
            shared = max(0, shared - RESERVED)
            counts: dict[str, int] = {}
            for opcode in INSTRUCTION.findall(code.get(name, "")):
                counts[opcode] = counts.get(opcode, 0) + 1
            resident = blocks_per_sm(gpu, registers, shared, -(-threads // 32))
            found.append(
                Kernel(
                    architecture, gpu.name, readable[name], threads, registers, stack, shared, resident,
                    classify(counts),
                )
            )  # fmt: skip
    return found


def worse(old: list[dict], new: list[dict]) -> list[str]:
    """Regressions between two surveys as read from CSV: more stack, fewer blocks, a missing kernel."""
    key = lambda row: (row["architecture"], row["kernel"])
    after = {key(row): row for row in new}
    found = []
    for row in old:
        now = after.get(key(row))
        if now is None:
            found.append(f"{' '.join(key(row))}: missing")
            continue
        for column, sign in (("stack", 1), ("blocks_per_sm", -1)):
            if sign * int(now[column]) > sign * int(row[column]):
                what = f"{column.replace('_', ' ')} {row[column]} -> {now[column]}"
                found.append(
                    f"{' '.join(key(row))}: {what}, registers {row['registers']} -> {now['registers']}"
                )
    return found
