"""MoELayer: gate, routing and experts. Vision tower, connector and language model all use this class.

    logits = gate(x)                                            x (T, H) -> (T, E)
    out[t] = sum_k w[t, k] * expert[idx[t, k]](x[t])            cumo_kernels: route, expert_mlp

Shape letters are those of cumo_kernels/types.py.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cumo_kernels import (
    Adapter,
    PackedWeight,
    RouterStats,
    Routing,
    expert_mlp,
    grouped_gemm,
    route,
)
from cumo_kernels.activations import get_activation
from cumo_kernels.integrations.peft import adapters_of, takes_adapters
from cumo_kernels.ops.checks import (
    check_bool,
    check_choice,
    check_count,
    check_device,
    check_float,
    check_int,
    check_like,
    check_tensor,
    check_top_k,
    shown,
)
from cumo_kernels.ops.noise import jittered
from cumo_kernels.ops.noisy import noisy_plan
from cumo_kernels.ops.routing import COMPAT, with_capacity
from cumo_kernels.tracing import is_autocast_on
from cumo_model.model.recording import (
    RoutingRecord,
    active_recorders,
    note_routing,
    saved_as_they_are,
)
from cumo_model.model.recording import record_routing as record_routing  # where it was before
from cumo_model.model.replay import given_to
from cumo_model.model.routers import RouterOptions

IMPLEMENTATIONS = ("cumo", "eager")  # of experts: cumo_kernels, or a loop in plain PyTorch


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else.

    False with hooks of the module, and with a forward replaced on this instance, as accelerate's offloading
    does. Parameters of such a module may be read only inside its forward. Hooks of all modules do not count:
    profilers and FLOP counters set them, and must not change what they measure.
    """
    return not ("forward" in module.__dict__ or any(getattr(module, name) for name in HOOKS))


def _mean_stats(stats: RouterStats, counted: Tensor) -> RouterStats:
    """Statistics of each token (G = T) -> means over the counted ones (G = 1); zeros if there is none."""
    count = counted.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:  # where, as padding may be anything
        kept = torch.where(counted.view(-1, *[1] * (values.ndim - 1)), values, 0.0)
        return (kept.sum(0) / count)[None]

    return RouterStats(mean(stats.mean_probs), mean(stats.top1_density), mean(stats.mean_squared_logsumexp))


class Gate(nn.Linear):
    """The router's linear layer. A subclass, because quantisers replace modules of class nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, E) logits, in the wider dtype of x and weight: a gate may be fp32 in a bf16 model."""
        check_device("x", x, "the gate", self.weight)
        if is_autocast_on(x.device.type):
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), self.bias)


_GATE_FORWARD = Gate.forward


def may_be_fused(gate: nn.Module, x: Tensor) -> bool:
    """Whether the router's kernel may read the weight of `gate` instead of calling it.

    False for a module of another class, a touched or patched gate, and a weight that is not a plain tensor of
    the dtype of x.
    """
    return (
        type(gate) is Gate
        and Gate.forward is _GATE_FORWARD
        and is_untouched(gate)
        and gate.bias is None
        and not is_traceable_wrapper_subclass(gate.weight)
        and gate.weight.dtype == x.dtype
    )


