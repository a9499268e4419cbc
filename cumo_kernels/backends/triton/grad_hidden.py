"""Backward through the down projection and the activation (Triton), in one kernel.

    h[p] = g[p] @ down_proj[e]        g[p] = grad[token(p)]   down_proj (E, O, I)   h (S, I)
    dz = w h act'(z)                  weighted = w a          dots = <h, a>         w = weight of slot p

h exists only as a tile in registers: the epilogue reads the pre-activation z, recomputes a = act(z), and
writes the inputs of the weight gradients and of the routing weights' gradient. For a gated activation z and
dz are (S, 2I), gate first. 2 * S * O * I FLOPs; reads z and writes dz and weighted once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.triton.common import (
    act_and_grad,
    dot,
    gate_offset,
    input_precision,
    linear,
    linear_backward,
    narrow,
    up_offset,
    wait_for_earlier,
)
from cumo_kernels.backends.triton.launch import Launch, can_describe, cdiv, describe, next_power_of_2, planned
from cumo_kernels.backends.triton.packed import (
    LowRank,
    Packed,
    add_low_rank,
    load_operand,
    low_rank_constants,
    low_rank_key,
    packed_constants,
)
from cumo_kernels.backends.triton.tiles import count_tiles, find_tile, halves, load_rows, upper_bound
from cumo_kernels.tiles import tuning

HIDDEN_SUMS = 16  # this epilogue holds z, act and act' for every sum that it finishes


@triton.jit
def _finish_hidden(
    h,  # (BLOCK_M, columns) fp32
    dots,  # (BLOCK_M,) fp32: <h, a> over the columns before these
    weights,  # (BLOCK_M,) fp32
    z_ptr,  # (rows, N) or, gated, (rows, 2N), its first row the tile's
    dz_ptr,  # like z, or None
    weighted_ptr,  # (rows, N), its first row the tile's, or None: gets w * a
    rows_left,
    first_col,
    N,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Backward of the activation for one tile, in PARTS column parts. -> dots"""
    if PARTS > 1:
        left, right = halves(h)
        half: tl.constexpr = h.shape[1] // 2
        dots = _finish_hidden(
            left, dots, weights, z_ptr, dz_ptr, weighted_ptr, rows_left, first_col, N,
            ACTIVATION, GATED, EVEN_N, PARTS // 2,
        )  # fmt: skip
        dots = _finish_hidden(
            right, dots, weights, z_ptr, dz_ptr, weighted_ptr, rows_left, first_col + half, N,
            ACTIVATION, GATED, EVEN_N, PARTS // 2,
        )  # fmt: skip
    else:
        rows = tl.arange(0, h.shape[0])[:, None]
        cols = (first_col + tl.arange(0, h.shape[1]))[None, :]
        mask = rows < rows_left
        if not EVEN_N:
            mask = mask & (cols < N)
        if GATED:
            offsets = rows * (2 * N) + gate_offset(cols, ACTIVATION)
        else:
            offsets = rows * N + cols
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        a, slope = act_and_grad(z, ACTIVATION)
        weighted_h = h * weights[:, None]
        if GATED:
            up_ptrs = z_ptr + up_offset(N, ACTIVATION) + offsets
            up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
            if dz_ptr is not None:
                through = linear_backward(weighted_h * a, up, ACTIVATION)
                up_ptrs = dz_ptr + up_offset(N, ACTIVATION) + offsets
                tl.store(up_ptrs, narrow(through, dz_ptr.dtype.element_ty), mask=mask)
            up = linear(up, ACTIVATION)
            a = a * up
            slope = slope * up
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, narrow(weighted_h * slope, dz_ptr.dtype.element_ty), mask=mask)
        if weighted_ptr is not None:
            weighted = narrow(weights[:, None] * a, weighted_ptr.dtype.element_ty)
            tl.store(weighted_ptr + (rows * N + cols), weighted, mask=mask)
        dots += tl.sum(h * a, 1)
    return dots


