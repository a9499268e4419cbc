"""Routers of transformers' models on the kernels: `set_router_implementation(model, "cumo")`.

    from cumo_kernels.integrations.routers import explain, set_router_implementation
    set_router_implementation(model, "cumo")    # and back: "eager"
    print(explain(model))

A router keeps its weights and what it returns; its logits are computed as before, and `route` chooses and
weighs. Experts are the same, except where scores of two differ by rounding only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cumo_kernels.ops import route
from cumo_kernels.ops.noisy import sparsemixer
from cumo_kernels.types import Routing
from cumo_kernels.versions import installed, minor

IMPLEMENTATIONS = ("eager", "cumo")
SCORES = {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "sqrtsoftplus"}  # class of score_fn -> score

Returned = tuple[Tensor, ...]


@cache
def _is_since(*release: int) -> bool:
    """Whether transformers is of this release or later: what some routers return has changed."""
    return minor(installed("transformers")) >= release


def _flat(hidden_states: Tensor) -> Tensor:
    return hidden_states.reshape(-1, hidden_states.shape[-1])


def _in_fp32(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return linear(_flat(hidden_states).float(), self.weight.float())


def _returned(logits: Tensor, routing: Routing, dtype: torch.dtype) -> Returned:
    return logits, routing.topk_weights.to(dtype), routing.topk_indices.long()


def _softmax(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = linear(_flat(hidden_states), self.weight)
    routing = route(logits, self.top_k, renormalize=bool(getattr(self, "norm_topk_prob", True)))
    return _returned(logits, routing, logits.dtype)


def _softmax_of_all(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Jamba, whose weights do not sum to 1."""
    logits = linear(_flat(hidden_states), self.weight)
    return _returned(logits, route(logits, self.top_k, renormalize=False), hidden_states.dtype)


