"""CumoPreTrainedModel, the base class of both CuMo models."""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from cumo_model.model.compat import CACHE_NAMES
from cumo_model.model.config import CumoConfig
from cumo_model.model.host import MoEHostMixin
from cumo_model.model.layouts import image_token_of, layout_of, read_config
from cumo_model.model.mlp_moe import CumoProjector
from cumo_model.model.tensor_parallel import ParallelMixin


class CumoPreTrainedModel(ParallelMixin, MoEHostMixin, PreTrainedModel):
    """Base class: initialisation, loading and activation checkpointing of both CuMo models."""

    config: CumoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # one decoding step with a static cache

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CumoProjector):
            module.reset_parameters()
        newline = getattr(module, "image_newline", None)
        if newline is not None:
            init.normal_(newline, std=newline.numel() ** -0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load as transformers does; the checkpoint may have any registered layout (layouts.py).

        The image token of the config becomes that of a tokenizer in the same folder, unless the caller gives
        another one than the folder's config.json.

        Raises:
            ValueError: an index of the folder is damaged or names a file outside the folder.
        """
        path = pretrained_model_name_or_path
        layout = layout_of(read_config(path, **kwargs))
        if layout is not None and layout.is_loader(cls):
            return super().from_pretrained(path, *args, **kwargs)
        load = super().from_pretrained if layout is None else partial(layout.load, cls)
        loaded = load(path, *args, **kwargs)
        config = (loaded[0] if isinstance(loaded, tuple) else loaded).config
        token = image_token_of(path, kwargs.get("subfolder"))
        if token is not None:
            where = {key: kwargs[key] for key in ("subfolder",) if key in kwargs}
            if config.image_token_index == CumoConfig.from_pretrained(path, **where).image_token_index:
                config.image_token_index = token
        return loaded
