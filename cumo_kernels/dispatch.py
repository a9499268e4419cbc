"""Which backend runs a call: one table, one rule, one error.

Of the backends that do not refuse and that verified.json proves right on this GPU (`torch`, which is made of
torch's own kernels, needs no proof), the fastest by measured.json wins, or without such data the first in
`BACKENDS`; the reference never competes, and runs what nobody else can. `CUMO_BACKEND=name` or
`use_backend(name)` leaves only that one, proven or not, and its refusal is then an error. The chosen name
travels as an argument of the op, so backward and compiled graphs run on the backend that ran forward.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from cumo_kernels import extension, measured, verified
from cumo_kernels.hardware import gpu_of
from cumo_kernels.tracing import constant

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


@constant
def _cuda_unfit(device: torch.device) -> str | None:
    return extension.unfit(device)


@cache
def _unfit_for_triton(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, this torch is built for ROCm"
    if torch.cuda.is_available() and (capability := gpu_of(device).capability) < 80:
        return f"it needs compute capability 8.0 or later, this GPU has {capability / 10}"
    try:
        for stem in sorted(set(OPS.values())):
            importlib.import_module(f"cumo_kernels.backends.triton.{stem}")
    except Exception as error:  # another release of Triton may break there in any way
        return f"its kernels do not load with this Triton: {type(error).__name__}: {error}"
    return None


@constant
def _triton_unfit(device: torch.device) -> str | None:
    return _unfit_for_triton(device)


@constant
def _unverified(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    proven, words = verified.proof(backend, op, dtype, device)
    return None if proven else words


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
    return _cuda_unfit(device)


def _refuse_triton(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    if _TRITON_MISSING:
        return "triton or cumo_kernels.backends.triton is not in this installation"
    device = torch.device(device)
    if device.type != "cuda" and not _INTERPRET:
        return f"it needs CUDA tensors or TRITON_INTERPRET=1, got {device.type}"
    if dtype not in _FLOATS:
        return f"it computes in fp32, fp16 and bf16, got {dtype}"
    return None if device.type != "cuda" else _triton_unfit(device)


def _refuse_torch(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"it needs CPU or CUDA tensors, got {device.type}"
    if dtype not in _FLOATS:
        return f"grouped_mm computes in fp32, fp16 and bf16, got {dtype}"
    return _while_capturing("torch", op, device, dtype)


def _refuse_reference(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    return _while_capturing("reference", op, torch.device(device), dtype)


@constant
def asks_host(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` makes a CUDA device wait for the host under that backend, or None."""
    if device.type != "cuda" or backend not in ("torch", "reference"):
        return None
    if backend == "reference":
        return "it asks the host where experts begin"
    if OPS[op] not in ("grouped_gemm", "experts"):
        return None
    generation = gpu_of(device).capability // 10
    if dtype == torch.bfloat16 and generation in (9, 10) and torch.version.hip is None:
        return None
    return "grouped_mm asks the host where experts begin, but in bf16 on compute capability 9.x and 10.x"


