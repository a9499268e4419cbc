"""Runs that can be cut off anywhere: checkpoints that appear in one move, stops on request, automatic resume.

A checkpoint is a folder `checkpoint-N`. It is written as `.saving/checkpoint-N`, flushed to the disk and
renamed, so whatever bears the name is whole; older ones go only afterwards.
"""

import errno
import math
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

SAVING = ".saving"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / TRAINER_STATE_NAME).is_file():
            found[int(number[1])] = path
    return [found[step] for step in sorted(found)]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_no_room(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    # safetensors and torch say it in words
    words = (
        "No space left",
        "File too large",
        "os error 28",
        "os error 27",
        "PytorchStreamWriter",
        "unexpected pos",
    )
    return isinstance(error, SafetensorError | RuntimeError) and any(word in str(error) for word in words)


def everywhere(value: bool) -> bool:
    """Whether `value` is true on any process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(float(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether this process's shares of all parameters are numbers; one wait for the device."""
    shares = (p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in parameters)
    largest = [torch.linalg.vector_norm(share, math.inf).float() for share in shares if share.numel()]
    return not largest or math.isfinite(torch.stack(largest).max().item())


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


class AtomicCheckpoints(Trainer):
    """A Trainer whose checkpoints are whole or not there, and which goes on when the disk is full."""

    _saving_to: str | None = None
    save_failed: str | None = None  # why the last checkpoint could not be written

    def _run_epoch(self, **options):
        if self.state.global_step >= self.state.max_steps:  # the Trainer would look only after one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def _get_output_dir(self, trial):
        return self._saving_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run, step = Path(self.args.output_dir), self.state.global_step
        final, work = run / f"checkpoint-{step}", run / SAVING
        if (final / TRAINER_STATE_NAME).is_file():
            return
        # whoever goes on from such a checkpoint never trains again, and the good ones would go for it
        if everywhere(not _finite(p for p in self.model.parameters() if p.requires_grad)):
            raise FloatingPointError(f"a weight is not finite at step {step}: no checkpoint is made of that")
        first = self.is_world_process_zero()
        if first:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        # before anybody starts: a process that fails halfway would leave the others waiting for it
        reason = self._room_problem(run) if first else None
        if everywhere(reason is not None):
            self._report(reason, work)
            return
        _barrier()
        self._saving_to = str(work)
        try:
            super()._save_checkpoint(model, trial)
            reason = None
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_no_room(error):
                raise
            reason = str(error)
        finally:
            self._saving_to = None
        if everywhere(reason is not None):
            self._report(reason or "another process could not write", work)
            return
        if first:
            for path in [*(work / final.name).rglob("*"), work / final.name]:
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)  # half of one, of somebody's copying
            os.replace(work / final.name, final)
            _flush(run)
            shutil.rmtree(work, ignore_errors=True)
            self._keep_last(run)
        self.save_failed = None
        _barrier()

    def _room_problem(self, run: Path) -> str | None:
        last = checkpoints(run)
        if not last:
            return None
        needed = sum(path.stat().st_size for path in last[-1].rglob("*") if path.is_file())
        free = shutil.disk_usage(run).free
        return f"{free:,} bytes are free in {run}, a checkpoint takes {needed:,}" if free < needed else None

    def _report(self, reason: str | None, work: Path) -> None:
        self.save_failed = reason or "no room"
        if self.is_world_process_zero():
            shutil.rmtree(work, ignore_errors=True)
            warnings.warn(f"no checkpoint at step {self.state.global_step}: {self.save_failed}", stacklevel=3)

    def _keep_last(self, run: Path) -> None:
        limit = self.args.save_total_limit
        for path in checkpoints(run)[: -limit if limit else 0]:
            shutil.rmtree(path, ignore_errors=True)


class StopRequests(TrainerCallback):
    """SIGTERM or SIGINT: finish the step, save, stop.

    All processes stop at the same step; a second signal acts as usual.
    """

    def __init__(self):
        self.asked = False
        self.stopped = False
        self._before: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True
        signal.signal(number, self._before[number])

    def on_step_end(self, args, state, control, **kwargs):
        if everywhere(self.asked) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
