"""Loading code while a CUDA graph is being captured.

The first launch of a kernel loads its module. While any thread captures in mode "global", torch's default,
the driver forbids that to every thread: error 900, and the capture is lost. A thread may lift it for
itself, since what it loads is no part of the graph. Tested with a stand-in for the driver; no GPU has run
it.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def is_capturing() -> bool:
    """Whether the current stream is; without a look at the driver where nothing has begun to use it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@cache
def _exchange() -> Callable[[object], int]:
    return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode


def _swap(mode: ctypes.c_int) -> None:
    """Set this thread's capture mode to `mode`, which then holds the former one."""
    code = _exchange()(ctypes.byref(mode))
    if code:
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode({mode.value}) returned error {code}")


@contextmanager
def loading() -> Iterator[None]:
    """Inside, this thread may load modules although something is being captured."""
    mode = ctypes.c_int(RELAXED)
    _swap(mode)
    try:
        yield
    finally:
        _swap(mode)
