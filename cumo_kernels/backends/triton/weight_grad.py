"""The k-grouped GEMM (Triton): the reduction runs over each expert's rows; gradients of weights and biases.

    grad_weight[e] = grad_e.T @ x_e          grad (S, N)   x (S, K)   grad_weight (E, N, K)
    grad_bias[e] = sum of grad_e             grad_bias (E, N)

Rows of e are [expert_offsets[e], expert_offsets[e + 1]); without rows the sums are exactly zero. Either
operand may be gathered from token order. If there are few tiles with very many rows each, the rows are split
and the parts added in a fixed order (tuning.splits). Whole blocks of rows need no mask and may be loaded by
the copy engine. The last, partial block is masked in both operands, since the rows after it belong to another
expert and may hold anything. 2 * S * N * K FLOPs. The bias gradient of weighted rows is in bias_grad.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.backends.triton.common import dot, input_precision, narrow, wait_for_earlier
from cumo_kernels.backends.triton.launch import Launch, can_describe, cdiv, describe, planned
from cumo_kernels.backends.triton.tiles import grouped_order, halves, sum_rows
from cumo_kernels.tiles import tuning


@triton.jit
def _load_ragged(
    ptr,  # (rows, width)
    desc,  # the same, or None
    sources,  # (BLOCK_M,) rows to take
    first_row,
    rows_left,
    first_col,
    width,
    stride_s,
    stride_c,
    MASK_ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A (BLOCK_M, BLOCK_C) tile of an operand; with MASK_ROWS `rows_left` rows, then zeros."""
    if desc is not None and not MASK_ROWS:
        tile = desc.load([first_row, first_col])
    else:
        cols = (first_col + tl.arange(0, BLOCK_C))[None, :]
        ptrs = ptr + sources.to(tl.int64)[:, None] * stride_s + cols.to(tl.int64) * stride_c
        if MASK_ROWS:
            inside = (tl.arange(0, BLOCK_M) < rows_left)[:, None]
            tile = tl.load(ptrs, mask=inside & (cols < width), other=0.0)
        elif EVEN:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=cols < width, other=0.0)
    return tile


