"""Balancing without a loss: after each optimizer step, selection biases move towards an even load.

The load of a step is that of all its micro-batches and processes, without padding. The biases are buffers of
the model (`MoELayer.selection_bias`), so that a checkpoint has them, and a resumed run goes on with the same
bits.
"""

from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from cumo_kernels import update_selection_bias
from cumo_model.model.moe import MoELayer
from cumo_model.model.recording import RoutingRecord, watch_routing

RATE = 0.001  # of DeepSeek-V3 (arXiv 2412.19437, section 4.2)


def biased_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The layers with a selection bias of which the gate is trained, by their names in `model`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
        and module.selection_bias is not None
        and any(parameter.requires_grad for parameter in module.gate.parameters())
    }


class SelectionBiasCallback(TrainerCallback):
    """Updates the selection biases of a model. Any Trainer of transformers takes it:

        Trainer(model, args, callbacks=[SelectionBiasCallback()], ...)

    Layers whose gate is frozen keep their bias. There is no host synchronisation; with several processes the
    loads of all layers are one all-reduce.

    Args:
        rate: by how much a bias moves in a step, finite and not negative.
    """

    def __init__(self, rate: float = RATE):
        update_selection_bias(torch.zeros(1), torch.zeros(1, dtype=torch.int64), rate)  # checks the rate
        self.rate = rate
        self._block, self._loads = ExitStack(), {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._block.close()  # of a step that failed
        self._loads: dict[int, Tensor] = {}  # by id of the layer, as several may have one place and index
        self._block = ExitStack()
        self._block.enter_context(watch_routing(self._add, of=model))

    @torch.no_grad()
    def _add(self, record: RoutingRecord, layer: nn.Module) -> None:
        key = id(layer)
        self._loads[key] = self._loads.get(key, 0) + record.chosen_per_expert.to(torch.int64)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._block.close()
        layers = biased_layers(model)
        if not layers:
            return
        self._check_threads(args, model, layers)
        loads = [self._loads.get(id(layer), torch.zeros_like(layer.selection_bias, dtype=torch.int64))
                 for layer in layers.values()]  # fmt: skip
        device = next(iter(layers.values())).selection_bias.device
        whole = torch.cat([load.to(device) for load in loads])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(whole)
        parts = whole.split([load.shape[0] for load in loads])
        for layer, load in zip(layers.values(), parts, strict=True):
            update_selection_bias(layer.selection_bias, load.to(layer.selection_bias.device), self.rate)

    def _check_threads(self, args, model: nn.Module, layers: dict[str, MoELayer]) -> None:
        """Without records of any layer, nn.DataParallel has run them in threads that are not recorded.

        Without nn.DataParallel that is a step in which no layer ran, such as one without pictures.
        """
        if any(id(layer) in self._loads for layer in layers.values()):
            return
        is_split = getattr(args, "n_gpu", 1) > 1  # so decides transformers' Trainer
        is_split |= any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules())
        if is_split:
            raise ValueError(
                "model must not be run by torch.nn.DataParallel, whose threads are not counted, with "
                "selection biases (use torchrun, one process for each GPU), got no record of the layers "
                f"{', '.join(layers)}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._block.close()
