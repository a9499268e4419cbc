"""Routers of transformers' models on the kernels: `set_router_implementation(model, "cumo")`.

    from cumo_kernels.integrations.routers import set_router_implementation
    set_router_implementation(model, "cumo")    # and back: "eager"

A router keeps its weights and what it returns; its logits are computed as before, and `route` chooses and
weighs. Experts are the same, except where scores of two differ by rounding only.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cumo_kernels.ops import route
from cumo_kernels.ops.noisy import sparsemixer

IMPLEMENTATIONS = ("eager", "cumo")


def _returned(logits: Tensor, routing, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return logits, routing.topk_weights.to(dtype), routing.topk_indices.long()


def _softmax(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    routing = route(logits, self.top_k, renormalize=bool(getattr(self, "norm_topk_prob", True)))
    return _returned(logits, routing, logits.dtype)


def _softmax_in_fp32(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    return _returned(logits, route(logits, self.top_k), torch.float32)


def _softmax_of_chosen(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = linear(hidden_states, self.weight, self.bias)
    return _returned(logits, route(logits, self.top_k), logits.dtype)


def _sigmoid_groups(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = linear(hidden_states.view(-1, self.hidden_dim).float(), self.weight.float())
    routing = route(
        logits,
        self.top_k,
        score="sigmoid",
        selection_bias=self.e_score_correction_bias,
        expert_groups=self.num_group,
        top_groups=self.topk_group,
        group_score="top2",
        renormalize=bool(self.norm_topk_prob),
        scale=self.routed_scaling_factor,
    )
    return _returned(logits, routing, torch.float32)


def _dense_sigmoid(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama-4: a score for every expert, 0 of those that are not chosen, and the logits."""
    logits = nn.Linear.forward(self, hidden_states)
    routing = route(logits, self.top_k, score="sigmoid", renormalize=False)
    weights = routing.topk_weights.to(logits.dtype)
    return torch.zeros_like(logits).scatter(1, routing.topk_indices.long(), weights), logits


def _sparsemixer(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if self.training:  # the model samples with the generator of torch
        return super(type(self), self).forward(hidden_states)
    logits = nn.Linear.forward(self, hidden_states)
    routing = sparsemixer(logits, jitter=self.router_jitter_noise)
    return _returned(logits, routing, logits.dtype)


FORWARDS: dict[str, Callable] = {  # class of transformers -> its forward
    "DeepseekV3TopkRouter": _sigmoid_groups,
    "Dots1TopkRouter": _sigmoid_groups,
    "Glm4MoeTopkRouter": _sigmoid_groups,
    "GptOssTopKRouter": _softmax_of_chosen,
    "Llama4Router": _dense_sigmoid,
    "MixtralTopKRouter": _softmax_in_fp32,
    "OlmoeTopKRouter": _softmax,
    "PhimoeTopKRouter": _sparsemixer,
    "Qwen3MoeTopKRouter": _softmax,
    "Qwen3_5MoeTopKRouter": _softmax,
}


@cache
def _taken_over(kind: type) -> type:
    """A subclass with our forward, and the name of its base, by which transformers may know it."""
    members = {"forward": FORWARDS[kind.__name__], "__module__": kind.__module__, "taken_over": kind}
    return type(kind.__name__, (kind,), members)


def set_router_implementation(model: nn.Module, implementation: str) -> int:
    """Let `route` choose and weigh in all routers of `model` whose class is in FORWARDS, or undo it.

    Args:
        model: a model of transformers, or a part of one.
        implementation: "cumo", or "eager" for the model's own code.

    Returns:
        Number of routers that run so now.

    Raises:
        ValueError: `implementation` is another word, or for "cumo" no router of the model is known.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    number = 0
    for module in model.modules():
        kind = getattr(type(module), "taken_over", type(module))
        if kind.__name__ in FORWARDS and kind.__module__.startswith("transformers.models."):
            module.__class__ = _taken_over(kind) if implementation == "cumo" else kind
            number += 1
    if not number and implementation == "cumo":
        raise ValueError(f"model must have a router of {sorted(FORWARDS)}, got {type(model).__name__}")
    return number
