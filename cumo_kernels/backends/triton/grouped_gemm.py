"""Grouped GEMM (Triton): rows of expert e times the weight of expert e.

    out[p] = act(x[p] @ weight[e].T + bias[e])                x (S, K)   weight (E, N, K)   out (S, N)

With `permutation`, row p is x[permutation[p] // top_k], gathered as the tile is loaded. Grid: as many
programs as fit on the chip at once. Each loops over tiles and finds a tile's expert from expert_offsets, so
one captured graph serves every routing. If there are few tiles and K is large, K is split (tuning.splits).
2 * S * N * K FLOPs; reads x and the weights of the experts with rows, writes out. The k-grouped form is in
weight_grad.py. Contract: cumo_kernels/ops/grouped_gemm.py. Reference: backends/reference/grouped_gemm.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.triton.activation import activate
from cumo_kernels.backends.triton.common import (
    act,
    dot,
    input_precision,
    linear,
    narrow,
    only_if,
    wait_for_earlier,
)
from cumo_kernels.backends.triton.launch import (
    Launch,
    can_describe,
    cdiv,
    describe,
    next_power_of_2,
    on_device_of_first,
    planned,
)
from cumo_kernels.backends.triton.packed import (
    LowRank,
    Packed,
    add_low_rank,
    load_operand,
    low_rank_constants,
    low_rank_key,
    packed_constants,
)
from cumo_kernels.backends.triton.tiles import (
    count_tiles,
    find_tile,
    halves,
    load_rows,
    sum_rows,
    upper_bound,
)
from cumo_kernels.backends.triton.weight_grad import launch_weight_grad
from cumo_kernels.tiles import tuning


@triton.jit
def _finish(
    acc,  # (BLOCK_M, columns) fp32
    acc_up,  # the same for the up half of a gated activation, else unused
    bias_ptr,  # (N,) or, gated, (2N,) of this expert, or None
    out_ptr,  # (rows, N), its first row the tile's, or None
    pre_ptr,  # (rows, N) or, gated, (rows, 2N), its first row the tile's, or None
    rows_left,
    first_col,
    N,
    with_bias,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Bias, pre-activation, activation, and the stores of one tile, in PARTS column parts.

    A whole tile and its addresses do not fit in registers.
    """
    if PARTS > 1:
        left, right = halves(acc)
        left_up, right_up = left, right
        if GATED:
            left_up, right_up = halves(acc_up)
        half: tl.constexpr = acc.shape[1] // 2
        _finish(
            left, left_up, bias_ptr, out_ptr, pre_ptr, rows_left, first_col, N, with_bias,
            ACTIVATION, GATED, PARTS // 2,
        )  # fmt: skip
        _finish(
            right, right_up, bias_ptr, out_ptr, pre_ptr, rows_left, first_col + half, N, with_bias,
            ACTIVATION, GATED, PARTS // 2,
        )  # fmt: skip
    else:
        rows = tl.arange(0, acc.shape[0])[:, None]
        cols = first_col + tl.arange(0, acc.shape[1])
        mask = (rows < rows_left) & (cols < N)[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=only_if(with_bias, cols < N), other=0.0)
            acc += bias.to(tl.float32)[None, :]
            if GATED:
                bias_up = tl.load(bias_ptr + N + cols, mask=cols < N, other=0.0)
                acc_up += bias_up.to(tl.float32)[None, :]
        if pre_ptr is not None:
            pre_ptrs = pre_ptr + (rows * (2 * N if GATED else N) + cols[None, :])
            tl.store(pre_ptrs, narrow(acc, pre_ptr.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(pre_ptrs + N, narrow(acc_up, pre_ptr.dtype.element_ty), mask=mask)
        if out_ptr is not None:
            if ACTIVATION is not None:
                acc = act(acc, ACTIVATION)
            if GATED:
                acc = acc * linear(acc_up, ACTIVATION)
            out_ptrs = out_ptr + (rows * N + cols[None, :])
            tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zero_rows(ptr, first, end, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """ptr[first : end] = 0 of a contiguous (rows, width); all programs share the work."""
    tiles_n = tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(end - first, BLOCK_M) * tiles_n, tl.num_programs(0)):
        rows = first + tile // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), ptr.dtype.element_ty)
        mask = (rows < end)[:, None] & (cols < width)[None, :]
        tl.store(ptr + rows.to(tl.int64)[:, None] * width + cols[None, :], zeros, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def grouped_gemm_kernel(
    x_ptr,  # (S, K), or (T, K) with permutation; None with a descriptor
    x_desc,  # (S, K) or None
    weight_ptr,  # (E, N, K) or, gated, (E, 2N, K); None with a descriptor; two elements a byte with FORMAT
    weight_desc,  # the same, innermost dimension as stored, or None
    scales_ptr,  # (E, N, K / GROUP) or, transposed, (E, K, N / GROUP); None without FORMAT
    zeros_ptr,  # like scales, or None
    codes_ptr,  # (16,) fp32, or None
    u_ptr,  # (S, R): u @ v.T is added, or None
    v_ptr,  # (E, N, R) or, gated, (E, 2N, R), or None
    bias_ptr,  # (E, N) or (E, 2N), or None
    expert_offsets_ptr,  # (E + 1,) int32
    permutation_ptr,  # (S,) int32 or None
    out_ptr,  # (S, N); under split-k (SPLITS, S, N) fp32; or None
    pre_ptr,  # (S, N) or (S, 2N), or None
    num_rows,
    N,
    K,
    stride_x_s,
    stride_x_k,
    stride_w_e,
    stride_w_n,
    stride_w_k,
    R,
    stride_v_e,
    stride_v_n,
    stride_v_r,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    K_INNER: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    wait_for_earlier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_ends = count_tiles(expert_offsets_ptr, tiles_n * SPLITS, E, E_POW2, BLOCK_M)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0), flatten=FLATTEN):
        expert, end, first_row, tile_n, split = find_tile(
            tile, tile_ends, expert_offsets_ptr, tiles_n, SPLITS, BLOCK_M, GROUP_M
        )
        first_col = tile_n * BLOCK_N
        row_ptrs = None
        if x_desc is None:
            # rows past the expert's end are computed from its last row and never stored
            source = tl.minimum(first_row + tl.arange(0, BLOCK_M), end - 1)
            if permutation_ptr is not None:
                source = tl.load(permutation_ptr + source) // TOP_K
            row_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_x_s
        expert_ptr, expert_scales, expert_zeros = None, scales_ptr, zeros_ptr
        if weight_desc is None:
            expert_ptr = weight_ptr + expert.to(tl.int64) * stride_w_e
        if FORMAT is not None:
            stride_scales = stride_w_e // (GROUP // 2)  # stride_w_e is in bytes
            expert_scales = scales_ptr + expert.to(tl.int64) * stride_scales
            if zeros_ptr is not None:
                expert_zeros = zeros_ptr + expert.to(tl.int64) * stride_scales

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, steps):
            k = (split * steps + step) * BLOCK_K
            a = load_rows(row_ptrs, x_desc, first_row, k, K, stride_x_k, BLOCK_K, EVEN_K)
            b = load_operand(
                expert_ptr, weight_desc, expert_scales, expert_zeros, codes_ptr,
                expert, first_col, k, N, K, stride_w_n, stride_w_k,
                FORMAT, GROUP, SHARED, 2 if GATED else 1, K_INNER, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, a.dtype,
            )  # fmt: skip
            acc = dot(a, b, acc, INPUT_PRECISION)
            if GATED:
                b_up = load_operand(
                    expert_ptr, weight_desc, expert_scales, expert_zeros, codes_ptr,
                    expert, N + first_col, k, 2 * N, K, stride_w_n, stride_w_k,
                    FORMAT, GROUP, SHARED, 1, K_INNER, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, a.dtype,
                )  # fmt: skip
                acc_up = dot(a, b_up, acc_up, INPUT_PRECISION)
        if u_ptr is not None:
            expert_v = v_ptr + expert.to(tl.int64) * stride_v_e
            used_rank = R
            if SPLITS > 1:
                used_rank = tl.where(split == 0, R, 0)
            acc = add_low_rank(
                acc, u_ptr, expert_v, first_row, end, first_col, N, used_rank, R, stride_v_n, stride_v_r,
                INPUT_PRECISION, BLOCK_R,
            )  # fmt: skip
            if GATED:
                acc_up = add_low_rank(
                    acc_up, u_ptr, expert_v, first_row, end, N + first_col, 2 * N, used_rank, R,
                    stride_v_n, stride_v_r, INPUT_PRECISION, BLOCK_R,
                )  # fmt: skip

        # int64: a row number times its width exceeds 2**31; offsets within a tile do not
        row64 = first_row.to(tl.int64)
        width = 2 * N if GATED else N
        bias_row, out_row, pre_row = bias_ptr, out_ptr, pre_ptr
        if bias_ptr is not None:
            bias_row = bias_ptr + expert * width
        if out_ptr is not None:
            out_row = out_ptr + (row64 + split * num_rows.to(tl.int64)) * N
        if pre_ptr is not None:
            pre_row = pre_ptr + row64 * width
        _finish(
            acc, acc_up, bias_row, out_row, pre_row, end - first_row, first_col, N, split == 0,
            ACTIVATION, GATED, PARTS,
        )  # fmt: skip

    if ZERO_TAIL:
        tail = tl.load(expert_offsets_ptr + E)
        for split in tl.static_range(SPLITS):
            _zero_rows(out_ptr + split * num_rows.to(tl.int64) * N, tail, num_rows, N, BLOCK_M, BLOCK_N)
        if pre_ptr is not None:
            _zero_rows(pre_ptr, tail, num_rows, 2 * N if GATED else N, BLOCK_M, BLOCK_N)


@dataclass(frozen=True)
class _Plan:
    """Shared by all calls of one kind; a block is None where a pointer is used instead of a descriptor."""

    config: tuning.Config
    launch: Launch
    tiles_n: int
    max_programs: int
    x_block: list[int] | None
    weight_block: list[int] | None


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    weight_shape: tuple[int, int, int],
    x_strides: tuple[int, int],
    weight_strides: tuple[int, int, int],
    top_k: int,
    activation: str | None,
    gathered: bool,
    describe_x: bool,
    describe_weight: bool,
    zero_tail: bool,
    packed: tuple[str, int] | None,
    low_rank: tuple[int, ...] | None,
    precision: str,
    config: tuning.Config | None,
    gpu: tuning.Gpu,
) -> _Plan:
    num_experts, width, in_features = weight_shape
    is_gated = activation is not None and get_activation(activation).is_gated
    out_width = width // (1 + is_gated)
    if config is None:
        problem = tuning.Problem(
            "gemm", dtype, rows, out_width, in_features, num_experts, is_gated, gathered, activation is None,
            packed is not None, low_rank is not None,
        )  # fmt: skip
        config = tuning.get_config(problem, gpu)
    k_inner = weight_strides[2] == 1
    weight_block = [1, config.BLOCK_N, config.BLOCK_K] if k_inner else [1, config.BLOCK_K, config.BLOCK_N]
    # the up half of a gated tile could start at a column that is not 16-byte aligned
    describe_weight = describe_weight and (k_inner or not is_gated)
    launch = Launch(
        grouped_gemm_kernel,
        N=out_width,
        K=in_features,
        stride_x_s=x_strides[0],
        stride_x_k=x_strides[1],
        stride_w_e=weight_strides[0],
        stride_w_n=weight_strides[1],
        stride_w_k=weight_strides[2],
        **low_rank_constants(low_rank, config.BLOCK_N),
        **packed_constants(
            packed, config.BLOCK_K if k_inner else config.BLOCK_N, 0 if k_inner or not is_gated else out_width
        ),
        TOP_K=top_k,
        ACTIVATION=None if activation is None else get_activation(activation).spelled,
        GATED=is_gated,
        ZERO_TAIL=zero_tail,
        K_INNER=k_inner,
        EVEN_N=out_width % config.BLOCK_N == 0,
        EVEN_K=in_features % (config.BLOCK_K * config.SPLITS) == 0,
        INPUT_PRECISION=precision,
        PARTS=config.epilogue_parts(config.BLOCK_M, config.BLOCK_N, tuning.EPILOGUE_SUMS // (1 + is_gated)),
        E=num_experts,
        E_POW2=next_power_of_2(num_experts),
        **config.constants(),
    )
    return _Plan(
        config,
        launch,
        cdiv(out_width, config.BLOCK_N),
        gpu.sms * config.PER_SM,
        [config.BLOCK_M, config.BLOCK_K] if describe_x else None,
        weight_block if describe_weight else None,
    )


def launch_gemm(
    x: Tensor,
    weight: Tensor | Packed,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    top_k: int,
    activation: str | None,
    *,
    low_rank: LowRank | None = None,
    keep_out: bool = True,
    keep_pre: bool = False,
    zero_tail: bool = True,
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """-> out and pre-activation, empty where not kept; out is (SPLITS, S, N) fp32 where k was split.

    With `low_rank` the product is x @ weight.T + u @ v.T, in one sum. Without `zero_tail`, rows past the last
    expert's end are not written.
    """
    if activation is not None and get_activation(activation).is_interleaved:
        # one plain product of the weight as it is stored: a tile of every second column is no block that the
        # copy engine reads
        z, _ = launch_gemm(
            x, weight, expert_offsets, bias, permutation, top_k, None,
            low_rank=low_rank, zero_tail=zero_tail, config=config,
        )  # fmt: skip
        z = sum_rows(z, x.dtype) if z.ndim == 3 else z
        return activate(z, activation) if keep_out else x.new_empty(0), z if keep_pre else x.new_empty(0)
    gathered = permutation is not None
    num_rows = permutation.shape[0] if gathered else x.shape[0]
    num_experts, width, _ = weight.shape
    out_width = width // 2 if activation is not None and get_activation(activation).is_gated else width
    if num_rows * width == 0:
        empty = x.new_empty(0)
        return x.new_empty(num_rows, out_width) if keep_out else empty, (
            x.new_empty(num_rows, width) if keep_pre else empty
        )
    gpu = tuning.gpu_of(x.device)
    is_packed = isinstance(weight, Packed)
    stored = weight if weight.stride()[2] == 1 else weight.transpose(1, 2)  # its rows as stored in memory
    plan = _plan(
        x.device, x.dtype, tuning.bucket(num_rows), weight.shape, x.stride(), weight.stride(), top_k,
        activation, gathered, not gathered and can_describe(x, gpu.has_tma),
        not is_packed and can_describe(stored, gpu.has_tma), zero_tail,
        weight.kind if is_packed else None, low_rank_key(low_rank), input_precision(x.dtype), config, gpu,
    )  # fmt: skip
    num_splits = plan.config.SPLITS
    out, pre = None, x.new_empty(num_rows, width) if keep_pre else None
    if keep_out and num_splits > 1:
        out = x.new_empty(num_splits, num_rows, out_width, dtype=torch.float32)
    elif keep_out:
        out = x.new_empty(num_rows, out_width)
    tiles = upper_bound(num_rows, num_experts, plan.config.BLOCK_M) * plan.tiles_n * num_splits
    plan.launch(
        min(plan.max_programs, tiles),
        None if plan.x_block else x,
        describe(x, plan.x_block) if plan.x_block else None,
        None if plan.weight_block else weight.data if is_packed else weight,
        describe(stored, plan.weight_block) if plan.weight_block else None,
        *(weight.pointers() if is_packed else (None, None, None)),
        *(low_rank or (None, None)),
        None if bias is None else bias.contiguous(),
        expert_offsets,
        permutation,
        out,
        pre,
        num_rows,
    )
    return x.new_empty(0) if out is None else out, x.new_empty(0) if pre is None else pre


@on_device_of_first
def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """-> (out, pre_activation); without an activation the second is empty."""
    return multiply(x, weight, expert_offsets, bias, permutation, top_k, activation)


def multiply(
    x: Tensor,
    weight: Tensor | Packed,
    expert_offsets: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    top_k: int,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """`grouped_gemm`, also with a weight in four bits."""
    out, pre = launch_gemm(
        x, weight, expert_offsets, bias, permutation, top_k, activation, keep_pre=activation is not None
    )
    return sum_rows(out, x.dtype) if out.ndim == 3 else out, pre


@on_device_of_first
def grouped_gemm_weight_grad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    inverse_permutation: Tensor | None,
    top_k: int,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """-> grad_weight (E, N, K) and grad_bias (E, N); without `need_bias` the second is empty."""
    return launch_weight_grad(grad, x, expert_offsets, permutation, top_k, need_bias)
