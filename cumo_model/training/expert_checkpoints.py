"""A Trainer for expert parallelism: gradients, checkpoints and resume of DTensors together with DDP or FSDP2.

A checkpoint contains unsharded tensors, so that training can resume with any number of processes.
"""

import os
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from cumo_model.training.parallel import ParallelExperts, expert_mesh, expert_parallel, shard_experts
from cumo_model.training.recover import AtomicCheckpoints

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# a parameter without gradients so far, such as those of the tower's last layer, has no optimizer state
_SOME = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def spread_experts(
    model: nn.Module, number: int, device: torch.device, with_fsdp: bool, exchange: str = "exact"
) -> None:
    """Distribute the experts over groups of `number` processes, and with FSDP2 over the groups.

    Args:
        model: the model; changed in place.
        number: processes per group.
        device: device of this process.
        with_fsdp: whether the rest of the model is also sharded with FSDP2.
        exchange: as in `expert_parallel`.
    """
    mesh = expert_mesh(number, device.type)
    model.to(device)
    expert_parallel(model, mesh["experts"], exchange)
    if with_fsdp or mesh["data"].size() > 1:
        shard_experts(model, mesh)


def _settled(state):
    """Wait for all pending collectives in nested dicts of tensors."""
    if isinstance(state, dict):
        return {key: _settled(value) for key, value in state.items()}
    return state.wait() if isinstance(state, AsyncCollectiveTensor) else state


class SpreadCheckpoints(AtomicCheckpoints):
    """Saves and loads models of `spread_experts`, and FSDP2 on CPUs; other models as the Trainer does."""

    _fsdp_on_cpu = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # accelerate uses FSDP2 on accelerators only and falls back to DDP silently; FSDP2 itself
            # supports gloo
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = self._fsdp_on_cpu = True

    @property
    def _is_spread(self) -> bool:
        if self.is_fsdp_enabled:
            return self._fsdp_on_cpu
        return any(isinstance(module, ParallelExperts) for module in self.model.modules())

    def _has_mixed_mesh_grads(self, model):
        # The Trainer's own norm fails where experts are spread over two axes. It is also chosen once, by the
        # gradients of a run's first step, and experts have none there if it has no pictures: a run that
        # resumes at a later step would add in another order. Accelerate's norm takes all DTensors.
        return False

    def save_model(self, output_dir=None, _internal_call=False):
        if not self._is_spread:
            return super().save_model(output_dir, _internal_call)
        state = _settled(get_model_state_dict(self.model, options=_WHOLE))
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self._is_spread:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = _settled(get_optimizer_state_dict(self.model, self._torch_optimizer, options=_WHOLE))
        if self.args.should_save:
            with self._room_may_end():
                torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._fsdp_on_cpu:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = {}
        for file in sorted(Path(resume_from_checkpoint).glob("model*.safetensors")):
            state |= load_file(file)
        set_model_state_dict(self.model, state, options=_WHOLE)

    def _load_optimizer_and_scheduler(self, checkpoint):
        # with several processes the Trainer calls torch.load with the device "cpu:0", which it does not
        # support
        several_cpus = self.accelerator.distributed_type == DistributedType.MULTI_CPU
        if checkpoint is None or not (self._is_spread or several_cpus):
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(os.path.join(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        if self._is_spread:
            set_optimizer_state_dict(self.model, self._torch_optimizer, state, options=_SOME)
        else:
            self.optimizer.load_state_dict(state)
        path = os.path.join(checkpoint, SCHEDULER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def is_spread(parameter: nn.Parameter) -> bool:
    """Whether a parameter is distributed over processes (a DTensor)."""
    return isinstance(parameter, DTensor)
