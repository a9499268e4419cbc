"""LoRA stages: adapters by peft, what trains whole beside them, and the whole model that comes of both.

peft saves adapters alone; connector and tower may train beside them, as in LLaVA, so a checkpoint has a file
of these too. What a finished stage leaves is one model again, adapters merged into whole weights, which the
next stage can begin with.
"""

import dataclasses
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cumo_model.training.recipe import ModelSection, Recipe, StageSection
from cumo_model.training.start import start_model

BESIDE = "beside_adapters.safetensors"
ADAPTER = "lora_"  # in the name of every parameter that is peft's


def with_lora(model: nn.Module, stage: StageSection) -> nn.Module:
    """The model with adapters that train; the rest of the stage's parts but the language model train whole.

    Raises:
        ValueError: the package peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ValueError("stage.lora needs the package peft, which is not installed") from None

    lora = stage.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=list(lora.target_parameters) or None,
        task_type=None,
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "language" not in name}
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        original = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if original in trained and "lm_head" not in name:
            parameter.requires_grad_(True)
    return wrapped


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def save_beside(model: nn.Module, state: dict[str, Tensor] | None, folder: str | os.PathLike) -> None:
    """Write what trains and is no adapter; `state` is the whole state dict where weights are spread."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and ADAPTER not in name]
    state = model.state_dict() if state is None else state
    if names:
        save_file({name: state[name].detach().cpu().contiguous() for name in names}, Path(folder, BESIDE))


@torch.no_grad()
def load_beside(model: nn.Module, folder: str | os.PathLike) -> None:
    """Read what `save_beside` wrote, if it did."""
    if not Path(folder, BESIDE).is_file():
        return
    parameters = dict(model.named_parameters())
    for name, value in load_file(Path(folder, BESIDE)).items():
        parameters[name].copy_(value)


def merged(recipe: Recipe, begin_with: ModelSection, folder: str | os.PathLike) -> nn.Module:
    """The stage's first model in whole weights, with the adapters and parameters of `folder` in it."""
    from peft import PeftModel

    model, _ = start_model(dataclasses.replace(begin_with, quantize=None), recipe.data)
    wrapped = PeftModel.from_pretrained(model, os.fspath(folder))
    load_beside(wrapped, folder)
    return wrapped.merge_and_unload()
