"""Which backend runs a call: one table, one rule, one error.

Of the backends that do not refuse, the fastest by measured.json wins, or without such data the first in
`BACKENDS`; the reference never competes. `CUMO_BACKEND=name` or `use_backend(name)` leaves
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

from cumo_kernels import extension, measured

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
_CUDA_MISSING = extension.missing()
_TRITON_MISSING = _missing("triton") or _missing("cumo_kernels.backends.triton")
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CUDA_EXPERTS = 256  # kMaxExperts of csrc/kernels.h
Device = torch.device | str


def _refuse_cuda(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    if _CUDA_MISSING is not None:
        return _CUDA_MISSING
    device = torch.device(device)
    if extension.EMULATE and device.type != "cpu":
        return f"it needs CPU tensors under CUMO_EMULATE=1, got {device.type}"
    if device.type != "cuda" and not extension.EMULATE:
        return f"it needs CUDA tensors or CUMO_EMULATE=1, got {device.type}"
    if dtype not in _FLOATS:
        return f"it computes in fp32, fp16 and bf16, got {dtype}"
    if OPS[op] == "routing" and num_experts > CUDA_EXPERTS:
        return f"it routes to at most {CUDA_EXPERTS} experts, got {num_experts}"
    # a graph being compiled has no place for this question; its first eager call has answered it
    return None if torch.compiler.is_compiling() else extension.unfit(device)


def _refuse_triton(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    if _TRITON_MISSING:
        return "triton or cumo_kernels.backends.triton is not in this installation"
    device = torch.device(device)
    if device.type != "cuda" and not _INTERPRET:
        return f"it needs CUDA tensors or TRITON_INTERPRET=1, got {device.type}"
    if dtype not in _FLOATS:
        return f"it computes in fp32, fp16 and bf16, got {dtype}"
    return None


def _refuse_reference(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    name: str  # folder under cumo_kernels/backends
    # (op, device, dtype, num_experts) -> why it cannot run this call, or None
    refuse: Callable[..., str | None]
    on_request: str | None = None  # why it runs only when it is forced, or None


_UNTRIED = "it has not run on a GPU yet: force it to try"
BACKENDS = (
    Backend("triton", _refuse_triton, on_request=_UNTRIED),
    Backend("cuda", _refuse_cuda, on_request=_UNTRIED),
    Backend("reference", _refuse_reference),
)
_NAMES = tuple(backend.name for backend in BACKENDS)


def _check_name(source: str, name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {list(_NAMES)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("CUMO_BACKEND") or None


def choose(op: str, x: torch.Tensor, num_experts: int = 0) -> str:
    """Name of the backend that runs `op` on tensors like `x`; RuntimeError with the reasons if none does.

    `num_experts` is for the ops of routing, where a backend may have a limit.
    """
    if _forced is not None:
        _check_name("CUMO_BACKEND", _forced)
    reasons, able = [], []
    for backend in BACKENDS:
        if _forced is None or _forced == backend.name:
            reason = backend.refuse(op, x.device, x.dtype, num_experts)
            if reason is None and _forced is None:
                reason = backend.on_request
            if reason is None:
                able.append(backend.name)
            else:
                reasons.append(f"{backend.name}: {reason}")
    if not able:
        raise RuntimeError(f"no backend runs {op} (forced: {_forced}): {'; '.join(reasons)}")
    return _prefer(op, x, able)[0]


def _prefer(op: str, x: torch.Tensor, able: list[str]) -> tuple[str, str]:
    """Which of several to take, and why."""
    rivals = [name for name in able if name != "reference"]
    if len(rivals) > 1:
        return measured.fastest(op, x, rivals) or (rivals[0], "nothing is measured on this GPU")
    return able[0], ""


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


def explain(op: str, x: torch.Tensor, num_experts: int = 0) -> str:
    """One line per backend: chosen, available, or the reason it refuses `op` on tensors like `x`.

    `num_experts` as for `choose`.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {sorted(OPS)}, got {op!r}")
    if _forced is not None:
        _check_name("CUMO_BACKEND", _forced)
    lines = [f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')}:"]
    verdicts, able = {}, []
    for backend in BACKENDS:
        reason = backend.refuse(op, x.device, x.dtype, num_experts)
        if _forced not in (None, backend.name):
            verdicts[backend.name] = f"not asked: {_forced} is forced"
        elif reason is not None:
            verdicts[backend.name] = f"refuses: {reason}"
        elif backend.on_request is not None and _forced is None:
            verdicts[backend.name] = f"only on request: {backend.on_request}"
        else:
            verdicts[backend.name] = "available"
            able.append(backend.name)
    if able:
        chosen, why = _prefer(op, x, able)
        verdicts[chosen] = f"chosen: {why}" if why else "chosen"
    lines += [f"  {name:<10} {verdict}" for name, verdict in verdicts.items()]
    return "\n".join(lines)
