"""transformers' Trainer for CuMo: its data order, losses by name, rates and recovery; and runs of recipes.

What a step sees is a function of the recipe and the step, on however many processes: the global batch is the
recipe's, and accumulation is what is left of it after processes and micro-batches.
"""

import json
import os
import shutil
import signal
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from cumo_model.checkpoints.folders import fingerprint, new_directory
from cumo_model.data.batches import Collator
from cumo_model.data.sampling import StepSampler, Units, plan_packs
from cumo_model.data.streamed import StreamedConversations
from cumo_model.model.compat import CHECKPOINTING, checkpointing_arguments
from cumo_model.training.deepspeed import (
    begin,
    clear,
    first_model,
    join_processes,
    require_deepspeed,
    whole_weights,
)
from cumo_model.training.expert_checkpoints import SpreadCheckpoints, is_spread, spread_experts
from cumo_model.training.lora import has_adapters, load_beside, merged, save_beside, with_lora
from cumo_model.training.monitor import Monitor, MonitorCallback, ShortProgress
from cumo_model.training.recipe import Recipe, StageSection, plain
from cumo_model.training.recover import SAVING, StopRequests, last_sound
from cumo_model.training.train import PARTS, Interrupted

RECIPE_FILE = "recipe.json"  # in a run's folder: what it is a run of
DATA_FILE = "data.json"  # likewise: what its data are
START_FILE = "start.json"  # likewise: what the models it begins with are
RESULT = "model"  # in a finished run's folder


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _leave_stops_to_the_parent(worker: int) -> None:
    """In a process that loads data: a signal for the whole group, as of Ctrl-C, timeout or a batch system, is
    answered by who trains, and a loader that died of it would fail the step before the save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class CumoTrainer(SpreadCheckpoints):
    """Trainer with CuMo's sampler, parts of the loss in the log, a connector rate of its own."""

    def __init__(
        self,
        model,
        args: TrainingArguments,
        units: Units,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        collator: Collator,
        grouping: str,
        stage: StageSection,
        **options,
    ):
        """
        Args:
            units: rows of a batch.
            lengths, has_image: of each unit.
            grouping: of `StepSampler`.
            stage: rates and what trains.
            options: of Trainer (processing_class, callbacks).
        """
        self.lengths, self.has_image, self.grouping, self.stage = lengths, has_image, grouping, stage
        whole = set(stage.trains) - ({"language"} if stage.lora is not None else set())
        self.monitor = Monitor(model, whole)
        super().__init__(model, args, data_collator=collator, train_dataset=units, **options)
        self.metrics = MonitorCallback(self.monitor)
        self.callback_handler.callbacks.insert(0, self.metrics)
        self.pop_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ShortProgress())

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        sampler = StepSampler(
            self.lengths,
            self.has_image,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            grouping=self.grouping,
        )
        return _Loader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=_leave_stops_to_the_parent,
        )

    def create_optimizer(self, model=None):
        own_rate = self.stage.projector_learning_rate
        if self.optimizer is None and (own_rate is not None or self.stage.expert_parallel > 1):
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups: dict[tuple[bool, bool, bool], dict] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    # fused optimizers take plain tensors or DTensors in one group, not both
                    key = ("multi_modal_projector" in name, name in decayed, is_spread(parameter))
                    group = groups.setdefault(key, {"params": []})
                    group["params"].append(parameter)
            for (is_projector, decays, _), group in groups.items():
                group["weight_decay"] = self.args.weight_decay if decays else 0.0
                group["lr"] = own_rate if is_projector and own_rate is not None else options["lr"]
            self.optimizer = kind(list(groups.values()), **options)
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {"use_cache": False, "skip_logits": True, **inputs}
        with self.monitor.watching(inputs, model.training):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            self.monitor.add_losses(outputs["loss_parts"])
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if has_adapters(self.model):
            with self._room_may_end():
                save_beside(self.model, state_dict, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if has_adapters(self.model):
            load_beside(self.model, resume_from_checkpoint)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        path = self._window_file(output_dir)
        torch.save(
            {
                "loss": self._tr_loss,
                "total": self._total_loss_scalar,
                "logged": self._globalstep_last_logged,
                "monitor": self.monitor.state_dict(),
            },
            path,
        )

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        path = self._window_file(checkpoint)
        if not path.is_file():
            return
        device = self.args.device
        place = device if device.type == "cuda" else device.type  # "cpu:0" is no place to torch.load
        window = torch.load(path, weights_only=True, map_location=place)
        self._tr_loss, self._total_loss_scalar = window["loss"], window["total"]
        self._globalstep_last_logged = window["logged"]
        self.monitor.load_state_dict(window["monitor"])

    def _window_file(self, folder: str | os.PathLike) -> Path:
        """What this process has added up since the last log: the next one is then of all its steps."""
        return Path(folder, f"window_{self.args.process_index}_of_{self.args.world_size}.pt")

    def log(self, logs, start_time=None):
        if "loss" in logs:
            if not np.isfinite(logs["loss"]):
                raise FloatingPointError(f"the loss became {logs['loss']} at step {self.state.global_step}")
            logs.update(self.metrics.metrics())
        super().log(logs, start_time)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of a recipe on this machine.

    Raises:
        ValueError: a key is none of theirs, or the batch does not divide over the processes.
    """
    given, stage, world = (
        checkpointing_arguments(recipe.trainer),
        recipe.stage,
        int(os.environ.get("WORLD_SIZE", 1)),
    )
    micro = int(given.pop("per_device_train_batch_size", 1))
    if stage.batch_size % (micro * world):
        raise ValueError(
            f"stage.batch_size must be a multiple of {micro} (micro-batch) x {world} (processes), "
            f"got {stage.batch_size}"
        )
    given.setdefault("learning_rate", stage.learning_rate)
    for name in ("fsdp_config", "deepspeed"):
        if isinstance(given.get(name), str):
            given[name] = _engine_config(name, given[name])
    if given.get("deepspeed"):
        require_deepspeed()
    if not torch.cuda.is_available():
        given.pop("tf32", None)  # what only a GPU has is no reason to refuse a CPU
        if given.get("fp16"):
            raise ValueError(
                "trainer.fp16 needs a GPU, a CPU would compute in fp32; trainer.bf16 runs on both"
            )
    if "fsdp_config" in given:
        given.setdefault("fsdp", True)
    if stage.expert_parallel > 1 and stage.expert_exchange == "padded" and torch.cuda.is_available():
        if not given.get("use_cpu"):  # sizes are agreed on by CPU tensors, rows travel by NCCL
            given.setdefault("ddp_backend", "cpu:gloo,cuda:nccl")
    fixed = {
        "output_dir": recipe.output_dir,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": stage.batch_size // (micro * world),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # a loss that is no number ends the run
        "label_names": ["labels"],
    }
    if given.get(CHECKPOINTING):  # the model refuses the other way
        options = f"{CHECKPOINTING}_kwargs"
        given[options] = {"use_reentrant": False, **(given.get(options) or {})}
    defaults = {
        "logging_steps": 1,
        "save_total_limit": 2,
        "save_strategy": "steps",
        "report_to": "none",
        "disable_tqdm": False,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(),
        # a step of text alone leaves tower and connector without gradient
        "ddp_find_unused_parameters": True,
    }
    environment = os.environ.get
    if environment("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(
        environment("TORCHELASTIC_MAX_RESTARTS", 0)
    ):
        warnings.warn(
            "torch 2.11's torchrun gives restarted processes the store of those before, where they find "
            "addresses of the dead: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun",
            stacklevel=2,
        )
    try:
        return TrainingArguments(**{**defaults, **given, **fixed})
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from None


def _engine_config(name: str, path: str) -> dict:
    from cumo_model.training.recipe import SHIPPED

    place = Path(path) if os.path.exists(path) else SHIPPED / path
    try:
        return json.loads(place.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"trainer.{name} {path!r} cannot be read: {error}") from None


def freeze(model, stage: StageSection) -> None:
    """Leave only what the stage trains with gradients."""
    model.requires_grad_(False)
    for part in stage.trains:
        for name in PARTS[part]:
            for parameter in model.get_submodule(name).parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)


def _claim(path: Path, wanted: dict) -> None:
    """Only a run of the same things goes on in a folder, where `path` says what they are."""
    out = path.parent
    if path.exists():
        found = json.loads(path.read_text())
        differ = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differ:
            raise ValueError(f"{out} is a run with another {', '.join(differ)}: choose another output_dir")
        return
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # nodes may share process numbers
    part.write_text(json.dumps(wanted, indent=1))
    os.replace(part, path)


def _claim_start(recipe: Recipe) -> None:
    """A stage before that was trained again, into the same folder, is another beginning."""
    model = recipe.model
    named = (model.start, model.vision, model.language, model.projector)
    paths = [path for path in named if path is not None]
    # where one is gone a run that needs it says so
    if all(os.path.exists(path) for path in paths):
        wanted = {f"content of {path}": fingerprint(path) for path in paths}
        _claim(Path(recipe.output_dir) / START_FILE, wanted)


def build_trainer(recipe: Recipe, callbacks: Sequence = ()) -> CumoTrainer:
    """Model, data and Trainer of a recipe, ready to train."""
    args = training_arguments(recipe)
    set_seed(args.seed)
    join_processes(args)
    model, processor = begin(recipe, args)
    stage, data = recipe.stage, recipe.data
    model.config.balance_loss_coef = stage.balance_loss_coef
    model.config.router_z_loss_coef = stage.router_z_loss_coef
    cache = data.cache_dir or os.path.join(os.path.dirname(os.path.abspath(recipe.output_dir)), "index")
    with args.main_process_first(desc="indexing the data"):
        dataset = StreamedConversations(
            list(data.files),
            list(data.images) or None,
            processor,
            data.template,
            data.max_length,
            cache,
            data.skip_bad,
        )
    _claim(
        Path(recipe.output_dir) / DATA_FILE, {"content of data": dataset.identity(), "records": len(dataset)}
    )
    units = [[i] for i in range(len(dataset))]
    lengths, has_image = dataset.lengths, dataset.has_image
    if data.packing:
        if data.max_length is None:
            raise ValueError("data.max_length must be given for data.packing, got None")
        units = plan_packs(lengths, has_image, data.max_length, seed=args.seed)
        has_image = np.array([has_image[unit].any() for unit in units])
        lengths = np.array([lengths[unit].sum() for unit in units])
    collator = Collator(
        dataset.pad_id,
        model.config.vision_config.image_size,
        data.packing,
        data.dummy_images,
        needs_image="language" not in stage.trains and stage.lora is None,
    )
    freeze(model, stage)
    if stage.lora is not None:
        model = with_lora(model, stage)
    if stage.expert_parallel > 1:
        if stage.lora is not None or args.deepspeed:
            raise ValueError("stage.expert_parallel must be 1 with lora or deepspeed")
        if args.fp16:  # the Trainer's norm over both kinds of parameters does not know the loss's scale
            raise ValueError("stage.expert_parallel must be 1 with trainer.fp16; it works with trainer.bf16")
        spread_experts(model, stage.expert_parallel, args.device, bool(args.fsdp), stage.expert_exchange)
    return CumoTrainer(
        model,
        args,
        Units(dataset, units),
        lengths,
        has_image,
        collator,
        data.grouping,
        stage,
        processing_class=processor,
        callbacks=[StopRequests(), *callbacks],
    )


def run_recipe(recipe: Recipe, callbacks: Sequence = ()) -> Path:
    """Train, from the last whole checkpoint if there is one; a finished run is left as it is.

    Returns:
        The folder with the trained model and its processor.

    Raises:
        ValueError: the recipe does not fit the data, the model, or what `output_dir` holds, or no checkpoint
            there can be read.
        FloatingPointError: the loss is not finite.
        Interrupted: SIGINT or SIGTERM came; progress is saved.
    """
    out = Path(recipe.output_dir)
    _claim(out / RECIPE_FILE, recipe.identity())
    _claim_start(recipe)
    if (out / RESULT).is_dir():
        if int(os.environ.get("RANK", 0)) == 0:
            clear(recipe)  # left where a run was killed between its result and this
            shutil.rmtree(_work(out / RESULT), ignore_errors=True)
        return out / RESULT
    trainer = build_trainer(recipe, callbacks)
    if trainer.is_world_process_zero():
        shutil.rmtree(out / SAVING, ignore_errors=True)
    last = last_sound(out)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    stops = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StopRequests)
    ]
    if any(stop.stopped for stop in stops):
        what = "progress is saved" if trainer.save_failed is None else f"NOT saved: {trainer.save_failed}"
        raise Interrupted(f"{out}: stopped at step {trainer.state.global_step}, {what}")
    save_result(trainer, out / RESULT, recipe)
    if trainer.is_world_process_zero():
        clear(recipe)
    return out / RESULT


def _work(path: Path) -> Path:
    return path.with_name(f".{path.name}-work")


def save_result(trainer: CumoTrainer, path: Path, recipe: Recipe) -> None:
    """The trained model, adapters merged, and its processor as a folder that appears in one move."""
    work = _work(path)
    trainer.save_model(str(work))  # all processes: sharded weights are gathered
    if not trainer.is_world_process_zero():
        return
    with new_directory(path) as folder:
        if has_adapters(trainer.model):
            with whole_weights(trainer.args):
                merged(recipe, first_model(recipe), work).save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        else:
            for item in sorted(work.iterdir()):
                if item.name != "training_args.bin":
                    shutil.move(item, folder / item.name)
        (folder / RECIPE_FILE).write_text(json.dumps(plain(recipe), indent=1))
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    shutil.rmtree(work, ignore_errors=True)
