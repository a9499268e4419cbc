"""4-bit quantisation of stacked experts with bitsandbytes, whose own loader quantises only nn.Linear.

    model = from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))   # attention
    quantize_experts(model)                                                                    # experts

The experts of a layer are dequantised to the model's dtype while that layer runs. Gates and biases keep their
precision, because a rounding error in a gate can select another expert.
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
    """Quantise the weights of all experts of tower, connector and language model to 4 bits, in place.

    The quantised weights are frozen. LoRA can be applied to the linear layers, but not to the quantised
    experts through `target_parameters`. The quantised model cannot be saved: save it before, or save
    adapters only.

    Args:
        model: a CuMo model, or any module that contains MoELayers.
        quant_type: 4-bit data type of bitsandbytes.
        compress_statistics: also quantise the scales (double quantisation).
        device: device to which each weight is moved before it is quantised. The caller moves the rest of the
            model. None: weights stay on their device.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model has no experts, `quant_type` is unknown, or bitsandbytes is not installed.
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
    """Whether any MoELayer of `model` has quantised experts."""
    return any(
        type(step).__module__.startswith("bitsandbytes")
        for module in model.modules()
        if isinstance(module, MoELayer) and is_parametrized(module.experts)
        for steps in module.experts.parametrizations.values()
        for step in steps
    )
