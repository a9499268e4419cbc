"""Replay of routing: a pass that uses the experts of an earlier pass, also of another engine.

Reinforcement learning needs it: an engine for inference chooses other experts than the trained model where
logits differ by rounding, and the ratio of their probabilities is then that of other networks.
"""

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from cumo_kernels.hostsync import values_at_hand
from cumo_kernels.ops.checks import check_int, shown
from cumo_model.model.recording import RoutingRecord, backward_pass

_KEYS = ("place", "layer", "topk_indices")
_NARROW = (torch.int8, torch.uint8, torch.int16)  # as engines send them


@dataclass(frozen=True)
class Given:
    """What one call of a layer must repeat."""

    topk_indices: Tensor  # (T, K) integers
    number: int  # of the record in the list
    seed: Tensor | None = None  # of the noise; None: new noise
    num_experts: int | None = None  # where it is known


class _Replay:
    """The records of one `replay_routing`, and how many calls have used theirs."""

    def __init__(self, given: dict[tuple[str, int] | None, list[Given]], backward: int):
        self.given, self.backward = given, backward
        self.used: dict[tuple[str, int] | None, int] = dict.fromkeys(given, 0)

    def next(self, place: str, layer: int, is_needed: bool) -> Given | None:
        key = None if None in self.given else (place, layer)
        entries, number = self.given.get(key, ()), self.used.get(key, 0)
        if number >= len(entries):
            if not is_needed:
                return None
            of = "" if key is None else f" of layer {layer} of {place!r}"
            raise ValueError(
                f"records must have one for each call of a layer, got {len(entries)}{of}, which runs again"
            )
        self.used[key] = number + 1
        return entries[number]

    def check_used(self) -> None:
        for key, entries in self.given.items():
            if self.used[key] < len(entries):
                of = "" if key is None else f" of layer {key[1]} of {key[0]!r}"
                raise ValueError(
                    f"records must have one for each call of a layer, got {len(entries)}{of}, of which "
                    f"{self.used[key]} were used"
                )


class _Replays(threading.local):
    """Replays that are active in the current thread, outermost first."""

    def __init__(self):
        self.active: tuple[_Replay, ...] = ()  # as in recording.py


_replays = _Replays()


@contextmanager
def replay_routing(
    records: Sequence[RoutingRecord | Mapping[str, Any] | Tensor],
) -> Iterator[None]:
    """Let every MoE layer that this thread runs inside the `with` block use the experts of `records`.

    Weights are computed from the current logits, as those of the given experts, and have gradients. With the
    parameters, inputs and records of a first pass, outputs and gradients are the same bits; a limited
    capacity drops the same slots again, and the noise of routers is that of the records. After a change of
    the parameters the experts are still those of the records.

    The n-th call of a layer takes the n-th record of that layer. A layer of which only the router runs, for
    its losses, may have none. Blocks can be nested: the innermost counts. Recomputation by activation
    checkpointing, also after the block, takes the record of the call that it repeats, if the checkpointing
    is not reentrant. Under torch.compile use a new block for each call. Compile what contains the
    checkpointing, such as the whole model: compiled code inside of checkpointing is refused.

    Args:
        records: of `record_routing`; or of another engine: dicts with "place" ("clip", "mlp" or "llm"),
            "layer" (its index within the place) and "topk_indices", (T, K) int32 or int64, for all tokens in
            order, padding included; or such tensors alone, one for each call in the order of the calls.
            int8, uint8 and int16 are widened. Expert E drops a slot.

    Raises:
        ValueError: `records` is wrong, a call has no record or one of another T, K or E, or a record is left
            at the end of the block; or compiled layers run inside of activation checkpointing.
    """
    replay = _Replay(_read(records), backward_pass())
    _replays.active = (*_replays.active, replay)
    try:
        yield
    finally:
        _replays.active = tuple(other for other in _replays.active if other is not replay)
    replay.check_used()


def _read(records: Sequence[RoutingRecord | Mapping[str, Any] | Tensor]) -> dict:
    if isinstance(records, Tensor | Mapping | str) or not isinstance(records, Sequence):
        raise ValueError(f"records must be a list of records, got {type(records).__name__}")
    given: dict[tuple[str, int] | None, list[Given]] = {}
    for number, record in enumerate(records):
        key, seed, num_experts = None, None, None
        if isinstance(record, RoutingRecord):
            key, indices = (record.place, record.layer), record.topk_indices
            seed, num_experts = record.seed, record.routing.num_experts
        elif isinstance(record, Mapping):
            if set(record) != set(_KEYS):
                raise ValueError(f"records must be dicts with {', '.join(_KEYS)}, got keys {list(record)}")
            place, layer, indices = (record[name] for name in _KEYS)
            if not isinstance(place, str):
                raise ValueError(f"records[{number}] must have a string as place, got {shown(place)}")
            key = place, check_int(f"layer of records[{number}]", layer)
        else:
            indices = record
        if not isinstance(indices, Tensor):
            raise ValueError(
                "records must be RoutingRecords, dicts or tensors of expert indices, "
                f"got {type(indices).__name__}"
            )
        if indices.dtype in _NARROW:
            indices = indices.int()
        if indices.ndim != 2 or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "records must have (T, K) int32 or int64 topk_indices, "
                f"got {tuple(indices.shape)} {indices.dtype}"
            )
        given.setdefault(key, []).append(Given(indices, number, seed, num_experts))
    if None in given and len(given) > 1:
        raise ValueError("records must all name their layers or none of them, got both")
    return given