@triton.jit
def _add_rows(
    acc,  # (BLOCK_N, BLOCK_K) fp32
    acc_bias,  # (BLOCK_N, 16) fp32, the sum of its columns is the bias gradient
    slots,  # (BLOCK_M,) permutation[rows], or the rows themselves
    grad_ptr, grad_desc, x_ptr, x_desc,
    row, end, first_n, first_k, N, K,
    stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
    TOP_K: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_X: tl.constexpr,
    WITH_BIAS: tl.constexpr, MASK_ROWS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of the sum: the BLOCK_M rows from `row` on."""
    rows = row + tl.arange(0, BLOCK_M)
    grad = _load_ragged(
        grad_ptr, grad_desc, slots // TOP_K if GATHER_GRAD else rows, row, end - row, first_n, N,
        stride_grad_s, stride_grad_n, MASK_ROWS, EVEN_N, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    x = _load_ragged(
        x_ptr, x_desc, slots // TOP_K if GATHER_X else rows, row, end - row, first_k, K,
        stride_x_s, stride_x_k, MASK_ROWS, EVEN_K, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    acc = dot(grad.T, x, acc, INPUT_PRECISION)
    if WITH_BIAS and INPUT_PRECISION == "tf32":
        # a TF32 dot would truncate its operands to 10 bits
        acc_bias += tl.where(tl.arange(0, 16)[None, :] == 0, tl.sum(grad.to(tl.float32), 0)[:, None], 0.0)
    elif WITH_BIAS:
        # the tensor cores compute the bias gradient too: the tile times a column of ones
        columns = tl.arange(0, 16)[None, :]
        ones = tl.broadcast_to((columns == 0).to(tl.float32), (BLOCK_M, 16)).to(x.dtype)
        acc_bias = dot(grad.T, ones, acc_bias, INPUT_PRECISION)
    return acc, acc_bias


@triton.jit
def _sum_rows(
    grad_ptr, grad_desc, x_ptr, x_desc, permutation_ptr,
    begin, end, first_n, first_k, N, K,
    stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
    TOP_K: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_X: tl.constexpr, WITH_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over the rows [begin, end): whole blocks without a mask, then the rest with one."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    acc_bias = tl.zeros((BLOCK_N, 16), tl.float32)
    whole = begin + (end - begin) // BLOCK_M * BLOCK_M
    slots = begin + tl.arange(0, BLOCK_M)
    if permutation_ptr is not None:
        slots = tl.load(permutation_ptr + slots, mask=slots < end, other=0)
    for row in tl.range(begin, whole, BLOCK_M):
        next_slots = row + BLOCK_M + tl.arange(0, BLOCK_M)
        if permutation_ptr is not None:
            # one step ahead, so that loading a row does not wait for its row number
            next_slots = tl.load(permutation_ptr + next_slots, mask=next_slots < end, other=0)
        acc, acc_bias = _add_rows(
            acc, acc_bias, slots, grad_ptr, grad_desc, x_ptr, x_desc,
            row, end, first_n, first_k, N, K,
            stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
            TOP_K, GATHER_GRAD, GATHER_X, WITH_BIAS, False, EVEN_N, EVEN_K, INPUT_PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        slots = next_slots
    if whole < end:
        acc, acc_bias = _add_rows(
            acc, acc_bias, slots, grad_ptr, grad_desc, x_ptr, x_desc,
            whole, end, first_n, first_k, N, K,
            stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
            TOP_K, GATHER_GRAD, GATHER_X, WITH_BIAS, True, EVEN_N, EVEN_K, INPUT_PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc, acc_bias


@triton.jit
def _store(
    acc,  # (BLOCK_N, columns) fp32
    out_ptr,  # (rows, K), its first row the tile's
    rows_left,
    first_k,
    K,
    PARTS: tl.constexpr,
):
    """out = acc, in PARTS column parts: a whole tile does not fit in registers."""
    if PARTS > 1:
        left, right = halves(acc)
        half: tl.constexpr = acc.shape[1] // 2
        _store(left, out_ptr, rows_left, first_k, K, PARTS // 2)
        _store(right, out_ptr, rows_left, first_k + half, K, PARTS // 2)
    else:
        rows = tl.arange(0, acc.shape[0])[:, None]
        cols = (first_k + tl.arange(0, acc.shape[1]))[None, :]
        mask = (rows < rows_left) & (cols < K)
        tl.store(out_ptr + (rows * K + cols), narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    grad_ptr,  # (S, N), or (T, N) with GATHER_GRAD
    grad_desc,  # (S, N) or None
    x_ptr,  # (S, K), or (T, K) with GATHER_X
    x_desc,  # (S, K) or None
    expert_offsets_ptr,  # (E + 1,) int32
    permutation_ptr,  # (S,) int32 or None
    out_ptr,  # (E, N, K); when rows are split (SPLITS, E, N, K) fp32
    bias_out_ptr,  # (E, N); when rows are split (SPLITS, E, N) fp32; or None
    N,
    K,
    stride_grad_s,
    stride_grad_n,
    stride_x_s,
    stride_x_k,
    TOP_K: tl.constexpr,
    GATHER_GRAD: tl.constexpr,
    GATHER_X: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    wait_for_earlier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), E * SPLITS * tiles_n * tiles_k, tl.num_programs(0)):
        part = tile // (tiles_n * tiles_k)
        tile_n, tile_k = grouped_order(tile % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP_M)
        expert = part // SPLITS
        split = part % SPLITS
        begin = tl.load(expert_offsets_ptr + expert)
        end = tl.load(expert_offsets_ptr + expert + 1)
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(end - begin, BLOCK_M), SPLITS) * BLOCK_M
            begin = tl.minimum(begin + split * share, end)
            end = tl.minimum(begin + share, end)
        first_n = tile_n * BLOCK_N
        first_k = tile_k * BLOCK_K
        # int64: SPLITS * E * N * K exceeds 2**31
        slab = split.to(tl.int64) * E + expert
        cols_n = first_n + tl.arange(0, BLOCK_N)
        if bias_out_ptr is None:
            acc, _ = _sum_rows(
                grad_ptr, grad_desc, x_ptr, x_desc, permutation_ptr,
                begin, end, first_n, first_k, N, K,
                stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
                TOP_K, GATHER_GRAD, GATHER_X, False, EVEN_N, EVEN_K, INPUT_PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        elif tile_k == 0:
            acc, acc_bias = _sum_rows(
                grad_ptr, grad_desc, x_ptr, x_desc, permutation_ptr,
                begin, end, first_n, first_k, N, K,
                stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
                TOP_K, GATHER_GRAD, GATHER_X, True, EVEN_N, EVEN_K, INPUT_PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            bias = narrow(tl.sum(acc_bias, 1), bias_out_ptr.dtype.element_ty)
            tl.store(bias_out_ptr + slab * N + cols_n, bias, mask=cols_n < N)
        else:
            acc, _ = _sum_rows(
                grad_ptr, grad_desc, x_ptr, x_desc, permutation_ptr,
                begin, end, first_n, first_k, N, K,
                stride_grad_s, stride_grad_n, stride_x_s, stride_x_k,
                TOP_K, GATHER_GRAD, GATHER_X, False, EVEN_N, EVEN_K, INPUT_PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        _store(acc, out_ptr + (slab * N + first_n) * K, N - first_n, first_k, K, PARTS)


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    num_experts: int,
    width: int,
    in_features: int,
    columns: int,
    grad_strides: tuple[int, int],
    x_strides: tuple[int, int],
    top_k: int,
    gather_grad: bool,
    gather_x: bool,
    describe_grad: bool,
    describe_x: bool,
    precision: str,
    config: tuning.Config | None,
    gpu: tuning.Gpu,
) -> tuple[tuning.Config, Launch, int]:
    """-> config, launch, programs."""
    if config is None:
        gathered = gather_grad or gather_x
        problem = tuning.Problem(
            "weight_grad", dtype, rows, width, in_features, num_experts, False, gathered, True
        )
        config = tuning.get_config(problem, gpu)
    launch = Launch(
        weight_grad_kernel,
        N=width,
        K=columns,
        stride_grad_s=grad_strides[0],
        stride_grad_n=grad_strides[1],
        stride_x_s=x_strides[0],
        stride_x_k=x_strides[1],
        TOP_K=top_k,
        GATHER_GRAD=gather_grad,
        GATHER_X=gather_x,
        EVEN_N=width % config.BLOCK_N == 0,
        EVEN_K=columns % config.BLOCK_K == 0,
        INPUT_PRECISION=precision,
        PARTS=config.epilogue_parts(config.BLOCK_N, config.BLOCK_K),
        E=num_experts,
        **config.constants("FLATTEN"),
    )
    tiles = cdiv(width, config.BLOCK_N) * cdiv(columns, config.BLOCK_K) * num_experts * config.SPLITS
    return config, launch, min(gpu.sms * config.PER_SM, tiles)


def launch_weight_grad(
    grad: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor | None,
    top_k: int,
    need_bias: bool,
    *,
    need_weight: bool = True,
    gather: str = "x",
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """-> grad_weight (E, N, K), grad_bias (E, N), empty if not needed; `permutation` gathers "x" or "grad".

    The bias alone is summed in the same order as with the weight, from one column of x.
    """
    num_experts = expert_offsets.shape[0] - 1
    width, in_features = grad.shape[1], x.shape[1]
    x = x if need_weight else x[:, :1]
    gather_grad = permutation is not None and gather == "grad"
    gather_x = permutation is not None and gather == "x"
    num_rows = grad.shape[0] if gather_x else x.shape[0]
    gpu = tuning.gpu_of(x.device)
    describe_grad = not gather_grad and can_describe(grad, gpu.has_tma)
    describe_x = not gather_x and can_describe(x, gpu.has_tma)
    config, launch, programs = _plan(
        x.device, x.dtype, tuning.bucket(num_rows), num_experts, width, in_features, x.shape[1],
        grad.stride(), x.stride(), top_k, gather_grad, gather_x, describe_grad, describe_x,
        input_precision(x.dtype), config, gpu,
    )  # fmt: skip
    split = config.SPLITS > 1
    make = lambda *size: x.new_empty(
        (config.SPLITS, *size) if split else size, dtype=torch.float32 if split else x.dtype
    )
    grad_weight = make(num_experts, width, x.shape[1])
    grad_bias = make(num_experts, width) if need_bias else x.new_empty(0)
    if grad_weight.numel() == 0:
        return grad_weight, grad_bias
    launch(
        programs,
        grad,
        describe(grad, [config.BLOCK_M, config.BLOCK_N]) if describe_grad else None,
        x,
        describe(x, [config.BLOCK_M, config.BLOCK_K]) if describe_x else None,
        expert_offsets,
        permutation,
        grad_weight,
        grad_bias if need_bias else None,
    )
    if split:
        grad_weight = sum_rows(grad_weight, x.dtype) if need_weight else grad_weight
        grad_bias = sum_rows(grad_bias, x.dtype) if need_bias else grad_bias
    return grad_weight if need_weight else x.new_empty(0), grad_bias
