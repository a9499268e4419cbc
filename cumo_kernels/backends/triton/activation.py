"""Activation (Triton): act(z), or act(gate) * up, computed in fp32.

    out[s] = act(x[s])                          x (S, I)    out (S, I)
    out[s] = act(x[s, :I]) * x[s, I:]           x (S, 2I)   out (S, I)     gated

One program per tile of rows x columns. Memory bound: 2 * S * I elements (3 gated) forward, 3 * S * I (5
gated) backward, moved in 16-byte pieces when I allows it.

Contract: cumo_kernels/ops/activation.py. Reference: cumo_kernels/backends/reference/activation.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels.activations import get_activation
from cumo_kernels.backends.triton.common import (
    act,
    act_and_grad,
    gate_offset,
    linear,
    linear_backward,
    narrow,
    tile_of_rows,
    up_offset,
    wait_for_earlier,
)
from cumo_kernels.backends.triton.launch import Launch, cdiv, on_device_of_first, planned


@triton.jit
def _tile(rows, cols, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr):
    """-> row numbers (BLOCK_S, 1) and column numbers (1, BLOCK_I) of this program, int64, and their mask."""
    col_tiles = tl.cdiv(cols, BLOCK_I)
    # int64: one long row may pass 2**31 elements
    pid = tl.program_id(0).to(tl.int64)
    s = pid // col_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    i = pid % col_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    return s[:, None], i[None, :], (s < rows)[:, None] & (i < cols)[None, :]


@triton.jit(do_not_specialize=["S"])
def _activate_kernel(
    x_ptr,  # (S, I), or (S, 2I) if gated
    out_ptr,  # (S, I)
    S,
    I,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    wait_for_earlier()
    s, i, mask = _tile(S, I, BLOCK_S, BLOCK_I)
    if GATED:
        x_ptrs = x_ptr + s * (2 * I) + gate_offset(i, NAME)
        out = act(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), NAME)
        out *= linear(tl.load(x_ptrs + up_offset(I, NAME), mask=mask, other=0.0).to(tl.float32), NAME)
    else:
        out = act(tl.load(x_ptr + s * I + i, mask=mask, other=0.0).to(tl.float32), NAME)
    tl.store(out_ptr + s * I + i, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S"])
def _activate_backward_kernel(
    grad_ptr,  # (S, I)
    x_ptr,  # (S, I), or (S, 2I) if gated
    dx_ptr,  # like x
    S,
    I,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    wait_for_earlier()
    s, i, mask = _tile(S, I, BLOCK_S, BLOCK_I)
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    grad = tl.load(grad_ptr + s * I + i, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        x_ptrs = x_ptr + s * (2 * I) + gate_offset(i, NAME)
        dx_ptrs = dx_ptr + s * (2 * I) + gate_offset(i, NAME)
        value, slope = act_and_grad(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), NAME)
        up = tl.load(x_ptrs + up_offset(I, NAME), mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptrs, narrow(grad * linear(up, NAME) * slope, DTYPE), mask=mask)
        through = linear_backward(grad * value, up, NAME)
        tl.store(dx_ptrs + up_offset(I, NAME), narrow(through, DTYPE), mask=mask)
    else:
        x = tl.load(x_ptr + s * I + i, mask=mask, other=0.0).to(tl.float32)
        _, slope = act_and_grad(x, NAME)
        tl.store(dx_ptr + s * I + i, narrow(grad * slope, DTYPE), mask=mask)


@planned
def _plan(kernel, device: torch.device, name: str, width: int, block: tuple[int, int]) -> Launch:
    row = get_activation(name)
    return Launch(kernel, I=width, NAME=row.spelled, GATED=row.is_gated, BLOCK_S=block[0], BLOCK_I=block[1])


def _launch(kernel, x: Tensor, name: str, *tensors: Tensor) -> None:
    """Launch over S rows of width I; a plain activation gets one long row if rows are not 16-byte aligned."""
    width = x.shape[-1]
    rows = x.numel() // width
    row = get_activation(name)
    if row.is_gated:
        width //= 2
    elif width * x.element_size() % 16:  # one plan per number of tokens, but still 16 bytes at a time
        rows, width = 1, x.numel()
    block_s, block_i = tile_of_rows(width, x.element_size(), rows)
    if row.is_interleaved and block_i > 256:  # each column has an address of its own, and they take registers
        block_i //= 2
    launch = _plan(kernel, x.device, name, width, (block_s, block_i))
    launch(cdiv(rows, block_s) * cdiv(width, block_i), *tensors, rows)


@on_device_of_first
def activate(x: Tensor, name: str) -> Tensor:
    is_gated = get_activation(name).is_gated
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if is_gated else x.shape[-1])
    if out.numel() == 0:
        return out
    _launch(_activate_kernel, x, name, x.contiguous(), out)
    return out


@on_device_of_first
def activate_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        _launch(_activate_backward_kernel, x, name, grad.contiguous(), x.contiguous(), dx)
    return dx
