"""Fields of TrainingArguments in a recipe: their types, and which values a run cannot follow.

A field that the run sets itself, or that has no effect on it, may be given only with the value that holds.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers import __version__ as VERSION
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import ExplicitEnum
from transformers.training_args import _convert_str_dict, trainer_log_levels

from cumo_model.model.compat import checkpointing_arguments
from cumo_model.model.json_files import read_object
from cumo_model.training.recipe_files import SHIPPED
from cumo_model.training.values import (
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    UNIT,
    Range,
    at_least,
    check_range,
    nearest,
)

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
    "a run that resumes from a checkpoint without the optimizer's state would differ": ("save_only_model",),
    "processes share the work by stage.expert_parallel, trainer.fsdp and trainer.deepspeed": (
        "parallelism_config",
    ),
}
WITHOUT_EFFECT = {name: reason for reason, names in NO_EFFECT.items() for name in names}
EVALUATION = "a stage has no evaluation"
WITHOUT_EFFECT_VALUES = {  # (field, value) -> reason
    ("save_strategy", "best"): EVALUATION,
    ("lr_scheduler_type", "reduce_lr_on_plateau"): EVALUATION,
    ("lr_scheduler_type", "greedy"): EVALUATION,
}
LOADER = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")  # accelerator_config
DEFAULTS = {  # that differ from those of TrainingArguments
    "logging_steps": 1,
    "save_total_limit": 2,
    "save_strategy": "steps",
    "report_to": "none",
    "disable_tqdm": False,
    "log_level_replica": "passive",  # "warning" would print on every process but the first
    "optim": "adamw_torch_fused",
    # in a step without images, tower and connector get no gradient
    "ddp_find_unused_parameters": True,
}
STEPS = Range("finite", lambda value: abs(value) < math.inf)  # NaN is not
RANGES = {  # that transformers does not check, or only in the middle of a run
    "per_device_train_batch_size": at_least(1),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": UNIT,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "torch_empty_cache_steps": at_least(1),
    "save_total_limit": at_least(0),
    "save_steps": STEPS,
    "logging_steps": STEPS,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": at_least(0),
    "dataloader_prefetch_factor": at_least(1),
    "ddp_bucket_cap_mb": at_least(1),
    "ddp_timeout": at_least(1),
}
CHOICES = {  # that transformers finds wrong late or never
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
    "include_num_input_tokens_seen": ("no", "all", "non_padding", True, False),
}
BETAS = ("adam_beta1", "adam_beta2")  # torch takes no whole numbers
# fields whose annotations do not have all types that transformers takes
ANY_TYPE = ("fsdp", "resume_from_checkpoint")
FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # an object, or the name of a JSON file
OBJECTS = (  # an object, which may be a string of JSON
    *FILES,
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
)
REFUSALS = (  # what transformers raises for values that it cannot use
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)


def typed_fields(given: Mapping[str, Any]) -> dict:
    """The values of a recipe as the types of the fields, as far as YAML reads others.

    Strings such as 1e-5 become numbers where a field is one, whole numbers become texts where it is a text,
    and `no` of a strategy, which YAML reads as False, becomes "no".

    Raises:
        ValueError: a field is unknown, or its value is not of its type or out of range; the message names it.
    """
    for name in checkpointing_arguments(dict(given)):
        if name not in FIELDS:
            near = nearest(name, FIELDS)
            raise ValueError(
                f"trainer.{name} is not a field of TrainingArguments of transformers {VERSION}"
                + (f": did you mean trainer.{near}?" if near else "")
            )
    values = {name: _typed(name, value) for name, value in given.items()}
    for name, allowed in RANGES.items():
        check_range(f"trainer.{name}", values.get(name), allowed)
    return values


def _typed(name: str, value: Any) -> Any:
    if name not in FIELDS or value is None:
        return _numbers(value)
    kinds = _kinds(FIELDS[name].type)
    if name in ANY_TYPE:
        return value
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
    allowed = {typing.get_origin(kind) or kind for kind in kinds}
    if float in kinds:
        allowed.add(int)
    if name not in WITHOUT_EFFECT and not any(type(value) is kind for kind in allowed):
        wanted = " or ".join(sorted(kind.__name__ for kind in allowed - ({int} if float in kinds else set())))
        raise ValueError(f"trainer.{name} must be of type {wanted}, got {value!r}")
    if type(value) is int and name in BETAS:
        value = float(value)
    return value if isinstance(value, str) else _numbers(value)


def _kinds(wanted: Any) -> set:
    """The types of an annotation, without None."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(wanted) for kind in _kinds(part)} - {type(None)}
    if typing.get_origin(wanted) is typing.Literal:
        return {type(value) for value in typing.get_args(wanted)}
    return {wanted}


