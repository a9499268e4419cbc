"""Several processes compute what one does: experts spread over them, FSDP2, both. gloo on the CPU, fp64."""

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
        """A model on disk, and a batch.

        The last expert of every layer gets no token anywhere, others get some on some processes only: engines
        that skip idle experts would wait for each other forever.
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
def test_two_processes_are_one(make):
    """Every gradient, with both losses of tower and connector. ddp and fsdp have all experts on each
    process."""
    model, batch, folder = make(2)
    truth = single(model, batch)
    idle = truth["model.multi_modal_projector.mlp.experts.down_proj"][3]
    assert idle.shape == (24, 24) and not idle.any()
    for found in run(folder, 2, "experts-exact", "experts-padded", "ddp", "fsdp"):
        assert_same_formula(beside_weights(found), beside_weights(truth))


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fp64")
def test_mixtral_experts_and_fsdp2_over_four_processes(make):
    """Two by two: experts over one axis, FSDP2 over the other for them and over both for the rest. The router
    statistics of Mixtral are over a process's own tokens, so the coefficients are 0 here."""
    model, batch, folder = make(4, text="mixtral", balance_loss_coef=0.0, router_z_loss_coef=0.0)
    truth = single(model, batch)
    for found in run(folder, 4, "both-exact", "experts-padded"):
        assert_same_formula(beside_weights(found), beside_weights(truth))


def test_splits_that_cannot_be_are_named(tiny_model):
    with pytest.raises(ValueError, match="expert_parallel must divide the 1 processes, got 2"):
        expert_mesh(2)
    with pytest.raises(ValueError, match="exchange must be one of exact, padded, got 'some'"):
        expert_parallel(tiny_model(), None, "some")
