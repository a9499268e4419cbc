"""Layers made for experts distributed over GPUs, LigerCute's and Dist-MoE's: one process, with all experts.

Their groups and buffers are created at the first call; any error they raise there is the reason of a gap.
"""

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases.shapes import SHAPES, Shape
from cumo_kernels import Routing

# backward, backward alone and saved memory are each measured separately
ONE_BACKWARD = "buffers of a forward pass are held until its one backward pass: neither can be repeated alone"


def _group():
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    return dist.group.WORLD


@functools.cache
def _reserve(device: torch.device) -> None:
    """Reserve memory for the largest of each size; LigerCute reserves only once in a process."""
    from liger_kernel.ops.configure import MoEConfig, configure

    largest = lambda size: max(size(s) for s in SHAPES.values() if s.activation == "swiglu" and not s.bias)
    room = MoEConfig(
        max_tokens=largest(lambda s: s.T), hidden_size=largest(lambda s: s.H),
        num_experts=largest(lambda s: s.E), top_k=largest(lambda s: s.K), num_hosts=1, gpus_per_host=1,
    )  # fmt: skip
    if not configure(bootstrap_group=_group(), device=device, moe=room):
        raise RuntimeError("liger_kernel.ops.configure refuses this machine")


def liger_cute(shape: Shape, routing: Routing) -> Callable[..., Tensor]:
    from liger_kernel.ops.cute.ops.moe import moe_fused

    indices = routing.topk_indices.int()

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        _reserve(x.device)
        gate, other = up.chunk(2, dim=1)
        if torch.is_grad_enabled():  # its backward accepts no views
            gate, other = gate.contiguous(), other.contiguous()
        return moe_fused(x, indices, weights.to(x.dtype), gate, other, down, shape.E, shape.K)

    return layer


def dist_moe(shape: Shape, routing: Routing) -> Callable[..., Tensor]:
    import dist_moe as package

    indices = routing.topk_indices.contiguous()
    config = package.Config(
        num_local_input_tokens=shape.T, hidden_dim=shape.H, intermediate_dim=shape.I, top_k=shape.K,
        num_experts=shape.E, max_moe_layers_per_activation_slot=1, activation_slot_capacity_factor=1.0,
    )  # fmt: skip
    held = []

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if not held:
            held.append(package.create_context(group=_group(), config=config, device=x.device))
        return package.routed_experts(x, indices, weights, up, down, held[0])

    # the package keeps a context and its buffers until they are released
    weakref.finalize(layer, lambda: [context.close() for context in held])
    return layer
