"""Experts of a model in memory, in four bits. `cumo_model.model.quantizer` reads and writes such models.

model = quantize_experts(from_pretrained(path))
model = quantize_experts(from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)))
"""

from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.packing.tensor import PackedWeight
from cumo_model.model.quantizer import (
    CumoQuantizationConfig,
    CumoQuantizer,
    Unsaved,
    attach,
    check_weights,
    expert_weights,
    no_experts,
    packed_parameter,
    packed_weights,
    unsaved,
)


def quantize_experts(
    model: nn.Module,
    quant_type: Literal["nf4", "fp4", "mxfp4", "int4"] = "nf4",
    compress_statistics: bool = True,
    device: torch.device | str | None = None,
    group: int | None = None,
) -> nn.Module:
    """Round the weights of all experts to 4 bits, in place; gates and biases keep their precision.

    The packed weights are frozen; LoRA can train beside them. The model can be saved and loaded again, unless
    bitsandbytes has quantised its other weights.

    Args:
        model: a CuMo model, any module that contains MoELayers, or a model of transformers whose experts are
            stacked; with `experts_implementation="cumo"` these run without being dequantised.
        quant_type: format of the weights.
        compress_statistics: keep the scales in bf16 instead of fp32; mxfp4 has scales of its own.
        device: device to which each weight is moved before it is quantised. The caller moves the rest of the
            model. None: weights stay on their device.
        group: weights of a row that share a scale. None: 64, in mxfp4 32, in int4 128.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model has no experts, `quant_type` is unknown, or a weight has rows that are no
            multiple of the group; the message names it.
    """
    if quant_type not in FORMATS:
        raise ValueError(f"quant_type must be one of {tuple(FORMATS)}, got {quant_type!r}")
    dtype = None if quant_type == "mxfp4" else torch.bfloat16 if compress_statistics else torch.float32
    config = CumoQuantizationConfig(quant_type, group, scale_dtype=dtype)
    weights = expert_weights(model)
    if not weights:
        kind, why = type(model).__name__, no_experts(model)
        raise ValueError(f"model must hold experts, got a {kind} without any: it {why}")
    new = {
        name: of for name, of in weights.items() if not isinstance(model.get_parameter(name), PackedWeight)
    }
    if new:
        check_weights(new, config)
    for name, of in new.items():
        path, _, own = name.rpartition(".")
        module, weight = model.get_submodule(path), model.get_parameter(name).detach()
        packed = packed_parameter(weight if device is None else weight.to(device), of, config.packing)
        setattr(module, own, packed)
    if isinstance(model, PreTrainedModel):
        other = getattr(model, "hf_quantizer", None)
        if other is None or isinstance(other, CumoQuantizer):
            attach(model)
        else:  # save_pretrained of transformers asks it
            other.is_serializable = Unsaved(unsaved(other))
    return model


def are_experts_quantized(model: nn.Module) -> bool:
    """Whether any weight of the experts of `model` is in four bits."""
    return bool(packed_weights(model))


def prepare_to_save(model: PreTrainedModel) -> bool:
    """Make a model with quantised experts ready for `save_pretrained`.

    Returns:
        Whether its quantised experts are saved; adapters that are loaded into a model are saved alone.

    Raises:
        ValueError: it cannot be saved; the message says why.
    """
    if not are_experts_quantized(model) or getattr(model, "_hf_peft_config_loaded", False):
        return False
    attach(model)
    return True
