"""One of the ranks of tests/model/training/test_parallel.py: python parallel_worker.py FOLDER MODE..."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cumo_model import CumoForConditionalGeneration
from cumo_model.training.parallel import expert_mesh, expert_parallel, shard_experts, whole
from tests.rounding import in_fp64


def part(batch: dict, rank: int, world: int) -> dict:
    """The rows and pictures of one process; every row has one picture."""
    return {name: value.chunk(world)[rank] for name, value in batch.items()}


def gather(model: torch.nn.Module, loss: torch.Tensor) -> dict:
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": mean / dist.get_world_size(), **grads}


def run(mode: str, folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = CumoForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float64).train()
    batch = torch.load(folder / "batch.pt", weights_only=True)
    kind, _, exchange = mode.partition("-")
    parts = 2 if kind == "both" else world
    mesh = expert_mesh(parts)
    if kind in ("experts", "both"):
        expert_parallel(model, mesh["experts"], exchange)
    if kind in ("experts", "ddp"):
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        if kind == "both":
            shard_experts(model, mesh)
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            fully_shard(layer)
        wrapped = fully_shard(model)
    loss = wrapped(**part(batch, rank, world), use_cache=False).loss
    loss.backward()
    found = gather(model, loss)
    if rank == 0:
        torch.save(found, folder / f"{mode}.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with in_fp64():
        for mode in sys.argv[2:]:
            run(mode, Path(sys.argv[1]))
    dist.destroy_process_group()
