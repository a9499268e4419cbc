"""The CUDA extension without running kernels: its launchers' signatures, errors and index arithmetic.

All tests need the module, built (`make`) or emulated; test_cuda_emulated.py tests what the kernels compute.
"""

import inspect
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cumo_kernels import ACTIVATIONS, dispatch, extension

# the extension has no kernels for packed weights and adapters
OPS = [op for op in dispatch.OPS if dispatch.MODULES.get(op) != "adapted"]
pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))


@pytest.fixture(scope="module")
def module():
    return extension.load()


def bound(function) -> list[tuple[str, str]]:
    """(name, type) of every argument, from the line that pybind11 writes."""
    line = function.__doc__.splitlines()[0]
    inside = line[line.index("(") + 1 : line.index(") -> ")]
    pairs = re.findall(r"(\w+): ([\w.]+(?: \| None)?)", inside)
    return [(name, kind.replace("typing.SupportsInt", "int").removeprefix("torch.")) for name, kind in pairs]


def written(function) -> list[tuple[str, str]]:
    """The same for a Python launcher."""
    rows = inspect.signature(function).parameters.items()
    kinds = {
        name: row.annotation if isinstance(row.annotation, type) else str(row.annotation)
        for name, row in rows
    }
    return [(name, getattr(kind, "__name__", kind).removeprefix("torch.")) for name, kind in kinds.items()]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_the_launchers_are_those_of_the_other_backends(module, op, backend):
    if dispatch._missing(backend) and backend == "triton":
        pytest.skip("triton is not installed")
    wanted = written(dispatch.implementation(backend, op))
    # which only plain torch reproduces (ops/routing.py)
    assert bound(getattr(module, op)) == [row for row in wanted if row[0] != "compat"]


def test_the_backend_exposes_the_extension(module):
    for op in OPS:
        assert dispatch.implementation("cuda", op) is getattr(module, op)


WRONG = "meta" if extension.EMULATE else "cpu"  # a device that this build does not support


def calls(device, full=False):
    """(op, arguments) of every op; `full`: with all optional arguments."""
    new = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=device)
    slots, offsets, weights = new(4, dtype=torch.int32), new(3, dtype=torch.int32), new(2, 2)
    given = lambda tensor: tensor if full else None
    x, up, down = new(2, 8), new(2, 8, 8), new(2, 8, 8)
    plan = (weights, slots, slots, offsets)
    yield "activate", (x, "gelu")
    yield "activate_backward", (x, x, "gelu")
    yield "permute", (x, slots, slots, 2)
    yield "combine", (new(4, 8), weights, slots, 2)
    yield "combine_backward", (x, new(4, 8), weights, slots, slots)
    gate, groups = given(new(2, 8)), given(new(2, dtype=torch.int32))
    yield "route", (x, gate, groups, 1, 2, True)
    experts = 2 if full else 8
    yield (
        "route_backward",
        (weights, new(1, experts), new(1), x, gate, slots.view(2, 2), groups, True, True, full),
    )
    how = "sigmoid 1 1 max 2.5"
    bias, chosen = given(new(experts)), given(slots.view(2, 2))
    yield "scored_route", (x, gate, bias, groups, 1, 2, True, how, chosen)
    yield (
        "scored_route_backward",
        (weights, new(1, experts), new(1), x, gate, slots.view(2, 2), groups, True, True, full, how),
    )
    yield "sort_by_expert", (slots, 2)
    bias = given(new(2, 8))
    yield "grouped_gemm", (new(4, 8), up, offsets, bias, given(slots), given(slots), 1, None)
    yield "grouped_gemm_weight_grad", (new(4, 8), new(4, 8), offsets, given(slots), given(slots), 1, full)
    yield "expert_mlp", (x, *plan, up, down, bias, bias, "gelu", "none")
    every = (True,) * 6
    yield (
        "expert_mlp_backward",
        (x, x, *plan, up, down, bias, bias, new(4, 8), new(0), "gelu", "preact", *every),
    )


