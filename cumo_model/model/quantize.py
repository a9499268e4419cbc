"""Stacked experts in 4 bits through bitsandbytes, whose own loading knows nothing but nn.Linear.

    model = from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))   # attention
    quantize_experts(model)                                                                    # experts

A layer's experts are expanded to the model's dtype while the layer runs, one layer at a time. Gates and
biases keep their precision: a wrong expert costs more than a rough one.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from cumo_model.model.moe import MoELayer


def quantize_experts(
    model: nn.Module,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    compress_statistics: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replace the weights of all experts of tower, connector and language model by 4-bit ones, in place.

    They are frozen; LoRA may go onto the linear layers, its `target_parameters` do not find them. The model
    can no longer be saved: save it before, or an adapter alone.

    Args:
        model: a CuMo, or any module that holds MoELayers.
        quant_type: bitsandbytes' table of values.
        compress_statistics: quantise the scales too.
        device: where each weight goes before it is quantised; the rest of the model is moved by the caller.
            None: where it is.

    Returns:
        `model` itself.

    Raises:
        ValueError: there are no experts, another `quant_type`, or bitsandbytes is not installed.
    """
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be nf4 or fp4, got {quant_type!r}")
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ValueError(f"model must hold experts, got a {type(model).__name__} without any")
    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError as error:
        raise ValueError(f"quantize_experts needs bitsandbytes 0.48 or later: {error}") from None
    for layer in layers:
        experts = layer.experts
        for name in (experts.up_name, "down_proj"):
            if is_parametrized(experts, name):
                continue
            if device is not None:
                weight = getattr(experts, name)
                setattr(experts, name, nn.Parameter(weight.to(device), requires_grad=False))
            replace_parameter_4bit(experts, name, compress_statistics, quant_type)
    return model


def are_experts_quantized(model: nn.Module) -> bool:
    return any(is_parametrized(module.experts) for module in model.modules() if isinstance(module, MoELayer))
