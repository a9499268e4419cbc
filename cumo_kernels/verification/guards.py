"""Guarded memory: all tensors of a backend lie between NaNs, which must not change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cumo_kernels import dispatch

GUARD = 4096  # bytes on either side; more than one tile's row
FILL = 0xFF  # every byte: NaN in every float format, -1 in every integer one
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class _Guarded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.buffers: list[tuple[Tensor, int, int]] = []  # bytes, the tensor's first byte and its end

    def place(self, tensor: Tensor, copy: bool) -> Tensor:
        """A tensor of the same shape, strides and alignment between guards, with the same values or NaN."""
        if tensor.numel() == 0:
            return tensor
        size = tensor.element_size()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = GUARD + tensor.data_ptr() % 256
        length = begin + extent * size + GUARD
        buffer = torch.full((length,), FILL, dtype=torch.uint8, device=tensor.device)
        flat = buffer[begin : begin + extent * size].view(tensor.dtype)
        if copy:
            flat.copy_(tensor.as_strided((extent,), (1,)))
        self.buffers.append((buffer, begin, begin + extent * size))
        return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.place(out, copy=False) if func in _ALLOCATIONS else out

    def overwritten(self) -> int:
        """Number of bytes outside all tensors that changed."""
        return sum(
            int((part != FILL).sum())
            for buffer, begin, end in self.buffers
            for part in (buffer[:begin], buffer[end:])
        )


def _guarded(implementation: Callable, op: str) -> Callable:
    def call(*args):
        mode = _Guarded()
        placed = [mode.place(a, copy=True) if isinstance(a, Tensor) else a for a in args]
        given = [buffer.clone() for buffer, _, _ in mode.buffers]
        with mode:
            out = implementation(*placed)
        if mode.overwritten():
            raise AssertionError(f"{op} wrote {mode.overwritten()} bytes outside its tensors")
        for before, (after, _, _) in zip(given, mode.buffers, strict=False):
            if not torch.equal(before, after):
                raise AssertionError(f"{op} changed an argument")
        return out

    return call


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Inside, all arguments and allocations of a backend function are in guarded memory.

    A read outside a tensor, or before a write, then gives a NaN in the result. A write outside a tensor or
    into an argument raises an AssertionError.
    """
    plain = dispatch.implementation
    dispatch.implementation = lambda backend, op: _guarded(plain(backend, op), f"{backend}.{op}")
    try:
        yield
    finally:
        dispatch.implementation = plain
