"""Instructions of csrc/ in emulation compared with the PTX manual: wgmma's layouts, cp.async, mbarrier.

Expected values come from the manual's tables, figures and rules, not from our formulas: kernels and emulation
could share an error, which these tests detect. Section and figure numbers are those of the edition in which
wgmma is section 9.7.15. tests/kernels/host/ptx_tables.cpp executes the instructions.
"""

import pytest

from tests import programs

MISSING = programs.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def execute(instruction: str, given: str) -> list[list[float]]:
    program = programs.build("ptx_tables", "-O1", *programs.EMULATED)
    lines = programs.run(program, instruction, given=given)
    return [[float(word) for word in line.split()] for line in lines]


# 5.5.7 "Swizzling Modes", 128 byte swizzle mode, 16-byte atomicity: rows of 128 bytes from a 1024-byte
# boundary on, and which of a row's pieces of 16 bytes lies at each place of the row.
SWIZZLE_128 = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (1, 0, 3, 2, 5, 4, 7, 6),
    (2, 3, 0, 1, 6, 7, 4, 5),
    (3, 2, 1, 0, 7, 6, 5, 4),
    (4, 5, 6, 7, 0, 1, 2, 3),
    (5, 4, 7, 6, 1, 0, 3, 2),
    (6, 7, 4, 5, 2, 3, 0, 1),
    (7, 6, 5, 4, 3, 2, 1, 0),
)


def swizzled(byte: int) -> int:
    """The position of a byte of the unswizzled layout."""
    row, piece = byte // 128, byte % 128 // 16
    return row * 128 + SWIZZLE_128[row % 8].index(piece) * 16 + byte % 16


