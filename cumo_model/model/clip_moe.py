"""CLIP vision tower with Mixture-of-Experts MLPs: transformers' CLIP in which only `mlp` is replaced.

The balance loss uses statistics per crop; the class token is included. The tower has no final layer norm,
because CuMo uses an earlier hidden state and its checkpoints do not contain that norm. In CLIP that norm is
applied to the class token only, for `pooler_output`; so that field is None here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.utils.output_capturing import capture_outputs

from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.host import MoEHostMixin
from cumo_model.model.layouts import layout_of, read_config
from cumo_model.model.moe import MoELayer
from cumo_model.model.tensor_parallel import ParallelMixin

ACTIVATION_OF = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}  # transformers' name -> name in cumo_kernels, where they differ


class _ZeroGradientEdge(torch.autograd.Function):
    """Returns x unchanged. In backward `other`, of the same shape, gets a gradient of zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


class CumoVisionEncoderLayer(CLIPEncoderLayer):
    """Pre-norm attention and MLP. The MLP is an MoELayer if the config has more than one expert."""

    def __init__(self, config: CumoVisionConfig, layer_idx: int):
        super().__init__(config)
        self.config = config
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
                router=config.router,
            )

    def forward(self, hidden_states: Tensor, router_only: bool = False, **kwargs: Any) -> Tensor:
        """(N, n, H) -> (N, n, H). With `router_only` only the router runs, for its statistics."""
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        x = self.layer_norm2(hidden_states)
        if self.config.num_experts == 1:
            return hidden_states + self.mlp(x)
        groups = x.shape[0]  # len(x) would be a constant in an exported program
        if router_only:
            # the output is created after the router, so that backward visits it first
            return _ZeroGradientEdge.apply(hidden_states, self.mlp(x, groups=groups, router_only=True))
        return hidden_states + self.mlp(x, groups=groups)


class CumoVisionEncoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: CumoVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CumoVisionEncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )


class CumoVisionModel(ParallelMixin, MoEHostMixin, CLIPPreTrainedModel):
    """CLIP vision tower with dense or Mixture-of-Experts MLPs, without the final layer norm."""

    config: CumoVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["CumoVisionEncoderLayer", "CLIPVisionEmbeddings"]

    def __init__(self, config: CumoVisionConfig):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled as in CLIP
        self.encoder = CumoVisionEncoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a vision tower as transformers does, from a folder that contains only the tower.

        Raises:
            ValueError: the folder contains a whole CuMo model, in which the tower's parameters have other
                names.
        """
        path = pretrained_model_name_or_path
        values = read_config(path, **kwargs)
        kind = values.get("model_type")
        if kind == CumoConfig.model_type or layout_of(values) is not None:
            raise ValueError(
                f"{path} must contain a vision tower only, got a whole model ({kind}): use "
                "`.model.vision_tower` of CumoForConditionalGeneration.from_pretrained"
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

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        feature_layer: int | Sequence[int] = -1,
        all_routers: bool = False,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode N crops independently.

        Args:
            pixel_values: (N, 3, s, s); s is the config's image_size.
            feature_layer: index of the hidden state to return, out of num_hidden_layers + 1, or indices of
                several, which are concatenated on the channel axis. Layers after them do not run.
            all_routers: run the router of every layer, as the auxiliary losses require. The last layer runs
                without its experts if only its router is needed.
            interpolate_pos_encoding: accept crops of another size than image_size; the position embeddings
                are interpolated to it, as in CLIP.
            output_hidden_states: also return all hidden states; every layer runs. None: as in the config.
            output_attentions: also return the attention weights of all layers (N, heads, 1 + patches,
                1 + patches), which the attention implementation "eager" has; every layer runs. None: as in
                the config.
            **kwargs (Any): passed on to the attention; `return_dict=False` gives a tuple.

        Returns:
            last_hidden_state (N, 1 + patches, H), or (N, 1 + patches, number of indices * H): the selected
            state; hidden_states and attentions: tuples, or None. pooler_output is None: CLIP computes it
            with a layer norm that this tower does not have.
        """
        layers = self.encoder.layers
        several = not isinstance(feature_layer, int)
        asked, states = list(feature_layer) if several else [feature_layer], len(layers) + 1
        if not asked or any(not -states <= i < states for i in asked):
            raise ValueError(
                f"feature_layer must index the tower's {states} hidden states, got {feature_layer}"
            )
        indices = [range(states)[i] for i in asked]
        deepest = max(indices)
        all_routers = all_routers and self.config.num_experts > 1
        wants_attentions = self._records("attentions", output_attentions)
        wants_all = wants_attentions or self._records("hidden_states", output_hidden_states)
        if wants_attentions:
            kwargs["output_attentions"] = True  # an attention implementation without weights warns
        hidden_states = self.pre_layrnorm(
            self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        )
        states = {0: hidden_states}
        for i, layer in enumerate(layers):
            if i >= deepest and not (all_routers or wants_all):
                break
            router_only = i >= deepest and i == len(layers) - 1 and not wants_all
            hidden_states = layer(hidden_states, router_only=router_only, **kwargs)
            if i + 1 in indices:
                states[i + 1] = hidden_states
        if states[deepest] is not hidden_states and not wants_all:
            # FSDP gathers a layer for backward when its output gets a gradient; the last layer's output gets
            # none
            states[deepest] = _ZeroGradientEdge.apply(states[deepest], hidden_states)
        chosen = [states[i] for i in indices]
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(chosen, -1) if several else chosen[0])

    def _records(self, name: str, given: bool | None) -> bool:
        """Whether `capture_outputs` records this output: the argument, or else the config, requests it."""
        return bool(getattr(self.config, f"output_{name}", False) if given is None else given)


AutoModel.register(CumoVisionConfig, CumoVisionModel)
