"""Training metrics: losses by part, expert statistics by layer, gradient norms, speed and memory.

Sums are kept on the device and read once per log. Means by part and place are written to the Trainer's log
and history. Metrics with a slash in the name (`experts/clip.03/load_entropy`) are sent only to the reporters
(TensorBoard, W&B), because a large model has hundreds of them.

    load_entropy     normalised entropy of the share of slots per expert: 1 if uniform, 0 if one has all
    router_entropy   normalised entropy of the router's softmax, mean over tokens
    zero_experts     number of experts without a slot
    dropped          share of slots that no expert computes

Padding of the language model's rows is not counted, as in the router losses.
"""

import math
import resource
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from cumo_kernels.tiles import hardware
from cumo_model.model.config import CumoConfig
from cumo_model.model.losses import load_balancing_loss, router_z_loss
from cumo_model.model.moe import MoELayer
from cumo_model.model.recording import PLACES, RoutingRecord, record_routing
from cumo_model.training.flops import step_flops

LOSSES = ("language", *(f"{place}_{kind}" for place in PLACES for kind in ("balance", "z")))
# sums per layer, in addition to the load
EXTRA = ("slots", "balance", "z", "calls", "router_entropy", "entropy_calls")
SUMS = ("_losses", "_loads", "_extra", "tokens", "images", "flops")  # state of a Monitor
PARTS_OF = {"vision": "vision_tower", "projector": "multi_modal_projector", "language": ""}


