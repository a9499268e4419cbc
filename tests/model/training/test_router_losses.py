"""Router losses beside a loss computed outside the model, where the Trainer averages over processes."""

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from cumo_model.training.router_losses import RouterLosses
from tests.rounding import assert_same_formula


class WithRouterLosses(RouterLosses, Trainer):
    pass


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("averages", [True, False])
def test_router_losses_are_scaled_as_the_trainer_scales_the_loss(
    tiny_model, tiny_batch, tmp_path, monkeypatch, averages
):
    """Gradients are averaged over three processes, so the share of a process in the labels counts thrice."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], average_tokens_across_devices=averages
    )
    own = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    model, batch = tiny_model(balance_loss_coef=0.5, router_z_loss_coef=0.25).train(), tiny_batch()
    batch["labels"][:, 0] = 7  # no position predicts the first one
    trainer = WithRouterLosses(model, args, compute_loss_func=own)
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    found, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True, num_items_in_batch=40)
    assert float(outputs.aux_loss) > 0
    share = 12 / 40  # six labels in each of two rows
    scale = 3 if averages else 1
    assert_same_formula(found, scale * (own(outputs, None) + share * outputs.aux_loss))
    without = trainer.compute_loss(model, dict(batch))
    assert_same_formula(without, own(outputs, None) + outputs.aux_loss)
    evaluated = trainer.compute_loss(model.eval(), dict(batch), num_items_in_batch=40)
    with torch.no_grad():
        assert_same_formula(evaluated, scale * own(model(**batch), None))
