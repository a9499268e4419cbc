"""How torch's compiler and its dispatch modes treat our functions."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def constant(function: Callable) -> Callable:
    """Decorator: asks what only Python at large can answer; in a graph being compiled that is a constant.

    As torch.compiler.assume_constant_result, which would import the compiler, a second's worth.
    """
    function._dynamo_marked_constant = True
    return function


def run_inside(mode: TorchDispatchMode, func, device_type: str, args: tuple, kwargs: dict):
    """The implementation of an op of ours on that device, seen by `mode` operator by operator."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device_type.upper()))
    with mode:
        return func.redispatch(keys, *args, **kwargs)
