"""Helpers for torch's compiler and dispatch modes."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def constant(function: Callable) -> Callable:
    """Decorator: call the function in plain Python while a graph is compiled; its result is a constant there.

    Like torch.compiler.assume_constant_result, which would import the compiler and take a second.
    """
    function._dynamo_marked_constant = True
    return function


def run_inside(mode: TorchDispatchMode, func, device_type: str, args: tuple, kwargs: dict):
    """Run the implementation of one of our ops on that device, with each of its operators seen by `mode`."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device_type.upper()))
    with mode:
        return func.redispatch(keys, *args, **kwargs)
