"""Code that must not make a GPU wait for the host: inside `no_host_sync` a call that would is an error.

Works on CPU tensors too, so that what a GPU would wait for is found without one.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cumo_kernels.tracing import run_inside

_ATEN = torch.ops.aten
# their result, or its shape, is a number that the host has to read
_READS = {
    _ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN.equal, _ATEN.bincount,
    _ATEN._unique, _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive, _ATEN.is_nonzero,
}  # fmt: skip
_INDEXED = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_, _ATEN._unsafe_index}
_COPIES = {_ATEN._to_copy, _ATEN.copy_, _ATEN.copy}
# these read a CPU tensor's memory without a word to the dispatcher
_SILENT = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
INTERPRETER = "triton.runtime.interpreter"  # stands in for a GPU, and reads what a GPU would


_guarding = False  # inside no_host_sync CPU tensors stand for a GPU's


def values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at the values costs no sync and happens at run time (not while a graph is traced)."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not _guarding
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class HostSync(RuntimeError):
    """A call for which a GPU's queue has to run empty."""


def _called_from(modules: tuple[str, ...]) -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


def _why(op, args: tuple, kwargs: dict) -> str | None:
    if op in _READS:
        return "its result is read by the host"
    if op is _ATEN.repeat_interleave and isinstance(args[-1], Tensor) and "output_size" not in kwargs:
        return "its shape depends on data"
    if op in _INDEXED and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        return "a mask as an index makes a shape that depends on data"
    if op in _COPIES:
        source = args[1] if op is not _ATEN._to_copy else args[0]
        target = kwargs.get("device") if op is _ATEN._to_copy else args[0].device
        if source.device.type == "cuda" and target is not None and torch.device(target).type == "cpu":
            return "it copies from the GPU to the host"
    return None


class _Excusing:
    def __init__(self, excused: tuple[str, ...]):
        super().__init__()
        self.excused = excused


class _Dispatched(_Excusing, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "cumo":  # an op of ours: look inside
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

    Args:
        excused: modules whose calls may, "transformers.masking_utils".

    Not seen: what an operator does below torch's dispatcher (grouped_mm where it loops, sort's scratch), and
    backward passes that other threads run, as those of CUDA tensors; set_sync_debug_mode sees these there.
    """
    global _guarding
    before, _guarding = _guarding, True
    try:
        excused = (INTERPRETER, *excused)
        with _Called(excused), _Dispatched(excused):
            yield
    finally:
        _guarding = before
