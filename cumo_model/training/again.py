"""A run that is started again: what it may change, and when a finished run can be extended."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cumo_model.model.json_files import read_object
from cumo_model.training.arguments import default_here
from cumo_model.training.recipe import Recipe
from cumo_model.training.run_folder import RECIPE_FILE, RESULT, checkpoints, finished_step, step_of

LENGTH = ("max_steps", "num_train_epochs")
# fields of the Trainer, besides the seeds, that change the result by more than rounding
CHANGE = (
    *LENGTH,
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "optim_target_modules",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)
ANOTHER = "choose another output_dir"
# schedules whose learning rate at a step does not depend on the number of steps
WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")


def fields_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe's section `trainer` that change the result, as JSON values."""
    found = {name: trainer[name] for name in CHANGE if trainer.get(name) is not None}
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _value(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    return default_here(name) if value is None else value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], lengths: bool) -> list[str]:
    """The fields with another value, with both values; `lengths`: also those that set the number of steps."""
    names = [name for name in CHANGE if lengths or name not in LENGTH]
    if (_value(before, "max_steps"), _value(now, "max_steps")) != (-1, -1) and lengths:
        names.remove("num_train_epochs")  # max_steps counts
    pairs = {name: (_value(before, name), _value(now, name)) for name in names}
    return [f"trainer.{name} (was {a!r}, is {b!r})" for name, (a, b) in pairs.items() if a != b]


def has_end(fields: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step depends on the number of steps of the run."""
    kind, warmup = _value(fields, "lr_scheduler_type"), _value(fields, "warmup_steps")
    return kind not in WITHOUT_END or (kind != "constant" and 0 < warmup < 1)  # a share of the steps


def is_complete(out: Path, recipe: Recipe) -> bool:
    """Whether a run with a result has all the steps that a recipe asks for.

    Args:
        out: the run's folder, with a result.
        recipe: the recipe, of which all but the section `trainer` is known to be the same.

    Returns:
        False if the run is to be extended.

    Raises:
        ValueError: the recipe asks for fewer steps, for more where the result would not be that of one run,
            or for another training; the message names the fields.
    """
    done = finished_step(out)
    before = fields_of(read_object(out / RESULT / RECIPE_FILE).get("trainer") or {})
    now = fields_of(recipe.trainer)
    if other := _differences(before, now, lengths=False):
        raise ValueError(
            f"{out} is finished at step {done}, with another {', another '.join(other)}: {ANOTHER}"
        )
    if not _differences(before, now, lengths=True) or _value(now, "max_steps") == done:
        return True
    if done is None:
        raise ValueError(f"{out / RESULT} is damaged: it does not say its number of steps")
    by_steps = _value(now, "max_steps") != -1
    name = "max_steps" if by_steps else "num_train_epochs"
    asked, least = _value(now, name), done if by_steps else _value(before, name)
    is_finished = f"as {out} is already finished at step {done}"
    if asked < least and (by_steps or _value(before, "max_steps") == -1):
        raise ValueError(f"trainer.{name} must be at least {least}, {is_finished}, got {asked}: {ANOTHER}")
    reason = None
    if has_end(now):
        reason = (
            f"and the learning rate of its schedule {_value(now, 'lr_scheduler_type')} ended there; runs "
            f"with trainer.lr_scheduler_type={', '.join(WITHOUT_END)} can be extended"
        )
    elif not checkpoints(out):
        reason = "and has no checkpoint to go on from"
    if reason is not None:
        raise ValueError(
            f"trainer.{name} must be left as it was, {is_finished}, {reason}, got {asked}: to train on from "
            f"its result, choose another output_dir and model.start={out / RESULT}"
        )
    return False


def check_resumed(out: Path, recipe: Recipe, before: Mapping[str, Any] | None) -> None:
    """Check the number of steps of a run that goes on, and warn of what changes from here.

    Args:
        out: the run's folder.
        recipe: the recipe.
        before: the fields with which it has run so far; None if they are not known.

    Raises:
        ValueError: the run has made more steps than the recipe asks for.
    """
    found, now = checkpoints(out), fields_of(recipe.trainer)
    if not found:
        return
    step, steps = step_of(found[-1]), _value(now, "max_steps")
    if steps != -1 and steps < step:
        raise ValueError(
            f"trainer.max_steps must be at least {step}, the last checkpoint of {out}, got {steps}: {ANOTHER}"
        )
    if before is None:
        return
    differ = _differences(before, now, lengths=has_end(now) or has_end(before))
    if differ:
        warnings.warn(
            f"{out} goes on from step {step} with another {', another '.join(differ)}: its result will be "
            "that of neither",
            stacklevel=3,
        )


class EnoughSteps(TrainerCallback):
    """Refuses a run that has made more steps than its epochs have; only the data say how many these are."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > state.max_steps:
            raise ValueError(
                f"trainer.num_train_epochs {args.num_train_epochs} gives {state.max_steps} steps, and "
                f"{args.output_dir} is at step {state.global_step}: {ANOTHER}"
            )
