"""The common part of all training stages: batches as a function of the step, resumable logs, result folders.

Sums between two logs are saved in checkpoints, so an interrupted run logs the same values. The model and its
data are not part of it: `cumo_model.training.trainer` adds them for the CuMo of a recipe.
"""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from cumo_model.checkpoints.folders import first_line, new_directory
from cumo_model.data.sampling import StepSampler
from cumo_model.model.full_disk import is_no_room
from cumo_model.model.json_files import read_object
from cumo_model.model.losses import share_of_labels
from cumo_model.training.again import EnoughSteps, check_resumed, fields_of, is_complete
from cumo_model.training.claims import claim, claim_recipe, claim_start, record_fields, sizes_of
from cumo_model.training.deepspeed import clear
from cumo_model.training.expert_checkpoints import SpreadCheckpoints
from cumo_model.training.lock import locked
from cumo_model.training.monitor import Monitor, MonitorCallback, ShortProgress
from cumo_model.training.paths import check_output
from cumo_model.training.recipe import Recipe, plain
from cumo_model.training.recover import SAVING, Interrupted, StopRequests, last_sound
from cumo_model.training.router_losses import RouterLosses
from cumo_model.training.run_folder import (
    DATA_FILE,
    HISTORY_FILE,
    RECIPE_FILE,
    RESULT,
    START_FILE,
    checkpoints,
    finished_step,
    has_begun,
    is_first_process,
    step_of,
)


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a data loading worker.

    Ctrl-C, `timeout` and batch systems send a signal to the whole process group. Only the training process
    handles it. If a worker ended at once, the current step would fail before the checkpoint is saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StageTrainer(RouterLosses, SpreadCheckpoints):
    """A Trainer whose batches are a function of the step, and whose log is the same after an interruption.

    Args:
        model: the model to train.
        args: arguments of the Trainer.
        dataset: items of the batches.
        collator: function of a list of items that returns a batch, a dict of tensors.
        lengths: length of each item.
        has_image: for each item, whether it has an image.
        grouping: as in `StepSampler`.
        monitor: collects metrics between two logs; by default `Monitor(model, ())`.
        callbacks: callbacks of the Trainer. A `ShortProgress` among them replaces the default progress bar.
        **options: further arguments of the Trainer, such as `processing_class`.
    """

    forward_options: dict = {}  # arguments of every forward pass

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        dataset: Dataset,
        collator: Callable,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        grouping: str = "none",
        monitor: Monitor | None = None,
        callbacks: Sequence = (),
        **options: Any,
    ):
        self.lengths, self.has_image, self.grouping = lengths, has_image, grouping
        self.monitor = Monitor(model, ()) if monitor is None else monitor
        callbacks = [EnoughSteps(), StopRequests(), *callbacks]
        super().__init__(
            model, args, data_collator=collator, train_dataset=dataset, callbacks=callbacks, **options
        )
        self.metrics = MonitorCallback(self.monitor)
        known = self.callback_handler.callbacks
        plain_bars = [callback for callback in known if type(callback) is ProgressCallback]
        kept = [callback for callback in known if not isinstance(callback, PrinterCallback)]
        self.callback_handler.callbacks = [self.metrics, *(c for c in kept if c not in plain_bars)]
        if plain_bars and not any(isinstance(callback, ShortProgress) for callback in known):
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
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=_ignore_stop_signals,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**self.forward_options, **inputs}
        weight = 1.0
        if "labels" in inputs and self.model_accepts_loss_kwargs:
            weight = share_of_labels(inputs["labels"][..., 1:], num_items_in_batch)
        with self.monitor.watching(inputs, model.training):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            self.monitor.add_losses(outputs.get("loss_parts") or {}, weight)
        return (loss, outputs) if return_outputs else loss

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
        place = device if device.type == "cuda" else device.type  # torch.load rejects "cpu:0"
        window = torch.load(path, weights_only=True, map_location=place)
        self._tr_loss, self._total_loss_scalar = window["loss"], window["total"]
        self._globalstep_last_logged = window["logged"]
        self.monitor.load_state_dict(window["monitor"])

    def _window_file(self, folder: str | os.PathLike) -> Path:
        """File with the sums of this process since the last log. The next log then covers all its steps."""
        return Path(folder, f"window_{self.args.process_index}_of_{self.args.world_size}.pt")

    def log(self, logs, start_time=None):
        if "loss" in logs:
            if not np.isfinite(logs["loss"]):
                raise FloatingPointError(f"the loss became {logs['loss']} at step {self.state.global_step}")
            logs.update(self.metrics.metrics())
        super().log(logs, start_time)

    def save_result(self, path: Path, recipe: Recipe) -> None:
        """Save the trained model as a folder, created atomically. All processes must call this."""
        work = _work(path)
        self.save_model(str(work))  # all processes: sharded weights are gathered
        if not self.is_world_process_zero():
            return
        if path.is_dir():  # the result of fewer steps
            os.replace(path, path.with_name(f"{path.name}-at-step-{finished_step(path.parent)}"))
        with new_directory(path) as folder:
            self.write_result(work, folder, recipe)
            (folder / RECIPE_FILE).write_text(json.dumps(plain(recipe), indent=1))
            self.state.save_to_json(str(folder / HISTORY_FILE))
        shutil.rmtree(work, ignore_errors=True)

    def write_result(self, work: Path, folder: Path, recipe: Recipe) -> None:
        """Fill `folder` with the files that `save_model` wrote to `work`, on the first process only."""
        for item in sorted(work.iterdir()):
            if item.name != "training_args.bin":
                shutil.move(item, folder / item.name)