class Monitor:
    """Collects metrics while the model runs. `read` returns them and resets the sums.

    Args:
        model: a model with or without MoELayers; may be wrapped by peft.
        trains: parts that are trained, for the count of FLOPs.
    """

    def __init__(self, model: nn.Module, trains: Collection[str] = tuple(PARTS_OF)):
        self.config, self.trains = getattr(model, "config", None), trains
        self._logits: dict[str, list[Tensor]] = {}  # of the calls whose records are not added yet
        self.layers: dict[str, int] = {}  # "clip.03" -> number of experts, in the same order on all processes
        self._inside = False
        for module in model.modules():
            if isinstance(module, MoELayer):
                name = f"{module.place}.{module.layer:02}"
                self.layers[name] = module.gate.out_features
                module.gate.register_forward_hook(self._watch_gate(name))
        self.reset()

    def reset(self) -> None:
        """Set all sums to zero."""
        self._losses: dict[str, tuple[Tensor, Tensor | float]] = {}
        self._loads: dict[str, Tensor] = {}
        self._extra: dict[str, dict[str, Tensor | float]] = {name: {} for name in self.layers}
        self.tokens: Tensor | int = 0
        self.images, self.flops = 0, 0.0
        self.since, self.cpu_since = time.monotonic(), time.process_time()

    def state_dict(self) -> dict:
        """The sums since the last `read`."""
        elapsed = {"elapsed": time.monotonic() - self.since, "cpu": time.process_time() - self.cpu_since}
        return {name: getattr(self, name) for name in SUMS} | elapsed

    def load_state_dict(self, state: dict) -> None:
        """Restore the sums of `state_dict`."""
        for name in SUMS:
            setattr(self, name, state[name])
        self.since = time.monotonic() - state["elapsed"]
        self.cpu_since = time.process_time() - state["cpu"]

    def _watch_gate(self, name: str):
        def watch(module, args, logits: Tensor) -> None:
            if self._inside:
                self._logits.setdefault(name, []).append(logits.detach())

        return watch

    def _add(self, layer: str, key: str, value: Tensor | float) -> None:
        self._extra[layer][key] = self._extra[layer].get(key, 0) + value

    @contextmanager
    def watching(self, batch: dict, training: bool) -> Iterator[None]:
        """Collect metrics of one forward pass inside the `with` block, if `training`."""
        if not training:
            yield
            return
        self._count(batch)
        self._inside = True
        try:
            with record_routing() as records:
                yield
        finally:
            self._inside = False
        for record in records:
            self._add_record(record)
        self._logits.clear()

    def _count(self, batch: dict) -> None:
        ids = batch["input_ids"]
        images = 0 if batch.get("pixel_values") is None else batch["pixel_values"].shape[0]
        mask = batch.get("attention_mask", batch.get("router_mask"))
        self.tokens = self.tokens + (ids.numel() if mask is None else mask.sum())
        self.images += images
        if isinstance(self.config, CumoConfig):
            predicted = ids.numel()  # an upper bound that does not depend on the labels
            self.flops += step_flops(self.config, self.trains, ids.numel(), ids.shape[1], predicted, images)

    @torch.no_grad()
    def _add_record(self, record: RoutingRecord) -> None:
        name, routing = f"{record.place}.{record.layer:02}", record.routing
        if name not in self.layers:
            return
        self._loads[name] = self._loads.get(name, 0) + record.tokens_per_expert.float()
        self._add(name, "slots", record.num_slots)
        self._add(name, "calls", 1)
        if logits := self._logits.get(name):  # layers run, and are recorded, in the same order as their gates
            log_probs = logits.pop(0).float().log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            if record.counted is not None:
                entropy = entropy.where(record.counted, 0.0) * (
                    entropy.numel() / record.counted.sum().clamp(min=1)
                )
            self._add(name, "router_entropy", entropy.mean())
            self._add(name, "entropy_calls", 1)
        if routing.stats is not None:
            own = record.balance
            self._add(name, "balance", (load_balancing_loss(routing.stats) if own is None else own).detach())
            self._add(name, "z", router_z_loss(routing.stats).detach())

    def add_losses(self, parts: dict[str, Tensor], weight: Tensor | float = 1.0) -> None:
        """Add the terms of the loss of one forward pass, with its weight in the average over a step."""
        for name, value in parts.items():
            total, weights = self._losses.get(name, (0, 0))
            self._losses[name] = (total + weight * value.detach().float(), weights + weight)

    def read(self) -> dict[str, float]:
        """Metrics since the last call, over all processes. Needs one host synchronisation.

        Returns:
            Terms of the loss by name, means over layers by place (`clip_load_entropy` ...), `tokens`,
            `wall_seconds` and `cpu_seconds` (of all training processes, without data loading workers), tokens
            and images per second, MFU if the peak performance of the device is known, memory in GiB, and
            metrics by layer under `experts/`.
        """
        cpu = time.process_time() - self.cpu_since
        row: list[Tensor | float] = [self.tokens, self.images, self.flops, cpu]
        for name in LOSSES:
            row += self._losses.get(name, (0.0, 0))
        for name, experts in self.layers.items():
            load = self._loads.get(name)
            row += list(load) if load is not None else [0.0] * experts
            row += [self._extra[name].get(key, 0.0) for key in EXTRA]
        device = next((v.device for v in row if isinstance(v, Tensor)), torch.device("cpu"))
        # fp64: token and FLOP counts exceed 2^24 within one log
        flat = torch.stack([torch.as_tensor(v, device=device, dtype=torch.float64) for v in row])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            if dist.get_backend() == "nccl":
                flat = flat.cuda()
            dist.all_reduce(flat)
        values, seconds = iter(flat.tolist()), time.monotonic() - self.since
        tokens, images, flops, cpu = (next(values) for _ in range(4))
        found = {"tokens": tokens, "wall_seconds": seconds, "cpu_seconds": cpu}
        found |= self._speed(tokens, images, flops, seconds)
        for name in LOSSES:
            total, weights = next(values), next(values)
            if weights:
                found[name] = total / weights
        found |= self._experts(values)
        self.reset()
        return found

    def _speed(self, tokens: float, images: float, flops: float, seconds: float) -> dict[str, float]:
        found = {"tokens_per_second": tokens / seconds, "images_per_second": images / seconds}
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if torch.cuda.is_available():
            peak = hardware.gpu_of(torch.device("cuda")).tflops_16
            if peak:
                found["mfu"] = flops / seconds / (world * peak * 1e12)
            found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            found["memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        found["tflops_per_second"] = flops / seconds / 1e12
        return found

    def _experts(self, values: Iterator[float]) -> dict[str, float]:
        found: dict[str, float] = {}
        by_place: dict[str, list[dict[str, float]]] = {}
        for name, experts in self.layers.items():
            load = [next(values) for _ in range(experts)]
            extra = {key: next(values) for key in EXTRA}
            if not extra["calls"]:
                continue
            facts = layer_facts(load, extra["slots"])
            facts |= {key: extra[key] / extra["calls"] for key in ("balance", "z")}
            if extra["entropy_calls"]:
                scale = math.log(experts) if experts > 1 else 1.0
                facts["router_entropy"] = extra["router_entropy"] / extra["entropy_calls"] / scale
            by_place.setdefault(name.split(".")[0], []).append(facts)
            found |= {f"experts/{name}/{key}": value for key, value in facts.items()}
            shares = [count / max(1.0, sum(load)) for count in load]
            found |= {f"experts/{name}/load_{e}": share for e, share in enumerate(shares)}
        for place, layers in by_place.items():
            for key in ("load_entropy", "router_entropy", "max_load", "zero_experts", "dropped"):
                known = [facts[key] for facts in layers if key in facts]
                if known:
                    found[f"{place}_{key}"] = sum(known) / len(known)
        return found


def layer_facts(load: list[float], slots: float) -> dict[str, float]:
    """Metrics of one layer from `load` (slots per expert) and `slots`, the slots including dropped ones."""
    total = sum(load)
    shares = [count / total for count in load if count > 0 and total]
    scale = math.log(len(load)) if len(load) > 1 else 1.0
    return {
        "load_entropy": -sum(share * math.log(share) for share in shares) / scale,
        "max_load": max(shares, default=0.0),
        "zero_experts": float(sum(count == 0 for count in load)),
        "dropped": 1 - total / slots if slots else 0.0,
    }


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, float]:
    """L2 norms of the gradients of tower, connector and language model, and of all gates."""
    squares: dict[str, list[Tensor]] = {name: [] for name in (*PARTS_OF, "gates")}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        square = parameter.grad.float().pow(2).sum()
        square = square.full_tensor() if isinstance(square, DTensor) else square
        part = next(part for part, mark in PARTS_OF.items() if mark in name)
        squares[part].append(square)
        if name.endswith("mlp.gate.weight"):
            squares["gates"].append(square)
    return {f"grad_norm_{name}": float(torch.stack(s).sum().sqrt()) for name, s in squares.items() if s}