@triton.jit
def grad_hidden_kernel(
    grad_ptr,  # (T, K), K the output size; with SORTED (S, K); None with a descriptor
    grad_desc,  # (S, K) or None
    weight_ptr,  # (E, K, N), N the intermediate size; None with a descriptor; with FORMAT two elements a byte
    weight_desc,  # the same, innermost dimension as stored, or None
    scales_ptr,  # with FORMAT: (E, K, N / GROUP); else None
    zeros_ptr,  # like scales, or None
    codes_ptr,  # (16,) fp32, or None
    u_ptr,  # (S, R) in expert order, or None
    v_ptr,  # (E, N, R): u @ v.T is added to h
    expert_offsets_ptr,  # (E + 1,) int32
    permutation_ptr,  # (S,) int32
    topk_weights_ptr,  # (S,) fp32 by slot
    z_ptr,  # (S, N) or, gated, (S, 2N)
    dz_ptr,  # like z, or None
    weighted_ptr,  # (S, N) or None
    dots_ptr,  # (S, cdiv(N, BLOCK_N)) fp32 or None: <h, a> by column tile
    N,
    K,
    stride_grad_t,
    stride_grad_k,
    stride_w_e,
    stride_w_k,
    stride_w_n,
    R,
    stride_v_e,
    stride_v_n,
    stride_v_r,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
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
    FLATTEN: tl.constexpr,
):
    wait_for_earlier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_ends = count_tiles(expert_offsets_ptr, tiles_n, E, E_POW2, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0), flatten=FLATTEN):
        expert, end, first_row, tile_n, _ = find_tile(
            tile, tile_ends, expert_offsets_ptr, tiles_n, 1, BLOCK_M, GROUP_M
        )
        rows = first_row + tl.arange(0, BLOCK_M)
        first_col = tile_n * BLOCK_N
        row_ptrs = None
        if grad_desc is None:
            source = tl.minimum(rows, end - 1)
            if not SORTED:
                source = tl.load(permutation_ptr + source) // TOP_K
            row_ptrs = grad_ptr + source.to(tl.int64)[:, None] * stride_grad_t
        expert_ptr, expert_scales, expert_zeros = None, scales_ptr, zeros_ptr
        if weight_desc is None:
            expert_ptr = weight_ptr + expert.to(tl.int64) * stride_w_e
        if FORMAT is not None:
            stride_scales = stride_w_e // (GROUP // 2)  # stride_w_e is in bytes
            expert_scales = scales_ptr + expert.to(tl.int64) * stride_scales
            if zeros_ptr is not None:
                expert_zeros = zeros_ptr + expert.to(tl.int64) * stride_scales

        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            g = load_rows(row_ptrs, grad_desc, first_row, k, K, stride_grad_k, BLOCK_K, EVEN_K)
            b = load_operand(
                expert_ptr, weight_desc, expert_scales, expert_zeros, codes_ptr,
                expert, first_col, k, N, K, stride_w_n, stride_w_k,
                FORMAT, GROUP, SHARED, 1, K_INNER, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, g.dtype,
            )  # fmt: skip
            h = dot(g, b, h, INPUT_PRECISION)
        if u_ptr is not None:
            expert_v = v_ptr + expert.to(tl.int64) * stride_v_e
            h = add_low_rank(
                h, u_ptr, expert_v, first_row, end, first_col, N, R, R, stride_v_n, stride_v_r,
                INPUT_PRECISION, BLOCK_R,
            )  # fmt: skip

        # loaded here, so that it does not occupy registers during the loop
        slots = tl.load(permutation_ptr + tl.minimum(rows, end - 1), volatile=True)
        weights = tl.load(topk_weights_ptr + slots)
        # int64: a row number times its width exceeds 2**31; offsets within a tile do not
        row64 = first_row.to(tl.int64)
        width = 2 * N if GATED else N
        dz_row, weighted_row = dz_ptr, weighted_ptr
        if dz_ptr is not None:
            dz_row = dz_ptr + row64 * width
        if weighted_ptr is not None:
            weighted_row = weighted_ptr + row64 * N
        dots = _finish_hidden(
            h, tl.zeros((BLOCK_M,), tl.float32), weights, z_ptr + row64 * width, dz_row, weighted_row,
            end - first_row, first_col, N, ACTIVATION, GATED, EVEN_N, PARTS,
        )  # fmt: skip
        if dots_ptr is not None:
            tl.store(dots_ptr + rows.to(tl.int64) * tiles_n + tile_n, dots, mask=rows < end)


@planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    weight_shape: tuple[int, int, int],
    grad_strides: tuple[int, int],
    weight_strides: tuple[int, int, int],
    top_k: int,
    is_sorted: bool,
    activation: str,
    describe_grad: bool,
    describe_weight: bool,
    packed: tuple[str, int] | None,
    low_rank: tuple[int, ...] | None,
    precision: str,
    config: tuning.Config | None,
    gpu: tuning.Gpu,
) -> tuple[tuning.Config, Launch, list[int] | None, list[int] | None]:
    """-> config, launch, and the descriptor blocks of grad and of the weight, if they have descriptors."""
    num_experts, out_features, width = weight_shape
    row = get_activation(activation)
    gated = row.is_gated
    if config is None:
        problem = tuning.Problem(
            "grad_hidden", dtype, rows, width, out_features, num_experts, gated, not is_sorted, False,
            packed is not None, low_rank is not None,
        )  # fmt: skip
        config = tuning.get_config(problem, gpu)
    k_inner = _is_k_inner(weight_strides)
    block = [1, config.BLOCK_N, config.BLOCK_K] if k_inner else [1, config.BLOCK_K, config.BLOCK_N]
    launch = Launch(
        grad_hidden_kernel,
        N=width,
        K=out_features,
        stride_grad_t=grad_strides[0],
        stride_grad_k=grad_strides[1],
        stride_w_e=weight_strides[0],
        stride_w_k=weight_strides[1],
        stride_w_n=weight_strides[2],
        **low_rank_constants(low_rank, config.BLOCK_N),
        **packed_constants(packed, config.BLOCK_K if k_inner else config.BLOCK_N),
        TOP_K=top_k,
        SORTED=is_sorted,
        ACTIVATION=row.spelled,
        GATED=gated,
        K_INNER=k_inner,
        EVEN_N=width % config.BLOCK_N == 0,
        EVEN_K=out_features % config.BLOCK_K == 0,
        INPUT_PRECISION=precision,
        PARTS=config.epilogue_parts(config.BLOCK_M, config.BLOCK_N, HIDDEN_SUMS),
        E=num_experts,
        E_POW2=next_power_of_2(num_experts),
        **config.constants("SPLITS"),
    )
    grad_block = [config.BLOCK_M, config.BLOCK_K] if describe_grad else None
    return config, launch, grad_block, block if describe_weight else None


def _is_k_inner(weight_strides: tuple[int, int, int]) -> bool:
    return weight_strides[1] == 1 and weight_strides[2] != 1


def launch_grad_hidden(
    grad: Tensor,
    topk_weights: Tensor,
    permutation: Tensor,
    expert_offsets: Tensor,
    down_proj: Tensor | Packed,
    z: Tensor,
    activation: str,
    *,
    low_rank: LowRank | None = None,
    need_dz: bool,
    need_weighted: bool,
    need_dots: bool,
    is_sorted: bool = False,
    config: tuning.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dz like z, w * a (S, I), and <h, a> by column tile (S, tiles) fp32; empty where not needed.

    `grad` is (T, O), or with `is_sorted` (S, O) in expert order. With `low_rank` h gets u @ v.T too.
    """
    num_rows = permutation.shape[0]
    num_experts, _, width = down_proj.shape
    z = z.contiguous()  # a tensor from a saved-tensor hook may not be
    gpu = tuning.gpu_of(grad.device)
    is_packed = isinstance(down_proj, Packed)
    stored = down_proj.transpose(1, 2) if _is_k_inner(down_proj.stride()) else down_proj
    config, launch, grad_block, weight_block = _plan(
        grad.device, grad.dtype, tuning.bucket(num_rows), down_proj.shape, grad.stride(), down_proj.stride(),
        topk_weights.shape[1], is_sorted, activation, is_sorted and can_describe(grad, gpu.has_tma),
        not is_packed and can_describe(stored, gpu.has_tma), down_proj.kind if is_packed else None,
        low_rank_key(low_rank), input_precision(grad.dtype), config, gpu,
    )  # fmt: skip
    tiles_n = cdiv(width, config.BLOCK_N)
    dz = torch.empty_like(z) if need_dz else grad.new_empty(0)
    weighted = grad.new_empty(num_rows, width) if need_weighted else grad.new_empty(0)
    dots = topk_weights.new_empty(num_rows if need_dots else 0, tiles_n)
    if num_rows * width:
        launch(
            min(gpu.sms * config.PER_SM, upper_bound(num_rows, num_experts, config.BLOCK_M) * tiles_n),
            None if grad_block else grad,
            describe(grad, grad_block) if grad_block else None,
            None if weight_block else down_proj.data if is_packed else down_proj,
            describe(stored, weight_block) if weight_block else None,
            *(down_proj.pointers() if is_packed else (None, None, None)),
            *(low_rank or (None, None)),
            expert_offsets,
            permutation,
            topk_weights,
            z,
            dz if need_dz else None,
            weighted if need_weighted else None,
            dots if need_dots else None,
        )
    return dz, weighted, dots