def _softmax_of_fp32(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Lara Mini."""
    logits = _in_fp32(self, hidden_states)
    routing = route(logits, self.top_k, renormalize=bool(self.norm_topk_prob))
    return _returned(logits, routing, hidden_states.dtype)


def _softmax_in_fp32(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = linear(_flat(hidden_states), self.weight)
    return _returned(logits, route(logits, self.top_k), torch.float32)


def _softmax_of_chosen(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = linear(hidden_states, self.weight, self.bias)
    return _returned(logits, route(logits, self.top_k), logits.dtype)


def _softmax_over_top_k(self: nn.Module, hidden_states: Tensor) -> Returned:
    """OpenAI's privacy filter, whose weights sum to 1 / K."""
    logits = linear(hidden_states.float(), self.weight.float(), self.bias.float())
    routing = route(logits, self.top_k)
    return logits, routing.topk_weights / self.top_k, routing.topk_indices.long()


def _granite(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = linear(hidden_states, self.weight).float()
    return _returned(logits, route(logits, self.top_k), hidden_states.dtype)


def _granite_indices_first(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits, weights, indices = _granite(self, hidden_states)
    return (logits, weights, indices) if _is_since(5, 21) else (indices, weights, logits)


def _hunyuan(self: nn.Module, hidden_states: Tensor) -> Returned:
    x = _flat(hidden_states)
    logits = self.wg(x.float() if self.wg.weight.dtype == torch.float32 else x)
    return _returned(logits, route(logits, self.top_k), logits.dtype)


def _gemma4(self: nn.Module, hidden_states: Tensor) -> Returned:
    scaled = self.norm(hidden_states) * self.scale * self.scalar_root_size
    logits = self.proj(scaled)
    routing = route(logits, self.config.top_k_experts)
    indices = routing.topk_indices.long()
    weights = routing.topk_weights * self.per_expert_scale[indices]
    return logits.softmax(-1, dtype=torch.float32), weights, indices


def _cohere2(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = linear(hidden_states, self.weight)
    by_softmax = self.expert_selection_fn == "softmax"
    routing = route(
        logits,
        self.top_k,
        score=self.expert_selection_fn,
        renormalize=bool(by_softmax or self.norm_topk_prob),
    )
    return _returned(logits, routing, hidden_states.dtype)


def _ernie(self: nn.Module, hidden_states: Tensor) -> Returned:
    """The bias is one row; a sum of weights below `norm_min` divides as `norm_min`."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = linear(hidden_states.float(), self.weight.float())
        bias = self.moe_statics.e_score_correction_bias.squeeze()
        routing = route(logits, self.top_k, selection_bias=bias, renormalize=False)
        weights = routing.topk_weights
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=self.norm_min)
    return logits, weights.to(hidden_states.dtype), routing.topk_indices.long()


def _softmax_groups(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Mistral 4."""
    logits = linear(_flat(hidden_states), self.weight)
    return _returned(logits, _in_groups(self, logits, "softmax", None), logits.dtype)


def _softmax_groups_in_fp32(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Mistral Large 4."""
    logits = _in_fp32(self, hidden_states)
    return _returned(logits, _in_groups(self, logits, "softmax", None), torch.float32)


def _sigmoid_groups(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = _in_fp32(self, hidden_states)
    routing = _in_groups(self, logits, "sigmoid", self.e_score_correction_bias)
    return _returned(logits, routing, torch.float32)


def _in_groups(self: nn.Module, logits: Tensor, score: str, bias: Tensor | None) -> Routing:
    return route(
        logits,
        self.top_k,
        score=score,
        selection_bias=bias,
        expert_groups=self.num_group,
        top_groups=self.topk_group,
        group_score="top2",
        renormalize=bool(getattr(self, "norm_topk_prob", True)),
        scale=getattr(self, "routed_scaling_factor", 1),
    )


def _softmax_best_groups(self: nn.Module, hidden_states: Tensor) -> Returned:
    """DeepSeek-V2."""
    logits = _in_fp32(self, hidden_states)
    groups = {"expert_groups": self.num_group, "top_groups": self.topk_group}
    routing = route(
        logits,
        self.top_k,
        renormalize=False,
        scale=self.routed_scaling_factor,
        **(groups if self.topk_method == "group_limited_greedy" else {}),
    )
    return _returned(logits, routing, torch.float32)


def _softmax_bias(self: nn.Module, hidden_states: Tensor) -> Returned:
    """LongCat-Flash: some experts do nothing."""
    logits = linear(_flat(hidden_states).float(), self.classifier.weight.float())
    routing = route(
        logits,
        self.top_k,
        selection_bias=self.e_score_correction_bias,
        renormalize=False,
        scale=self.routed_scaling_factor,
    )
    found = _returned(logits, routing, torch.float32)
    return found if _is_since(5, 19) else found[1:]


def _sigmoid_bias(self: nn.Module, hidden_states: Tensor, bias: Tensor | None = None) -> Returned:
    """MiniMax and Step keep the bias in the router or pass it."""
    logits = linear(_flat(hidden_states).to(self.weight.dtype), self.weight)
    bias = self.e_score_correction_bias if bias is None else bias
    routing = route(logits, self.top_k, score="sigmoid", selection_bias=bias)
    return _returned(logits, routing, torch.float32)


def _sigmoid_bias_scaled(self: nn.Module, hidden_states: Tensor, bias: Tensor) -> Returned:
    """Trinity (AFMoE) and Hunyuan V3."""
    if hasattr(self, "gate"):
        logits, scale = self.gate(_flat(hidden_states)).float(), self.route_scale
    else:
        logits, scale = _in_fp32(self, hidden_states), self.router_scaling_factor
    routing = route(logits, self.top_k, score="sigmoid", selection_bias=bias, scale=scale)
    return _returned(logits, routing, torch.float32)


def _sigmoid_capped(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Laguna."""
    logits, cap = linear(_flat(hidden_states), self.weight).float(), self.router_logit_softcapping
    if cap > 0:
        logits = torch.tanh(logits / cap) * cap
    routing = route(logits, self.top_k, score="sigmoid", selection_bias=self.e_score_correction_bias)
    return _returned(logits, routing, hidden_states.dtype)


def _sigmoid_multiplied(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Muse Spark."""
    logits = _in_fp32(self, hidden_states) * self.output_multiplier
    bias, scale = self.e_score_correction_bias, self.routed_scaling_factor
    routing = route(logits, self.top_k, score="sigmoid", selection_bias=bias, scale=scale)
    return _returned(logits, routing, torch.float32)


def _sigmoid_in_fp32(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Flint."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = _in_fp32(self, hidden_states)
    routing = route(logits, self.top_k, score="sigmoid", renormalize=bool(self.norm_topk_prob))
    return _returned(logits, routing, torch.float32)


def _logits_with_bias(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Kolibri: the bias is added to the logits, not to their scores."""
    logits = _in_fp32(self, hidden_states)
    chosen = route((logits + self.e_score_correction_bias).detach(), self.top_k).topk_indices
    renormalize = bool(self.norm_topk_prob)
    routing = route(logits, self.top_k, score="sigmoid", topk_indices=chosen, renormalize=renormalize)
    return _returned(logits, routing, torch.float32)


def _lfm2(self: nn.Module, hidden_states: Tensor, bias: Tensor | None = None) -> Returned:
    """The sum of weights has 1e-6 added."""
    logits = linear(hidden_states, self.weight)
    bias = bias if self.use_expert_bias else None
    routing = route(logits, self.top_k, score="sigmoid", selection_bias=bias, renormalize=False)
    weights = routing.topk_weights
    if self.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return logits, (weights * self.routed_scaling_factor).to(logits.dtype), routing.topk_indices.long()


def _inkling2(self: nn.Module, hidden_states: Tensor) -> Returned:
    return _deepseek_v4(self, hidden_states.float())


def _deepseek_v4(self: nn.Module, hidden_states: Tensor) -> Returned:
    logits = linear(_flat(hidden_states), self.weight)
    routing = route(
        logits,
        self.top_k,
        score=_score(self),
        selection_bias=self.e_score_correction_bias,
        scale=self.routed_scaling_factor,
    )
    return _returned(logits, routing, logits.dtype)


def _deepseek_v4_by_token(self: nn.Module, hidden_states: Tensor, input_ids: Tensor) -> Returned:
    """A table names the experts of each token of the vocabulary."""
    logits = linear(_flat(hidden_states), self.weight)
    chosen = self.tid2eid[input_ids.reshape(-1)]
    scale = self.routed_scaling_factor
    routing = route(logits, self.top_k, score=_score(self), topk_indices=chosen, scale=scale)
    return _returned(logits, routing, logits.dtype)


def _score(router: nn.Module) -> str:
    kind = type(router.score_fn).__name__
    if kind not in SCORES:
        raise ValueError(f"scoring_func must be one of {tuple(SCORES.values())}, got {kind}")
    return SCORES[kind]


def _dense_sigmoid(self: nn.Module, hidden_states: Tensor) -> Returned:
    """Llama-4: a score for every expert, 0 of those that are not chosen, and the logits."""
    logits = nn.Linear.forward(self, hidden_states)
    routing = route(logits, self.top_k, score="sigmoid", renormalize=False)
    weights = routing.topk_weights.to(logits.dtype)
    return torch.zeros_like(logits).scatter(1, routing.topk_indices.long(), weights), logits


def _sparsemixer(self: nn.Module, hidden_states: Tensor) -> Returned:
    if self.training:  # the model samples with the generator of torch
        return self.taken_over.forward(self, hidden_states)
    logits = nn.Linear.forward(self, hidden_states)
    routing = sparsemixer(logits, jitter=self.router_jitter_noise)
    return _returned(logits, routing, logits.dtype)


FAMILIES: dict[Callable, str] = {  # forward -> the classes of transformers that compute it
    _softmax: "AriaTextTopKRouter FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter "
    "Qwen3MoeTopKRouter Qwen3NextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter Qwen3OmniMoeTextTopKRouter "
    "Qwen3OmniMoeThinkerTextTopKRouter Qwen3VLMoeTextTopKRouter Qwen3_5MoeTopKRouter Qwen4ExpTextTopKRouter",
    _softmax_of_all: "JambaTopKRouter",
    _softmax_of_fp32: "LaraMiniTopKRouter",
    _softmax_in_fp32: "MiniMaxTopKRouter MixtralTopKRouter",
    _softmax_of_chosen: "GptOssTopKRouter",
    _softmax_over_top_k: "OpenAIPrivacyFilterTopKRouter",
    _granite: "GraniteMoeSWATopKRouter",
    _granite_indices_first: "GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter GraniteMoeTopKRouter",
    _hunyuan: "HunYuanMoEV1Gate",
    _gemma4: "DiffusionGemmaTextRouter Gemma4TextRouter",
    _cohere2: "Cohere2MoeTopKRouter",
    _ernie: "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter",
    _softmax_groups: "Mistral4TopkRouter",
    _softmax_groups_in_fp32: "MistralLarge4TextTopkRouter",
    _sigmoid_groups: "AXK1TopkRouter BailingHybridTopkRouter BeamTopKRouter DeepseekV32TopkRouter "
    "DeepseekV3TopkRouter Dots1TopkRouter Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeLiteTopkRouter "
    "Glm4MoeTopkRouter Glm4vMoeTextTopkRouter Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter "
    "HYV4VLTopkRouter KimiLinearTopkRouter MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter",
    _softmax_best_groups: "DeepseekOcr2TextTopkRouter DeepseekV2TopkRouter UnlimitedOcrTextTopkRouter",
    _softmax_bias: "LongcatFlashTopkRouter",
    _sigmoid_bias: "MiniMaxM2TopKRouter MiniMaxM3VLTopKRouter Step3p7TopKRouter",
    _sigmoid_bias_scaled: "AfmoeTokenChoiceRouter Dots3NoteVisionTopKRouter HYV3TopKRouter",
    _sigmoid_capped: "LagunaTopKRouter",
    _sigmoid_multiplied: "MuseSparkTopkRouter",
    _sigmoid_in_fp32: "FlintTopKRouter",
    _logits_with_bias: "Kolibri1TopKRouter",
    _lfm2: "Lfm2MoeTopKRouter",
    _deepseek_v4: "DeepseekV4TopKRouter",
    _deepseek_v4_by_token: "DeepseekV4HashRouter",
    _inkling2: "Inkling2LoopTopKRouter Inkling2TopKRouter",
    _dense_sigmoid: "Llama4Router",
    _sparsemixer: "PhimoeTopKRouter",
}
FORWARDS = {name: forward for forward, names in FAMILIES.items() for name in names.split()}
REFUSED = {  # class -> why its own code runs
    "AXK2TopkRouter": "where scores with bias are negative, experts outside of the chosen groups are chosen",
    "DbrxRouter": "it returns logits, and the experts choose",
    "InklingTopkRouter": "shared experts share in the sum of the weights",
    "JetMoeTopKGating": "it returns rows sorted by expert, and their numbers as a list",
    "NllbMoeTop2Router": "it returns one-hot masks, cut by a capacity of its own",
    "SwitchTransformersTop1Router": "it returns one-hot masks, cut by a capacity of its own",
    "ZayaRouter": "its state passes from layer to layer, and one choice is no expert",
}


@cache
def _taken_over(kind: type) -> type:
    """A subclass with our forward, and the name of its base, by which transformers may know it."""
    members = {
        "forward": FORWARDS[kind.__name__],
        "__module__": kind.__module__,
        "taken_over": kind,
        "__reduce_ex__": lambda self, protocol: (_again, (kind,), self.__getstate__()),
    }
    return type(kind.__name__, (kind,), members)


def _again(kind: type) -> nn.Module:
    """For pickle and copies, which cannot find the subclass by its name."""
    return object.__new__(_taken_over(kind))


@dataclass(frozen=True)
class _Router:
    name: str
    module: nn.Module
    kind: type  # the class of transformers

    @property
    def is_ours(self) -> bool:
        return self.kind.__name__ in FORWARDS and issubclass(type(self.module), _taken_over(self.kind))

    @property
    def reason(self) -> str | None:
        """Why the code that runs now cannot be exchanged, or None."""
        if self.kind.__name__ in REFUSED:
            return REFUSED[self.kind.__name__]
        if "forward" in vars(self.module):
            return "its forward is replaced, as by accelerate's offloading; take it over before that"
        if type(self.module) not in (self.kind, _taken_over(self.kind)):
            return f"its class was changed to {type(self.module).__name__}, as by torch's parametrizations"
        return None


def _routers(model: nn.Module) -> list[_Router]:
    """Every router of transformers in `model` that is in one of the tables."""
    found = []
    for name, module in model.named_modules():
        for kind in reversed(type(module).__mro__):  # from the base: also where a subclass was made of it
            known = kind.__name__ in FORWARDS or kind.__name__ in REFUSED
            if known and kind.__module__.startswith("transformers.models."):
                found.append(_Router(name or "model", module, kind))
                break
    return found


def explain(model: nn.Module) -> str:
    """One line per known router of a transformers model: which code runs, and why where it cannot be ours."""
    lines = []
    for router in _routers(model):
        if router.is_ours:
            samples = FORWARDS[router.kind.__name__] is _sparsemixer
            how = "cumo; in training eager, which samples with torch's generator" if samples else "cumo"
        else:
            how = "eager; can be cumo" if router.reason is None else f"eager: {router.reason}"
        lines.append(f"{router.name}: {router.kind.__name__}: {how}")
    return "\n".join(lines) or f"{type(model).__name__} has no router that is known here"


def set_router_implementation(model: nn.Module, implementation: str) -> int:
    """Let `route` choose and weigh in all routers of `model` whose class is in FORWARDS, or undo it.

    Args:
        model: a model of transformers, or a part of one.
        implementation: "cumo", or "eager" for the model's own code.

    Returns:
        Number of routers that run so now. `explain` names the others, and why.

    Raises:
        ValueError: `implementation` is another word; for "cumo" no router of the model can be taken over, or
            one has a score that is unknown or a table of tokens that names an expert twice; for "eager" one
            that was taken over has changed since, so that it cannot be given back.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    to_cumo = implementation == "cumo"
    routers = _routers(model)
    free = [router for router in routers if router.reason is None]
    if to_cumo and not free and not any(router.is_ours for router in routers):
        raise ValueError(
            f"model must have a router that can be taken over, got {type(model).__name__}: {explain(model)}"
        )
    for router in routers:
        if not to_cumo and router.is_ours and router.reason is not None:
            raise ValueError(f"model must be as it was taken over, got {router.name}: {router.reason}")
    for router in free:
        if to_cumo:
            _check(router)
    for router in free:
        router.module.__class__ = _taken_over(router.kind) if to_cumo else router.kind
    return sum(router.kind.__name__ in FORWARDS and router.is_ours == to_cumo for router in routers)


def _check(router: _Router) -> None:
    """
    Raises:
        ValueError: the router has a score or a table of experts that `route` does not take.
    """
    if hasattr(router.module, "score_fn"):
        _score(router.module)
    table = getattr(router.module, "tid2eid", None)
    if table is not None and not table.is_meta and (table.sort(-1).values.diff(dim=-1) == 0).any():
        raise ValueError(
            f"tid2eid must name each expert once in a row, got others in {router.name}: the table of a new "
            "model is empty, and that of a checkpoint must be loaded first"
        )
