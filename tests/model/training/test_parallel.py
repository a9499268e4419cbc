"""Tests that several processes compute the same as one: expert parallelism, FSDP2, both; gloo, CPU, fp64."""

from pathlib import Path

import pytest
import torch

from cumo_model.training.parallel import expert_mesh, expert_parallel
from tests.model.gradients import beside_weights
from tests.processes import Forked, finish
from tests.rounding import assert_same_formula

WORKER = Path(__file__).with_name("parallel_worker.py")


def run(folder: Path, processes: int, *modes: str) -> list[dict]:
    finish(Forked([WORKER, folder, *modes], folder / "out.txt", processes), seconds=190)
    return [torch.load(folder / f"{mode}.pt", weights_only=True) for mode in modes]


def single(model, batch) -> dict:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.fixture
def make(tiny_model, tmp_path):
    def build(rows: int, **options):
        """Save a model and a batch.

        The last expert of every layer gets no token on any process, and other experts get tokens on some
        processes only. An engine that skips idle experts would then wait forever.
        """
        model = tiny_model(scales=(1,), **options).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    parameter[1:] = 0
        model.save_pretrained(tmp_path / "model")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 50, (rows, 20), generator=generator)
        ids[:, 3:12] = 60
        labels = ids.clone()
        labels[:, :14] = -100
        pixels = torch.randn(rows, 3, 12, 12, generator=generator)
        batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
        torch.save(batch, tmp_path / "batch.pt")
        return model, batch, tmp_path

    return build


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fp64")
def test_two_processes_compute_the_same_as_one(make):
    """Compares all gradients, with both router losses. With ddp and fsdp each process has all experts."""
    model, batch, folder = make(2)
    expected = single(model, batch)
    idle = expected["model.multi_modal_projector.mlp.experts.down_proj"][3]
    assert idle.shape == (24, 24) and not idle.any()
    for found in run(folder, 2, "experts-exact", "experts-padded", "ddp", "fsdp"):
        assert_same_formula(beside_weights(found), beside_weights(expected))


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fp64")
def test_mixtral_experts_and_fsdp2_over_four_processes(make):
    """A mesh of two by two: FSDP2 shards the experts over one axis, and all other parameters over both.

    Mixtral's router statistics include only the tokens of the process, so the coefficients are 0 here.
    """
    model, batch, folder = make(4, text="mixtral", balance_loss_coef=0.0, router_z_loss_coef=0.0)
    expected = single(model, batch)
    for found in run(folder, 4, "both-exact", "experts-padded"):
        assert_same_formula(beside_weights(found), beside_weights(expected))


def test_impossible_splits_are_named(tiny_model):
    with pytest.raises(ValueError, match="expert_parallel must divide the 1 processes, got 2"):
        expert_mesh(2)
    with pytest.raises(ValueError, match="exchange must be one of exact, padded, got 'some'"):
        expert_parallel(tiny_model(), None, "some")