# 9.7.15.5.1.2.1.3 "Canonical Layouts", 128B swizzling, T = 8 elements of 16 bits; strides of the table are in
# elements, LBO and SBO in bytes.
def k_major(outer: int, k: int, sbo: int) -> int:
    """((8,m),(T,2k)):((8T,SBO),(1,T)), one k of 16"""
    return swizzled(outer % 8 * 64 * 2 + outer // 8 * sbo + k % 8 * 2 + k // 8 * 8 * 2)


def mn_major(outer: int, k: int, lbo: int, sbo: int) -> int:
    """((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))"""
    along_outer = outer % 8 * 2 + outer // 8 % 8 * 8 * 2 + outer // 64 * lbo
    return swizzled(along_outer + k % 8 * 64 * 2 + k // 8 * sbo)


def descriptor(start: int, lbo: int, sbo: int) -> int:
    """9.7.15.5.1.2.2 "Matrix Descriptor Format": bits 13-0, 29-16, 45-32 in 16 bytes, 63-62 the swizzle."""
    return start >> 4 | lbo >> 4 << 16 | sbo >> 4 << 32 | 1 << 62


def test_places_read_off_the_tables():
    """A few elements by hand, to check the two functions above."""
    # row 1 is shifted by one piece: its first is at place 2; k = 8 begins the second piece, at place 1
    assert k_major(0, 0, 1024) == 0 and k_major(1, 0, 1024) == 128 + 16 and k_major(1, 8, 1024) == 128
    # row 7 is mirrored: piece 0 is last, piece 1 the last but one
    assert k_major(7, 0, 1024) == 896 + 112 and k_major(7, 15, 1024) == 896 + 96 + 14
    # the ninth row begins the next group of eight
    assert k_major(8, 0, 2048) == 2048 and k_major(63, 9, 2048) == 7 * 2048 + 896 + 96 + 2
    # here k is the row: k = 3 reverses each half, and column 10 is the third element of piece 1
    assert mn_major(0, 3, 0, 0) == 384 + 48 and mn_major(10, 3, 0, 0) == 384 + 32 + 4
    assert mn_major(63, 6, 0, 0) == 768 + 16 + 14  # piece 7 of row 6 is at the second place
    assert mn_major(64, 0, 4096, 2048) == 4096 and mn_major(0, 8, 4096, 2048) == 2048
    assert mn_major(127, 15, 4096, 2048) == 4096 + 2048 + 896 + 14


# 9.7.15.5.1.1.1 "Matrix Fragments for wgmma.mma_async.m64nNk16", figure 149, accumulator D: row -> the
# threads that hold columns 0-1, 2-3, 4-5 and 6-7 of every eight, and the first of the two registers for the
# columns of the first eight; for each further eight columns the register number is four higher.
FRAGMENT_D = {
    0: ((0, 1, 2, 3), 0),
    1: ((4, 5, 6, 7), 0),
    7: ((28, 29, 30, 31), 0),
    8: ((0, 1, 2, 3), 2),
    9: ((4, 5, 6, 7), 2),
    15: ((28, 29, 30, 31), 2),
    16: ((32, 33, 34, 35), 0),
    24: ((32, 33, 34, 35), 2),
    31: ((60, 61, 62, 63), 2),
    32: ((64, 65, 66, 67), 0),
    47: ((92, 93, 94, 95), 2),
    48: ((96, 97, 98, 99), 0),
    56: ((96, 97, 98, 99), 2),
    63: ((124, 125, 126, 127), 2),
}
N = 128


def product(across_a: bool, across_b: bool, a: dict, b: dict, lbo_a: int, lbo_b: int) -> dict[int, list]:
    """D of A (64, 16) and B (16, N), {(outer, k): number}, in the rows of the table; D starts at 1."""
    # strides larger than a dense tile's, and different
    start, sbo = {"a": 1024, "b": 20480}, {"a": 2048, "b": 3072}
    lines = []
    for name, across, elements, lbo in (("a", across_a, a, lbo_a), ("b", across_b, b, lbo_b)):
        for (outer, k), number in elements.items():
            byte = mn_major(outer, k, lbo, sbo[name]) if across else k_major(outer, k, sbo[name])
            lines.append(f"{start[name] + byte} {number}")
    descriptors = f"{descriptor(start['a'], lbo_a, sbo['a'])} {descriptor(start['b'], lbo_b, sbo['b'])}"
    registers = execute(f"wgmma {across_a:d} {across_b:d}", "\n".join([descriptors, *lines]))
    return {
        row: [registers[threads[col % 8 // 2]][col // 8 * 4 + first + col % 2] for col in range(N)]
        for row, (threads, first) in FRAGMENT_D.items()
    }


IDENTITY = {(i, i): 1 for i in range(16)}
# 9.7.15.5.1.2.1.1 "Leading Dimension Byte Offset": not used along K; across K from 64 rows to the next
UNUSED, CHUNK = 8208, 8192


@pytest.mark.parametrize("across_b", [False, True], ids=["b-k-major", "b-n-major"])
@pytest.mark.parametrize("across_a", [False, True], ids=["a-k-major", "a-m-major"])
class TestWgmma:
    def test_operand_a(self, across_a, across_b):
        """A numbered, B the identity: D is A, added to the initial values."""
        a = {(row, k): row * 16 + k for row in range(64) for k in range(16)}
        found = product(across_a, across_b, a, IDENTITY, UNUSED, CHUNK)
        for row in FRAGMENT_D:
            assert found[row] == [1 + row * 16 + col for col in range(16)] + [1] * (N - 16), row

    def test_operand_b(self, across_a, across_b):
        """A the identity, B numbered: D's first 16 rows are B; its columns from 64 on are a stride away."""
        b = {(col, k): col * 16 + k for col in range(N) for k in range(16)}
        found = product(across_a, across_b, IDENTITY, b, UNUSED, CHUNK if across_b else UNUSED)
        for row in FRAGMENT_D:
            assert found[row] == [1 + (col * 16 + row if row < 16 else 0) for col in range(N)], row


def test_cp_async_fills_with_zeros():
    """9.7.9.25.3.1 "cp.async": the first src-size bytes are copied; the rest of cp-size, 16, is set to zero.

    9.7.9.25.3.3 "cp.async.wait_group": with N, the newest N groups may be pending, older ones are complete.
    Pending bytes may have any value; in emulation they have the old one.
    """
    old, source = [0xAA] * 24, list(range(1, 33))
    copied = {
        16: [*source[:16], *old[16:]],
        8: [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, *old[16:]],
        2: [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, *old[16:]],
        0: [0] * 16 + old[16:],
        14: [*source[:14], 0, 0, *old[16:]],
    }
    found = execute("cp.async", " ".join(map(str, copied)))
    finished = list(copied.values())
    assert found[:5] == [old] * 5
    assert found[5:10] == [*finished[:4], old]
    assert found[10:] == finished


# 9.7.13.15 "mbarrier". "Phase Completion": a phase is complete when the pending arrivals and the tx-count
# are zero; the pending count is then reset to the expected one. "arrive": one arrival; with .expect_tx the
# tx-count grows before it. "test_wait / try_wait" with .parity tests the current phase, which is incomplete,
# or the previous one, which is complete; the first phase is even, 0. A copy's complete-tx subtracts its
# bytes, here 32, from the tx-count.
#
# name: (count of init, [(waits from this step on, for parity)], steps, [(done after this step, copies in)])
BARRIERS = {
    "three arrivals complete a phase": (3, [(0, 0)], "arrive arrive arrive", [(3, 0)]),
    "a new barrier's previous phase is complete": (1, [(0, 1), (0, 0)], "arrive", [(0, 0), (1, 0)]),
    "a completed phase stays complete in the next": (
        2, [(2, 0), (3, 0), (2, 1)], "arrive arrive arrive arrive", [(2, 0), (3, 0), (4, 0)],
    ),
    "every phase needs all arrivals again": (
        2, [(0, 0), (2, 1), (4, 0)], "arrive arrive arrive arrive arrive arrive", [(2, 0), (4, 0), (6, 0)],
    ),
    "arrivals do not complete a phase that expects bytes": (1, [(0, 0)], "expect 32 copy deliver", [(3, 1)]),
    "nor do bytes alone": (2, [(0, 0)], "expect 32 copy deliver arrive", [(4, 1)]),
    "a wait is for all bytes": (1, [(0, 0)], "expect 64 copy deliver copy deliver", [(5, 2)]),
    "bytes of two expectations add up": (
        2, [(0, 0)], "expect 32 expect 32 copy deliver copy deliver", [(6, 2)],
    ),
    "bytes may come before they are expected": (2, [(0, 0)], "arrive copy deliver expect 32", [(4, 1)]),
    "the next phase expects none": (1, [(0, 0), (3, 1)], "expect 32 copy deliver arrive", [(3, 1), (4, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BARRIERS)
def test_mbarrier(name):
    count, waits, steps, over = BARRIERS[name]
    asked = " ".join(f"{step} {parity}" for step, parity in waits)
    assert execute("mbarrier", f"{count} {len(waits)} {asked} {steps}") == [list(row) for row in over]