class MonitorCallback(TrainerCallback):
    """Computes gradient norms by part of a CuMo in logged steps, and adds metrics for reporters to the log.

    It must be registered before the reporters.
    """

    def __init__(self, monitor: Monitor):
        self.monitor, self.norms, self.detail = monitor, {}, {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.update(self.detail)
        self.detail = {}

    def metrics(self) -> dict[str, float]:
        """Metrics for the history; those for the reporters are kept until `on_log`."""
        found = self.monitor.read()
        self.detail = {name: value for name, value in found.items() if "/" in name}
        return {name: value for name, value in found.items() if "/" not in name} | self.norms

    def on_train_begin(self, args, state, control, **kwargs):
        self.monitor.reset()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        every = max(1, int(state.logging_steps or 1))
        if isinstance(self.monitor.config, CumoConfig) and (state.global_step + 1) % every == 0:
            self.norms = gradient_norms(model)


class ShortProgress(ProgressCallback):
    """The Trainer's progress bar, with a few metrics of the last log.

    Args:
        label: text before the bar.
        position: line of the terminal, if several runs share it.
    """

    SHOWN = ("loss", "language", "grad_norm", "learning_rate", "tokens_per_second")

    def __init__(self, label: str | None = None, position: int | None = None):
        super().__init__()
        self.label, self.position = label, position

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.label,
                position=self.position,
                dynamic_ncols=True,
                mininterval=0.3 if sys.stderr.isatty() else 20,
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            text = " ".join(f"{name}={logs[name]:.4g}" for name in self.SHOWN if name in (logs or {}))
            self.training_bar.set_postfix_str(text, refresh=False)
