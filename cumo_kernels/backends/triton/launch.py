"""The host's side of a launch, as short as it can be: a decode step waits for it.

What follows from shapes, strides and dtypes alone (tile sizes, constants, grid) is a plan, which a launcher
keeps for each kind of call (`planned`); a `Launch` in it remembers what Triton compiled.
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from types import ModuleType

import torch
from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from cumo_kernels import tuning

log = logging.getLogger(__name__)
# multiplications and additions are fused, as in Triton 3.6, whose default that is: 3.10 will have another
FUSION = "enable_fp_fusion"


def settle(kernel: JITFunction) -> None:
    """Give `kernel` the cache key that it has in every process, by hashing what it calls before itself.

    Triton 3.6 leaves the constants that a called function reads out of the caller's key where it has not
    hashed that function before: keys depend on which kernel a process launches first, and so does whether a
    kernel is found in the cache.
    """
    # the class is asked: the key itself is made by asking for it
    if getattr(kernel, "hash", "unknown") is not None or not hasattr(type(kernel), "cache_key"):
        return
    names = kernel.fn.__code__.co_names
    used = [kernel.fn.__globals__.get(name) for name in names]
    # `tl.sum` stands there as two names, and is such a function too
    used += [
        getattr(module, name, None) for module in used if isinstance(module, ModuleType) for name in names
    ]
    for called in used:
        if isinstance(called, JITFunction) and called is not kernel:
            settle(called)
    assert kernel.cache_key


def planned(function: Callable) -> Callable:
    """Decorator for pure functions of what decides a launch's constants; the device is one of the arguments.

    What `Launch` sees for itself (dtypes of tensors, which are None) is none of them. The kernels above
    `function` in its module are settled here: an argument that is one is hashed before anything is launched.
    """
    for kernel in list(function.__globals__.values()):
        if isinstance(kernel, JITFunction):
            settle(kernel)
    remembering = lru_cache(4096)(function)
    tuning.CACHES.append(remembering)
    return remembering


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def on_device_of_first(function: Callable) -> Callable:
    """Triton launches on the current device: make that the device of the first argument."""

    @wraps(function)
    def launch(first: Tensor, *args):
        with torch.cuda.device_of(first):
            return function(first, *args)

    return launch


def whole_rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def why_not_direct(kernel, compiled) -> str | None:
    """Why `compiled`, which launching `kernel` returned, may not be launched as `compiled[grid](*arguments)`.

    No interface of Triton promises that this takes every argument of the kernel, constants too, and nothing
    else; its launcher reads them by `src.signature`. So it is in Triton 3.6 to 3.9.
    """
    try:
        taken = inspect.signature(compiled[1, 1, 1]).parameters.values()
        described = list(compiled.src.signature)
    except (AttributeError, TypeError, ValueError) as error:
        return f"{type(compiled).__name__}: {error}"
    if [p.kind for p in taken if p.default is p.empty] != [inspect.Parameter.VAR_POSITIONAL]:
        return f"{type(compiled).__name__}[grid] takes ({', '.join(map(str, taken))})"
    if described != list(kernel.arg_names):
        return f"its signature has {len(described)} of {len(kernel.arg_names)} arguments"
    return None


@lru_cache
def _warn_once(words: str) -> None:
    log.warning(words)


@cache
def _fused(options: type = CUDAOptions) -> dict[str, bool]:
    """The option that asks for fusion; nothing where this Triton does not take it, after a warning."""
    if hasattr(options, FUSION):
        return {FUSION: True}
    _warn_once(f"this Triton takes no {FUSION}: the last bits of results are as its own default has them")
    return {}


class Launch:
    """A kernel on one device with all arguments fixed but tensors, descriptors and unspecialised integers.

    Triton binds and classifies every argument at every call, three times the work of the launch itself. Here
    nothing can differ between calls but dtypes, the alignment of pointers, and which tensors are None.
    """

    def __init__(self, kernel, *, num_warps: int = 4, num_stages: int = 3, **fixed):
        self._options = {"num_warps": num_warps, "num_stages": num_stages, **_fused()}
        self._kernel, self._direct = kernel, True
        self._free = [i for i, name in enumerate(kernel.arg_names) if name not in fixed]
        self._arguments = [fixed.get(name) for name in kernel.arg_names]
        for parameter in getattr(kernel, "params", ()):
            is_data = parameter.name.endswith(("_ptr", "_desc"))
            if not (parameter.name in fixed or is_data or parameter.do_not_specialize):
                raise TypeError(f"{kernel.arg_names[parameter.num]} is specialised and must be fixed")
        self._compiled: dict[tuple, object] = {}

    def __call__(self, programs: int, *values: Tensor | TensorDescriptor | int | None) -> None:
        """Launch with the arguments that are not fixed, in the kernel's order."""
        arguments = self._arguments.copy()
        for i, value in zip(self._free, values, strict=True):
            arguments[i] = value
        # a Parameter is a Tensor too; integers are not specialised
        kinds = tuple([(v.data_ptr() & 15, v.dtype) if isinstance(v, Tensor) else type(v) for v in values])
        compiled = self._compiled.get(kinds)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments)
            return
        named = dict(zip(self._kernel.arg_names, arguments, strict=True))
        compiled = self._kernel[(programs,)](**named, **self._options)
        # None from the interpreter, and where kernels are only compiled
        if compiled is not None and self._direct:
            reason = why_not_direct(self._kernel, compiled)
            if reason is None:
                self._compiled[kinds] = compiled
            else:
                self._direct = False
                _warn_once(f"Triton itself binds the arguments of every launch, which is slower: {reason}")


def can_describe(tensor: Tensor, has_tma: bool) -> bool:
    """Whether the copy engine is there and can address `tensor`: what a plan's key must hold of it."""
    if not has_tma or tensor.numel() == 0 or tensor.data_ptr() & 15:
        return False
    *outer, inner = tensor.stride()
    size = tensor.element_size()
    return inner == 1 and all(stride > 0 and stride * size % 16 == 0 for stride in outer)


class _Descriptor(TensorDescriptor):
    """Without the checks, which `can_describe` has made."""

    def __post_init__(self):
        pass


def describe(tensor: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """A descriptor of what `can_describe` accepts; reads outside the tensor give zeros."""
    return _Descriptor(tensor, tensor.shape, tensor.stride(), block_shape)
