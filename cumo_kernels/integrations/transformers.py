"""Experts for every Mixture-of-Experts model of transformers; importing this module registers them.

    import cumo_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="cumo")
    model.set_experts_implementation("cumo")        # or later, on an existing model

A model's router chooses the experts; its experts module (stacked weights, under the names of transformers'
experts interface) then runs here. Plain and gated MLPs whose activation is in `cumo_kernels.ACTIVATIONS` run
as one `expert_mlp`, also with the clamped gates of gpt-oss, DeepSeek-V4 and others, and with transposed or
interleaved weights, which are read as they are stored. A norm of each expert's rows, or a gate function that
is not known here, lies between two `grouped_gemm`. Anything else falls back to transformers' own grouped_mm;
the reason is logged once. Weights in four bits (`cumo_kernels.packing`) run packed, and LoRA
adapters of peft without the weights of W + B A (`cumo_kernels.integrations.peft`).
"""

import math

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_scalar
from transformers import activations as hf
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.utils import logging

from cumo_kernels import PackedWeight, combine, expert_mlp, grouped_gemm, routing_from_topk
from cumo_kernels.integrations.peft import adapters_of, takes_adapters
from cumo_kernels.integrations.routers import set_router_implementation as set_router_implementation

NAME = "cumo"
FALLBACK = "grouped_mm"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = {  # class of a model's act_fn -> our name for the same function
    hf.QuickGELUActivation: "quick_gelu",
    hf.GELUActivation: "gelu",
    nn.GELU: "gelu",
    hf.GELUTanh: "gelu_tanh",
    hf.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    hf.ReLUSquaredActivation: "relu2",
    hf.SiLUActivation: "silu",
    nn.SiLU: "silu",
}
FUNCTIONS = {nn.functional.silu: "silu", nn.functional.gelu: "gelu", nn.functional.relu: "relu"}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
OWN_GATES = {  # the method of a class of transformers -> our name, the attributes with limit and alpha
    "BeamExperts._apply_gate": ("swiglu", None, None),  # in fp32, as our kernels compute every gate
    "GptOssExperts._apply_gate": ("swiglu_oai", "limit", "alpha"),
    "OpenAIPrivacyFilterExperts._apply_gate": ("swiglu_oai", "limit", "alpha"),
    "MiniMaxM3VLExperts._apply_gate": ("swiglu_oai", "swiglu_limit", "swiglu_alpha"),
    "DeepseekV4Experts._apply_gate": ("swiglu_clamped", "limit", None),
    "HYV4Experts._apply_gate": ("swiglu_clamped", "swiglu_limit", None),
    "HYV4VLExperts._apply_gate": ("swiglu_clamped", "swiglu_limit", None),
    "Glm5NextTextExperts._apply_gate": ("swiglu_clamped", "swiglu_limit", None),
    "Step3p7Experts._apply_gate": ("clamped_swiglu", "limit", None),
}
INTERLEAVED_GATES = {"GptOssExperts._apply_gate"}  # is_concatenated also describes models that do not

logger = logging.get_logger(__name__)


