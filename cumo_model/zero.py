"""DeepSpeed beside the Trainer: its process group on CPUs, and where a stage begins under ZeRO-3.

Under ZeRO-3 a model is loaded with each weight spread over the processes, so nobody can make experts of it.
One process does that first, on a whole model, and leaves a checkpoint that all then load.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from cumo_model.files import new_directory
from cumo_model.recipe import Recipe
from cumo_model.recover import everywhere
from cumo_model.start import start_model

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
def _whole_weights(args: TrainingArguments) -> Iterator[None]:
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def begin(recipe: Recipe, args: TrainingArguments):
    """`start_model`, whatever the engine."""
    if not args.deepspeed or not args.hf_deepspeed_config.is_zero3():
        return start_model(recipe.model, recipe.data)
    folder, failed = Path(recipe.output_dir) / START, None
    if args.process_index == 0 and not folder.is_dir():
        try:
            with _whole_weights(args):
                model, processor = start_model(recipe.model, recipe.data)
                with new_directory(folder) as work:
                    model.save_pretrained(work)
                    processor.save_pretrained(work)
                del model
        except Exception as error:  # the others wait below
            failed = error
    if everywhere(failed is not None):
        raise failed or ValueError("another process could not make the model of this stage")
    made = dataclasses.replace(
        recipe.model,
        start=str(folder),
        vision=None,
        language=None,
        vision_experts=0,
        projector_experts=0,
        text_experts=0,
    )
    return start_model(made, recipe.data)


def clear(recipe: Recipe) -> None:
    """Take away what `begin` left."""
    shutil.rmtree(Path(recipe.output_dir) / START, ignore_errors=True)