def _while_capturing(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return None
    reason = asks_host(backend, op, device, dtype)
    if reason is None or not torch.cuda.is_current_stream_capturing():
        return None
    return f"a CUDA graph is being captured, and {reason}"


def _unproven(name: str) -> Callable[..., str | None]:
    """-> (op, device, dtype) -> why backend `name` runs such a call only when it is forced, or None."""

    def ask(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or _INTERPRET:
            return "on CPU tensors, or interpreted, it is slow and for tests: force it to try"
        return _unverified(name, op, device, dtype)

    return ask


@dataclass(frozen=True)
class Backend:
    name: str  # folder under cumo_kernels/backends
    # (op, device, dtype, num_experts) -> why it cannot run this call, or None
    refuse: Callable[..., str | None]
    # (op, device, dtype) -> why it runs this call only when it is forced, or None; None: it never is the case
    on_request: Callable[..., str | None] | None = None


BACKENDS = (
    Backend("triton", _refuse_triton, _unproven("triton")),
    Backend("cuda", _refuse_cuda, _unproven("cuda")),
    Backend("torch", _refuse_torch),
    Backend("reference", _refuse_reference),
)
_NAMES = tuple(backend.name for backend in BACKENDS)


def _check_name(source: str, name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {list(_NAMES)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("CUMO_BACKEND") or None


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors has a backward pass."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose(op: str, x: torch.Tensor, num_experts: int = 0, with_backward: bool = False) -> str:
    """Name of the backend that runs `op` on tensors like `x`; RuntimeError with the reasons if none does.

    `num_experts` is for the ops of routing, where a backend may have a limit. `with_backward`, `needs_grad`
    of what the op is called on, says which timings to compare: backward runs where forward ran.
    """
    if _forced is not None:
        _check_name("CUMO_BACKEND", _forced)
    reasons, able = [], []
    for backend in BACKENDS:
        if _forced is None or _forced == backend.name:
            reason = backend.refuse(op, x.device, x.dtype, num_experts)
            if reason is None and _forced is None and backend.on_request is not None:
                reason = backend.on_request(op, x.device, x.dtype)
            if reason is None:
                able.append(backend.name)
            else:
                reasons.append(f"{backend.name}: {reason}")
    if not able:
        raise RuntimeError(f"no backend runs {op} (forced: {_forced}): {'; '.join(reasons)}")
    return _prefer(op, x, able, with_backward)[0]


def _prefer(op: str, x: torch.Tensor, able: list[str], with_backward: bool) -> tuple[str, str]:
    """Which of several to take, and why."""
    # on a GPU the reference waits for the host, which a timing of the op alone does not show
    on_cpu = x.device.type == "cpu" and measured.machine_of(x.device) == measured.CPU
    rivals = able if on_cpu else [name for name in able if name != "reference"]
    if len(rivals) > 1:
        return measured.fastest(op, x, rivals, with_backward) or (rivals[0], "nothing is measured for this")
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


@dataclass(frozen=True)
class Verdict:
    """What one backend would do with a call."""

    backend: str
    state: str  # one of STATES
    reason: str = ""


STATES = {  # and how `explain` says them
    "chosen": "chosen",
    "able": "available",
    "on request": "only on request",
    "refused": "refuses",
    "not asked": "not asked",
}


def judge(op: str, x: torch.Tensor, num_experts: int = 0, with_backward: bool | None = None) -> list[Verdict]:
    """Every backend's verdict on `op` for tensors like `x`, in the order of `BACKENDS`.

    `num_experts` and `with_backward` as for `choose`; None: as gradients are enabled.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {sorted(OPS)}, got {op!r}")
    if _forced is not None:
        _check_name("CUMO_BACKEND", _forced)
    states: dict[str, tuple[str, list[str | None]]] = {}
    for backend in BACKENDS:
        name, reason = backend.name, backend.refuse(op, x.device, x.dtype, num_experts)
        unproven = proof = None
        if reason is None and backend.on_request is not None:
            unproven = backend.on_request(op, x.device, x.dtype)
            proof = unproven or verified.proof(name, op, x.dtype, x.device)[1]
        if _forced not in (None, name):
            states[name] = "not asked", [f"{_forced} is forced"]
        elif reason is not None:
            states[name] = "refused", [reason]
        elif unproven is not None and _forced is None:
            states[name] = "on request", [unproven]
        else:
            states[name] = "able", [proof, asks_host(name, op, x.device, x.dtype)]
    able = [name for name, (state, _) in states.items() if state == "able"]
    if able:
        with_backward = torch.is_grad_enabled() if with_backward is None else with_backward
        chosen, why = _prefer(op, x, able, with_backward)
        states[chosen] = "chosen", [why or None, *states[chosen][1]]
    return [Verdict(name, state, "; ".join(filter(None, words))) for name, (state, words) in states.items()]


def explain(op: str, x: torch.Tensor, num_experts: int = 0, with_backward: bool | None = None) -> str:
    """One line per backend: chosen, available, or the reason it refuses `op` on tensors like `x`.

    `num_experts` and `with_backward` as for `judge`.
    """
    lines = [f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')}:"]
    for verdict in judge(op, x, num_experts, with_backward):
        said = STATES[verdict.state]
        lines.append(f"  {verdict.backend:<10} {said}{verdict.reason and f': {verdict.reason}'}")
    return "\n".join(lines)
