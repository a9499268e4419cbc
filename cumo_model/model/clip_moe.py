"""CLIP vision tower whose MLPs are Mixture-of-Experts: transformers' CLIP with only `mlp` replaced.

Balance statistics are per crop, class token included. The tower has no final layer norm: CuMo reads a state
before it, and its checkpoints lack it.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import AutoModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.layouts import layout_of, read_config
from cumo_model.model.moe import MoEHostMixin, MoELayer

ACTIVATION_OF = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}  # transformers' names where they differ


class CumoVisionEncoderLayer(CLIPEncoderLayer):
    """Pre-norm attention and MLP; the MLP is an MoELayer when the config has experts."""

    def __init__(self, config: CumoVisionConfig, layer_idx: int):
        super().__init__(config)
        if config.num_experts > 1:
            self.mlp = MoELayer(
                config.hidden_size,
                config.intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                ACTIVATION_OF.get(config.hidden_act, config.hidden_act),
                compat=config.compat,
                place="clip",
                layer=layer_idx,
            )

    def forward(self, hidden_states: Tensor, router_only: bool = False) -> Tensor:
        """(N, n, H) -> (N, n, H). `router_only` skips the experts: only the router's statistics count."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states))
        hidden_states = hidden_states + attended
        x = self.layer_norm2(hidden_states)
        if not isinstance(self.mlp, MoELayer):
            return hidden_states + self.mlp(x)
        if router_only:
            self.mlp.route(x, groups=x.shape[0])
            return hidden_states.view_as(hidden_states)  # made after the router, so met before it in backward
        return hidden_states + self.mlp(x, groups=x.shape[0])


class CumoVisionEncoder(nn.Module):
    def __init__(self, config: CumoVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CumoVisionEncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )


class _ZeroGradientEdge(torch.autograd.Function):
    """x as it is; in backward `other`, of the same shape, gets a gradient of zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


class CumoVisionModel(MoEHostMixin, CLIPPreTrainedModel):
    config: CumoVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["CumoVisionEncoderLayer", "CLIPVisionEmbeddings"]

    def __init__(self, config: CumoVisionConfig):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's own spelling
        self.encoder = CumoVisionEncoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, from a folder of a tower alone.

        Raises:
            ValueError: the folder holds a whole CuMo, whose tower has other names there.
        """
        path = pretrained_model_name_or_path
        values = read_config(path, **kwargs)
        kind = values.get("model_type")
        if kind == CumoConfig.model_type or layout_of(values) is not None:
            raise ValueError(
                f"{path} must hold a tower alone, got a whole model ({kind}): take `.model.vision_tower` of "
                "CumoForConditionalGeneration.from_pretrained"
            )
        return super().from_pretrained(path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoELayer):
            config = self.config
            experts = module.experts
            init.normal_(experts.up_proj, std=(2 * config.hidden_size) ** -0.5 * config.initializer_factor)
            down_std = (2 * config.hidden_size * config.num_hidden_layers) ** -0.5 * config.initializer_factor
            init.normal_(experts.down_proj, std=down_std)
            init.zeros_(experts.up_proj_bias)
            init.zeros_(experts.down_proj_bias)
            module.reset_gate()

    def forward(
        self,
        pixel_values: Tensor,
        feature_layer: int = -1,
        all_routers: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Encode crops, each on its own.

        Args:
            pixel_values: (N, 3, s, s), s the config's image_size.
            feature_layer: which of the num_hidden_layers + 1 hidden states to return; later ones do not run.
            all_routers: run every layer's router, as the auxiliary losses want it. The last layer then runs
                without its experts if only its router is needed.
            output_hidden_states: return all hidden states as well, running every layer.

        Returns:
            last_hidden_state (N, 1 + patches, H), the selected state; hidden_states, a tuple or None.
        """
        layers = self.encoder.layers
        selected = range(len(layers) + 1)[feature_layer]
        all_routers = all_routers and self.config.num_experts > 1
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        state, states = hidden_states, [hidden_states]
        for i, layer in enumerate(layers):
            if i >= selected and not (all_routers or output_hidden_states):
                break
            router_only = i >= selected and i == len(layers) - 1 and not output_hidden_states
            hidden_states = layer(hidden_states, router_only=router_only)
            if i < selected:
                state = hidden_states
            if output_hidden_states:
                states.append(hidden_states)
        if state is not hidden_states and not output_hidden_states:
            # FSDP gathers a layer for backward when its output gets a gradient; the last layer's goes nowhere
            state = _ZeroGradientEdge.apply(state, hidden_states)
        return BaseModelOutput(
            last_hidden_state=state, hidden_states=tuple(states) if output_hidden_states else None
        )


AutoModel.register(CumoVisionConfig, CumoVisionModel)