@pytest.mark.parametrize(("op", "arguments"), [pytest.param(*call, id=call[0]) for call in calls(WRONG)])
def test_a_tensor_on_the_wrong_device_is_named(module, op, arguments):
    wanted = "CPU tensor in emulation" if extension.EMULATE else "CUDA tensor"
    with pytest.raises(ValueError, match=rf"\w+ must be a {wanted}, got {WRONG}"):
        getattr(module, op)(*arguments)


HERE = "cpu" if extension.EMULATE else "cuda"


@pytest.mark.skipif(HERE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_the_one_tensor_on_another_device_is_named(module, op):
    """Each tensor argument in turn, before anything is launched."""
    (arguments,) = (call for name, call in calls(HERE, full=True) if name == op)
    names = [name for name, _ in bound(getattr(module, op))]
    before = module._launches()
    for i, (name, argument) in enumerate(zip(names, arguments, strict=True)):
        if isinstance(argument, torch.Tensor):
            moved = [*arguments[:i], argument.to(WRONG), *arguments[i + 1 :]]
            with pytest.raises(ValueError, match=rf"^{name} must (be|have)|must be on the device of {name}"):
                getattr(module, op)(*moved)
    assert module._launches() == before


def test_every_op_has_a_call_above():
    assert {op for op, _ in calls("meta")} == set(OPS)


def test_activations_are_all_there():
    """The table of csrc/bindings.cpp has the rows of activations.py, with the same ones gated."""
    source = (extension.CSRC / "bindings.cpp").read_text()
    rows = dict(re.findall(r'\{"(\w+)", \{ActKind::\w+, (true|false)\}\}', source))
    assert rows == {name: str(row.is_gated).lower() for name, row in ACTIVATIONS.items()}


COUNTS = st.lists(st.integers(0, 700), min_size=1, max_size=9)  # rows of each expert


def offsets_of(counts):
    return [sum(counts[:e]) for e in range(len(counts) + 1)]


@given(COUNTS, st.integers(1, 20), st.sampled_from([128, 64]), st.sampled_from([1, 2, 4]))
def test_tiles_cover_every_row_once(counts, tiles_n, tile_rows, splits):
    offsets = offsets_of(counts)
    tiles = extension.load()._find_tiles(offsets, tiles_n, tile_rows, splits)
    covered = Counter()
    for expert, first, end, tile_n, split, halved in tiles:
        assert not halved
        assert offsets[expert] <= first < end == offsets[expert + 1]
        assert 0 <= tile_n < tiles_n and 0 <= split < splits
        covered.update((row, tile_n, split) for row in range(first, min(first + tile_rows, end)))
    assert covered == Counter(
        (row, n, s) for row in range(offsets[-1]) for n in range(tiles_n) for s in range(splits)
    )
    most = extension.load()._most_row_tiles(offsets[-1], len(counts), tile_rows)
    assert len(tiles) <= most * tiles_n * splits


@given(COUNTS, st.integers(1, 6), st.sampled_from([1, 2]), st.integers(1, 200))
def test_a_short_last_round_is_cut_into_halves(counts, tiles_n, splits, blocks):
    """Each half once, at most one per block; a last round that fills over half of the blocks is not split."""
    module, offsets = extension.load(), offsets_of(counts)
    plain = module._find_tiles(offsets, tiles_n, 128, splits)
    whole = module._whole_tiles(len(plain), blocks)
    found = module._find_tiles(offsets, tiles_n, 128, splits, whole)
    assert found[:whole] == plain[:whole] and whole % blocks in (0, len(plain) % blocks)
    halves = [
        (expert, first, end, 2 * tile_n + half, split, True)
        for expert, first, end, tile_n, split, _ in plain[whole:]
        for half in range(2)
    ]
    assert found[whole:] == halves and len(halves) <= blocks
    assert halves or 2 * (len(plain) % blocks) > blocks or len(plain) % blocks == 0


@given(COUNTS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 8]), st.sampled_from([32, 64]))
def test_tiles_of_a_weight_gradient_cover_every_row_once(counts, tiles_n, tiles_k, splits, depth):
    offsets, module = offsets_of(counts), extension.load()
    covered = Counter()
    for number in range(len(counts) * splits * tiles_n * tiles_k):
        tile = module._grad_tile(offsets, number, tiles_n, tiles_k, splits, depth)
        expert, _, begin, end, first_n, first_k = tile
        assert begin >= end or offsets[expert] <= begin < end <= offsets[expert + 1]
        covered.update((row, first_n, first_k) for row in range(begin, end))
    cells = [(128 * n, 256 * k) for n in range(tiles_n) for k in range(tiles_k)]
    assert covered == Counter((row, *cell) for row in range(offsets[-1]) for cell in cells)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 200))
