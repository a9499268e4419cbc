"""DeepSpeed support for the Trainer: its process group on CPUs, and stages that start from sharded weights.

ZeRO-3 shards each weight over the processes while it is loaded, and quantised weights are packed. Experts
cannot be made of such weights. So one process first makes the model with experts, unsharded, and saves it as
a checkpoint that all processes load.
"""

import copy
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from cumo_model.checkpoints.folders import new_directory
from cumo_model.training.recipe import ModelSection, Recipe
from cumo_model.training.recover import everywhere
from cumo_model.training.start import start_model

START = ".start"  # folder of that checkpoint in a run's folder; deleted when the run is finished


def complete_config(config: Mapping[str, Any], follows: Mapping[str, Any]) -> dict:
    """A config of DeepSpeed that follows the recipe where it says nothing.

    Args:
        config: content of the config.
        follows: dotted key -> the value that follows from the recipe. A key that is not in the config becomes
            "auto": DeepSpeed would take its own default, and clip no gradients.

    Raises:
        ValueError: a key has another value, or the config has an optimizer or a scheduler of its own, which
            would replace those of the recipe with its separate learning rates.
    """
    config = copy.deepcopy(dict(config))
    for name in ("optimizer", "scheduler"):
        if config.get(name) is not None:
            raise ValueError(
                f"trainer.deepspeed must have no {name}, which is that of trainer and stage, "
                f"got {config[name]!r}"
            )
        config.pop(name, None)
    for name, value in follows.items():
        *above, key = name.split(".")
        place = config
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"trainer.deepspeed.{part} must contain keys and values, got {place!r}")
        if place.setdefault(key, "auto") not in ("auto", value):
            raise ValueError(
                f"trainer.deepspeed.{name} must be auto or {value!r}, as it follows from the recipe, "
                f"got {place[key]!r}"
            )
    return config


def require_deepspeed() -> None:
    """Check that the package deepspeed is installed.

    Raises:
        ValueError: the package is missing.
    """
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("trainer.deepspeed needs the package deepspeed, which is not installed") from None


def join_processes(args: TrainingArguments) -> None:
    """Initialise DeepSpeed's process group on CPUs, where transformers initialises only that of torch."""
    if args.deepspeed and args.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Models loaded inside the `with` block are not sharded."""
    if not args.deepspeed:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def begin(recipe: Recipe, args: TrainingArguments):
    """Load the first model of a stage, as `start_model`, for any engine."""
    wanted = recipe.model
    spread = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    made_of = (wanted.language, wanted.vision_experts, wanted.projector_experts, wanted.text_experts)
    if not any(made_of) or not (spread or wanted.quantize):
        return start_model(wanted, recipe.data)
    folder, failed = Path(recipe.output_dir) / START, None
    if args.process_index == 0 and not folder.is_dir():
        try:
            with whole_weights(args):
                model, processor = start_model(dataclasses.replace(wanted, quantize=None), recipe.data)
                with new_directory(folder) as work:
                    model.save_pretrained(work)
                    processor.save_pretrained(work)
                del model
        except Exception as error:  # the other processes wait below
            failed = error
    if everywhere(failed is not None):
        raise failed or ValueError("another process could not make the model of this stage")
    return start_model(first_model(recipe), recipe.data)


def first_model(recipe: Recipe) -> ModelSection:
    """The model section of the stage's first model: from the recipe, or the checkpoint saved by `begin`."""
    folder = Path(recipe.output_dir) / START
    if not folder.is_dir():
        return recipe.model
    return dataclasses.replace(
        recipe.model,
        start=str(folder),
        vision=None,
        language=None,
        vision_experts=0,
        projector_experts=0,
        text_experts=0,
    )


def clear(recipe: Recipe) -> None:
    """Delete the checkpoint saved by `begin`."""
    shutil.rmtree(Path(recipe.output_dir) / START, ignore_errors=True)
