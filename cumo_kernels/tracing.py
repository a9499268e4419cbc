"""Helpers for torch's compiler and dispatch modes."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def constant(function: Callable) -> Callable:
    """Decorator: call the function in plain Python while a graph is compiled; its result is a constant there.

    Like torch.compiler.assume_constant_result, which would import the compiler and take a second.
    """
    function._dynamo_marked_constant = True
    return function


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is active, outside of compiled graphs."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@constant
def _is_graph_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors requires a gradient.

    A batched tensor of torch.vmap does not tell, but what it wraps does. In a graph that is being compiled
    nothing tells, so that the answer is yes inside a transform.
    """
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return _is_graph_transformed()
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    inner = [
        functorch.get_unwrapped(t) if functorch.is_functorch_wrapped_tensor(t) else None
        for t in tensors
        if t is not None
    ]
    return any(t is not None for t in inner) and any_requires_grad(*inner)


def may_read(tensor: Tensor) -> bool:
    """Whether a CPU tensor's values may be read: no graph is traced, and the tensor is of no transform."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def is_eager(tensor: Tensor) -> bool:
    """Whether it has values and new tensors have, too: nothing is traced, and no mode fakes tensors."""
    return may_read(tensor) and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def is_autocast_on(device_type: str) -> bool:
    """torch.is_autocast_enabled, which raises for meta tensors; torch's own operators do not cast these."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def run_inside(mode: TorchDispatchMode, func, device_type: str, args: tuple, kwargs: dict):
    """Run the implementation of one of our ops on that device, with each of its operators seen by `mode`."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device_type.upper()))
    with mode:
        return func.redispatch(keys, *args, **kwargs)
