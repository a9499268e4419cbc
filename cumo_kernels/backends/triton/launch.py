"""The host side of a launch, kept short because a decode step waits for it.

A plan has everything that follows from shapes, strides and dtypes alone (tile sizes, constants, grid). A
launcher caches one plan for each kind of call (`planned`). A `Launch` in it keeps what Triton compiled.

A kernel is compiled and loaded at its first launch. A call inside a CUDA graph's capture needs the same
kernels as outside it, so running the same calls before a capture leaves nothing to load inside. After other
calls a capture may still need a kernel for the first time: with an operand of another alignment (a view) or
dtype, other outputs (a parameter frozen since), or another bucket of rows (other tiles, or sums that are
split and added by `sum_rows`). Such a kernel is compiled, which takes seconds, and loaded during the capture,
which capture.py makes legal.
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from types import ModuleType

import torch
from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from cumo_kernels.backends.triton import capture
from cumo_kernels.backends.triton.common import PDL
from cumo_kernels.tiles import tuning

log = logging.getLogger(__name__)
# multiplications and additions are fused, the default of Triton 3.6; 3.10 will have another default
FUSION = "enable_fp_fusion"


def settle(kernel: JITFunction) -> None:
    """Give `kernel` the same cache key in every process, by hashing the functions it calls before itself.

    Triton 3.6 omits the constants that a called function reads from the caller's key if it has not hashed
    that function before. So keys, and cache hits, would depend on which kernel a process launches first.
    """
    # look at the class: reading the attribute would compute the key
    if getattr(kernel, "hash", "unknown") is not None or not hasattr(type(kernel), "cache_key"):
        return
    names = kernel.fn.__code__.co_names
    used = [kernel.fn.__globals__.get(name) for name in names]
    # `tl.sum` has two names there, and is such a function too
    used += [
        getattr(module, name, None) for module in used if isinstance(module, ModuleType) for name in names
    ]
    for called in used:
        if isinstance(called, JITFunction) and called is not kernel:
            settle(called)
    assert kernel.cache_key


def planned(function: Callable) -> Callable:
    """Decorator for pure functions of what decides a launch's constants; the device is one of the arguments.

    What `Launch` handles itself (dtypes of tensors, which are None) is not an argument. The kernels defined
    above `function` in its module are settled here, so that an argument is hashed before any launch.
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
    """x itself if the elements of a row are contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def why_not_direct(kernel, compiled) -> str | None:
    """Why `compiled`, which launching `kernel` returned, cannot be launched as `compiled[grid](*arguments)`.

    No public interface of Triton guarantees that this takes exactly the kernel's arguments, constants
    included; its launcher reads them by `src.signature`. Triton 3.6 to 3.9 behave so.
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
    """The option that enables fusion; empty, with a warning, if this Triton does not accept it."""
    if hasattr(options, FUSION):
        return {FUSION: True}
    _warn_once(f"this Triton has no option {FUSION}: the last bits of results follow its default")
    return {}


def kind(value: object) -> object:
    """What Triton specialises a non-fixed argument on, computed in fewer steps than Triton's own.

    Pointer: its dtype, and whether it is divisible by 16. Descriptor: dtype and block. Number: its type.
    """
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if value is None:
        return None
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return "i32"
        return "i64" if value < 2**63 else "u64"
    raise TypeError(f"argument must be a tensor, descriptor, number or None, got {type(value).__name__}")


def _overlap() -> dict[str, bool]:
    """Under CUMO_PDL, from Hopper on, the option to start before the preceding kernel has ended."""
    if PDL.value and driver.active.get_current_target().arch >= 90:
        return {"launch_pdl": True}
    return {}


class Launch:
    """A kernel on one device with all arguments fixed except tensors, descriptors and unspecialised integers.

    Triton binds and classifies every argument at every call, three times the work of the launch itself. Here
    only dtypes, the alignment of pointers, and which tensors are None can differ between calls.
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
        kinds = tuple([kind(value) for value in values])
        compiled = self._compiled.get(kinds)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments)
            return
        named = dict(zip(self._kernel.arg_names, arguments, strict=True))
        options = {**self._options, **_overlap()}
        if capture.is_capturing():
            self._load(programs, named, options)
        compiled = self._kernel[(programs,)](**named, **options)
        # None in the interpreter, and where kernels are only compiled
        if compiled is not None and self._direct:
            reason = why_not_direct(self._kernel, compiled)
            if reason is None:
                self._compiled[kinds] = compiled
            else:
                self._direct = False
                _warn_once(f"Triton binds the arguments at every launch, which is slower: {reason}")

    def _load(self, programs: int, named: dict[str, object], options: dict[str, int | bool]) -> None:
        """Compile and load the kernel for the launch that follows."""
        with capture.loading():
            compiled = self._kernel.warmup(grid=(programs,), **named, **options)
            if compiled is not None:
                compiled._init_handles()  # not a public interface; 3.6 to 3.9 have it


def can_describe(tensor: Tensor, has_tma: bool) -> bool:
    """Whether a copy engine exists and can address `tensor`; must be part of a plan's key."""
    if not has_tma or tensor.numel() == 0 or tensor.data_ptr() & 15:
        return False
    *outer, inner = tensor.stride()
    size = tensor.element_size()
    return inner == 1 and all(stride > 0 and stride * size % 16 == 0 for stride in outer)


class _Descriptor(TensorDescriptor):
    """A descriptor without checks; `can_describe` has made them."""

    def __post_init__(self):
        pass


def describe(tensor: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """A descriptor of a tensor that `can_describe` accepts; reads outside the tensor return zeros."""
    return _Descriptor(tensor, tensor.shape, tensor.stride(), block_shape)
