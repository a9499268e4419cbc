"""LoRA stages: adapters of peft, parts that are trained without adapters, and the merged model.

Connector and tower may be trained fully together with the adapters, as in LLaVA. peft saves adapters only,
so a checkpoint has an additional file with these parameters and with the selection biases that move. A
finished stage saves one model with the adapters merged into its weights, from which the next stage can start.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cumo_kernels import PackedWeight
from cumo_model.model.moe import reads_adapters
from cumo_model.model.quantizer import CumoQuantizer, packed_weights
from cumo_model.training.balancing import biased_layers
from cumo_model.training.recipe import LoraSection, ModelSection, Recipe, StageSection
from cumo_model.training.start import start_model

BESIDE = "beside_adapters.safetensors"
ADAPTER = "lora_"  # part of the name of every parameter of peft


def with_lora(model: nn.Module, stage: StageSection) -> nn.Module:
    """Add trainable adapters. Parts of the stage other than the language model are trained fully."""
    from peft import LoraConfig, get_peft_model

    lora = stage.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=list(lora.target_parameters),
        task_type=None,
    )
    _check_names("targets", targets if isinstance(targets, list) else [], dict(model.named_modules()))
    _check_names("target_parameters", lora.target_parameters, dict(model.named_parameters()))
    _check_dropout(model, lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "language" not in name}
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        original = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if original in trained and "lm_head" not in name:
            parameter.requires_grad_(True)
    # nn.parallel would send them to the other processes, which have read them too, and cannot
    wrapped._ddp_params_and_buffers_to_ignore = list(packed_weights(wrapped))
    return wrapped


def _check_names(key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """peft needs one name to fit and passes over the others."""
    for name in names:
        if not any(f".{whole}".endswith(f".{name}") for whole in known):
            raise ValueError(f"stage.lora.{key} must name parts of the model, got {name!r}, which fits none")


def _check_dropout(model: nn.Module, lora: LoraSection) -> None:
    """Only experts compute with factors of adapters; peft itself has no dropout for parameters."""
    for owner, module in model.named_modules() if lora.dropout else ():
        for name, _ in module.named_parameters(recurse=False):
            whole = f".{owner}.{name}"
            targeted = any(whole.endswith(f".{target}") for target in lora.target_parameters)
            if targeted and not reads_adapters(module, name):
                raise ValueError(
                    "stage.lora.dropout must be 0 with target_parameters that are no weights of experts, "
                    f"for which peft has no dropout, got {lora.dropout} and {whole[1:]}"
                )


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is wrapped by peft."""
    return hasattr(model, "peft_config")


def save_beside(model: nn.Module, state: dict[str, Tensor] | None, folder: str | os.PathLike) -> None:
    """Save trained parameters that are no adapters, and the selection biases of layers whose gate is trained.

    `state` is the full state dict if weights are sharded; biases, which are buffers, never are.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad and ADAPTER not in name]
    state = model.state_dict() if state is None else state
    saved = {name: state[name] for name in names}
    saved |= {f"{name}.selection_bias": layer.selection_bias for name, layer in biased_layers(model).items()}
    if saved:
        saved = {name: value.detach().cpu().contiguous() for name, value in saved.items()}
        save_file(saved, Path(folder, BESIDE))


@torch.no_grad()
def load_beside(model: nn.Module, folder: str | os.PathLike) -> None:
    """Load the file of `save_beside`, if there is one."""
    if not Path(folder, BESIDE).is_file():
        return
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in load_file(Path(folder, BESIDE)).items():
        own[name].copy_(value)


def merged(recipe: Recipe, begin_with: ModelSection, folder: str | os.PathLike) -> nn.Module:
    """The first model of the stage, merged with the adapters and parameters of `folder`.

    It is unquantised, but for experts that were in four bits in `model.start` and have no adapters.
    """
    from peft import PeftModel

    model, _ = start_model(dataclasses.replace(begin_with, quantize=None), recipe.data)
    wrapped = PeftModel.from_pretrained(model, os.fspath(folder))
    load_beside(wrapped, folder)
    _unpack_adapted(wrapped)
    result = wrapped.merge_and_unload()
    if isinstance(getattr(result, "hf_quantizer", None), CumoQuantizer) and not packed_weights(result):
        result.dequantize()
    return result


def _unpack_adapted(wrapped: nn.Module) -> None:
    """Dequantise packed weights that have adapters: rounding the sums would undo what was learned."""
    for module in wrapped.modules():
        name = getattr(module, "parameter_name", None)  # of peft's wrapper of a parameter
        weight = None if name is None else getattr(module.get_base_layer(), name)
        if isinstance(weight, PackedWeight):
            plain = nn.Parameter(weight.dequantize().contiguous(), requires_grad=False)
            setattr(module.get_base_layer(), name, plain)
