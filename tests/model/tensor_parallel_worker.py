"""One of the ranks of tests/model/test_tensor_parallel.py: python tensor_parallel_worker.py FOLDER NAME..."""

import inspect
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from cumo_model import CumoForConditionalGeneration
from cumo_model.model.tensor_parallel import whole_of_halves
from tests.model.gradients import beside_weights
from tests.rounding import in_fp64


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = whole_of_halves(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(model: CumoForConditionalGeneration, batch: dict) -> dict:
    """Logits and tokens in evaluation, loss, gradients and one step of training; also for one process."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        found = {"logits": model(**inputs).logits}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(**inputs, **options)
    model.train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    grads = beside_weights({name: whole(p.grad) for name, p in trained.items()})
    torch.optim.SGD(trained.values(), lr=0.01, momentum=0.9).step()
    after = beside_weights({name: whole(p.detach()) for name, p in trained.items()})
    return found | {"loss": loss.detach(), "tokens": tokens, "grads": grads, "after": after}


def refused(folder: Path) -> str:
    """The error of from_pretrained for expert parallelism of transformers, from a folder without weights."""
    kinds = inspect.signature(DistributedConfig).parameters
    asked = {"ep_size": 2} if "ep_size" in kinds else {"enable_expert_parallel": True}
    (folder / "model.safetensors").write_bytes(b"")
    try:
        CumoForConditionalGeneration.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_size=2, **asked)
        )
    except ValueError as error:
        return str(error)
    raise AssertionError("expert parallelism was not refused")


def run(folder: Path, name: str) -> None:
    model = CumoForConditionalGeneration.from_pretrained(folder / name, tp_plan="auto", dtype=torch.float64)
    parts = {n: tuple(p.placements) for n, p in model.named_parameters() if isinstance(p, DTensor)}
    sizes = {n: p.to_local().numel() / p.numel() for n, p in model.named_parameters() if n in parts}
    model.save_pretrained(folder / f"{name}-saved")
    found = results(model, torch.load(folder / "batch.pt", weights_only=True))
    torch.save((found, sizes), folder / f"{name}-{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with in_fp64():
        for name in sys.argv[2:]:
            run(Path(sys.argv[1]), name)
    (folder := Path(sys.argv[1]) / f"none-{dist.get_rank()}").mkdir()
    shutil.copy(Path(sys.argv[1]) / sys.argv[-1] / "config.json", folder)
    (folder / "error.txt").write_text(refused(folder))
    dist.destroy_process_group()
