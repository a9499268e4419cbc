"""The machine code of csrc/, read from the built module: registers, stack, instructions."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from cumo_kernels import extension

pytest.importorskip("triton")
from cumo_kernels.tiles.codegen import CUOBJDUMP

BUILT = sorted((extension.ROOT / "cumo_kernels").glob("_C*.so"))
pytestmark = pytest.mark.skipif(not BUILT, reason="cumo_kernels._C is not built")


@cache
def dump(*flags: str) -> str:
    return subprocess.run([CUOBJDUMP, *flags, BUILT[0]], capture_output=True, text=True, check=True).stdout


@cache
def resources() -> list[tuple[str, str, int, int, int]]:
    """(architecture, kernel, registers, stack, local memory) of every kernel."""
    found = []
    for section in dump("-res-usage").split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", section)[1]
        usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        found += [(architecture, name, *map(int, row)) for name, *row in re.findall(usage, section)]
    return found


def built_for(architecture: str) -> None:
    if architecture not in {row[0] for row in resources()}:
        pytest.skip(f"built for {sorted({row[0] for row in resources()})}")


@cache
def sass(architecture: str) -> dict[str, list[str]]:
    """Kernel -> its instructions, without addresses and predicates."""
    built_for(architecture)
    parts = re.split(r"\n\s*Function : (\S+)", dump("-sass", "-arch", architecture))
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);")
    return {name: line.findall(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def opcodes(architecture: str) -> dict[str, set[str]]:
    """Kernel -> which instructions it has."""
    first = re.compile(r"[A-Z0-9_]+")
    return {name: {first.match(line)[0] for line in lines} for name, lines in sass(architecture).items()}


def test_every_kernel_is_there():
    names = {name for _, name, *_ in resources()}
    sources = [path.read_text() for path in Path(extension.CSRC).glob("*.cu")]
    written = {n for text in sources for n in re.findall(r"(\w+_kernel)\((?!\))", text)}
    assert written and [n for n in written if not any(n in name for name in names)] == []


def test_nothing_spills():
    assert [row for row in resources() if row[3] or row[4]] == []


def test_registers_leave_room_for_the_block():
    """256 threads of 255 registers fit."""
    assert [row for row in resources() if row[2] > 255] == []


def test_warpgroups_can_trade_registers():
    """Hopper's 384 threads start with 168 each; with fewer, consumers would wait for ever for 216."""
    built_for("sm_90a")
    hopper = [row for row in resources() if row[0] == "sm_90a" and "hopper" in row[1]]
    assert hopper and all(row[2] == 168 for row in hopper)
    assert 128 * 72 + 256 * 216 <= 384 * 168
    for name, lines in sass("sm_90a").items():
        if "hopper" in name:
            traded = [line for line in lines if line.startswith("USETMAXREG")]
            counts = re.findall(r"0x\w+", " ".join(traded))
            assert sorted(counts) == ["0x48", "0xd8"], (name, traded)


def test_hopper_kernels_use_hopper():
    kernels = {name: found for name, found in opcodes("sm_90a").items() if "hopper" in name}
    assert len(kernels) == 12
    for name, found in kernels.items():
        assert {"HGMMA", "UTMALDG", "LDGSTS", "SYNCS"} <= found, name
        assert not found & {"LDL", "STL"}, name


def test_products_of_successive_stages_overlap():
    """ptxas waits after each wgmma if it cannot track the sums; here only for the previous stage."""
    for name, lines in sass("sm_90a").items():
        if "hopper" not in name:
            continue
        products = [line.split(".")[1] for line in lines if line.startswith("HGMMA")]
        # 64 of 128 rows a warpgroup, or both; whole tiles and halves have separate loops
        loops = 2 if "Li256E" in name else 1
        wanted = {
            "64x128x16": 8 if "Li128E" in name else 4 * (loops - 1),
            "64x256x16": 4 * ("Li128E" not in name),
        }
        assert {shape: products.count(shape) for shape in wanted} == wanted, name
        waits = [line.split()[-1] for line in lines if line.startswith("WARPGROUP.DEPBAR")]
        # one after each loop, one inside
        assert sorted(waits) == ["0x0"] * loops + ["0x1"] * loops, (name, waits)


def between(lines: list[str], first: str, last: str) -> list[str]:
    """From the last instruction that begins with `first` to the next that begins with `last`."""
    begin = max(i for i, line in enumerate(lines) if line.startswith(first))
    return lines[begin + 1 : next(i for i in range(begin, len(lines)) if lines[i].startswith(last))]


def test_a_bias_takes_at_most_a_tenth_of_the_issue_slots():
    """The work of eight warps after the products of a stage, 1024 cycles of four schedulers."""
    kernels = {name: lines for name, lines in sass("sm_90a").items() if "hopper_weight_grad" in name}
    assert len(kernels) == 2
    for name, lines in kernels.items():
        work = between(lines, "HGMMA", "WARPGROUP.DEPBAR")
        assert [line.split(".")[0] for line in work].count("HMMA") == 4, name
        assert 8 * len(work) <= 4 * 1024 / 10, (name, len(work))


def test_every_kernel_waits_for_those_before_it():
    """griddepcontrol of PTX: the next kernel may start, and a wait precedes every access to memory."""
    memory = re.compile(r"(LDG|LDGSTS|UTMALDG|STG|ATOMG?|RED|LD|ST)\b")
    for name, lines in sass("sm_90a").items():
        assert [line for line in lines if line.startswith("PREEXIT")], name
        (wait,) = [i for i, line in enumerate(lines) if line.startswith("ACQBULK")]
        assert wait < min(i for i, line in enumerate(lines) if memory.match(line)), name


# a dump takes ten seconds; sm_80 has the same source as the newer two
@pytest.mark.parametrize(
    "architecture",
    ["sm_80", "sm_90a", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("sm_100", "sm_120"))],
)
def test_portable_kernels_use_tensor_cores_and_asynchronous_copies(architecture):
    gemms = ("grouped_gemm_kernel", "grad_hidden_kernel", "weight_grad_kernel")
    portable = lambda name: "hopper" not in name and any(gemm in name for gemm in gemms)
    kernels = {name: found for name, found in opcodes(architecture).items() if portable(name)}
    assert len(kernels) == 16
    for name, found in kernels.items():
        ieee = re.search(r"kernelIfLb0", name) is not None
        assert "LDGSTS" in found and ("HMMA" in found) == (not ieee), name
        assert not found & {"LDL", "STL"}, name