class Experts(nn.Module):
    """E two-layer MLPs with stacked weights; parameter names are those of transformers v5.

    The weights are up_proj (E, I, H) and down_proj (E, O, I). Gated experts have gate_up_proj (E, 2I, H)
    instead of up_proj, with the gate rows first. The biases, if any, are up_proj_bias (E, I) or
    gate_up_proj_bias (E, 2I), and down_proj_bias (E, O).

    Attributes:
        implementation: one of IMPLEMENTATIONS; set by `set_experts_implementation` of the model.
    """

    implementation = "cumo"

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
        is_gated = get_activation(activation).is_gated
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
        """Weight and bias of the first layer, gated or not."""
        return getattr(self, self.up_name), getattr(self, f"{self.up_name}_bias")

    def reset_parameters(self) -> None:
        """Initialise as E separate pairs of nn.Linear."""
        layers = (self.up, (self.down_proj, self.down_proj_bias))
        for (weight, bias), fan_in in zip(layers, self.fan_in, strict=True):
            bound = 1 / math.sqrt(fan_in)  # not read from the weight, which is empty under ZeRO-3
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, routing: Routing, compat: str | None = None) -> Tensor:
        """Apply each token's experts: x (T, H) -> (T, O).

        The kernels run inside this call, because FSDP and ZeRO-3 gather the parameters for its duration.
        With `compat` each step is rounded to the dtype of x, as in the original code (cumo_spec.md 2.4), and
        the outputs of a token's experts are added in the order of the experts. This is slow.
        """
        up_proj, up_bias, down_proj, down_bias = self._weights(x)
        of_up, of_down = adapters_of(self, self.up_name), adapters_of(self, "down_proj")
        if isinstance(up_proj, PackedWeight):
            check_device("x", x, "the experts", up_proj)
        elif not is_autocast_on(x.device.type):
            check_like("x", x, "the experts", up_proj)
        if self.implementation == "eager":
            up, down = (up_proj, up_bias, of_up), (down_proj, down_bias, of_down)
            return self._loop(x, routing, compat, up, down)
        if compat is not None:
            offsets = routing.expert_offsets
            z = grouped_gemm(x, up_proj, offsets, bias=up_bias, gather=routing, adapters=of_up)
            a = get_activation(self.activation).forward(z)
            rows = grouped_gemm(a, down_proj, offsets, bias=down_bias, adapters=of_down)
            slots = rows[routing.inverse_permutation].view(*routing.topk_indices.shape, rows.shape[1])
            slots = slots * routing.topk_weights.to(rows.dtype)[:, :, None]
            order = routing.topk_indices.argsort(1)[:, :, None].expand_as(slots)
            first, *rest = slots.gather(1, order).unbind(1)
            return sum(rest, first)
        return expert_mlp(
            x, routing, up_proj, down_proj, up_bias, down_bias, self.activation,
            up_adapters=of_up, down_adapters=of_down,
        )  # fmt: skip

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """up, its bias, down, its bias.

        The kernels dequantise packed weights to the dtype of x. The biases beside them are converted to it,
        because `prepare_model_for_kbit_training` of peft converts all parameters but quantised ones to fp32.
        """
        (up, up_bias), down, down_bias = self.up, self.down_proj, self.down_proj_bias
        if any(isinstance(weight, PackedWeight) for weight in (up, down)):
            if not is_autocast_on(x.device.type):
                up_bias, down_bias = (None if b is None else b.to(x.dtype) for b in (up_bias, down_bias))
            if self.implementation == "eager":
                up, down = up.to(x.dtype), down.to(x.dtype)
        return up, up_bias, down, down_bias

    def _loop(self, x: Tensor, routing: Routing, compat: str | None, up: tuple, down: tuple) -> Tensor:
        """The same in plain PyTorch: one expert after the other, with a host synchronisation for each."""
        dtype = x.dtype if compat is not None else torch.promote_types(x.dtype, torch.float32)
        out = x.new_zeros(x.shape[0], down[0].shape[1], dtype=dtype)
        for e in range(up[0].shape[0]):
            token, slot = (routing.topk_indices == e).nonzero(as_tuple=True)
            a = get_activation(self.activation).forward(_linear(x[token], e, *up))
            rows = _linear(a, e, *down)
            weights = routing.topk_weights[token, slot, None].to(dtype)
            out = out.index_add(0, token, rows.to(dtype) * weights)
        return out.to(x.dtype)


def _linear(x: Tensor, e: int, weight: Tensor, bias: Tensor | None, adapters: tuple[Adapter, ...]) -> Tensor:
    """One layer of expert e with its LoRA adapters: x (R, K) -> (R, N)."""
    out = nn.functional.linear(x, weight[e], None if bias is None else bias[e])
    for adapter in adapters:
        a, b = (part[e].to(out.dtype) for part in (adapter.a, adapter.b))
        dropped = nn.functional.dropout(x, adapter.dropout)
        out = out + adapter.scaling * nn.functional.linear(nn.functional.linear(dropped, a), b)
    return out


@takes_adapters
def reads_adapters(module: nn.Module, parameter_name: str) -> bool:
    """Whether `Experts.forward` runs when `module` is called, and computes with this weight."""
    return type(module) is Experts and parameter_name in (module.up_name, "down_proj")


