"""DeepSpeed beside the Trainer: its process group on CPUs, and where a stage begins with weights in parts.

Under ZeRO-3 each weight is spread over the processes as it is loaded, and quantised ones are packed, so that
nobody can make experts of them. One process does so first, on a whole model, and leaves a checkpoint for all.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from cumo_model.checkpoints.folders import new_directory
from cumo_model.training.recipe import ModelSection, Recipe
from cumo_model.training.recover import everywhere
from cumo_model.training.start import start_model

START = ".start"  # in a run's folder, until the run is finished


def require_deepspeed() -> None:
    """
    Raises:
        ValueError: the package is missing.
    """
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("trainer.deepspeed needs the package deepspeed, which is not installed") from None


def join_processes(args: TrainingArguments) -> None:
    """DeepSpeed's process group where transformers makes torch's alone: on CPUs."""
    if args.deepspeed and args.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Models loaded inside are whole on this process."""
    if not args.deepspeed:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def begin(recipe: Recipe, args: TrainingArguments):
    """`start_model`, whatever the engine."""
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
        except Exception as error:  # the others wait below
            failed = error
    if everywhere(failed is not None):
        raise failed or ValueError("another process could not make the model of this stage")
    return start_model(first_model(recipe), recipe.data)


def first_model(recipe: Recipe) -> ModelSection:
    """Where the stage's first model is: as the recipe says, or what `begin` left."""
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
    """Take away what `begin` left."""
    shutil.rmtree(Path(recipe.output_dir) / START, ignore_errors=True)
