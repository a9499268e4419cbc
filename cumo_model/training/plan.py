"""What a stage will make, from configs alone: experts, processes and disk space, before a model is loaded."""

import math
import os
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.initialization import no_init_weights

from cumo_model.checkpoints.assemble import config_of, experts_of, is_quantized
from cumo_model.checkpoints.parts import read_parts
from cumo_model.checkpoints.upcycle import router_of
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.routers import RouterOptions
from cumo_model.training.recipe import EXPERTS, PARTS, ModelSection, Recipe
from cumo_model.training.run_folder import RESULT, checkpoints
from cumo_model.training.start import DEFAULT_TOP_K

MLPS = {  # place of experts -> module, and part of the name, of the weights that are copied
    "vision_experts": ("model.vision_tower.", ".mlp."),
    "projector_experts": ("model.multi_modal_projector.", ""),
    "text_experts": ("model.language_model.", ".mlp."),
}
# optimizer -> values that it keeps per trained weight, of the weight's dtype; of others the least is assumed
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2}


def planned_config(model: ModelSection) -> CumoConfig:
    """The config of the model that a stage starts from, before new experts are made.

    Raises:
        ValueError: a config is missing, damaged or of another kind.
    """
    try:
        if model.start is not None:
            return config_of(model.start)
        options = {"scales": model.scales, "compat": model.compat}
        return read_parts(model.vision, model.language, model.projector, **options).config
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def planned_experts(model: ModelSection, config: CumoConfig) -> dict[str, tuple[int, int]]:
    """Experts, and experts per token, of each place, after new experts are made."""
    found = experts_of(config)
    top_k = DEFAULT_TOP_K if model.top_k is None else model.top_k
    new = {name: (number, top_k) for name in EXPERTS if (number := getattr(model, name)) > 1}
    return found | {name: pair for name, pair in new.items() if found[name][0] < 2}


def check_experts(model: ModelSection, found: dict[str, tuple[int, int]]) -> None:
    """Check that the experts of a model are those of the recipe, which cannot change existing ones.

    Args:
        model: section of the recipe.
        found: place -> experts, experts per token; from `planned_experts` or `experts_of`.

    Raises:
        ValueError: the message names the key.
    """
    for name, (number, top_k) in found.items():
        wanted = getattr(model, name)
        if wanted and wanted != number:
            raise ValueError(f"model.{name} must be {number}, what the model has already, got {wanted}")
        if top_k > number > 1:
            raise ValueError(f"model.top_k must be at most {number}, the number of {name}, got {top_k}")
    if model.top_k is not None:
        there = {name: top_k for name, (number, top_k) in found.items() if number > 1}
        if not there and model.top_k != DEFAULT_TOP_K:
            raise ValueError(f"model.top_k must be left out, as the model has no experts, got {model.top_k}")
        # where the recipe names places, it is theirs
        for name in [name for name in there if getattr(model, name)] or there:
            if there[name] != model.top_k:
                raise ValueError(
                    f"model.top_k must be {there[name]} or left out, as {name} of the model has already, "
                    f"got {model.top_k}"
                )


def check_router(model: ModelSection, config: CumoConfig, experts: dict[str, tuple[int, int]]) -> None:
    """Check that the routers of a recipe are possible, and those of the experts that the model has already.

    Args:
        model: section of the recipe.
        config: from `planned_config`.
        experts: from `planned_experts`.

    Raises:
        ValueError: the message names the key.
    """
    if model.router is None:
        return
    if all(number < 2 for number, _ in experts.values()):
        raise ValueError(f"model.router must be left out, as the model has no experts, got {model.router}")
    try:
        options = router_of(config, model.router)
        for number, top_k in experts.values():
            if number > 1:
                RouterOptions.of(options).check_experts(number, top_k)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def check_plan(recipe: Recipe, args: TrainingArguments) -> CumoConfig:
    """Check all that is known of a stage before its model is loaded -> the config, as `planned_config`.

    Raises:
        ValueError: experts or processes do not fit the model, or the disk has too little room; the message
            names the key.
    """
    config, model, stage = planned_config(recipe.model), recipe.model, recipe.stage
    if model.scratch and not any(
        number < 2 and getattr(model, name) > 1 for name, (number, _) in experts_of(config).items()
    ):
        raise ValueError("model.scratch must be False where model.start has the experts, got True")
    if model.quantize is not None and stage.lora is None:
        raise ValueError(
            "model.quantize must be left out without stage.lora, as quantised weights are not trained, "
            f"got {model.quantize}"
        )
    experts = planned_experts(model, config)
    check_experts(model, experts)
    check_router(model, config, experts)
    _check_packed(recipe, args, experts)
    number = stage.expert_parallel
    if number > 1:
        if stage.lora is not None or args.deepspeed:
            raise ValueError(f"stage.expert_parallel must be 1 with lora or deepspeed, got {number}")
        if args.fp16:  # the gradient norm over DTensors and plain tensors would include the loss scale
            raise ValueError(
                f"stage.expert_parallel must be 1 with trainer.fp16; it works with trainer.bf16, got {number}"
            )
        if args.world_size % number:
            raise ValueError(
                f"stage.expert_parallel must divide the number of processes, {args.world_size}, got {number}"
            )
        for name, (of_place, _) in experts.items():
            if of_place > 1 and of_place % number:
                raise ValueError(f"stage.expert_parallel must divide {name}, {of_place}, got {number}")
    check_room(recipe, args, config)
    return config


