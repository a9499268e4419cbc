"""cumo::name for torch's dispatcher, and a shorter way to the same function where nothing needs it.

torch.library gives an op what compilers, dispatch modes and transforms ask for, and costs more of the host's
time than a launch. Eager calls on plain tensors, nearly all there are, take an autograd.Function instead, or
no detour at all where nothing requires a gradient.
"""

from collections.abc import Callable
from functools import wraps
from types import NoneType

import torch
from torch import Tensor
from torch.autograd import Function

_PLAIN = {Tensor, torch.nn.Parameter, NoneType, bool, int, str}


def _is_plain(args: tuple) -> bool:
    """Whether a call can pass by the dispatcher: eager, without subclasses, dispatch modes or transforms."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(arg) in _PLAIN for arg in args)
        and not args[0].is_meta
    )


def _without_autocast(function: Callable) -> Callable:
    """What autocast had to say was said before; backward may run under one that forward did not see.

    Here and in no backend: a product in another dtype than its operands' is read by kernels as the operands'.
    """

    @wraps(function)
    def run(x, *args):
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(x, *args)
        with torch.autocast(device, enabled=False):
            return function(x, *args)

    return run


class Op:
    """What `define` makes of a function, and is called like it; `op` is what the dispatcher knows."""

    def __init__(self, name: str, function: Callable):
        self._function = _without_autocast(function)
        self.op = torch.library.custom_op(name, self._function, mutates_args=())
        self._node: type[Function] | None = None
        self.register_fake = self.op.register_fake

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """As of torch.library.custom_op."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):
            # one function: a setup_context of its own has torch inspect a signature at every call
            output = self._function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._node = type(self.op._qualname.replace("::", "_"), (Function,), methods)

    def __call__(self, *args):
        if not _is_plain(args):
            return self.op(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return self._function(*args)
        # without a formula the op says so; kernels would pass for constants
        return self.op(*args) if self._node is None else self._node.apply(*args)


def define(name: str) -> Callable[[Callable], Op]:
    """Decorator: the function becomes the op `name` ("cumo::..."), the first of its arguments a tensor."""
    return lambda function: Op(name, function)
