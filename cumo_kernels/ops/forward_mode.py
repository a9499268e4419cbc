"""Refuses forward-mode automatic differentiation, for which no op has a formula.

Without a formula torch would return outputs without a tangent, which count as a derivative of zero.
"""

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad


def _has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor has a tangent, at any level of nested transforms of torch.func."""
    functorch = torch._C._functorch
    transform = functorch.peek_interpreter_stack()
    if transform is None:
        return forward_ad.unpack_dual(tensor).tangent is not None
    is_wrapped = functorch.maybe_get_level(tensor) == transform.level()
    if is_wrapped and not functorch.is_batchedtensor(tensor):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    with temporarily_pop_interpreter_stack():
        return _has_tangent(functorch.get_unwrapped(tensor) if is_wrapped else tensor)


def refuse_forward_mode(op: str, *args) -> None:
    """Raise NotImplementedError if one of the arguments has a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0:  # no tangents exist
        return
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and _has_tangent(arg):
            raise NotImplementedError(
                f"{op} does not support forward-mode automatic differentiation (torch.func.jvp, "
                "torch.func.jacfwd, torch.autograd.forward_ad): use reverse mode (backward, "
                "torch.autograd.grad)"
            )
