"""Chooses the backend that runs a call: one table, one rule, one error.

A backend can run a call if it does not refuse it and if it is verified on this GPU, by verified.json or by a
self-check (`torch`, which is made of torch's own kernels, needs no proof). Of these, the fastest according to
measured.json runs; without such data the first in `BACKENDS`. The reference runs only what no other can run.
`CUMO_BACKEND=name` or `use_backend(name)` leaves only that one, verified or not, and its refusal is then an
error. The chosen name is an argument of the op, so backward and compiled graphs run on the backend that ran
forward. In a graph that is being compiled, the choice is a constant, equal to that of an eager call.
"""

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps

import torch

from cumo_kernels import extension
from cumo_kernels.tiles import measured
from cumo_kernels.tiles.hardware import INTERPRETER, gpu_of
from cumo_kernels.tracing import any_requires_grad, constant
from cumo_kernels.verification import proofs

OPS = {  # op -> stem: the module of that name in every backend folder implements the op
    "route": "routing",
    "route_backward": "routing",
    "scored_route": "routing",
    "scored_route_backward": "routing",
    "sort_by_expert": "routing",
    "permute": "permutation",
    "combine": "permutation",
    "combine_backward": "permutation",
    "grouped_gemm": "grouped_gemm",
    "grouped_gemm_weight_grad": "grouped_gemm",
    "activate": "activation",
    "activate_backward": "activation",
    "packed_grouped_gemm": "grouped_gemm",
    "expert_mlp": "experts",
    "expert_mlp_backward": "experts",
    "adapted_expert_mlp": "experts",
    "adapted_expert_mlp_backward": "experts",
}
# ops whose module in a backend folder is not that of their stem
MODULES = dict.fromkeys(
    ("packed_grouped_gemm", "adapted_expert_mlp", "adapted_expert_mlp_backward"), "adapted"
) | dict.fromkeys(("scored_route", "scored_route_backward"), "scores")

FORWARD = {  # backward runs on the backend that ran forward
    "route_backward": "route",
    "scored_route_backward": "scored_route",
    "combine_backward": "combine",
    "grouped_gemm_weight_grad": "grouped_gemm",
    "activate_backward": "activate",
    "expert_mlp_backward": "expert_mlp",
    "adapted_expert_mlp_backward": "adapted_expert_mlp",
}


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


# cached: installed packages do not change while a program runs
_CUDA_MISSING = extension.missing()
_TRITON_MISSING = _missing("triton") or _missing("cumo_kernels.backends.triton")
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CUDA_EXPERTS = 1024  # kMaxExperts of csrc/kernels.h
EXPERTS_TESTED = 1024  # the largest number in verify's cases
MOST_GROUPS = 1023  # of the kernel of grouped_mm
Device = torch.device | str


@constant
def _cuda_unfit(device: torch.device) -> str | None:
    return extension.unfit(device)


