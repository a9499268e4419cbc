"""Training: one loop, three stages that are data, and runs that resume wherever they were cut off.

`fit` minimises any loss of any module. Which samples step n sees is a function of n, and the optimizer's
state lies with the weights in one file that is replaced in one move: a run killed at any moment goes on from
its last save with the numbers it would have had.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cumo_model.checkpoints.folders import new_directory
from cumo_model.data import ConversationDataset
from cumo_model.model.cumo import CumoForConditionalGeneration

PARTS = {  # what a stage may train -> its modules in CumoForConditionalGeneration
    "vision": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "language": ("model.language_model", "lm_head"),
}
HISTORY_FILE = "history.json"  # in a finished stage's folder


class Interrupted(Exception):
    """The run was asked to stop; its progress is saved."""


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        warmup = max(1, math.ceil(self.warmup_ratio * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Stage:
    """What one stage of training is; CuMo's own three are recipes."""

    name: str
    trains: tuple[str, ...]  # of PARTS
    template: str  # of cumo_model.processing.templates.TEMPLATES
    schedule: Schedule
    balance_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0

    def __post_init__(self):
        if not self.trains or set(self.trains) - set(PARTS):
            raise ValueError(f"trains must name some of {sorted(PARTS)}, got {self.trains}")


Losses = tuple[Tensor, dict[str, Tensor], int]  # loss, its detached parts by name, tokens in the batch


def sample_indices(step: int, batch_size: int, num_samples: int, seed: int) -> list[int]:
    """The samples of one step: consecutive pieces of a new permutation per epoch, the same in every run."""
    first, indices = step * batch_size, []
    while len(indices) < batch_size:
        epoch, offset = divmod(first + len(indices), num_samples)
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        indices += order[offset : offset + batch_size - len(indices)].tolist()
    return indices


def fit(
    module: nn.Module,
    loss_at: Callable[[int], Losses],
    schedule: Schedule,
    progress_path: str | os.PathLike,
    identity: dict,
    label: str = "training",
    save_every_seconds: float = 20.0,
    position: int = 0,
) -> dict:
    """Minimise `loss_at(step)` over the parameters of `module` that require gradients.

    Args:
        module: trained in place; in training mode while this runs.
        loss_at: step -> (loss, parts, tokens); depends on nothing but the step and the parameters.
        schedule: steps and optimizer; `batch_size` is for `loss_at` to honour.
        progress_path: a safetensors file, replaced in one move every `save_every_seconds`, resumed from when
            it is there. The caller deletes it once the result is safe.
        identity: what makes this run this run; progress of another one is refused.
        label, position: of the progress bar.

    Returns:
        {"series": {"loss" and every part: one float a step, "tokens": ints}, "cpu_seconds", "wall_seconds"}.

    Raises:
        ValueError: the progress file is damaged, or of a run with another identity.
        FloatingPointError: the loss is not finite.
        Interrupted: SIGINT or SIGTERM came.
    """
    path = Path(progress_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    identity = json.loads(json.dumps(identity | {"schedule": dataclasses.asdict(schedule)}))
    optimizer = torch.optim.AdamW(
        trained.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
    )
    step, history = _load_progress(path, trained, optimizer, identity)
    clock, was_training = _Clock(history), module.training
    module.train()
    bar = tqdm(
        total=schedule.steps,
        initial=step,
        desc=label,
        position=position,
        dynamic_ncols=True,
        mininterval=0.3 if sys.stderr.isatty() else 20,
    )
    pending: list[tuple[dict[str, Tensor], int]] = []
    last_save = last_read = time.monotonic()
    with bar, _stop_requests() as stop:
        while step < schedule.steps:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at(step)
            loss, parts, tokens = loss_at(step)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), schedule.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending.append(({"loss": loss.detach(), **parts}, tokens))
            step += 1
            now, last = time.monotonic(), step == schedule.steps
            save = (now - last_save >= save_every_seconds or bool(stop)) and not last
            if now - last_read >= 1 or save or last:
                _read_losses(pending, history["series"], label)  # once a second: reading waits for the GPU
                clock.stamp(history)
                bar.set_postfix_str(_summary(history, clock), refresh=False)
                last_read = now
            bar.update()
            if save:
                _save_progress(path, trained, optimizer, identity, step, history)
                last_save = time.monotonic()
            if stop and not last:
                raise Interrupted(f"{label}: stopped at step {step} of {schedule.steps}, progress is saved")
    module.train(was_training)
    return history


