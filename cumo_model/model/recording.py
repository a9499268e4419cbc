"""Recording of routing: what `record_routing` collects while models run, for losses, metrics and replays."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cumo_kernels import Routing

PLACES = ("mlp", "clip", "llm")  # the order in which the original code adds their losses


@dataclass(frozen=True)
class RoutingRecord:
    """The routing of one MoE layer in one forward pass.

    Attributes:
        place: "clip" (vision tower), "mlp" (connector) or "llm" (language model).
        layer: index of the layer within its place.
        routing: the layer's routing plan, which includes padding, and its statistics, which do not.
        logits: (T, E) router logits if `record_routing` was asked for them, else None.
        counted: (T,) bool, False on padding, which does not count in the statistics; None: all tokens count.
        chosen: (T, K) int32, the experts before a limited capacity dropped some; None: nothing was dropped.
        balance: () the layer's own balance loss, of noisy top-k; None: that of the statistics.
        seed: () int64, seed of the router's noise in this call; None without noise.
    """

    place: str
    layer: int
    routing: Routing
    logits: Tensor | None = None
    counted: Tensor | None = None
    chosen: Tensor | None = None
    balance: Tensor | None = None
    seed: Tensor | None = None

    @property
    def topk_indices(self) -> Tensor:
        """(T, K) int32: the experts that the router has chosen, also those that a limited capacity drops."""
        return self.routing.topk_indices if self.chosen is None else self.chosen

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int32: slots of each expert, without those of padding."""
        if self.counted is None:
            return self.routing.tokens_per_expert
        return self._count(self.routing.topk_indices)

    @property
    def chosen_per_expert(self) -> Tensor:
        """(E,) int32: as `tokens_per_expert`, before a limited capacity dropped some."""
        return self.tokens_per_expert if self.chosen is None else self._count(self.chosen)

    def _count(self, indices: Tensor) -> Tensor:
        num_experts = self.routing.num_experts
        if self.counted is not None:
            indices = indices.where(self.counted[:, None], num_experts)
        experts = torch.arange(num_experts, device=indices.device)
        return (indices[:, :, None] == experts).sum((0, 1), dtype=torch.int32)

    @property
    def num_slots(self) -> Tensor | int:
        """Slots without those of padding, dropped ones included; a () tensor if there is padding."""
        return self.routing.num_slots if self.counted is None else self.counted.sum() * self.routing.top_k


@dataclass(eq=False)
class _Recorder:
    records: "list[RoutingRecord] | _Sink"
    logits: bool
    layers: frozenset[int] | None  # ids of the modules to record; None: all
    backward: int  # the backward pass in which recording began; -1: none


class _Recorders(threading.local):
    """Recorders that are active in the current thread, outermost first."""

    def __init__(self):
        # set for each thread: torch.compile does not guard on a class attribute of a threading.local
        self.active: tuple[_Recorder, ...] = ()


_recorders = _Recorders()


@contextmanager
def record_routing(logits: bool = False, of: nn.Module | None = None) -> Iterator[list[RoutingRecord]]:
    """Record the routing of every MoE layer that this thread runs inside the `with` block, in order.

    Other threads are not recorded, also not those that nn.DataParallel starts. Blocks can be nested: each
    gets all records. When activation checkpointing recomputes a layer during backward, the layer is not
    recorded again. Under torch.compile use a new block for each call: the compiled code depends on the
    number of records that the block already has.

    Args:
        logits: also record router logits. The routers then write them to memory, which they otherwise do not.
        of: record only the layers of this module. None, and always under torch.compile: all layers.
    """
    layers = None
    if of is not None and not torch.compiler.is_compiling():
        layers = frozenset(id(module) for module in of.modules())
    recorder = _Recorder([], logits, layers, backward_pass())
    _recorders.active = (*_recorders.active, recorder)
    try:
        yield recorder.records
    finally:  # blocks of generators and tasks may end in another order than they began
        _recorders.active = tuple(other for other in _recorders.active if other is not recorder)


class _Sink:
    """Takes the place of a list of records, which would keep their tensors until the end of the block."""

    def __init__(self, take: Callable[[RoutingRecord, nn.Module | None], None]):
        self.take = take


@contextmanager
def watch_routing(take: Callable[[RoutingRecord, nn.Module | None], None], of: nn.Module) -> Iterator[None]:
    """As `record_routing(of=of)`, for a function that is called with each record and its layer."""
    with record_routing(of=of) as records:
        recorder = next(other for other in _recorders.active if other.records is records)
        recorder.records = _Sink(take)
        yield


def is_recording() -> bool:
    """Whether a `record_routing` of this thread is active."""
    current = backward_pass()
    return any(recorder.backward == current for recorder in _recorders.active)


def note_routing(record: RoutingRecord, module: nn.Module | None = None) -> None:
    """Give the record of `module`, the layer, to every active `record_routing` of this thread."""
    for recorder in active_recorders(module):
        kept = record if recorder.logits or record.logits is None else replace(record, logits=None)
        if isinstance(recorder.records, _Sink):
            recorder.records.take(kept, module)
        else:
            recorder.records.append(kept)


def active_recorders(module: nn.Module | None) -> list[_Recorder]:
    """The recorders of this thread that want the routing of `module`."""
    current = backward_pass()
    return [
        recorder
        for recorder in _recorders.active
        if recorder.backward == current and (recorder.layers is None or id(module) in recorder.layers)
    ]


def saved_as_they_are():
    """Inside, autograd saves tensors without the hooks of activation checkpointing."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def backward_pass() -> int:
    """Number of the backward pass that this code runs in; -1 outside of one, and under torch.compile."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