def _numbers(value: Any) -> Any:
    """The value with all strings such as 1e-5, also inside lists and dicts, as numbers."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def given_objects(given: Mapping[str, Any]) -> dict:
    """The fields of a recipe without those left out, and with the content of JSON strings and files.

    None counts as left out, except where a field may be None. The names of files may be those of shipped
    ones ("engines/zero3.json").

    Raises:
        ValueError: a string or file cannot be read or contains no object; the message names the field.
    """
    found = {name: value for name, value in given.items() if value is not None or _takes_none(name)}
    for name in OBJECTS:
        if found.get(name) is not None:
            found[name] = _object(name, found[name])
    return found


def _takes_none(name: str) -> bool:
    """Whether None is a value of the field."""
    return name != "report_to" and type(None) in typing.get_args(FIELDS[name].type)


def _object(name: str, value: Any) -> dict:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = _convert_str_dict(json.loads(value))
        except ValueError as error:
            raise ValueError(f"trainer.{name} must be JSON, got {value!r}: {error}") from None
    elif isinstance(value, str) and name in FILES:
        place = SHIPPED / value if not os.path.exists(value) and (SHIPPED / value).is_file() else value
        try:
            value = read_object(place)
        except (OSError, ValueError) as error:
            raise ValueError(f"trainer.{name} {value!r} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"trainer.{name} must contain keys and values, got {value!r}")
    return value


def check_fields(given: Mapping[str, Any], fixed: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse values that the run would not follow, or with which it could not begin.

    Args:
        given: fields of the recipe, from `given_objects`.
        fixed: field -> the value that the run uses, and why.

    Raises:
        ValueError: a value is not one that holds; the message names the field, the value and the reason.
    """
    for name, (used, reason) in fixed.items():
        if given.get(name) is not None and given[name] != used:
            raise ValueError(f"trainer.{name} must be {used!r} or left out: {reason}, got {given[name]!r}")
    for name, value in given.items():
        if name in WITHOUT_EFFECT and name in FIELDS and value is not None and value != default(name):
            raise ValueError(f"trainer.{name} must be left out: {WITHOUT_EFFECT[name]}, got {value!r}")
    for (name, value), reason in WITHOUT_EFFECT_VALUES.items():
        if given.get(name) == value:
            raise ValueError(f"trainer.{name} must be another one: {reason}, got {value!r}")
    for name, known in CHOICES.items():
        if given.get(name, known[0]) not in known:
            raise ValueError(
                f"trainer.{name} must be one of {', '.join(map(str, known))}, got {given[name]!r}"
            )
    for name in ("save", "logging"):
        if given.get(f"{name}_strategy", "steps") == "steps" and given.get(f"{name}_steps", 1) <= 0:
            raise ValueError(
                f"trainer.{name}_steps must be positive (trainer.{name}_strategy=no switches it off), "
                f"got {given[f'{name}_steps']!r}"
            )
    _check_accelerator(given.get("accelerator_config") or {})
    _check_length(given.get("max_steps", -1), given.get("num_train_epochs", 3.0))
    _check_workers(given)
    _check_fsdp(given.get("fsdp"), given.get("fsdp_config"))


