"""Fields of TrainingArguments in a recipe: their types, and which values a run cannot follow.

A field that the run sets itself, or that has no effect on it, may be given only with the value that holds.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import ExplicitEnum

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
# YAML reads 1e-5 as a string, as it has no dot
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

NO_EFFECT = {  # reason -> fields
    "a stage has no evaluation; evaluate the finished model": (
        "do_eval",
        "do_predict",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_accumulation_steps",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "include_for_metrics",
        "batch_eval_metrics",
        "bf16_full_eval",
        "fp16_full_eval",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "the batches of a step follow from data.grouping, stage.batch_size and the seed": (
        "auto_find_batch_size",
        "dataloader_drop_last",
        "dataloader_in_order",
        "group_by_length",
        "ignore_data_skip",
        "length_column_name",
        "train_sampling_strategy",
    ),
    "a run resumes from the newest checkpoint in its output_dir": ("resume_from_checkpoint",),
    "push the finished model with its own push_to_hub": (
        "push_to_hub",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
    ),
    "a run saves a checkpoint at SIGTERM in any case": ("enable_jit_checkpoint",),
    "Liger has no kernels for CuMo": ("use_liger_kernel", "liger_kernel_config"),
    "the launcher (torchrun) sets it": ("local_rank",),
}
WITHOUT_EFFECT = {name: reason for reason, names in NO_EFFECT.items() for name in names}
LOADER = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")  # accelerator_config


def typed_fields(given: Mapping[str, Any]) -> dict:
    """The values of a recipe as the types of the fields, as far as YAML reads others.

    Strings such as 1e-5 become numbers where a field is one, whole numbers become texts where it is a text,
    and `no` of a strategy, which YAML reads as False, becomes "no". Unknown fields are left to
    TrainingArguments.

    Raises:
        ValueError: a value is not of the type of its field; the message names it.
    """
    return {name: _typed(name, value) for name, value in given.items()}


def _typed(name: str, value: Any) -> Any:
    if name not in FIELDS or value is None:
        return _numbers(value)
    kinds = _kinds(FIELDS[name].type)
    if value is False and name.endswith("_strategy"):
        return "no"
    if kinds == {str} and type(value) is int:
        return str(value)
    if isinstance(value, str) and kinds <= {int, float}:
        try:
            value = float(value)
        except ValueError:
            pass
    if kinds == {int} and isinstance(value, float) and value.is_integer():
        value = int(value)
    numbers = {int, float} if float in kinds else kinds
    if kinds <= {bool, int, float, str} and type(value) not in numbers:
        wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"trainer.{name} must be of type {wanted}, got {value!r}")
    return value if isinstance(value, str) else _numbers(value)


def _kinds(wanted: Any) -> set:
    """The types of an annotation, without None."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(wanted) for kind in _kinds(part)} - {type(None)}
    return {wanted}


def _numbers(value: Any) -> Any:
    """The value with all strings such as 1e-5, also inside lists and dicts, as numbers."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def check_fields(given: Mapping[str, Any], fixed: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse values that the run would not follow.

    Args:
        given: fields of the recipe.
        fixed: field -> the value that the run uses, and why.

    Raises:
        ValueError: a value is not the one that holds; the message names the field, the value and the reason.
    """
    for name, (used, reason) in fixed.items():
        if given.get(name) is not None and given[name] != used:
            raise ValueError(f"trainer.{name} must be {used!r} or left out: {reason}, got {given[name]!r}")
    for name, value in given.items():
        if name in WITHOUT_EFFECT and name in FIELDS and value is not None and value != _default(name):
            raise ValueError(f"trainer.{name} must be left out: {WITHOUT_EFFECT[name]}, got {value!r}")
    loader = given.get("accelerator_config")
    for name in LOADER if isinstance(loader, dict) else ():
        if loader.get(name) is not None:
            reason = WITHOUT_EFFECT["train_sampling_strategy"]
            raise ValueError(
                f"trainer.accelerator_config.{name} must be left out: {reason}, got {loader[name]!r}"
            )


def _default(name: str) -> Any:
    field = FIELDS[name]
    made = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return made.value if isinstance(made, ExplicitEnum) else made
