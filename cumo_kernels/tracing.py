"""What torch.compile must take as it is."""

from collections.abc import Callable


def constant(function: Callable) -> Callable:
    """Decorator: asks what only Python at large can answer; in a graph being compiled that is a constant.

    As torch.compiler.assume_constant_result, which would import the compiler, a second's worth.
    """
    function._dynamo_marked_constant = True
    return function