class MoELayer(nn.Module):
    """Mixture-of-Experts layer with top-k routing.

    Args:
        hidden_size: H, input features.
        intermediate_size: I, features between the two layers of an expert.
        num_experts: E.
        top_k: K, experts per token.
        activation: a name as in `cumo_kernels.activate`, with parameters or without. A gated activation
            gives gated experts.
        output_size: O, output features; H by default.
        bias: whether the experts have biases. The gate has none.
        compat: reproduce the rounding of the original code in the router (see `cumo_kernels.route`) and in
            the experts.
        place: name under which `record_routing` records this layer.
        layer: index under which `record_routing` records this layer.
        router: options of the router that differ from the defaults, as `router` of CumoConfig.

    Raises:
        ValueError: an argument is wrong; the message names it.
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
        router: dict | None = None,
    ):
        super().__init__()
        hidden_size = check_count("hidden_size", hidden_size)
        intermediate_size = check_count("intermediate_size", intermediate_size)
        output_size = hidden_size if output_size is None else check_count("output_size", output_size)
        num_experts = check_count("num_experts", num_experts)
        top_k = check_top_k(top_k, num_experts)
        activation = get_activation(activation).name
        check_bool("bias", bias)
        check_choice("compat", compat, COMPAT)
        if not isinstance(place, str):
            raise ValueError(f"place must be a string, got {shown(place)}")
        layer = check_int("layer", layer)
        self.hidden_size, self.num_experts, self.top_k, self.compat = hidden_size, num_experts, top_k, compat
        self.place, self.layer = place, layer
        self.router = RouterOptions.of(router)
        self.router.check_experts(num_experts, top_k)
        # made here, because torch.compile cannot read the fields of a dataclass
        self.choosing, self.weighing = self.router.choosing(), self.router.weighing()
        if compat is not None and (changed := self.router.changed()):
            raise ValueError(f"router must be None with compat {compat!r}, got {changed}")
        self.gate = Gate(hidden_size, num_experts, bias=False)
        self.noise_gate = Gate(hidden_size, num_experts, bias=False) if self.router.noisy else None
        start = torch.zeros(num_experts, dtype=torch.float32) if self.router.selection_bias else None
        self.register_buffer("selection_bias", start)
        self.experts = Experts(hidden_size, intermediate_size, output_size, num_experts, activation, bias)
        self.reset_gate()

    def reset_parameters(self) -> None:
        """Initialise experts and gate."""
        self.experts.reset_parameters()
        self.reset_gate()

    def reset_gate(self) -> None:
        """Initialise the gate from U(-1/sqrt(H), 1/sqrt(H)), as the original code does, upcycled or not."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.gate.weight, -bound, bound)
        self.reset_balance()

    def reset_balance(self) -> None:
        """Set to zero what balances the experts: the weight of the noise (arXiv 1701.06538), and the bias."""
        if self.noise_gate is not None:
            nn.init.zeros_(self.noise_gate.weight)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def _apply(self, fn, recurse=True):
        # the bias stays fp32: steps of 0.001 would be lost in a bf16 bias of the size of the scores
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def route(self, x: Tensor, groups: int = 1, counted: Tensor | None = None) -> Routing:
        """Route tokens to experts.

        Args:
            x: (..., H), taken as T tokens.
            groups: number of equal consecutive groups of tokens for which statistics are computed.
            counted: (...) bool, with `groups` 1: tokens that count in the statistics. None: all tokens.

        Returns:
            The routing plan of all tokens with its statistics.

        Raises:
            ValueError: the last dimension of `x` is not H, or `counted` has another shape or `groups`.
        """
        return self._route(x, groups, counted)

    def _route(
        self, x: Tensor, groups: int = 1, counted: Tensor | None = None, router_only: bool = False
    ) -> Routing:
        check_float("x", x)
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must be (..., {self.hidden_size}), got {tuple(x.shape)}")
        rows = self._rows(x)
        if counted is not None:
            check_tensor("counted", counted)
            check_device("counted", counted, "x", x)
            if check_int("groups", groups) != 1:
                raise ValueError(f"groups must be 1 with counted, got {groups}")
            if counted.shape != x.shape[:-1] or counted.dtype != torch.bool:
                raise ValueError(
                    f"counted must be {tuple(x.shape[:-1])} of torch.bool, "
                    f"got {tuple(counted.shape)} of {counted.dtype}"
                )
            counted = counted.reshape(-1)
            groups = rows.shape[0] or 1  # statistics of each token
        num_experts, options = self.num_experts, self.router
        sizes = (rows.shape[0], self.top_k)
        given = given_to(self, self.place, self.layer, sizes, num_experts, not router_only)
        indices = None if given is None else given.topk_indices.to(rows.device)
        is_replayed = given is not None and given.seed is not None and self.training
        seed = given.seed.to(rows.device) if is_replayed else self._seed(rows)
        if options.jitter and seed is not None:
            rows = jittered(rows, options.jitter, seed)
        routing, logits, balance = self._plan(rows, groups, counted, seed, indices)
        chosen = None
        if options.capacity_factor is not None and self.training:
            chosen = routing.topk_indices
            routing = with_capacity(routing, options.capacity(*sizes, num_experts), options.drop)
        if counted is not None:
            routing = replace(routing, stats=_mean_stats(routing.stats, counted))
        record = RoutingRecord(self.place, self.layer, routing, logits, counted, chosen, balance, seed)
        note_routing(record, self)
        return routing

    def _seed(self, x: Tensor) -> Tensor | None:
        """A new seed for the noise of one call, in training; None without noise.

        It comes from torch's generator, so that the seed of a run and the state in its checkpoints decide it,
        and activation checkpointing, which restores that state, repeats it. The noise itself is a function of
        this seed, the row of the token and the column.
        """
        if not self.training or not (self.router.jitter or self.router.noisy):
            return None
        return torch.randint(2**62, (), device=x.device)

    def _plan(
        self,
        rows: Tensor,
        groups: int,
        counted: Tensor | None,
        seed: Tensor | None,
        indices: Tensor | None,
    ) -> tuple[Routing, Tensor | None, Tensor | None]:
        """Plan with statistics, logits if they are known or recorded, and the balance loss of noisy top-k."""
        if self.noise_gate is not None:
            logits, raw = self.gate(rows), self.noise_gate(rows)
            plan = noisy_plan(
                logits, raw, self.top_k, seed, groups=groups, counted=counted, topk_indices=indices
            )
            return plan.routing, logits, plan.importance_loss + plan.load_loss
        if indices is not None:
            how = {"topk_indices": indices, **self.weighing}
        elif self.selection_bias is not None:
            how = {"selection_bias": self.selection_bias, **self.choosing}
        else:
            how = self.choosing
        if self.compat is not None or not may_be_fused(self.gate, rows):
            logits = self.gate(rows)
            return route(logits, self.top_k, groups=groups, compat=self.compat, **how), logits, None
        check_device("x", rows, "the gate", self.gate.weight)
        routing, logits = route(rows, self.top_k, self.gate.weight, groups=groups, **how), None
        if any(recorder.logits for recorder in active_recorders(self)):
            # activation checkpointing must not count these tensors: recomputation does not record
            with saved_as_they_are():
                logits = self.gate(rows)
        return routing, logits, None

    def _rows(self, x: Tensor) -> Tensor:
        # not -1: of an empty batch of torch.vmap torch cannot tell that size
        return x.reshape(math.prod(x.shape[:-1]), self.hidden_size)

    def forward(
        self, x: Tensor, groups: int = 1, router_only: bool = False, counted: Tensor | None = None
    ) -> Tensor:
        """Apply the layer: x (..., H) -> (..., O). `groups` and `counted` as in `route`.

        With `router_only` the experts do not run, and x is returned. A call of the layer, unlike a call of
        `route`, runs hooks, such as those of FSDP and of accelerate's offloading.
        """
        check_bool("router_only", router_only)
        routing = self._route(x, groups, counted, router_only)
        if router_only:
            return x.view_as(x)  # created after the router: backward visits it, and its hooks, first
        out = self.experts(self._rows(x), routing, self.compat)
        return out.view(*x.shape[:-1], out.shape[-1])
