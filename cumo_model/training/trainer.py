"""transformers' Trainer for CuMo: losses by name, learning rates, adapters; and runs of recipes.

The data of a step are a function of the recipe and the step, for any number of processes. The recipe sets the
global batch size; the number of accumulation steps follows from it, the processes and the micro-batch.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from cumo_model.checkpoints.processors import template_for
from cumo_model.data.batches import Collator
from cumo_model.data.sampling import Units, plan_packs
from cumo_model.data.streamed import StreamedConversations
from cumo_model.model.compat import CHECKPOINTING, checkpointing_arguments
from cumo_model.model.config import CumoConfig
from cumo_model.model.positions import position_limit
from cumo_model.training.arguments import (
    DEFAULTS,
    check_fields,
    check_tools,
    given_objects,
    make_arguments,
    typed_fields,
)
from cumo_model.training.balancing import RATE, SelectionBiasCallback
from cumo_model.training.claims import claim, sizes_of
from cumo_model.training.deepspeed import (
    begin,
    complete_config,
    first_model,
    join_processes,
    require_deepspeed,
    whole_weights,
)
from cumo_model.training.expert_checkpoints import is_spread, spread_experts
from cumo_model.training.lora import has_adapters, load_beside, merged, save_beside, with_lora
from cumo_model.training.monitor import Monitor
from cumo_model.training.paths import check_packages, check_paths
from cumo_model.training.plan import check_plan
from cumo_model.training.recipe import (
    PARTS,
    DataSection,
    Recipe,
    StageSection,
    check_model,
)
from cumo_model.training.run_folder import DATA_FILE
from cumo_model.training.stage import StageTrainer, run_stage


class CumoTrainer(StageTrainer):
    """Trainer of a stage of a CuMo: logs parts of the loss, supports a separate connector rate and adapters.

    Args:
        model: the CuMo; wrapped by peft if the stage trains adapters.
        args: arguments of the Trainer.
        units: data set whose items are the samples of one row.
        stage: section of the recipe with learning rates and the parts to train.
        **options: further arguments of StageTrainer.
    """

    forward_options = {"use_cache": False, "skip_logits": True}

    def __init__(
        self, model: nn.Module, args: TrainingArguments, units: Units, stage: StageSection, **options: Any
    ):
        self.stage = stage
        whole = set(stage.trains) - ({"language"} if stage.lora is not None else set())
        super().__init__(model, args, units, monitor=Monitor(model, whole), **options)

    def create_optimizer(self, model=None):
        own_rate = self.stage.projector_learning_rate
        if self.optimizer is None and (own_rate is not None or self.stage.expert_parallel > 1):
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups: dict[tuple[bool, bool, bool], dict] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    # a parameter group of a fused optimizer cannot contain both plain tensors and DTensors
                    key = ("multi_modal_projector" in name, name in decayed, is_spread(parameter))
                    group = groups.setdefault(key, {"params": []})
                    group["params"].append(parameter)
            for (is_projector, decays, _), group in groups.items():
                group["weight_decay"] = self.args.weight_decay if decays else 0.0
                group["lr"] = own_rate if is_projector and own_rate is not None else options["lr"]
            self.optimizer = kind(list(groups.values()), **options)
        return super().create_optimizer(model)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if has_adapters(self.model):
            with self._room_may_end():
                save_beside(self.model, state_dict, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if has_adapters(self.model):
            load_beside(self.model, resume_from_checkpoint)

    def write_result(self, work, folder, recipe):
        """Save the trained model, with adapters merged, and its processor."""
        if not has_adapters(self.model):
            super().write_result(work, folder, recipe)
            return
        with whole_weights(self.args):
            merged(recipe, first_model(recipe), work).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of a recipe on this machine.

    Args:
        recipe: the recipe; its section `trainer` has fields of TrainingArguments.

    Raises:
        ValueError: `trainer` has an unknown key, an unusable value, or one that the run would not follow
            (arguments.py); or the batch size is not a multiple of the micro-batch times the number of
            processes.
    """
    given = given_objects(typed_fields(checkpointing_arguments(recipe.trainer)))
    stage, world = recipe.stage, int(os.environ.get("WORLD_SIZE", 1))
    micro = given.pop("per_device_train_batch_size", 1)
    if stage.batch_size % (micro * world):
        raise ValueError(
            f"stage.batch_size must be a multiple of {micro} (micro-batch) x {world} (processes), "
            f"got {stage.batch_size}"
        )
    options = f"{CHECKPOINTING}_kwargs"
    if given.get(options) is not None and not given.get(CHECKPOINTING):
        raise ValueError(
            f"trainer.{options} must be left out without trainer.{CHECKPOINTING}, got {given[options]!r}"
        )
    fixed = {  # field -> value and reason
        "output_dir": (recipe.output_dir, "it is the recipe's output_dir"),
        "learning_rate": (stage.learning_rate, "it is stage.learning_rate"),
        "gradient_accumulation_steps": (
            stage.batch_size // (micro * world),
            f"it is stage.batch_size {stage.batch_size} / ({micro} per device x {world} processes)",
        ),
        "remove_unused_columns": (False, "the model takes all columns"),
        "logging_nan_inf_filter": (False, "a loss that is not finite stops the run"),
        "label_names": (["labels"], "a batch has no others"),
        "use_cache": (False, "training uses no cache"),
    }
    check_fields(given, fixed)
    if given.get("deepspeed"):
        steps, bf16, fp16 = fixed["gradient_accumulation_steps"][0], given.get("bf16"), given.get("fp16")
        follows = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": steps,
            "train_batch_size": stage.batch_size,
            "gradient_clipping": given.get("max_grad_norm", 1.0),
            "bf16.enabled": bool(bf16),
            "fp16.enabled": bool(fp16),
        }
        given["deepspeed"] = complete_config(given["deepspeed"], follows)
        require_deepspeed()
    if not torch.cuda.is_available():
        given.pop("tf32", None)  # transformers raises an error for it without a GPU
        if given.get("fp16"):
            raise ValueError(
                "trainer.fp16 needs a GPU, because a CPU would compute in fp32; trainer.bf16 runs on both"
            )
    if given.get("fsdp_config") is not None and given.get("fsdp") is None:
        given["fsdp"] = True
    if stage.expert_parallel > 1 and stage.expert_exchange == "padded" and torch.cuda.is_available():
        if not given.get("use_cpu"):  # sizes are exchanged as CPU tensors, rows with NCCL
            given.setdefault("ddp_backend", "cpu:gloo,cuda:nccl")
    if given.get(CHECKPOINTING):  # the model refuses the reentrant variant where there are experts
        given[options] = {"use_reentrant": False, **(given.get(options) or {})}
    defaults = {**DEFAULTS, "use_cpu": not torch.cuda.is_available()}
    environment = os.environ.get
    may_restart = int(environment("TORCHELASTIC_MAX_RESTARTS", 0)) and environment("LOCAL_RANK", "0") == "0"
    if environment("TORCHELASTIC_USE_AGENT_STORE") == "True" and may_restart:
        warnings.warn(
            "torchrun gives restarted workers the store of the previous ones, so they would wait for workers "
            "that have ended: use --processes of cumo train, or torchrun with --standalone (one machine) or "
            "--rdzv-backend=c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which the static rendezvous of "
            "torchrun ignores",
            stacklevel=2,
        )
    used = {name: value for name, (value, _) in fixed.items()}
    return make_arguments({**defaults, **given, **used, "per_device_train_batch_size": micro})


