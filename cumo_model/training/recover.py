"""Recovery of interrupted runs: atomic checkpoints, stop on a signal, automatic resume.

A checkpoint is a folder `checkpoint-N`. It is written as `.saving/checkpoint-N`, flushed to disk and
renamed, so a folder with that name was complete when it was created. Older checkpoints are deleted only
afterwards. A checkpoint may be damaged later, by a failing disk or an incomplete copy, so it is checked
before a run resumes from it.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from cumo_model.checkpoints.folders import first_line
from cumo_model.model.full_disk import is_no_room
from cumo_model.model.json_files import read_object
from cumo_model.training.run_folder import checkpoints

SAVING = ".saving"
SIZES = "files.json"  # file in a checkpoint: names and sizes of its files in bytes
SAME_REQUEST = 0.5  # seconds within which several signals are one request
DAMAGED = "damaged-"  # prefix for a checkpoint that cannot be read


def say(text: str) -> None:
    """Print a line to standard error, above a progress bar."""
    tqdm.write(text, file=sys.stderr)


class Interrupted(Exception):
    """The run was asked to stop; its progress is saved."""


def damage(checkpoint: Path) -> str | None:
    """The reason why a checkpoint cannot be resumed from, or None if no damage is found.

    It finds missing and truncated files and invalid headers. No tensor is read, so it is fast for any size.
    """
    try:
        read_object(checkpoint / TRAINER_STATE_NAME)
        sizes = checkpoint / SIZES  # checkpoints written by the plain Trainer have no such file
        for name, size in (read_object(sizes) if sizes.is_file() else {}).items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
        for path in sorted(checkpoint.rglob("*")):
            name = path.relative_to(checkpoint)
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return f"{name} is not what torch.save writes"
    except FileNotFoundError as error:
        return f"{Path(error.filename or checkpoint).name} is missing"
    except SafetensorError as error:
        return f"{name}: {error}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def last_sound(folder: str | os.PathLike) -> Path | None:
    """The newest readable checkpoint of a run, or None if the run has no checkpoint.

    All processes must call this; all get the same result. Newer checkpoints that cannot be read are renamed,
    with a warning.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    answer: list = [None, None]
    if not _together() or dist.get_rank() == 0:
        try:
            answer = [_choose(Path(folder)), None]
        except (ValueError, OSError) as error:  # the other processes wait below
            answer = [None, str(error)]
    if _together():
        dist.broadcast_object_list(answer, device=_device_of_messages())
    chosen, problem = answer
    if problem is not None:
        raise ValueError(problem)
    return chosen


def _choose(run: Path) -> Path | None:
    found, bad = checkpoints(run)[::-1], {}
    chosen = None
    for path in found:
        reason = damage(path)
        if reason is None:
            chosen = path
            break
        bad[path] = reason
    if bad and chosen is None:
        every = "; ".join(f"{path.name}: {reason}" for path, reason in bad.items())
        raise ValueError(f"no checkpoint in {run} can be read ({every}): delete them to restart")
    for path, reason in bad.items():
        # the run will save this step again under the same name
        aside = path.with_name(f"{DAMAGED}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        warnings.warn(
            f"{path} cannot be read ({reason}): this run resumes from {chosen.name}, the damaged one is kept "
            f"as {aside.name}",
            stacklevel=4,
        )
    return chosen


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_sizes(folder: Path) -> None:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / SIZES).write_text(json.dumps(sizes, indent=1))


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device_of_messages() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def everywhere(value: bool) -> bool:
    """Whether `value` is true on any process."""
    if not _together():
        return value
    flag = torch.tensor(float(value), device=_device_of_messages())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether all local parameter values are finite. Needs one host synchronisation."""
    shares = (p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in parameters)
    largest = [torch.linalg.vector_norm(share, math.inf).float() for share in shares if share.numel()]
    return not largest or math.isfinite(torch.stack(largest).max().item())


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


class AtomicCheckpoints(Trainer):
    """A Trainer that writes checkpoints atomically and continues training if the disk is full."""

    _saving_to: str | None = None
    _no_room: str | None = None  # error of this process while writing the current checkpoint
    save_failed: str | None = None  # why the last checkpoint could not be written

    def _run_epoch(self, **options):
        # the Trainer would check this only after another step
        if self.state.global_step >= self.state.max_steps:
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
        # a run cannot recover from such a checkpoint, and good ones would be deleted to keep it
        if everywhere(not _finite(p for p in self.model.parameters() if p.requires_grad)):
            raise FloatingPointError(f"a weight is not finite at step {step}: no checkpoint is written")
        first = self.is_world_process_zero()
        if first:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        # checked before any process writes: if one failed halfway, the others would wait for it
        reason = self._room_problem(run) if first else None
        if everywhere(reason is not None):
            self._report(reason, work)
            return
        _barrier()
        self._saving_to, self._no_room = str(work), None
        try:
            with self._room_may_end():
                super()._save_checkpoint(model, trial)
            failed = everywhere(self._no_room is not None)
            if first and not failed:  # all processes have written
                with self._room_may_end():
                    self._publish(work / final.name, final)
            failed = everywhere(failed or self._no_room is not None)
        finally:
            self._saving_to = None
        if failed:
            self._report(self._no_room or "another process could not write", work)
        else:
            self.save_failed = None

    @contextlib.contextmanager
    def _room_may_end(self) -> Iterator[None]:
        """Record an error of a full disk instead of raising it, around writes of this process alone.

        The checkpoint is abandoned after all processes have finished. If this process raised the error at
        once, the others would wait for it in the next collective.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if self._saving_to is None or not is_no_room(error):
                raise
            self._no_room = self._no_room or f"the disk is full: {first_line(error)}"

    def _save(self, output_dir=None, state_dict=None):
        with self._room_may_end():
            super()._save(output_dir, state_dict)

    def _publish(self, written: Path, final: Path) -> None:
        _write_sizes(written)
        for path in [*written.rglob("*"), written]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete copy
        os.replace(written, final)
        _flush(final.parent)
        shutil.rmtree(written.parent, ignore_errors=True)
        self._keep_last(final.parent)

    def _room_problem(self, run: Path) -> str | None:
        last = checkpoints(run)
        if not last:
            return None
        needed = sum(path.stat().st_size for path in last[-1].rglob("*") if path.is_file())
        free = shutil.disk_usage(run).free
        if free >= needed:
            return None
        return f"the disk is full: {free:,} bytes are free in {run}, a checkpoint takes {needed:,}"

    def _report(self, reason: str | None, work: Path) -> None:
        self.save_failed = reason or "no room"
        if self.is_world_process_zero():
            shutil.rmtree(work, ignore_errors=True)
            say(f"{self.args.output_dir}: NO checkpoint at step {self.state.global_step}: {self.save_failed}")

    def _keep_last(self, run: Path) -> None:
        limit = self.args.save_total_limit
        for path in checkpoints(run)[: -limit if limit and limit > 0 else 0]:  # as the Trainer: 0 keeps all
            shutil.rmtree(path, ignore_errors=True)


class StopRequests(TrainerCallback):
    """On SIGTERM or SIGINT: finish the step, save a checkpoint and stop.

    All processes stop at the same step. A second signal has its usual effect, if it is not part of the first:
    Linux sends one for each thread of a parent that was killed.
    """

    def __init__(self):
        self.asked = False
        self.stopped = False
        self._first = 0.0  # time of the first signal
        self._before: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > SAME_REQUEST:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def on_step_end(self, args, state, control, **kwargs):
        if everywhere(self.asked) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