@cache
def _unfit_for_triton(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, but this torch is built for ROCm"
    if torch.cuda.is_available() and (capability := gpu_of(device).capability) < 80:
        return f"it needs compute capability 8.0 or later, but this GPU has {capability / 10}"
    try:
        for module in sorted({*OPS.values(), *MODULES.values()}):
            importlib.import_module(f"cumo_kernels.backends.triton.{module}")
    except Exception as error:  # another release of Triton may raise anything here
        return f"its kernels cannot be imported with this Triton: {type(error).__name__}: {error}"
    return None


@constant
def _triton_unfit(device: torch.device) -> str | None:
    return _unfit_for_triton(device)


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
    if MODULES.get(op) == "adapted":
        return "it has no kernels for packed weights and adapters"
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


@constant
def _has_grouped_mm(device: Device, dtype: torch.dtype) -> bool:
    """Whether torch computes all groups in one kernel, and not in a loop."""
    device = torch.device(device)
    if dtype != torch.bfloat16 or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return gpu_of(device).capability // 10 in (9, 10) and torch.version.hip is None


def _refuse_torch(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        return f"it needs CPU or CUDA tensors, got {device.type}"
    if dtype not in _FLOATS:
        return f"grouped_mm computes in fp32, fp16 and bf16, got {dtype}"
    is_product = OPS[op] in ("grouped_gemm", "experts")
    if num_experts > MOST_GROUPS and is_product and _has_grouped_mm(device, dtype):
        return (
            f"grouped_mm takes at most {MOST_GROUPS} experts in bf16 on compute capability 9.x and 10.x, "
            f"got {num_experts}"
        )
    return _while_capturing("torch", op, device, dtype)


def _refuse_reference(op: str, device: Device, dtype: torch.dtype, num_experts: int = 0) -> str | None:
    return _while_capturing("reference", op, torch.device(device), dtype)


@constant
def asks_host(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `op` synchronises a CUDA device with the host under that backend, or None."""
    if device.type != "cuda" or backend not in ("torch", "reference"):
        return None
    if backend == "reference":
        return "it reads the expert offsets on the host"
    if OPS[op] not in ("grouped_gemm", "experts") or not torch.cuda.is_available():
        return None
    if _has_grouped_mm(device, dtype):
        return None
    return "grouped_mm reads the offsets on the host, except in bf16 on compute capability 9.x and 10.x"


def _while_capturing(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.compiler.is_compiling() or not _capturing(device):
        return None
    if (reason := asks_host(backend, op, device, dtype)) is None:
        return None
    return f"a CUDA graph is being captured, and {reason}"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@constant
def _proofs(
    names: tuple[str, ...], op: str, device: torch.device, dtype: torch.dtype, compiling: bool, asking: bool
) -> tuple[tuple[bool, str, bool], ...]:
    """For each of `names`: whether it may run such a call unforced, why, and whether that is final.

    `asking`: an explanation is wanted, no call is made.
    """
    if (device.type == "cuda" and _INTERPRET) or (device.type != "cuda" and gpu_of(device) is INTERPRETER):
        return ((False, "on CPU tensors, or interpreted, it is slow and only for tests", True),) * len(names)
    may_check = not (compiling or asking or _capturing(device))
    found = proofs.proofs(names, op, dtype, device, may_check)
    if compiling and not asking and not all(proof.is_final for proof in found):
        proofs.warn(
            f"a graph with {op} is compiled before {' and '.join(names)} had a self-check on this GPU, so "
            f"torch's kernels run in it: run {proofs.AHEAD} first, once for a machine"
        )
    return tuple((bool(proof.passed), proof.words, proof.is_final) for proof in found)


def _trusted(
    names: list[str],
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    num_experts: int,
    asking: bool = False,
) -> tuple[tuple[bool, str, bool], ...]:
    if num_experts > EXPERTS_TESTED:
        words = f"tested with up to {EXPERTS_TESTED} experts, got {num_experts}"
        return ((False, words, True),) * len(names)
    return _proofs(tuple(names), op, device, dtype, torch.compiler.is_compiling(), asking)


@dataclass(frozen=True)
class Backend:
    name: str  # folder under cumo_kernels/backends
    # (op, device, dtype, num_experts) -> why it cannot run this call, or None
    refuse: Callable[..., str | None]
    needs_proof: bool = False  # to run a call for which it was not forced


BACKENDS = (
    Backend("triton", _refuse_triton, needs_proof=True),
    Backend("cuda", _refuse_cuda, needs_proof=True),
    Backend("torch", _refuse_torch),
    Backend("reference", _refuse_reference),
)
_NAMES = tuple(backend.name for backend in BACKENDS)


def _check_name(source: str, name: str) -> str:
    if not isinstance(name, str) or name not in _NAMES:
        raise ValueError(f"{source} must be one of {list(_NAMES)}, got {name!r}")
    return name


class _Forced(threading.local):
    """The backend that the current thread has forced, at first that of CUMO_BACKEND."""

    def __init__(self):
        self.name: str | None = os.environ.get("CUMO_BACKEND") or None


_forced = _Forced()


def trains(*tensors: torch.Tensor | None) -> bool:
    """Whether any of these tensors requires a gradient, even if gradients are disabled.

    A checkpointed layer runs first without and then with gradients, and its results must be the same.
    """
    return any_requires_grad(*tensors)


def choose(op: str, x: torch.Tensor, num_experts: int = 0, with_backward: bool = False) -> str:
    """Name of the backend that runs `op` on tensors like `x`; RuntimeError with the reasons if none does.

    `num_experts`: for backends with a limit. `with_backward`: `trains` of the op's inputs; it selects the
    timings to compare, since backward runs on the backend that ran forward.
    """
    if x.device.type == "meta":  # computes nothing, so every backend fits
        return _forced.name or "reference"
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return measured.pick(_decide(op, x.device, x.dtype, num_experts, with_backward)[0], x.shape)
    # cached, since deciding at every call would keep a GPU waiting for the host
    key = (op, x.device, x.dtype, num_experts, with_backward, _forced.name, _capturing(x.device))
    if (known := _decided.get(key)) is None:
        known, is_final = _decide(op, x.device, x.dtype, num_experts, with_backward)
        if is_final:
            _decided[key] = known
    return measured.pick(known, x.shape)


_decided: dict[tuple, measured.Decisions] = {}


def forget() -> None:
    """Clear the caches; to be called after a change of anything that a choice depends on."""
    _decided.clear()
    proofs.forget()
    measured.forget()


def _decide(
    op: str, device: torch.device, dtype: torch.dtype, num_experts: int, with_backward: bool
) -> tuple[measured.Decisions, bool]:
    """-> the backends for such a call, by size; and whether that is final for this process."""
    reasons, able, unproven, is_final = [], [], [], True
    if _forced.name is not None:
        _check_name("CUMO_BACKEND", _forced.name)
    for backend in BACKENDS:
        if _forced.name is None or _forced.name == backend.name:
            reason = backend.refuse(op, device, dtype, num_experts)
            if reason is not None:
                reasons.append(f"{backend.name}: {reason}")
            elif _forced.name is None and backend.needs_proof:
                unproven.append(backend.name)
            else:
                able.append(backend.name)
    if unproven:
        answers = _trusted(unproven, op, device, dtype, num_experts)
        is_final = all(final for *_, final in answers)
        trusted = []
        for name, (passed, words, _) in zip(unproven, answers, strict=True):
            if passed:
                trusted.append(name)
            else:
                reasons.append(f"{name}: {words}")
        able = trusted + able
    if not able:
        raise RuntimeError(f"no backend runs {op} (forced: {_forced.name}): {'; '.join(reasons)}")
    return measured.decisions(op, device, dtype, _rivals(device, able), with_backward), is_final


def _rivals(device: torch.device, able: list[str]) -> list[str]:
    # on a GPU the reference waits for the host, which a timing of the op alone does not show
    on_cpu = device.type == "cpu" and measured.machine_of(device) == measured.CPU
    return able if on_cpu else [name for name in able if name != "reference"] or able


_implementations: dict[tuple[str, str], Callable] = {}


def implementation(backend: str, op: str) -> Callable:
    """The function that implements `op` in `backend`; the backend's module is imported on first use."""
    key = (backend, op)
    if key not in _implementations:
        module = importlib.import_module(f"cumo_kernels.backends.{backend}.{MODULES.get(op, OPS[op])}")
        _implementations[key] = getattr(module, op)
    return _implementations[key]


class use_backend:
    """Force one backend in this thread, like `torch.set_grad_enabled`: at once, and until a `with` ends.

    `use_backend("triton")` alone forces it until the next call; `with use_backend("triton"):` restores at its
    end what was forced before, and so does a function with the decorator `@use_backend("triton")`.

    The backward pass runs on the backend that ran forward. A layer that activation checkpointing recomputes
    on a GPU runs in a thread of autograd, for which only CUMO_BACKEND forces a backend.

    Args:
        name: "triton", "cuda", "torch" or "reference"; None restores the automatic choice.

    Raises:
        ValueError: no backend has that name. A refusal is raised by the call that is refused.
    """

    def __init__(self, name: str | None):
        self._name = None if name is None else _check_name("name", name)
        self._before = [_forced.name]
        self._is_entered = False
        _forced.name = self._name

    def __enter__(self) -> None:
        if self._is_entered:  # the first `with` restores what was forced before the call
            self._before.append(_forced.name)
        self._is_entered = True
        _forced.name = self._name

    def __exit__(self, *error) -> None:
        _forced.name = self._before.pop()

    def __call__(self, function: Callable) -> Callable:
        _forced.name = self._before[0]  # a decorator forces nothing outside of the function

        @wraps(function)
        def call(*args, **kwargs):
            with use_backend(self._name):
                return function(*args, **kwargs)

        return call


@dataclass(frozen=True)
class Verdict:
    """The state of one backend for a call."""

    backend: str
    state: str  # one of STATES
    reason: str = ""


STATES = {  # state -> its word in `explain`
    "chosen": "chosen",
    "able": "available",
    "refused": "refuses",
    "not asked": "not asked",
}


def judge(op: str, x: torch.Tensor, num_experts: int = 0, with_backward: bool = True) -> list[Verdict]:
    """Every backend's verdict on `op` for tensors like `x`, in the order of `BACKENDS`.

    `num_experts` and `with_backward` as for `choose`.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op must be one of {sorted(OPS)}, got {op!r}")
    if not all(hasattr(x, name) for name in ("device", "dtype", "shape")):
        raise ValueError(f"x must be a tensor, got {type(x).__name__}")
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 0:
        raise ValueError(f"num_experts must be an int of at least 0, got {num_experts!r}")
    if not isinstance(with_backward, bool):
        raise ValueError(f"with_backward must be True or False, got {with_backward!r}")
    op = FORWARD.get(op, op)
    if _forced.name is not None:
        _check_name("CUMO_BACKEND", _forced.name)
    states: dict[str, tuple[str, list[str | None]]] = {}
    for backend in BACKENDS:
        name, reason = backend.name, backend.refuse(op, x.device, x.dtype, num_experts)
        trusted, proof = True, None
        if reason is None and backend.needs_proof:
            ((trusted, proof, _),) = _trusted([name], op, x.device, x.dtype, num_experts, asking=True)
        if _forced.name not in (None, name):
            states[name] = "not asked", [f"{_forced.name} is forced"]
        elif reason is not None:
            states[name] = "refused", [reason]
        elif not trusted and _forced.name is None:
            states[name] = "refused", [proof, f"CUMO_BACKEND={name} forces it"]
        else:
            states[name] = "able", [proof, asks_host(name, op, x.device, x.dtype)]
    able = [name for name, (state, _) in states.items() if state == "able"]
    if able:
        rivals = _rivals(x.device, able)
        chosen = measured.pick(measured.decisions(op, x.device, x.dtype, rivals, with_backward), x.shape)
        why = None
        if len(rivals) > 1:
            why = measured.reason(op, x, rivals, with_backward) or "nothing is measured for this"
        states[chosen] = "chosen", [why, *states[chosen][1]]
    return [Verdict(name, state, "; ".join(filter(None, words))) for name, (state, words) in states.items()]


def explain(op: str, x: torch.Tensor, num_experts: int = 0, with_backward: bool = True) -> str:
    """One line per backend: chosen, available, or the reason it refuses `op` on tensors like `x`.

    Args:
        op: a name in `cumo_kernels.dispatch.OPS`, such as "expert_mlp".
        x: a tensor of the device, dtype and shape in question; its values are not read.
        num_experts: for backends with a limit.
        with_backward: whether backward runs too.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    verdicts = judge(op, x, num_experts, with_backward)
    lines = [f"{op} on {x.device.type} {str(x.dtype).removeprefix('torch.')}:"]
    for verdict in verdicts:
        said = STATES[verdict.state]
        lines.append(f"  {verdict.backend:<10} {said}{verdict.reason and f': {verdict.reason}'}")
    return "\n".join(lines)
