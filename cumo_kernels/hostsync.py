"""Detects host synchronisation: inside `no_host_sync` a call that makes a GPU wait for the host raises.

It works on CPU tensors too, so that such calls are found without a GPU.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cumo_kernels.tracing import may_read, run_inside

_ATEN = torch.ops.aten
# the host must read their result, or its shape
_READS = {
    _ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN.equal, _ATEN.bincount,
    _ATEN._unique, _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive, _ATEN.is_nonzero,
}  # fmt: skip
_INDEXED = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_, _ATEN._unsafe_index}
_COPIES = {_ATEN._to_copy, _ATEN.copy_, _ATEN.copy}
# these read a CPU tensor's memory without a call of the dispatcher
_SILENT = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
INTERPRETER = "triton.runtime.interpreter"  # emulates a GPU and reads tensors on its behalf


class _Guard(threading.local):
    """Whether this thread is inside no_host_sync, where CPU tensors are treated as CUDA tensors."""

    def __init__(self):
        self.active = False


_guard = _Guard()


def values_at_hand(tensor: Tensor) -> bool:
    """Whether reading the values needs no sync and happens at run time (not while a graph is traced)."""
    return tensor.device.type == "cpu" and not _guard.active and may_read(tensor)


class HostSync(RuntimeError):
    """A call that must wait until a GPU's queue is empty."""


def _called_from(modules: tuple[str, ...]) -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


def _why(op, args: tuple, kwargs: dict) -> str | None:
    if op in _READS:
        return "the host reads its result"
    if op is _ATEN.repeat_interleave and isinstance(args[-1], Tensor) and "output_size" not in kwargs:
        return "its shape depends on data"
    if op in _INDEXED and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        return "with a mask as index, its shape depends on data"
    if op in _COPIES:
        source = args[1] if op is not _ATEN._to_copy else args[0]
        target = kwargs.get("device") if op is _ATEN._to_copy else args[0].device
        kinds = source.device.type, target and torch.device(target).type
        if kinds == ("cuda", "cpu"):
            return "it copies from the GPU to the host"
        if kinds == ("cpu", "cuda") and not source.is_pinned():
            return "it copies from the host's pageable memory, for which torch waits"
    return None


class _Excusing:
    def __init__(self, excused: tuple[str, ...]):
        super().__init__()
        self.excused = excused


class _Dispatched(_Excusing, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "cumo":  # one of our ops: check its implementation
            tensor = next(a for a in args if isinstance(a, Tensor))
            return run_inside(self, func, tensor.device.type, args, kwargs)
        reason = _why(func.overloadpacket, args, kwargs)
        if reason is not None and not _called_from(self.excused):
            raise HostSync(f"{func}: {reason}")
        return func(*args, **kwargs)


class _Called(_Excusing, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _SILENT and not _called_from(self.excused):
            raise HostSync(f"Tensor.{func.__name__}: the host reads the tensor")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync(*excused: str) -> Iterator[None]:
    """Inside, a call that makes a GPU wait for the host raises HostSync, on CPU tensors too.

    Not detected: what an operator does below torch's dispatcher (the loop of grouped_mm, the workspace of
    sort), and backward passes in other threads, as for CUDA tensors; torch.cuda.set_sync_debug_mode detects
    those.

    Args:
        excused: modules whose calls may wait, such as "transformers.masking_utils".
    """
    before, _guard.active = _guard.active, True
    try:
        excused = (INTERPRETER, *excused)
        with _Called(excused), _Dispatched(excused):
            yield
    finally:
        _guard.active = before