def test_each_row_of_tiles_sums_its_bias_once(rows, tiles_k, blocks):
    beside = [n // tiles_k for n in range(rows * tiles_k) if extension.load()._sums_bias(n, tiles_k, blocks)]
    assert beside == list(range(rows))


@pytest.mark.parametrize(
    ("rows", "tiles_k"), [(4 * 32, 4), (4 * 8, 16), (4 * 32, 8), (8 * 224, 16)], ids=lambda n: str(n)
)
def test_every_block_has_its_share_of_the_biases(module, rows, tiles_k):
    """An H100's 132 blocks; up and down projection of CLIP, and larger ones."""
    share = Counter(n % 132 for n in range(rows * tiles_k) if module._sums_bias(n, tiles_k, 132))
    assert max(share.values()) <= 2 * -(-rows // 132) and len(share) >= 0.9 * min(rows, 132)


@given(st.integers(0, 300), st.sampled_from([1, 2, 4, 16]))
def test_splits_share_the_steps(steps, splits):
    found = [extension.load()._steps_of_split(steps, split, splits) for split in range(splits)]
    assert [step for begin, end in found for step in range(begin, end)] == list(range(steps))


@pytest.mark.parametrize("tile_columns", [128, 256])
@pytest.mark.parametrize("width", [1, 7, 64, 200, 384])
def test_a_gated_tile_pairs_gate_and_up(module, tile_columns, width):
    """Every column of both halves once; the up column of a gate column is eight places after it."""
    seen = Counter()
    for tile_n in range(-(-width // (tile_columns // 2))):
        column = lambda r, tile_n=tile_n: module._weight_column(tile_n, tile_columns, r, width, True)
        for r in range(tile_columns):
            index, left = column(r)
            if left > 0:
                seen[index] += 1
            if r % 16 < 8:
                assert column(r + 8) == (index + width, left)
    assert seen == Counter(range(2 * width))


def test_plain_columns_are_in_order(module):
    found = [module._weight_column(n, 128, r, 200, False) for n in range(2) for r in range(128)]
    assert found == [(c, 200 - c) for c in range(256)]


def test_the_swizzle_loses_nothing_and_spreads_over_the_banks(module):
    along = [module._offset_along(row, byte) for row in range(128) for byte in range(0, 128, 16)]
    assert sorted(along) == list(range(0, 128 * 128, 16))
    for depth, row_bytes in ((64, 256), (32, 512)):  # 128 columns of 16 bits, of 32 bits
        across = [
            module._offset_across(k, byte, depth) for k in range(depth) for byte in range(0, row_bytes, 16)
        ]
        assert sorted(across) == list(range(0, 128 * 128, 16))
    for byte in range(0, 128, 16):  # what ldmatrix reads at once: eight rows, one column of pieces
        assert len({module._offset_along(row, byte) % 128 for row in range(8)}) == 8


def test_the_swizzle_is_that_of_tma(module):
    """PTX ISA, 128B swizzle: bits 4 to 6 of the address are XORed with bits 7 to 9."""
    for row in range(128):
        for byte in range(0, 128, 16):
            linear = row * 128 + byte
            assert module._offset_along(row, byte) == linear ^ ((linear >> 7 & 7) << 4)