def freeze(model: nn.Module, stage: StageSection) -> None:
    """Enable gradients for the parts that the stage trains, and disable them for all other parameters."""
    model.requires_grad_(False)
    for part in stage.trains:
        for name in PARTS[part]:
            for parameter in model.get_submodule(name).parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)


def check_positions(config: CumoConfig, data: DataSection, lengths: np.ndarray) -> None:
    """Check that no row of a training run is longer than the language model's positions.

    Raises:
        ValueError: data.max_length or a record is longer.
    """
    limit = position_limit(config.text_config)
    if limit is None:
        return
    has = f"{limit}, text_config.max_position_embeddings of the model"
    if data.max_length is not None and data.max_length > limit and not data.packing:
        raise ValueError(f"data.max_length must be at most {has}, got {data.max_length}")
    # the positions of a packed row begin again with each record
    if len(lengths) and lengths.max() > limit:
        longest = int(lengths.argmax())
        setting = "records of packed rows must have" if data.packing else "data.max_length must be given,"
        raise ValueError(f"{setting} at most {has}, got {lengths[longest]} tokens in record {longest}")


def build_trainer(recipe: Recipe, callbacks: Sequence = ()) -> CumoTrainer:
    """Build the model, the data set and the Trainer of a recipe.

    Args:
        recipe: the recipe.
        callbacks: callbacks of the Trainer.

    Returns:
        The Trainer, ready to train.

    Raises:
        ValueError: the recipe does not fit the machine, the data or the model, or its output folder belongs
            to a run with other data.
    """
    check_model(recipe.model)
    args = training_arguments(recipe)
    check_tools(args)
    check_paths(recipe.model, recipe.data, recipe.output_dir)
    check_packages(recipe.model, recipe.stage)
    check_positions(check_plan(recipe, args), recipe.data, np.zeros(0, np.int64))
    set_seed(args.seed)
    join_processes(args)
    model, processor = begin(recipe, args)
    stage, data = recipe.stage, recipe.data
    if (stage.balance_loss_coef or stage.router_z_loss_coef) and not model.has_expert_losses:
        warnings.warn(
            "stage.balance_loss_coef and stage.router_z_loss_coef have no effect, as neither tower nor "
            "connector has experts",
            stacklevel=2,
        )
    if (model.config.router or {}).get("selection_bias"):
        rate = RATE if stage.selection_bias_rate is None else stage.selection_bias_rate
        callbacks = [SelectionBiasCallback(rate), *callbacks]
    elif stage.selection_bias_rate is not None:
        raise ValueError(
            "stage.selection_bias_rate must be left out for a model without selection biases (model.router), "
            f"got {stage.selection_bias_rate}"
        )
    model.config.balance_loss_coef = float(stage.balance_loss_coef)
    model.config.router_z_loss_coef = float(stage.router_z_loss_coef)
    model.config.average_loss_over = stage.average_loss_over
    cache = data.cache_dir or os.path.join(os.path.dirname(os.path.abspath(recipe.output_dir)), "index")
    with args.main_process_first(desc="indexing the data"):
        dataset = StreamedConversations(
            list(data.files),
            list(data.images) or None,
            processor,
            template_for(processor, data.template, "data.template"),
            data.max_length,
            cache,
            data.skip_bad,
        )
    claim(
        Path(recipe.output_dir) / DATA_FILE,
        {"content of data": dataset.identity(), "number of records": len(dataset), **sizes_of(data.files)},
        ", or restore the data files: data.skip_bad=true passes over pictures that cannot be read",
    )
    check_positions(model.config, data, dataset.lengths)
    units = [[i] for i in range(len(dataset))]
    lengths, has_image = dataset.lengths, dataset.has_image
    if data.packing:
        units = plan_packs(lengths, has_image, data.max_length, seed=args.seed)
        has_image = np.array([has_image[unit].any() for unit in units])
        lengths = np.array([lengths[unit].sum() for unit in units])
    collator = Collator(
        dataset.pad_id,
        model.config.vision_config.image_size,
        data.packing,
        data.dummy_images,
        needs_image="language" not in stage.trains and stage.lora is None,
        padding_counts=model.config.compat is not None,
    )
    freeze(model, stage)
    if stage.lora is not None:
        model = with_lora(model, stage)
    if stage.expert_parallel > 1:
        spread_experts(model, stage.expert_parallel, args.device, bool(args.fsdp), stage.expert_exchange)
    return CumoTrainer(
        model,
        args,
        Units(dataset, units),
        stage,
        collator=collator,
        lengths=lengths,
        has_image=has_image,
        grouping=data.grouping,
        processing_class=processor,
        callbacks=callbacks,
    )


def run_recipe(recipe: Recipe, callbacks: Sequence = ()) -> Path:
    """Train a CuMo with `run_stage`.

    Args:
        recipe: the recipe.
        callbacks: callbacks of the Trainer.

    Returns:
        The folder with the trained model and its processor.
    """
    return run_stage(recipe, build_trainer, callbacks)