# Recomputation runs in a backward pass, possibly on another thread and after the block. What it repeats is
# known from the frame that non-reentrant checkpointing makes for each of its calls: the frame's hooks for
# saved tensors are active in the call and in its recomputation.
_memos: "weakref.WeakKeyDictionary[Any, _Memo]" = weakref.WeakKeyDictionary()
_replayed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # layers that have ever been replayed


class _Memo:
    """What the calls in one frame were given, in order; by layer, whose id is safe while the graph lives."""

    def __init__(self):
        self.given: dict[int, list[Given | None]] = {}
        self.repeated: dict[tuple[int, Any], int] = {}  # calls of a layer in one recomputation

    def again(self, layer: nn.Module, recomputation: Any) -> Given | None:
        key = id(layer), recomputation
        number = self.repeated.get(key, 0)
        self.repeated[key] = number + 1
        return self.given[id(layer)][number]


def _frame() -> tuple[Any, Any] | None:
    """The frame of checkpointing around this code, and the recomputation: None in the first call.

    torch has no public name for it, so it is read from the closure of the hook.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    code = None if hooks is None else getattr(hooks[0], "__code__", None)
    if code is None or hooks[0].__module__ != "torch.utils.checkpoint":
        return None
    cells = hooks[0].__closure__ or ()
    names = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
    if "target_frame_ref" in names:
        return names["target_frame_ref"](), names["gid"]
    return (names["frame"], None) if "frame" in names else None


# Compiled code does not know which call it repeats: it cannot read the frame, and what it has read of Python
# is constant in it. So it asks at run time whether checkpointing will repeat it. Dynamo does not compile what
# checkpointing inside a compiled function runs, so that is recomputed in eager mode, as above.
@torch.library.custom_op("cumo::replayed", mutates_args=())
def _replayed_once(indices: Tensor, place: str, layer: int) -> Tensor:
    """A copy of `indices`. ValueError if activation checkpointing runs this compiled code."""
    caller = sys._getframe()
    while caller is not None:
        if caller.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise ValueError(
                "torch.compile must be around activation checkpointing, not inside of it, where routing is "
                f"replayed: got a compiled layer {layer} of {place!r} that checkpointing will run again, "
                "without its record"
            )
        caller = caller.f_back
    return indices.clone()


@_replayed_once.register_fake
def _(indices: Tensor, place: str, layer: int) -> Tensor:
    return torch.empty_like(indices)


def given_to(
    layer: nn.Module, place: str, index: int, shape: tuple[int, int], num_experts: int, is_needed: bool
) -> Given | None:
    """What the active replay gives this call of a layer; None: it routes by itself.

    Args:
        layer: the layer.
        place: name under which it is recorded.
        index: index under which it is recorded.
        shape: T, K.
        num_experts: E.
        is_needed: whether a record must exist.

    Raises:
        ValueError: there is no record, or one of other sizes; or the layer runs in a backward pass, and what
            it repeats is unknown.
    """
    if torch.compiler.is_compiling():
        if not _replays.active:
            return None
        found = _replays.active[-1].next(place, index, is_needed)
    else:
        if not _replays.active and layer not in _replayed:
            return None
        found = _given_in_eager(layer, place, index, is_needed)
    if found is None:
        return None
    if tuple(found.topk_indices.shape) != shape:
        raise ValueError(
            f"records must have topk_indices of {shape} for layer {index} of {place!r}, "
            f"got {tuple(found.topk_indices.shape)}"
        )
    if found.num_experts not in (None, num_experts):
        raise ValueError(
            f"records must be of {num_experts} experts for layer {index} of {place!r}, "
            f"got {found.num_experts}"
        )
    if torch.compiler.is_compiling():
        indices = _replayed_once(found.topk_indices, place, index)
        return Given(indices, found.number, found.seed, found.num_experts)
    _check_indices(found, num_experts, place, index)
    return found


def _check_indices(given: Given, num_experts: int, place: str, index: int) -> None:
    """On the CPU; what `route` would refuse too, which does not know the record."""
    indices = given.topk_indices
    if not indices.numel() or not values_at_hand(indices):
        return
    of = f"records[{given.number}], of layer {index} of {place!r},"
    low, high = (int(value) for value in indices.aminmax())
    if low < 0 or high > num_experts:
        raise ValueError(
            f"topk_indices must lie in [0, {num_experts}] in {of} got values from {low} to {high}"
        )
    ordered = indices.sort(-1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < num_experts)).any(1)
    if twice.any():
        token = int(twice.nonzero()[0])
        raise ValueError(
            f"topk_indices must name an expert once in a row in {of} got {indices[token].tolist()} "
            f"for token {token}"
        )


def _given_in_eager(layer: nn.Module, place: str, index: int, is_needed: bool) -> Given | None:
    current, frame = backward_pass(), _frame()
    mine = [replay for replay in _replays.active if replay.backward == current]
    if mine:
        found = mine[-1].next(place, index, is_needed)
        if frame is not None and frame[1] is None:
            _memos.setdefault(frame[0], _Memo()).given.setdefault(id(layer), []).append(found)
        _replayed.add(layer)
        return found
    if frame is not None and frame[1] is not None:
        memo = _memos.get(frame[0])
        return None if memo is None or id(layer) not in memo.given else memo.again(layer, frame[1])
    if current != -1 and layer in _replayed:
        raise ValueError(
            "use_reentrant must be False, with no checkpointing inside checkpointing, "
            f"where routing is replayed: layer {index} of {place!r} runs again in backward, and its record "
            "is unknown"
        )
    return None
