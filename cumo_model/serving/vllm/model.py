"""The class that vLLM runs for a CuMo, on vLLM's backend for models of transformers.

    vision tower, connector    as in training: the modules and kernels of this project, whole on every rank
    language model             vLLM's attention, linear layers and, for Mixtral, vLLM's fused experts, split
                               over the ranks of tensor parallelism
    head                       vLLM's, with the steps that the decoder's own CausalLM has (head.py)

The experts of tower and connector are not vLLM's, because they have biases and no gate, which vLLM's fused
experts would compute wrongly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import AutoModel, BatchFeature, MixtralModel
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.transformers import (
    CausalMixin,
    MoEMixin,
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.model_executor.models.transformers.base import Base, PreTrainedModelClasses
from vllm.model_executor.models.transformers.utils import init_on_device_without_buffers
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from cumo_model.model.head import head_of
from cumo_model.serving.vllm.limits import check_config

WHOLE = ("vision_tower", "multi_modal_projector")  # parts of the model that stay as they are


class CumoPictures(MultiModalProcessor):
    """Pictures and prompts for the model, by CumoProcessor."""

    def _get_field_config(
        self, modality: str, key: str, hf_inputs: BatchFeature, sizes: Tensor
    ) -> MultiModalFieldConfig:
        """As in the backend, which would give a picture as many rows of image_sizes as it has tiles."""
        if key == "image_sizes":
            return MultiModalFieldConfig.batched(modality)
        return super()._get_field_config(modality, key, hf_inputs, sizes)


@MULTIMODAL_REGISTRY.register_processor(
    CumoPictures, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class CumoForVllm(MoEMixin, MultiModalMixin, CausalMixin):
    """CuMo in vLLM, with a dense language model or with Mixtral."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        check_config(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        words = self.text_config.vocab_size
        self.head = head_of(self.text_config)
        self.logits_processor = LogitsProcessor(words)  # the head has scale and cap
        self.configure_mm_token_handling(words, [self.config.image_token_index])

    @property
    def is_sparse(self) -> bool:
        """Whether the language model has experts."""
        return self.text_config.model_type == "mixtral"

    @cached_property
    def _pre_trained_model_classes(self) -> PreTrainedModelClasses:
        """As in the backend, with the decoder that `_create_hf_to_vllm_mapper` puts in."""
        found = super()._pre_trained_model_classes
        return found._replace(decoder=MixtralModel) if self.is_sparse else found

    def _create_hf_to_vllm_mapper(self) -> None:
        """As in the backend, with the Mixtral of transformers, whose experts vLLM knows how to fuse."""
        if self.is_sparse:
            with init_on_device_without_buffers("meta"):
                decoder = AutoModel.from_config(self.text_config, dtype=self.model_config.dtype)
            self.model.language_model = decoder
        super()._create_hf_to_vllm_mapper()

    def recursive_replace(self) -> None:
        """As in the backend, in the language model only."""
        with _without(self.model, WHOLE):
            if self.is_sparse:
                super().recursive_replace()
            else:
                self.num_moe_layers = 0
                Base.recursive_replace(self)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, H) -> (T, V), None on the ranks to which vLLM does not gather them.

        The image token, if it is in the vocabulary, is never the next one, as in `generate`.
        """
        logits = super().compute_logits(self.head.before(hidden_states))
        if logits is None:
            return None
        logits, token = self.head.after(logits), self.config.image_token_index
        if token < logits.shape[-1]:
            logits[..., token] = -torch.inf
        return logits


@contextmanager
def _without(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Inside, the model does not have these parts; afterwards all are there in their order."""
    before = dict(model._modules)
    for name in names:
        del model._modules[name]
    try:
        yield
    finally:
        changed = dict(model._modules)
        model._modules.clear()
        model._modules.update({name: changed.get(name, part) for name, part in before.items()})
