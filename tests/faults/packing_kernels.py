"""Faults of the Triton kernels that read packed weights and add low-rank terms, as in kernels.py."""

from tests.faults import Fault

T = "cumo_kernels/backends/triton/"
ROWS = (  # name, file, code, wrong code, test of tests/kernels/test_packed.py
    (
        "mxfp4 without its sign",
        T + "packed.py",
        "((q & 7) << 22) | ((q >> 3) << 31)",
        "((q & 7) << 22)",
        "test_a_weight_has_the_bits_of_dequantize",
    ),
    (
        "int4 zero point of 7",
        T + "packed.py",
        "zero = 8.0",
        "zero = 7.0",
        "test_a_weight_has_the_bits_of_dequantize",
    ),
    (
        "high half of a byte first",
        T + "packed.py",
        "tl.interleave(pairs & 15, pairs >> 4)",
        "tl.interleave(pairs >> 4, pairs & 15)",
        "test_a_weight_has_the_bits_of_dequantize",
    ),
    (
        "one scale for a whole step",
        T + "packed.py",
        "math.gcd(block, group, second_half)",
        "math.gcd(block, second_half)",
        "test_a_weight_has_the_bits_of_dequantize",
    ),
    (
        "a gate's second half shares the tile's scale",
        T + "packed.py",
        "math.gcd(block, group, second_half)",
        "math.gcd(block, group)",
        "test_the_second_half_of_a_transposed_gate_may_begin_within_a_group",
    ),
    (
        "exponent 0 of e8m0 is zero",
        T + "packed.py",
        "tl.where(exponent == 0, 0x00400000, exponent << 23)",
        "exponent << 23",
        "test_scales_at_the_ends_of_e8m0",
    ),
    (
        "every part of a split sum has the low-rank term",
        T + "grouped_gemm.py",
        "tl.where(split == 0, R, 0)",
        "R",
        "test_sums_in_parts",
    ),
    (
        "the up half takes the gate's adapter",
        T + "grouped_gemm.py",
        "acc_up, u_ptr, expert_v, first_row, end, N + first_col, 2 * N, used_rank, R,",
        "acc_up, u_ptr, expert_v, first_row, end, first_col, 2 * N, used_rank, R,",
        "test_layers",
    ),
    (
        "scales of the first expert",
        T + "grouped_gemm.py",
        "expert_scales = scales_ptr + expert.to(tl.int64) * stride_scales",
        "expert_scales = scales_ptr",
        "test_products",
    ),
    (
        "gradient of down_b without the routing weight",
        T + "adapted.py",
        "ddown_b = from_g(weigh_rows(v, *plan))",
        "ddown_b = from_g(v)",
        "test_layers",
    ),
    (
        "dx without the adapter",
        T + "adapted.py",
        "expert_offsets, None, None, inverse_permutation, top_k, pair\n",
        "expert_offsets, None, None, inverse_permutation, top_k, None\n",
        "test_layers",
    ),
    (
        "a recomputed z without the adapter",
        T + "adapted.py",
        "low_rank=None if up_b is None else LowRank(u.contiguous(), up_b),",
        "low_rank=None,",
        "test_layers",
    ),
)
FAULTS = tuple(Fault(name, file, code, wrong, "packed", test) for name, file, code, wrong, test in ROWS)