def train(
    model: CumoForConditionalGeneration,
    stage: Stage,
    dataset: ConversationDataset,
    out_dir: str | os.PathLike,
    processor,
    seed: int = 0,
    **options,
) -> CumoForConditionalGeneration:
    """Run one stage and leave its checkpoint in `out_dir`; a stage that is done there is loaded instead.

    Args:
        model: where the stage starts; its loss coefficients become the stage's.
        stage: what trains, how long, with which losses.
        dataset: its conversations, in the stage's template.
        out_dir: appears in one move when the stage is done: config, safetensors, processor, history.
        processor: saved beside the model.
        seed: of the order of samples.
        options: `label`, `position`, `save_every_seconds` of `fit`.

    Returns:
        The model, trained in place or the one loaded, in evaluation mode.

    Raises:
        ValueError: `out_dir` holds a stage with other settings. See `fit` for the rest.
    """
    out = Path(out_dir)
    model.config.balance_loss_coef = stage.balance_loss_coef
    model.config.router_z_loss_coef = stage.router_z_loss_coef
    identity = {
        "stage": dataclasses.asdict(stage),
        "model": _model_digest(model),
        "data": _digest(dataset),
        "seed": seed,
    }
    identity = json.loads(json.dumps(identity))
    if out.exists():
        _check_identity(out, read_history(out)["identity"], identity)
        return CumoForConditionalGeneration.from_pretrained(out, use_safetensors=True).to(model.device).eval()

    model.requires_grad_(False)
    for part in stage.trains:
        for name in PARTS[part]:
            model.get_submodule(name).requires_grad_(True)
    device = model.device
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def loss_at(step: int) -> Losses:
        batch = dataset.batch(sample_indices(step, stage.schedule.batch_size, len(dataset), seed))
        tokens = int(batch["attention_mask"].sum())
        with precision:
            batch = {key: value.to(device) for key, value in batch.items()}
            output = model(**batch, use_cache=False, skip_logits=True)
        return output.loss, output.loss_parts, tokens

    progress = out.with_name(f"{out.name}.progress.safetensors")
    history = fit(model, loss_at, stage.schedule, progress, identity, **{"label": stage.name, **options})
    model.requires_grad_(True).eval()
    with new_directory(out) as work:
        model.save_pretrained(work)
        processor.save_pretrained(work)
        write_history(work, history, identity)
    progress.unlink(missing_ok=True)
    return model


def read_history(out_dir: str | os.PathLike) -> dict:
    """What `fit` returned for a finished stage, and its "identity"."""
    path = Path(out_dir) / HISTORY_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a finished stage: it has no {HISTORY_FILE}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_history(folder: Path, history: dict, identity: dict) -> None:
    (folder / HISTORY_FILE).write_text(json.dumps({**history, "identity": identity}))


# what saving and loading write into a config: a stage continues in memory or from disk alike
_NOT_THE_MODEL = ("architectures", "dtype", "_name_or_path", "transformers_version")


def _model_digest(model: CumoForConditionalGeneration) -> str:
    def bare(config: dict) -> dict:
        kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
        return {key: bare(value) if isinstance(value, dict) else value for key, value in kept.items()}

    content = json.dumps(bare(json.loads(model.config.to_json_string())), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _digest(dataset: ConversationDataset) -> str:
    digest = hashlib.sha256()
    for ids, labels in dataset.samples:
        digest.update(ids.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def _check_identity(path: Path, found: dict, wanted: dict) -> None:
    differ = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differ:
        raise ValueError(
            f"{path} belongs to a run with another {', '.join(differ)}: choose another folder or delete it"
        )


def _save_progress(
    path: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: dict,
    step: int,
    history: dict,
) -> None:
    tensors = {"rng.cpu": torch.get_rng_state()}
    for name, parameter in trained.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    if any(parameter.is_cuda for parameter in trained.values()):
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    metadata = {"step": step, "history": history, "identity": identity}
    part = path.with_name(f".{path.name}.part")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        part,
        {key: json.dumps(value) for key, value in metadata.items()},
    )
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _load_progress(
    path: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, identity: dict
) -> tuple[int, dict]:
    if not path.exists():
        return 0, {"series": {"tokens": []}, "cpu_seconds": 0.0, "wall_seconds": 0.0}
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in file.metadata().items()}
            _check_identity(path, metadata["identity"], identity)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start this stage again") from None
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors.pop(f"parameter.{name}"))
    torch.set_rng_state(tensors.pop("rng.cpu"))
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("rng.cuda"))
    parameters = dict(trained)
    for name, tensor in tensors.items():
        key, _, parameter = name.partition(".")
        # the step count of a fused optimizer lives where its parameter lives
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)
    return metadata["step"], metadata["history"]


def _read_losses(pending: list, series: dict[str, list], label: str) -> None:
    for parts, tokens in pending:
        for name, value in parts.items():
            series.setdefault(name, []).append(float(value))
        series["tokens"].append(tokens)
        if not math.isfinite(series["loss"][-1]):
            step = len(series["loss"])
            raise FloatingPointError(f"{label}: the loss became {series['loss'][-1]} at step {step}")
    pending.clear()


class _Clock:
    """Adds this process's CPU and wall time to what earlier runs of the same work took."""

    def __init__(self, history: dict):
        self.wall, self.cpu = time.monotonic(), time.process_time()
        self.earlier = history["wall_seconds"], history["cpu_seconds"]
        self.tokens_before = sum(history["series"]["tokens"])

    def stamp(self, history: dict) -> None:
        history["wall_seconds"] = round(self.earlier[0] + time.monotonic() - self.wall, 3)
        history["cpu_seconds"] = round(self.earlier[1] + time.process_time() - self.cpu, 3)

    def tokens_per_second(self, history: dict) -> float:
        return (sum(history["series"]["tokens"]) - self.tokens_before) / (time.monotonic() - self.wall)


def _summary(history: dict, clock: _Clock) -> str:
    shown = {name: values[-1] for name, values in history["series"].items() if name != "tokens"}
    text = " ".join(f"{name.replace('_balance', '_b')}={value:.3f}" for name, value in shown.items())
    return f"{text} {clock.tokens_per_second(history):.0f} tok/s"


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second signal acts as usual."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        requests.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
