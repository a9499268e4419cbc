"""Loads kernels while a CUDA graph is being captured.

The first launch of a kernel loads its module. While any thread captures in mode "global", torch's default,
the driver forbids loading in every thread: it returns error 900, and the capture fails. A thread may relax
its own mode for that, since loading is not part of the graph. Tested with a stub driver; not yet run on a
GPU.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def is_capturing() -> bool:
    """Whether the current stream is capturing; does not initialise CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@cache
def _exchange() -> Callable[[object], int]:
    return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode


def _swap(mode: ctypes.c_int) -> None:
    """Set this thread's capture mode to `mode`, which then holds the previous one."""
    code = _exchange()(ctypes.byref(mode))
    if code:
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode({mode.value}) returned error {code}")


@contextmanager
def loading() -> Iterator[None]:
    """Inside, this thread may load modules during a capture."""
    mode = ctypes.c_int(RELAXED)
    _swap(mode)
    try:
        yield
    finally:
        _swap(mode)