def _up_name(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _weights(experts: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """up (E, 2I or I, H), down (E, O, I) and their biases; transposed storage is read through views."""
    name = _up_name(experts)
    up, down = getattr(experts, name), experts.down_proj
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not experts.has_bias:
        return up, down, None, None
    return up, down, getattr(experts, f"{name}_bias"), experts.down_proj_bias


def _has_norm(experts: nn.Module) -> bool:
    """Whether the rows of every expert go through a norm before they are weighted; transformers 5.20 on."""
    return getattr(experts, "has_post_expert_norm", False)


@torch.compiler.assume_constant_result  # a compiled graph cannot ask where a function comes from
def _row_of_gate(kind: type[nn.Module]) -> tuple[str | None, str | None, str | None, bool]:
    method = kind._apply_gate
    is_theirs = getattr(method, "__module__", "").startswith("transformers.models.")
    found = OWN_GATES.get(getattr(method, "__qualname__", None)) if is_theirs else None
    return (*(found or (None, None, None)), found is not None and method.__qualname__ in INTERLEAVED_GATES)


def _own_gate(experts: nn.Module, plain: str | None) -> str | None:
    """Name of the activation that a class of transformers computes with a gate method of its own, or None."""
    name, limit_name, alpha_name, is_interleaved = _row_of_gate(type(experts))
    has_silu = plain == "silu" if hasattr(experts, "act_fn") else True
    if limit_name is None:
        return name if has_silu else None
    limit = _constant(getattr(experts, limit_name, None))
    alpha = _constant(getattr(experts, alpha_name, None)) if alpha_name else 1.0
    if name is None or not has_silu or not (_is_above_zero(limit) and _is_above_zero(alpha)):
        return None
    if math.isinf(limit):
        return None if alpha_name else "swiglu"
    words = [f"alpha={float(alpha)!r}"] if alpha_name else []
    words += [f"limit={float(limit)!r}"]
    words += ["interleaved"] if is_interleaved else []
    return f"{name}({','.join(words)})"


def _constant(value: object) -> object:
    """The value, as a constant also to a compiler, to which a number that differs is a variable."""
    return guard_scalar(value) if isinstance(value, int | float) else value


def _is_above_zero(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def known_activation(experts: nn.Module) -> str | None:
    """Name by which `cumo_kernels` knows what is between the two products of these experts, or None."""
    act_fn = getattr(experts, "act_fn", None)
    name = FUNCTIONS.get(act_fn, PLAIN.get(type(act_fn)))
    name = "gelu_tanh" if getattr(act_fn, "approximate", None) == "tanh" else name
    if not experts.has_gate:
        return name
    if type(experts)._apply_gate is not _default_apply_gate:
        return _own_gate(experts, name)
    return GATED.get(name) if experts.is_concatenated else None


def fused_activation(experts: nn.Module) -> str | None:
    """Name of the activation with which one `expert_mlp` computes these experts, or None."""
    if _has_norm(experts) or (experts.is_transposed and _is_packed(experts)):
        return None
    return known_activation(experts)


def _is_packed(experts: nn.Module) -> bool:
    weights = (getattr(experts, name, None) for name in (_up_name(experts), "down_proj"))
    return any(isinstance(weight, PackedWeight) for weight in weights)


def refusal(experts: nn.Module) -> str | None:
    """Why "cumo" cannot run this experts module of transformers, or None."""
    name = _up_name(experts)
    wanted = [name, "down_proj"] + ([f"{name}_bias", "down_proj_bias"] if experts.has_bias else [])
    for parameter in wanted:
        value = getattr(experts, parameter, None)
        if not isinstance(value, Tensor):
            return f"it has no tensor {parameter}"
        if value.dtype not in FLOATS:
            return f"its {parameter} is {value.dtype}; cumo_kernels computes in fp32, bf16, fp16 and fp64"
    return None


def cumo_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function transformers calls for `experts_implementation="cumo"`.

    Args:
        self: an experts module whose class has `@use_experts_implementation`.
        hidden_states: (T, H).
        top_k_index: (T, K) integers; the value `self.num_experts` drops a slot, as expert parallelism needs.
        top_k_weights: (T, K) float.

    Returns:
        (T, O), dtype of `hidden_states`.
    """
    reason = refusal(self)
    if reason is not None:
        logger.warning_once(f"cumo: {type(self).__name__} runs as {FALLBACK}: {reason}")
        return ALL_EXPERTS_FUNCTIONS[FALLBACK](self, hidden_states, top_k_index, top_k_weights)
    routing = routing_from_topk(top_k_weights, top_k_index, self.num_experts)
    up, down, up_bias, down_bias = _weights(self)
    x = hidden_states.to(up.dtype)  # changes the dtype only where a norm keeps fp32 in a half-precision model
    activation = fused_activation(self)
    of_up, of_down = adapters_of(self, _up_name(self)), adapters_of(self, "down_proj")
    if activation is not None:
        out = expert_mlp(
            x, routing, up, down, up_bias, down_bias, activation, up_adapters=of_up, down_adapters=of_down
        )
    else:
        offsets = routing.expert_offsets
        known = known_activation(self)
        a = grouped_gemm(x, up, offsets, bias=up_bias, gather=routing, activation=known, adapters=of_up)
        if known is None:
            a = self._apply_gate(a) if self.has_gate else self.act_fn(a)
        rows = grouped_gemm(a, down, offsets, bias=down_bias, adapters=of_down)
        out = combine(self.post_expert_norm(rows) if _has_norm(self) else rows, routing)
    return out.to(hidden_states.dtype)


def _is_experts(module: nn.Module) -> bool:
    """Whether the class of a module has transformers' experts interface."""
    return all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "is_concatenated"))


@takes_adapters
def _runs_here(module: nn.Module, parameter_name: str) -> bool:
    """Whether `cumo_experts_forward` computes with this weight when `module` is called."""
    return (
        _is_experts(module)
        and parameter_name in (_up_name(module), "down_proj")
        and getattr(getattr(module, "config", None), "_experts_implementation", None) == NAME
        and refusal(module) is None
    )


def explain(model: nn.Module) -> str:
    """One line per experts module of a transformers model: how "cumo" runs it, or why it cannot."""
    lines = []
    for name, module in model.named_modules():
        if not _is_experts(module):
            continue
        reason, activation = refusal(module), fused_activation(module)
        between = known_activation(module) or "its own activation"
        how = f"expert_mlp ({activation})" if activation else f"grouped_gemm, {between}, grouped_gemm"
        how += ", its norm" if _has_norm(module) else ""
        lines.append(f"{name}: {how if reason is None else f'{FALLBACK}: {reason}'}")
    return "\n".join(lines) or f"{type(model).__name__} has no experts in transformers' experts interface"


ALL_EXPERTS_FUNCTIONS.register(NAME, cumo_experts_forward)
