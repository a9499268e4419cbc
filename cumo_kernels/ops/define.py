"""Registers cumo::name with torch's dispatcher, and gives plain eager calls a shorter path.

torch.library provides what compilers, dispatch modes and transforms need, and costs more host time than a
launch. Eager calls on plain tensors, which are nearly all calls, use an autograd.Function instead, or call
the function directly where nothing requires a gradient. The transforms of torch.func (vmap, grad, vjp, jacrev
and their combinations) use another autograd.Function, since they refuse those that torch.library makes.
"""

from collections.abc import Callable
from functools import wraps
from types import NoneType

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from cumo_kernels.ops.batching import call_each
from cumo_kernels.ops.forward_mode import refuse_forward_mode
from cumo_kernels.tracing import is_autocast_on, is_transformed

_PLAIN = {Tensor, torch.nn.Parameter, NoneType, bool, int, str}


def _is_plain(args: tuple) -> bool:
    """Whether a call can bypass the dispatcher: eager, without subclasses, dispatch modes or transforms."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(arg) in _PLAIN for arg in args)
        and not args[0].is_meta
        and not (torch._C._current_graph_task_id() != -1 and _has_batch(args))
    )


def _has_batch(args: tuple) -> bool:
    """Whether backward runs on a batch of gradients, by the older vmap of is_grads_batched."""
    return any(isinstance(arg, Tensor) and torch._C._functorch.is_legacy_batchedtensor(arg) for arg in args)


def _without_autocast(function: Callable) -> Callable:
    """Run `function` with autocast off: inputs are cast already, and backward may run under another autocast.

    Backends rely on this: a kernel reads a product in the dtype of its operands, which autocast would change.
    """

    @wraps(function)
    def run(x, *args):
        device = x.device.type
        if not is_autocast_on(device):
            return function(x, *args)
        with torch.autocast(device, enabled=False):
            return function(x, *args)

    return run


def _rule_of_vmap(op: Callable) -> Callable:
    return lambda info, in_dims, *args: call_each(op, info.batch_size, in_dims, args)


class Op:
    """The result of `define`, called like the function; `op` is the op registered with the dispatcher."""

    def __init__(self, name: str, function: Callable):
        self._name = name.removeprefix("cumo::")
        self._function = _without_autocast(function)
        self.op = torch.library.custom_op(name, self._function, mutates_args=())
        self.op.register_vmap(_rule_of_vmap(self.op))  # in compiled graphs
        self.register_fake = self.op.register_fake
        self.register_autograd(self._refuse_backward, lambda ctx, inputs, output: None)

    def _refuse_backward(self, ctx, *grads):
        raise RuntimeError(f"{self._name} has no gradient: cumo_kernels has no second derivatives of this op")

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Like the method of the same name of torch.library.custom_op."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):
            # one function: with a separate setup_context torch inspects a signature at every call
            output = self._function(*args)
            setup_context(ctx, args, output)
            return output

        self._node = self._make_node(forward=forward, backward=backward)
        self._transformed = self._make_node(
            forward=lambda *args: self(*args),
            setup_context=setup_context,
            backward=backward,
            vmap=_rule_of_vmap(self),
        )

    def _make_node(self, **methods: Callable) -> type[Function]:
        members = {name: staticmethod(method) for name, method in methods.items()}
        return type(self.op._qualname.replace("::", "_"), (Function,), members)

    def __call__(self, *args):
        if forward_ad._current_level >= 0:
            refuse_forward_mode(self._name, *args)
        if not _is_plain(args):
            if is_transformed():
                return self._transformed.apply(*args)
            return self.op(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return self._function(*args)
        return self._node.apply(*args)


def define(name: str) -> Callable[[Callable], Op]:
    """Decorator: registers the function as op `name` ("cumo::..."); its first argument is a tensor."""
    return lambda function: Op(name, function)
