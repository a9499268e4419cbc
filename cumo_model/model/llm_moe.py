"""The language model: an unchanged dense decoder of transformers, or Mixtral with MoELayer as sparse block.

The balance loss uses statistics over all tokens of the micro-batch, padding included.
"""

import torch
from torch import nn
from transformers import MODEL_MAPPING, MixtralConfig, MixtralModel, PreTrainedConfig, PreTrainedModel
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

from cumo_model.model.head import head_of
from cumo_model.model.host import MoEHostMixin
from cumo_model.model.moe import MoELayer
from cumo_model.model.tensor_parallel import ParallelMixin

GATED_ACTIVATION_OF = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
}


class CumoMixtralDecoderLayer(MixtralDecoderLayer):
    """Mixtral's decoder layer with an MoELayer as sparse block. Parameter names are those of Mixtral."""

    def __init__(self, config: MixtralConfig, layer_idx: int, compat: str | None):
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
        )


class CumoMixtralModel(ParallelMixin, MoEHostMixin, MixtralModel):
    """Mixtral's decoder without its head, built of CumoMixtralDecoderLayer."""

    _no_split_modules = ["CumoMixtralDecoderLayer"]
    # transformers finds router logits by its router's class, which is not used here; use record_routing()
    _can_record_outputs = {k: v for k, v in MixtralModel._can_record_outputs.items() if k != "router_logits"}

    def __init__(self, config: MixtralConfig, compat: str | None = None):
        MixtralPreTrainedModel.__init__(self, config)
        if config.router_jitter_noise > 0:
            raise ValueError(f"text_config.router_jitter_noise must be 0, got {config.router_jitter_noise}")
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            CumoMixtralDecoderLayer(config, i, compat) for i in range(config.num_hidden_layers)
        )
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoELayer):
            for weight in module.experts.parameters():
                init.normal_(weight, std=self.config.initializer_range)


# transformers converts per-expert checkpoints of an external class only if it is registered
register_checkpoint_conversion_mapping(
    CumoMixtralModel.__name__, get_checkpoint_conversion_mapping("mixtral"), overwrite=True
)


def build_language_model(text_config: PreTrainedConfig, compat: str | None = None) -> PreTrainedModel:
    """Build the decoder without its head.

    Args:
        text_config: configuration of mixtral or of any dense decoder of transformers.
        compat: "cumo" reproduces the rounding of the original code in Mixtral.

    Raises:
        ValueError: `head_of` refuses text_config, such as another sparse model, whose experts cumo_kernels
            would not run.
    """
    head_of(text_config)
    if text_config.model_type == "mixtral":
        return CumoMixtralModel(text_config, compat="cumo_llm" if compat else None)
    return MODEL_MAPPING[type(text_config)](text_config)
