"""MoELayer: gate, routing and experts. Tower, connector and language model all use this one class.

    logits = gate(x)                                            x (T, H) -> (T, E)
    out[t] = sum_k w[t, k] * expert[idx[t, k]](x[t])            cumo_kernels: route, expert_mlp

Shape letters are those of cumo_kernels/types.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cumo_kernels import ACTIVATIONS, Routing, expert_mlp, grouped_gemm, route


@dataclass(frozen=True)
class RoutingRecord:
    place: str  # "clip" | "mlp" | "llm"
    layer: int
    routing: Routing


_recorders: list[list[RoutingRecord]] = []


@contextmanager
def record_routing() -> Iterator[list[RoutingRecord]]:
    """Collect the routing of every MoE layer that runs inside the `with`, in order of execution.

    The recomputation of a checkpointed layer during backward is not a second run and is not recorded.
    """
    records: list[RoutingRecord] = []
    _recorders.append(records)
    try:
        yield records
    finally:
        # by identity: two empty recordings are equal lists
        del _recorders[next(i for i, active in enumerate(_recorders) if active is records)]


def note_routing(place: str, layer: int, routing: Routing) -> None:
    """Give one layer's routing to every `record_routing` that is open."""
    if _recorders and not _in_backward():
        record = RoutingRecord(place, layer, routing)
        for records in _recorders:
            records.append(record)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class MoEHostMixin:
    """What a transformers model says of itself when its experts are MoELayers."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False  # cumo_kernels dispatches, not transformers

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers skips modules without parameters of their own in code from outside, and with them the
        # initialisation of every block; that is for code whose _init_weights ignores what was loaded
        super()._initialize_weights(module, is_custom_code=False)


class Gate(nn.Linear):
    """The router's linear layer. A class of its own, because quantisers replace nn.Linear itself."""


class Experts(nn.Module):
    """E two-layer MLPs with stacked weights, under the parameter names of transformers v5.

    up_proj (E, I, H), or gate_up_proj (E, 2I, H) with the gate rows first when gated; down_proj (E, O, I).
    With bias also up_proj_bias (E, I) or gate_up_proj_bias (E, 2I), and down_proj_bias (E, O).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        output_size: int,
        num_experts: int,
        activation: str,
        bias: bool,
    ):
        super().__init__()
        self.activation, self.fan_in = activation, (hidden_size, intermediate_size)
        is_gated = ACTIVATIONS[activation].is_gated
        self.up_name = "gate_up_proj" if is_gated else "up_proj"
        width = 2 * intermediate_size if is_gated else intermediate_size
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_experts, width, hidden_size)))
        self.register_parameter(
            f"{self.up_name}_bias", nn.Parameter(torch.empty(num_experts, width)) if bias else None
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, output_size, intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self.reset_parameters()

    @property
    def up(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the first layer, under whichever name they have."""
        return getattr(self, self.up_name), getattr(self, f"{self.up_name}_bias")

    def reset_parameters(self) -> None:
        """What E separate nn.Linear pairs would start from."""
        layers = (self.up, (self.down_proj, self.down_proj_bias))
        for (weight, bias), fan_in in zip(layers, self.fan_in, strict=True):
            bound = 1 / math.sqrt(fan_in)  # not of the weight's shape: ZeRO-3 keeps weights elsewhere
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, routing: Routing, compat: str | None = None) -> Tensor:
        """x (T, H) -> (T, O). The kernel runs inside this call: FSDP and ZeRO-3 gather parameters for it.

        With `compat` every step is rounded to the dtype of x, as in the original (cumo_spec.md 2.4), and what
        the experts return is added in the order of the experts; that is slow.
        """
        up_proj, up_bias = self.up
        if compat is not None:
            z = grouped_gemm(x, up_proj, routing.expert_offsets, bias=up_bias, gather=routing)
            a = ACTIVATIONS[self.activation].forward(z)
            rows = grouped_gemm(a, self.down_proj, routing.expert_offsets, bias=self.down_proj_bias)
            slots = rows[routing.inverse_permutation].view(*routing.topk_indices.shape, -1)
            slots = slots * routing.topk_weights.to(rows.dtype)[:, :, None]
            order = routing.topk_indices.argsort(1)[:, :, None].expand_as(slots)
            first, *rest = slots.gather(1, order).unbind(1)
            return sum(rest, first)
        return expert_mlp(x, routing, up_proj, self.down_proj, up_bias, self.down_proj_bias, self.activation)


class MoELayer(nn.Module):
    """Top-k routed experts.

    Args:
        hidden_size, intermediate_size: H and I.
        num_experts, top_k: E and K.
        activation: name in `cumo_kernels.ACTIVATIONS`; a gated one makes gated experts.
        output_size: O; H unless given.
        bias: whether the experts have biases; the gate has none.
        compat: rounding of the original: in the router, see `cumo_kernels.route`, and in the experts.
        place, layer: what `record_routing` calls this layer.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        activation: str,
        output_size: int | None = None,
        bias: bool = True,
        compat: str | None = None,
        place: str = "",
        layer: int = 0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and the {num_experts} experts, got {top_k}")
        self.hidden_size, self.top_k, self.compat = hidden_size, top_k, compat
        self.place, self.layer = place, layer
        self.gate = Gate(hidden_size, num_experts, bias=False)
        self.experts = Experts(
            hidden_size, intermediate_size, output_size or hidden_size, num_experts, activation, bias
        )
        self.reset_gate()

    def reset_parameters(self) -> None:
        self.experts.reset_parameters()
        self.reset_gate()

    def reset_gate(self) -> None:
        """U(-1/sqrt(H), 1/sqrt(H)), where the original's gates start, upcycled or not."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.gate.weight, -bound, bound)

    def route(self, x: Tensor, groups: int = 1) -> Routing:
        """x (..., H) as T tokens -> their plan, with statistics over `groups` equal runs of tokens."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must be (..., {self.hidden_size}), got {tuple(x.shape)}")
        rows, gate = x.reshape(-1, self.hidden_size), self.gate
        # a gate that is watched, wrapped or rounded as in the original computes its own logits
        if (
            type(gate) is Gate
            and self.compat is None
            and not (gate._forward_hooks or gate._forward_pre_hooks)
        ):
            routing = route(rows, self.top_k, gate.weight, groups=groups)
        else:
            routing = route(gate(rows), self.top_k, groups=groups, compat=self.compat)
        note_routing(self.place, self.layer, routing)
        return routing

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        """x (..., H) -> (..., O); `groups` as in `route`."""
        routing = self.route(x, groups)
        out = self.experts(x.reshape(-1, self.hidden_size), routing, self.compat)
        return out.view(*x.shape[:-1], out.shape[-1])
