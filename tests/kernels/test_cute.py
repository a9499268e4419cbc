"""csrc/'s layouts compared with CuTe's: the placement of elements, and the arguments of wgmma and TMA.

CuTe is NVIDIA's own description of its hardware, so it can detect an error that kernels and emulation share.
Three programs of tests/kernels/host print named lists of numbers for one problem (cases.h): hopper.cpp by
running csrc/ in emulation, driver.cpp with what the GPU code passes to cuTensorMapEncodeTiled, cute.cpp from
the headers in the package nvidia-cutlass. Lists of the same name must be equal, bit for bit.
"""

import pytest

from tests import programs

MISSING = programs.missing()
if MISSING is None and programs.cutlass_headers() is None:
    MISSING = "the headers of nvidia-cutlass are not installed"
if MISSING is None and not programs.cuda_headers():
    MISSING = "there are no CUDA headers: neither nvcc's nor those of triton and nvidia-cuda-cccl"
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.timeout(600),  # CuTe is compiled the first time, half a minute
]


def read(lines: list[str]) -> dict[str, list[int]]:
    """Name -> list; a name that occurs twice has the same list."""
    found: dict[str, list[int]] = {}
    for line in lines:
        name, *words = line.split()
        numbers = [int(word) for word in words]
        assert found.setdefault(name, numbers) == numbers, name
    return found


def cuda() -> list[str]:
    return [f"-isystem{folder}" for folder in programs.cuda_headers()]


@pytest.fixture(scope="module")
def ours() -> dict[str, list[int]]:
    lines = programs.run(programs.build("hopper", "-O1", *programs.EMULATED))
    maps = [line for line in lines if line.startswith("map/")]
    told = programs.run(programs.build("driver", *cuda()), given="\n".join(maps))
    return read([line for line in lines if line not in maps]) | read(told)


@pytest.fixture(scope="module")
def cute() -> dict[str, list[int]]:
    program = programs.build("cute", f"-isystem{programs.cutlass_headers()}", *cuda(), csrc=False)
    return read(programs.run(program))


def of_kind(lists: dict[str, list[int]], kind: str) -> dict[str, list[int]]:
    return {name: numbers for name, numbers in lists.items() if name.startswith(f"{kind}/")}


def assert_same(name: str, mine: list[int], theirs: list[int], mask: int = -1) -> None:
    assert len(mine) == len(theirs) > 0, name
    for i, (own, other) in enumerate(zip(mine, theirs, strict=True)):
        assert own & mask == other & mask, f"{name}[{i}]: csrc/ {own:#x}, CuTe {other:#x}, compared {mask:#x}"


def test_a_tile_in_shared_memory(ours, cute):
    """swizzled, offset_along, offset_across: the byte of every element; ours have no type, CuTe has both."""
    found = of_kind(ours, "offsets")
    assert set(found) == {f"offsets/{way}/{n}" for way in ("along", "across") for n in (64, 128, 256)}
    for name, bytes_ in found.items():
        for dtype in ("bf16", "fp16"):
            assert_same(name, bytes_, cute[f"{name}/{dtype}"])


# kernel -> is A, is B stored across the reduction; and the groups that have a separate product
KERNELS = {
    "forward256-along": (False, False, 2), "forward256-across": (False, True, 2),
    "half256-along": (False, False, 2), "half256-across": (False, True, 2),
    "forward128-along": (False, False, 1), "forward128-across": (False, True, 1),
    "weight_grad": (True, True, 2),
}  # fmt: skip
ALL = (1 << 64) - 1
LEADING = 0x3FFF << 16  # the leading dimension's byte offset in a descriptor


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_descriptors_of_every_product(ours, cute, kernel, dtype):
    """All descriptors that multiply_stages passes to wgmma in one ring, compared with CuTe's fragments.

    Where the PTX manual ("Leading Dimension Byte Offset") does not use that offset it is not compared: with a
    swizzle it is assumed to be 1 along the reduction; across, it leads from 64 rows to the next 64, which A
    does not have. CuTe writes 1 and 0 there, csrc/ writes 0 and the chunk's size. All else is compared.
    """
    across_a, across_b, groups = KERNELS[kernel]
    for group in range(groups):
        suffix = f"{kernel}/{dtype}/group{group}"
        for operand, matters in (("a", False), ("b", across_b)):
            name = f"descriptors/{operand}/{suffix}"
            assert_same(name, ours[name], cute[name], ALL if matters else ALL & ~LEADING)
        products = len(ours[f"descriptors/a/{suffix}"])
        assert ours[f"transposed/{suffix}"] == cute[f"transposed/{suffix}"] == [across_a, across_b] * products


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("accumulators", 2),  # row and column of every register of wgmma's sums
        ("map", 2 * 14),  # type, rank, base, interleave, swizzle, fill, sizes, strides, box, element steps
        ("stage", 2 * 4 + 2),  # the placement of elements: producers run on a matrix of its own indices
        ("columns", 2),  # the order of the weight's columns in a gated tile
    ],
)
def test_lists_of_a_kind_are_the_same(ours, cute, kind, count):
    found = of_kind(ours, kind)
    assert set(found) == set(of_kind(cute, kind)) and len(found) == count
    for name, numbers in found.items():
        assert_same(name, numbers, cute[name])


def test_every_list_is_compared(ours, cute):
    kinds = {"offsets", "descriptors", "transposed", "accumulators", "map", "stage", "columns"}
    assert {name.split("/")[0] for name in [*ours, *cute]} == kinds
    assert len(of_kind(ours, "descriptors")) == len(of_kind(cute, "descriptors")) == 2 * 2 * 12