def _check_packed(recipe: Recipe, args: TrainingArguments, experts: dict[str, tuple[int, int]]) -> None:
    """Check that a stage can train beside experts in four bits, if it has such."""
    model, is_start = recipe.model, is_quantized(recipe.model.start)
    if is_start and recipe.stage.lora is None:
        raise ValueError(
            "model.start must have unquantised experts without stage.lora, as weights in four bits are not "
            f"trained, got {model.start!r}"
        )
    if is_start and model.quantize is not None:
        raise ValueError(
            f"model.quantize must be left out for model.start {model.start!r}, whose experts are quantised, "
            f"got {model.quantize}"
        )
    if args.deepspeed and (is_start or (model.quantize == 4 and experts["text_experts"][0] > 1)):
        raise ValueError(
            "trainer.deepspeed must be left out where experts are in four bits, which it cannot spread"
        )


def weights_of(recipe: Recipe, config: CumoConfig) -> tuple[int, int]:
    """The numbers of weights of a stage's model: all of them, and those that are trained as they are.

    Gates of new experts and adapters are not counted; they are small.

    Args:
        recipe: the recipe.
        config: from `planned_config`.
    """
    with no_init_weights(), torch.device("meta"):
        dense = CumoForConditionalGeneration(config)
    found, planned = experts_of(config), planned_experts(recipe.model, config)
    copies = {MLPS[name]: planned[name][0] for name in EXPERTS if planned[name] != found[name]}
    whole = set(recipe.stage.trains) - ({"language"} if recipe.stage.lora is not None else set())
    trained = tuple(f"{module}." for part in whole for module in PARTS[part])
    total = of_trained = 0
    for key, parameter in dense.named_parameters():
        times = next((n for (prefix, part), n in copies.items() if key.startswith(prefix) and part in key), 1)
        total += times * parameter.numel()
        of_trained += times * parameter.numel() * key.startswith(trained)
    return total, of_trained


def check_room(recipe: Recipe, args: TrainingArguments, config: CumoConfig) -> None:
    """Check that the disk has room for what a run certainly saves: its next checkpoints and its result.

    A checkpoint is written before an older one is deleted, so one more than `save_total_limit` must fit.

    Args:
        recipe: the recipe.
        args: from `training_arguments`.
        config: from `planned_config`.

    Raises:
        ValueError: there is less room; the message says how much is needed, and for what.
    """
    total, trained = weights_of(recipe, config)
    size = torch.empty((), dtype=getattr(torch, recipe.model.dtype)).element_size()
    result = total * size
    adapted = recipe.stage.lora is not None and recipe.stage.lora.target_parameters
    if is_quantized(recipe.model.start) and not adapted:  # as large as what it starts from
        result = sum(path.stat().st_size for path in Path(recipe.model.start).glob("*.safetensors"))
    saved = 0 if recipe.stage.lora is not None else result
    checkpoint = saved + trained * size * STATES.get(args.optim.value, 0)
    out = Path(recipe.output_dir)
    number = max(0, _checkpoints_at_once(args) - len(checkpoints(out)))
    needed = number * checkpoint + result
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        plural = "s" if number != 1 else ""
        of_checkpoints = f"{number} checkpoint{plural} of {_gb(checkpoint)} and " if number else ""
        raise ValueError(
            f"output_dir must be on a disk with {_gb(needed)} free, for {of_checkpoints}the result "
            f"({RESULT}) of {_gb(result)}, got {_gb(free)} in {os.fspath(place)!r}"
        )


def _checkpoints_at_once(args: TrainingArguments) -> int:
    """The largest number of checkpoints that are on the disk at one time, as far as that is known."""
    if args.save_strategy.value == "no":
        return 0
    limit, saves = args.save_total_limit, None
    if args.save_strategy.value == "steps" and args.max_steps > 0 and args.save_steps >= 1:
        saves = math.ceil(args.max_steps / args.save_steps)  # the last step is saved too
    known = [number for number in (saves, limit + 1 if limit else None) if number is not None]
    return min(known, default=1)


def _gb(size: int) -> str:
    return f"{size / 1000**3:,.1f} GB" if size >= 10**8 else f"{size / 1000**2:,.1f} MB"
