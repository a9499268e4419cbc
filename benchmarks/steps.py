"""The functions whose time and memory are measured: forward, backward or both, without arguments."""

import contextlib
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks import timing


def steps_of(
    run: Callable, inputs: tuple[Tensor, ...], modes: Iterable[str], parameters: tuple[Tensor, ...] = ()
) -> dict[str, timing.Step]:
    """mode -> a function without arguments that does it once."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]  # shared, not copied
    wanted = [*(t for t in leaves if t.requires_grad), *parameters]
    as_tuple = lambda outs: (outs,) if isinstance(outs, Tensor) else outs
    differentiable = lambda: tuple(o for o in as_tuple(run(*leaves)) if o.requires_grad)

    def forward() -> object:
        with torch.no_grad():
            return run(*leaves)

    steps: dict[str, timing.Step] = {"forward": forward}
    if set(modes) - {"forward"}:
        outs = differentiable()
        upstream = tuple(torch.randn_like(o) for o in outs)
        if "backward" in modes:  # only this mode keeps saved tensors, for all variants at the same time
            steps["backward"] = lambda: torch.autograd.grad(
                outs, wanted, upstream, retain_graph=True, allow_unused=True
            )
        steps["both"] = lambda: torch.autograd.grad(differentiable(), wanted, upstream, allow_unused=True)
    return {mode: steps[mode] for mode in modes if mode in steps}


def saved_bytes(run: Callable, inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...] = ()) -> int:
    """Bytes saved by a forward pass for backward, without inputs and weights; shared memory counts once."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]  # shared, not copied
    given = {t.untyped_storage().data_ptr() for t in (*leaves, *parameters)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(*leaves)
    del out
    return sum(kept.values())


def room(device: str) -> float:
    """Bytes that one case may use."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory * 0.8
    return 4 << 30


def peak_bytes(step: timing.Step, device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(steps: dict[str, timing.Step], refuse: Callable[[str, str], None]) -> dict[str, timing.Step]:
    """name -> a replay of its CUDA graph; `refuse` gets name and reason if capture is not possible."""
    found = {}
    for name, step in steps.items():
        try:
            # a step that synchronises would fail in the capture and leave the allocator in an invalid state
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found[name] = timing.captured(step)
        except Exception as error:
            refuse(name, f"it cannot be captured: {said(error)}")
    return found


def watching(
    seconds: float | None, hung: Callable[[str], None]
) -> Callable[[str], contextlib.AbstractContextManager]:
    """watch(name): a context; after `seconds` in it a thread calls hung(name), without `seconds` never."""

    @contextlib.contextmanager
    def watch(name: str):
        timer = threading.Timer(seconds, hung, [name]) if seconds else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    return watch


def said(error: Exception) -> str:
    """The error's type and first line, as the reason of a gap."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
