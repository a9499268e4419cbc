"""RouterLosses: a Trainer mixin for losses that are computed outside the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from cumo_model.model.losses import share_of_labels, smoothed_language_loss


class RouterLosses:
    """Keeps the router losses where a Trainer computes the loss itself. Mix it into any Trainer:

        class MyTrainer(RouterLosses, Trainer): ...

    With `compute_loss_func` the model's `aux_loss` is added to the function's result, weighted by the
    micro-batch's share of the step's labels. With `label_smoothing_factor` the model computes the smoothed
    loss itself, together with its router losses. A subclass that overrides compute_loss must call this one.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        labels = inputs.get("labels")
        custom = self.compute_loss_func is not None and labels is not None
        with self._smoothing_model(model):
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if custom and model.training and (aux_loss := outputs.get("aux_loss")) is not None:
            scale = 1
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                scale = self.accelerator.num_processes
            # nn.DataParallel gives one aux_loss for each replica
            loss = loss + scale * share_of_labels(labels[..., 1:], num_items_in_batch) * aux_loss.mean()
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _smoothing_model(self, model: nn.Module) -> Iterator[None]:
        smoother: LabelSmoother | None = self.label_smoother
        if smoother is None or self.compute_loss_func is not None:
            yield
            return
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        before = inner.__dict__.get("_loss_function")
        self.label_smoother, inner.loss_function = None, smoothed_language_loss(smoother.epsilon)
        try:
            yield
        finally:
            self.label_smoother = smoother
            if before is None:
                del inner._loss_function
            else:
                inner.loss_function = before
