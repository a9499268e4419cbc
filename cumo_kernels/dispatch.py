"""Which backend runs a call: one table, one rule, one error.

The first backend in `BACKENDS` that does not refuse wins. `CUMO_BACKEND=name` or `use_backend(name)` leaves
only that one, and its refusal is then an error. The chosen name travels as an argument of the op, so
backward and compiled graphs run on the backend that ran forward.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

OPS = {  # op -> stem: the module of that name in every backend folder implements the op
    "route": "routing",
    "route_backward": "routing",
    "sort_by_expert": "routing",
    "permute": "permutation",
    "combine": "permutation",
    "combine_backward": "permutation",
    "grouped_gemm": "grouped_gemm",
    "grouped_gemm_weight_grad": "grouped_gemm",
    "activate": "activation",
    "activate_backward": "activation",
    "expert_mlp": "experts",
    "expert_mlp_backward": "experts",
}


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


# looked up once: what is installed does not change under a running program
_CUDA_MISSING = _missing("cumo_kernels._C") or _missing("cumo_kernels.backends.cuda")
_TRITON_MISSING = _missing("triton") or _missing("cumo_kernels.backends.triton")
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _refuse_cuda(op: str, device: str, dtype: torch.dtype) -> str | None:
    if _CUDA_MISSING:
        return "the extension cumo_kernels._C is not built in this installation"
    if device != "cuda":
        return f"it needs CUDA tensors, got {device}"
    if dtype not in _FLOATS:
        return f"it computes in fp32, fp16 and bf16, got {dtype}"
    return None


def _refuse_triton(op: str, device: str, dtype: torch.dtype) -> str | None:
    if _TRITON_MISSING:
        return "triton or cumo_kernels.backends.triton is not in this installation"
    if device != "cuda" and not _INTERPRET:
        return f"it needs CUDA tensors or TRITON_INTERPRET=1, got {device}"
    if dtype not in _FLOATS:
        return f"it computes in fp32, fp16 and bf16, got {dtype}"
    return None


def _refuse_reference(op: str, device: str, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    name: str  # folder under cumo_kernels/backends
    refuse: Callable[[str, str, torch.dtype], str | None]  # why it cannot run this call, or None
    on_request: str | None = None  # why it runs only when it is forced, or None


BACKENDS = (
    Backend("cuda", _refuse_cuda),
    Backend("triton", _refuse_triton, on_request="it has not run on a GPU yet: force it to try"),
    Backend("reference", _refuse_reference),
)
_NAMES = tuple(backend.name for backend in BACKENDS)


def _check_name(source: str, name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {list(_NAMES)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("CUMO_BACKEND") or None


def choose(op: str, x: torch.Tensor) -> str:
    """Name of the backend that runs `op` on tensors like `x`; RuntimeError with the reasons if none does."""
    if _forced is not None:
        _check_name("CUMO_BACKEND", _forced)
    reasons = []
    for backend in BACKENDS:
        if _forced is None or _forced == backend.name:
            reason = backend.refuse(op, x.device.type, x.dtype)
            if reason is None and _forced is None:
                reason = backend.on_request
            if reason is None:
                return backend.name
            reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"no backend runs {op} (forced: {_forced}): {'; '.join(reasons)}")


_implementations: dict[tuple[str, str], Callable] = {}


def implementation(backend: str, op: str) -> Callable:
    """The function that implements `op` in `backend`; the backend's module is imported on first use."""
    key = (backend, op)
    if key not in _implementations:
        module = importlib.import_module(f"cumo_kernels.backends.{backend}.{OPS[op]}")
        _implementations[key] = getattr(module, op)
    return _implementations[key]


@contextmanager
def use_backend(name: str | None):
    """Force one backend inside the `with`; None restores the automatic choice.

    Raises:
        ValueError: no backend has that name. A refusal is raised by the call that is refused.
    """
    global _forced
    previous = _forced
    _forced = None if name is None else _check_name("backend", name)
    try:
        yield
    finally:
        _forced = previous


def explain(op: str, x: torch.Tensor) -> str:
    """One line per backend: chosen, available, or the reason it refuses `op` on tensors like `x`."""
    if op not in OPS:
        raise ValueError(f"op must be one of {sorted(OPS)}, got {op!r}")
    if _forced is not None:
        _check_name("CUMO_BACKEND", _forced)
    lines = [f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')}:"]
    chosen = False
    for backend in BACKENDS:
        reason = backend.refuse(op, x.device.type, x.dtype)
        if _forced not in (None, backend.name):
            verdict = f"not asked: {_forced} is forced"
        elif reason is not None:
            verdict = f"refuses: {reason}"
        elif backend.on_request is not None and _forced is None:
            verdict = f"only on request: {backend.on_request}"
        else:
            verdict, chosen = ("available", chosen) if chosen else ("chosen", True)
        lines.append(f"  {backend.name:<10} {verdict}")
    return "\n".join(lines)