def _work(path: Path) -> Path:
    return path.with_name(f".{path.name}-work")


def _check_data_of_result(recipe: Recipe) -> None:
    """Check that the data files that still exist are those of a finished run, which does not need them."""
    path = Path(recipe.output_dir) / DATA_FILE
    if path.is_file():
        found, now = read_object(path), sizes_of(recipe.data.files, missing_ok=True)
        claim(path, {**found, **{name: size for name, size in now.items() if name in found}})


def run_stage(
    recipe: Recipe, build: Callable[[Recipe, Sequence], StageTrainer], callbacks: Sequence = ()
) -> Path:
    """Train a stage, from its last readable checkpoint if there is one.

    A finished run is not changed. If the recipe asks for more steps and the learning rate of a step does not
    depend on their number, it goes on; the earlier result is kept as `model-at-step-N`.

    Args:
        recipe: the recipe of the stage.
        build: function of (recipe, callbacks) that returns the trainer, ready to train.
        callbacks: callbacks of the Trainer.

    Returns:
        The folder with the trained model.

    Raises:
        ValueError: the recipe does not fit the data, the model, or the run in `output_dir`; another process
            trains in that folder; or no checkpoint there can be read.
        FloatingPointError: the loss or a weight is not finite.
        Interrupted: SIGINT or SIGTERM was received; progress is saved if the disk is not full.
    """
    out = Path(recipe.output_dir)
    if _is_finished(recipe):
        if is_first_process():  # files of a run that was killed after it had saved its result
            clear(recipe)
            shutil.rmtree(_work(out / RESULT), ignore_errors=True)
        return out / RESULT
    check_output(out, recipe.model)
    with locked(out) if is_first_process() else contextlib.nullcontext():
        return _train(recipe, build, callbacks)


def _is_finished(recipe: Recipe) -> bool:
    """Whether the run in output_dir is that of the recipe and has all its steps."""
    out = Path(recipe.output_dir)
    if not (out / RESULT).is_dir():
        return False
    claim_recipe(out / RECIPE_FILE, recipe, fields_of(recipe.trainer))
    claim_start(out / START_FILE, recipe.model)
    _check_data_of_result(recipe)
    return is_complete(out, recipe)


def _train(recipe: Recipe, build: Callable[[Recipe, Sequence], StageTrainer], callbacks: Sequence) -> Path:
    out, fields = Path(recipe.output_dir), fields_of(recipe.trainer)
    if not has_begun(out) and is_first_process():
        clear(recipe)  # a first model that was made for another recipe
    before = claim_recipe(out / RECIPE_FILE, recipe, fields)
    claim_start(out / START_FILE, recipe.model)
    check_resumed(out, recipe, before)
    trainer = build(recipe, callbacks)
    if trainer.is_world_process_zero():
        record_fields(out / RECIPE_FILE, fields)
        shutil.rmtree(out / SAVING, ignore_errors=True)
    last = last_sound(out)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    stops = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StopRequests)
    ]
    if any(stop.stopped for stop in stops):
        what = "progress is saved"
        if trainer.save_failed is not None:
            what = f"progress is NOT saved: {trainer.save_failed}; {_kept(out)}"
        raise Interrupted(f"{out}: stopped at step {trainer.state.global_step}, {what}")
    try:
        trainer.save_result(out / RESULT, recipe)
    except Exception as error:
        if not is_no_room(error):
            raise
        if trainer.is_world_process_zero():
            shutil.rmtree(_work(out / RESULT), ignore_errors=True)
        raise OSError(
            f"{out}: the result is NOT saved, the disk is full ({first_line(error)}); {_kept(out)}: "
            "make room and give the same command again"
        ) from error
    if trainer.is_world_process_zero():
        clear(recipe)
    return out / RESULT


def _kept(out: Path) -> str:
    last = checkpoints(out)
    return f"there is a checkpoint of step {step_of(last[-1])}" if last else "there is NO checkpoint"


def read_history(result: str | os.PathLike) -> dict:
    """Read the logged metrics of a finished run.

    Args:
        result: the folder that `run_stage` returned.

    Returns:
        {"series": {"loss", "learning_rate", "tokens", parts of the loss, "clip_load_entropy" ...: a list with
        one float for each log that has the metric}, "steps", "tokens", "cpu_seconds", "wall_seconds": totals
        of all logs, including those before an interruption}. Time of steps that were lost by a kill is not
        counted.

    Raises:
        ValueError: the folder is not a finished run, or its history is damaged.
    """
    path = Path(result) / HISTORY_FILE
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a finished run: it has no {HISTORY_FILE}")
    state = read_object(path)
    try:
        logs = [entry for entry in state["log_history"] if "loss" in entry]
        series: dict[str, list[float]] = {}
        for entry in logs:
            for name, value in entry.items():
                series.setdefault(name, []).append(value)
        sums = {name: sum(series[name]) for name in ("tokens", "cpu_seconds", "wall_seconds")}
        return {"series": series, "steps": state["global_step"], **sums}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
