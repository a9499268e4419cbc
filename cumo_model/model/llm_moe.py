"""The language model: an unchanged dense decoder of transformers, or Mixtral with MoELayer as sparse block.

The router losses use statistics over the tokens of the micro-batch, without padding. With compat padding
counts, as in the original code.
"""

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, Cache, MixtralConfig, MixtralModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)

from cumo_model.model.compat import given_cache
from cumo_model.model.head import head_of
from cumo_model.model.host import MoEHostMixin
from cumo_model.model.moe import MoELayer
from cumo_model.model.recording import is_recording
from cumo_model.model.tensor_parallel import ParallelMixin

GATED_ACTIVATION_OF = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
}


class CumoMixtralDecoderLayer(MixtralDecoderLayer):
    """Mixtral's decoder layer with an MoELayer as sparse block. Parameter names are those of Mixtral."""

    def __init__(self, config: MixtralConfig, layer_idx: int, compat: str | None, router: dict | None):
        super().__init__(config, layer_idx)
        if config.hidden_act not in GATED_ACTIVATION_OF:
            raise ValueError(
                f"text_config.hidden_act must be one of {sorted(GATED_ACTIVATION_OF)}, "
                f"got {config.hidden_act!r}"
            )
        self.mlp = MoELayer(
            config.hidden_size,
            config.intermediate_size,
            config.num_local_experts,
            config.num_experts_per_tok,
            GATED_ACTIVATION_OF[config.hidden_act],
            bias=False,
            compat=compat,
            place="llm",
            layer=layer_idx,
            router=router,
        )

    def forward(self, hidden_states: Tensor, router_mask: Tensor | None = None, **kwargs) -> Tensor:
        """As in transformers; `router_mask` (B, S) bool: tokens that count in the router's statistics."""
        # an argument, because activation checkpointing recomputes the layer with the same arguments
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), counted=router_mask)


class CumoMixtralModel(ParallelMixin, MoEHostMixin, MixtralModel):
    """Mixtral's decoder without its head, built of CumoMixtralDecoderLayer."""

    _no_split_modules = ["CumoMixtralDecoderLayer"]
    # transformers finds router logits by its router's class, which is not used here; use record_routing()
    _can_record_outputs = {k: v for k, v in MixtralModel._can_record_outputs.items() if k != "router_logits"}

    def __init__(self, config: MixtralConfig, compat: str | None = None, router: dict | None = None):
        MixtralPreTrainedModel.__init__(self, config)
        self.compat = compat
        if config.router_jitter_noise > 0:
            raise ValueError(f"text_config.router_jitter_noise must be 0, got {config.router_jitter_noise}")
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            CumoMixtralDecoderLayer(config, i, compat, router) for i in range(config.num_hidden_layers)
        )
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args,
        router_mask: Tensor | None = None,
        **kwargs,
    ):
        """As in transformers.

        `router_mask` (B, S), 0 on tokens that do not count in the statistics of the routers, is by default
        the attention mask, if that is (B, tokens); with compat it is None, and all tokens count.

        Raises:
            ValueError: `router_mask` has another shape.
        """
        given = input_ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        shape = None if given is None else tuple(given.shape[:2])
        if router_mask is not None and tuple(router_mask.shape) != shape:
            raise ValueError(f"router_mask must be {shape} like input_ids, got {tuple(router_mask.shape)}")
        if is_recording() and shape is not None:  # else nobody reads the statistics
            if router_mask is None and self.compat is None:
                router_mask = mask_of_tokens(attention_mask, shape, given_cache(kwargs))
            if router_mask is not None:
                kwargs["router_mask"] = router_mask.bool()
        return super().forward(input_ids, attention_mask, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoELayer):
            for weight in module.experts.parameters():
                init.normal_(weight, std=self.config.initializer_range)
            module.reset_balance()


def mask_of_tokens(
    attention_mask: Tensor | None, shape: tuple[int, int], cache: Cache | None = None
) -> Tensor | None:
    """The part of a padding mask that belongs to the tokens of this call.

    Args:
        attention_mask: (B, S) or, with the tokens in the cache before them, (B, more).
        shape: B and S.
        cache: the cache of the earlier tokens.

    Returns:
        (B, S), or None if the mask has another form, which does not say what is padding.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    if attention_mask.shape == shape:
        return attention_mask
    if cache is None or attention_mask.shape[0] != shape[0] or attention_mask.shape[1] < shape[1]:
        return None
    # of a static cache the length is a tensor
    positions = torch.arange(shape[1], device=attention_mask.device) + cache.get_seq_length()
    return attention_mask[:, positions.clamp(max=attention_mask.shape[1] - 1)]


# transformers converts per-expert checkpoints of an external class only if it is registered
register_checkpoint_conversion_mapping(
    CumoMixtralModel.__name__, get_checkpoint_conversion_mapping("mixtral"), overwrite=True
)


def build_language_model(
    text_config: PreTrainedConfig, compat: str | None = None, router: dict | None = None
) -> PreTrainedModel:
    """Build the decoder without its head.

    Args:
        text_config: configuration of mixtral or of any dense decoder of transformers.
        compat: "cumo" reproduces the rounding of the original code in Mixtral.
        router: options of Mixtral's routers, as in CumoConfig.

    Raises:
        ValueError: `head_of` refuses text_config, such as another sparse model, whose experts cumo_kernels
            would not run.
    """
    head_of(text_config)
    if text_config.model_type == "mixtral":
        return CumoMixtralModel(text_config, compat="cumo_llm" if compat else None, router=router)
    return MODEL_MAPPING[type(text_config)](text_config)


def mask_for_meta(attention_mask: Tensor | None, inputs_embeds: Tensor, cache: Cache | None) -> Tensor | None:
    """The attention mask; for meta tensors one of four dimensions, whose values nothing reads."""
    if not inputs_embeds.is_meta or not isinstance(cache, Cache | None):
        return attention_mask
    rows, tokens, _ = inputs_embeds.shape
    keys = tokens + (0 if cache is None else cache.get_seq_length())
    return inputs_embeds.new_empty(rows, 1, tokens, keys)