def _check_accelerator(config: Mapping[str, Any]) -> None:
    usual = AcceleratorConfig()
    for name in LOADER:
        if config.get(name) is not None and config[name] != getattr(usual, name):
            reason = WITHOUT_EFFECT["train_sampling_strategy"]
            raise ValueError(
                f"trainer.accelerator_config.{name} must be left out: {reason}, got {config[name]!r}"
            )
    name, known = (
        "gradient_accumulation_kwargs",
        [f.name for f in dataclasses.fields(GradientAccumulationPlugin)],
    )
    known.remove("num_steps")
    options = config.get(name) or {}
    if isinstance(options, dict) and "num_steps" in options:
        raise ValueError(
            f"trainer.accelerator_config.{name}.num_steps must be left out: it follows from "
            f"stage.batch_size, got {options['num_steps']!r}"
        )
    if not isinstance(options, dict) or set(options) - set(known):
        raise ValueError(
            f"trainer.accelerator_config.{name} must have keys of {', '.join(known)}, got {options!r}"
        )


def _check_length(max_steps: int, epochs: float) -> None:
    if max_steps < 1 and max_steps != -1:
        raise ValueError(f"trainer.max_steps must be at least 1, or -1 for whole epochs, got {max_steps}")
    if not 0 < epochs < math.inf:
        raise ValueError(f"trainer.num_train_epochs must be positive and finite, got {epochs}")


def _check_workers(given: Mapping[str, Any]) -> None:
    number = given.get("dataloader_num_workers", 0)
    for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
        name = f"dataloader_{name}"
        if not number and given.get(name):
            raise ValueError(
                f"trainer.{name} must be left out without trainer.dataloader_num_workers, got {given[name]!r}"
            )
    context, known = given.get("dataloader_multiprocessing_context"), multiprocessing.get_all_start_methods()
    if context is not None and context not in known:
        raise ValueError(
            f"trainer.dataloader_multiprocessing_context must be one of {', '.join(known)}, got {context!r}"
        )


def _check_fsdp(fsdp: Any, config: Mapping[str, Any] | None) -> None:
    if config is not None and fsdp is not None and not fsdp:
        raise ValueError(f"trainer.fsdp_config must be left out if trainer.fsdp is {fsdp!r}, got {config!r}")
    for name, value in (config or {}).items():
        if name.startswith("xla") and value:
            raise ValueError(
                f"trainer.fsdp_config.{name} must be left out: XLA is not supported, got {value!r}"
            )


def make_arguments(values: Mapping[str, Any]) -> TrainingArguments:
    """TrainingArguments of checked values.

    Raises:
        ValueError: transformers refuses a value, whatever its exception; the message is one line.
    """
    try:
        return TrainingArguments(**values)
    except REFUSALS as error:
        raise ValueError(f"trainer: {_one_line(error)}") from error


def check_tools(args: TrainingArguments) -> None:
    """Check that optimizer, learning rate schedule and reporters can be made, before a model is loaded.

    Raises:
        ValueError: a package is missing, or options do not fit; the message is one line.
    """
    try:
        one = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, one, 0, 10, dict(args.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"trainer.lr_scheduler_kwargs {args.lr_scheduler_kwargs!r} cannot be used with "
            f"{args.lr_scheduler_type.value}: {_one_line(error)}"
        ) from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, TypeError, ValueError) as error:
        # with target modules it needs the model, but looks for the package first
        if isinstance(error, ImportError) or not args.optim_target_modules:
            raise ValueError(
                f"trainer.optim {args.optim.value} cannot be used: {_one_line(error)}"
            ) from error
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()  # as the Trainer does; it raises an error if its package is missing
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"trainer.report_to {args.report_to} cannot be used: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)


def default_here(name: str) -> Any:
    """The value of a field that a recipe leaves out, as far as the machine does not decide it."""
    return DEFAULTS[name] if name in DEFAULTS else default(name)


def default(name: str) -> Any:
    """The value of a field of TrainingArguments that is left out."""
    field = FIELDS[name]
    made = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return made.value if isinstance(made, ExplicitEnum) else made
