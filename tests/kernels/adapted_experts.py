"""Experts with adapters of peft, for tests that compare cumo_kernels with peft's own computation."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig, PreTrainedConfig, Qwen2MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import cumo_kernels.integrations.transformers  # noqa: F401  registers the experts
from tests.rounding import assert_same_formula

peft = pytest.importorskip("peft")

E, H, I, T, K = 4, 64, 128, 9, 2
SIZES = {"hidden_size": H, "intermediate_size": I}


class OwnGate(GptOssExperts):
    """A gate function that no table knows, between two products."""

    def _apply_gate(self, z):
        gate, up = z.chunk(2, dim=-1)
        return torch.tanh(gate) * up


EXPERTS = {  # kinds of experts -> class and config
    "mixtral": (MixtralExperts, MixtralConfig(**SIZES, num_local_experts=E)),
    "qwen2_moe": (Qwen2MoeExperts, Qwen2MoeConfig(**SIZES, moe_intermediate_size=I, num_experts=E)),
    "own_gate": (OwnGate, GptOssConfig(**SIZES, num_local_experts=E)),
    "gpt_oss": (GptOssExperts, GptOssConfig(**SIZES, num_local_experts=E)),  # clamps, biases, transposed
    "nemotron_h": (  # plain experts
        NemotronHExperts,
        NemotronHConfig(
            hidden_size=H, n_routed_experts=E, moe_intermediate_size=I, moe_latent_size=None, mlp_bias=False
        ),
    ),
}
UP = {"nemotron_h": "up_proj"}
TARGETS = {"both": ("up", "down_proj"), "up": ("up",), "down": ("down_proj",)}


class Holder(nn.Module):
    """A model that is nothing but its experts."""

    def __init__(self, kind: str, implementation: str = "cumo", dtype: torch.dtype = torch.float64):
        super().__init__()
        experts_class, config = EXPERTS[kind]
        config = copy.deepcopy(config)
        config._experts_implementation_internal = implementation
        self.experts = experts_class(config).to(dtype)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(std=0.3)

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def set_implementation(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._experts_implementation_internal = name


def config_of(kind: str, targets: str = "both", **options) -> "peft.LoraConfig":
    names = [f"experts.{name.replace('up', UP.get(kind, 'gate_up_proj'))}" for name in TARGETS[targets]]
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options}, target_parameters=names
    )


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    index = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    index[index == 1] = 2  # expert 1 gets no token, some tokens choose the same expert twice
    return torch.randn(T, H, dtype=dtype), index, torch.rand(T, K, dtype=dtype)


def results(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x, of the weights of the tokens, and of every adapter."""
    x, index, weights = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = model(x, index, weights)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    wanted = {"x": x, "weights": weights, **trained}
    grads = torch.autograd.grad(out, wanted.values(), upstream, allow_unused=True)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_equals_peft(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    set_implementation(model, "cumo")
    found = results(model, inputs)
    set_implementation(model, "eager")
    with parametrised() as calls:
        wanted = results(model, inputs)
    assert calls, "peft itself has not computed anything"
    set_implementation(model, "cumo")
    with parametrised() as calls:
        model(*inputs)
    assert not calls
    assert_same_formula(found, wanted)
    return found


@contextlib.contextmanager
def parametrised():
    """Records the names of parameters that peft replaces by W + scaling * B A."""
    names, register = [], nn.utils.parametrize.register_parametrization

    def recording(module, name, proxy, **options):
        names.append(name)
        return register(module, name, proxy, **options)

    nn.utils.parametrize.register_parametrization = recording
    try:
        yield names
    finally:
        nn.utils.parametrize.register_parametrization = register
