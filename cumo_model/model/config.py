"""Configurations of the vision tower and of the whole model. The defaults describe CuMo Mistral-7B."""

import math
from pathlib import Path
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, AutoConfig

from cumo_model.model.choices import AVERAGES, COMPATS
from cumo_model.model.compat import CACHE_NAMES
from cumo_model.model.image_tokens import PictureLayout
from cumo_model.model.layouts import layout_of
from cumo_model.model.remote import RemoteCodeMixin
from cumo_model.model.routers import RouterOptions

MISTRAL_7B = {  # values of Mistral-7B-Instruct-v0.2 that differ from the defaults of MistralConfig
    "model_type": "mistral",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@strict
class CumoVisionConfig(RemoteCodeMixin, CLIPVisionConfig):
    """Configuration of a CLIP vision tower with dense or Mixture-of-Experts MLPs.

    The default is ViT-L/14-336 with 4 experts, 2 of them active per token.

    Attributes:
        num_experts: experts per layer; 1 gives CLIP's dense MLP.
        num_experts_per_tok: experts that each token uses.
        compat: set by CumoConfig.
        router: set by CumoConfig.
    """

    model_type = "cumo_vision_model"
    base_config_key = "vision_config"
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "CumoVisionConfig",
        "AutoModel": "CumoVisionModel",
    }
    base_model_fsdp_plan = {"encoder.layers.*": "free_full_weight"}

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_experts: int = 4
    num_experts_per_tok: int = 2
    compat: Literal[COMPATS] | None = None
    router: dict | None = None

    def __post_init__(self, **kwargs):
        check_experts("vision_config.num_experts", self.num_experts, self.num_experts_per_tok)
        RouterOptions.of(self.router)
        super().__post_init__(**kwargs)


@strict
class CumoConfig(RemoteCodeMixin, PreTrainedConfig):
    """Configuration of a CuMo model: vision tower, connector and language model.

    Attributes:
        vision_config: CumoVisionConfig or its dict.
        text_config: configuration or dict with `model_type`: mixtral, or any dense decoder of transformers.
        projector_num_experts: experts of the connector; 1 gives a dense two-layer MLP.
        projector_num_experts_per_tok: experts of the connector that each token uses.
        scales: integer factors by which the image is enlarged before it enters the tower. The features of all
            scales are concatenated on the channel axis, in this order.
        vision_feature_layer: index into the tower's num_hidden_layers + 1 hidden states, or a list of
            indices. The features of several layers are concatenated on the channel axis, in this order, at
            each scale.
        vision_feature_select_strategy: "default" drops the class token, "full" keeps it (scales [1] only).
        image_token_index: id of the placeholders in `input_ids`; may be outside the vocabulary.
        patch_merge_type: how the tiles of a picture become tokens, see image_tokens.py. "spatial_unpad" adds
            the parameter image_newline.
        image_grid_pinpoints: [[height, width], ...] in pixels, the tile grids that anyres chooses from;
            multiples of the tower's image_size. None: each picture is one tile, or is passed as tiles.
        balance_loss_coef: weight of the load balancing loss in training.
        router_z_loss_coef: weight of the router z-loss in training.
        average_loss_over: "tokens": a step's loss is the mean over its tokens, however they are divided into
            micro-batches and processes. "micro_batches": the mean of the micro-batches' means, as in the
            original code.
        output_router_logits: whether `forward` returns router logits by default.
        compat: "cumo" reproduces the rounding of the original code in routers and experts, and counts padding
            in the router losses of the language model, as it does. None is more accurate and faster.
        router: options of all routers that differ from the paper's, a dict with some of the fields of
            `RouterOptions` (routers.py): {"score": "sigmoid", "selection_bias": True}. None: those of
            vision_config, or else the paper's, which {} demands. vision_config can have no others.
        tie_word_embeddings: whether lm_head shares the embedding's weight.
        original: config.json of the released-layout checkpoint this config was read from. It is used when the
            model is converted back to that layout.
    """

    model_type = "cumo"
    attribute_map = {"image_token_id": "image_token_index"}
    remote_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "CumoConfig",
        "AutoModel": "CumoModel",
        "AutoModelForImageTextToText": "CumoForConditionalGeneration",
        "AutoModelForMultimodalLM": "CumoForConditionalGeneration",
        "AutoProcessor": "CumoProcessor",
        "AutoImageProcessor": "CumoImageProcessor",
    }
    sub_configs = {"text_config": AutoConfig, "vision_config": CumoVisionConfig}
    base_model_fsdp_plan = {"multi_modal_projector": "free_full_weight"}
    keys_to_ignore_at_inference = [
        *CACHE_NAMES,
        "loss_parts",
        "router_stats",
        "aux_loss",
        "router_logits",
        "vision_router_logits",
        "projector_router_logits",
        "image_hidden_states",
        "hidden_states",
        "attentions",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_num_experts: int = 4
    projector_num_experts_per_tok: int = 2
    scales: list[int] | tuple[int, ...] = (1, 3)
    vision_feature_layer: int | list[int] | tuple[int, ...] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_token_index: int = 32000
    patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    image_grid_pinpoints: list | None = None
    balance_loss_coef: float | int = 0.1
    router_z_loss_coef: float | int = 0.01
    average_loss_over: Literal[AVERAGES] = "tokens"
    output_router_logits: bool = False
    compat: Literal[COMPATS] | None = None
    router: dict | None = None
    tie_word_embeddings: bool = False
    original: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers. A config.json in another registered layout is translated."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (layout := layout_of(values)) is not None:
            fields = layout.config_values(values, folder)
            values = {"model_type": cls.model_type, **fields}
        return values, kwargs

    def __post_init__(self, **kwargs):
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = CumoVisionConfig(**(self.vision_config or {}))
        elif not isinstance(self.vision_config, CumoVisionConfig):
            raise ValueError(
                f"vision_config must be a CumoVisionConfig, got {type(self.vision_config).__name__}"
            )
        if self.text_config is None or isinstance(self.text_config, dict):
            text = dict(self.text_config or MISTRAL_7B)
            kind = text.pop("model_type", "mistral")
            if kind not in CONFIG_MAPPING:
                raise ValueError(f"text_config.model_type must be known to transformers, got {kind!r}")
            self.text_config = CONFIG_MAPPING[kind](**text)
        self.vision_config.compat = self.compat
        if self.router is None:  # a tower that was trained by itself
            self.router = self.vision_config.router
        of_tower = self.vision_config.router
        if of_tower is not None and RouterOptions.of(of_tower) != RouterOptions.of(self.router):
            raise ValueError(
                "router must be that of vision_config, as all places have the same, "
                f"got router={self.router} and vision_config.router={of_tower}"
            )
        self.router = RouterOptions.of(self.router).changed() or None
        self.vision_config.router = self.router
        # lm_head belongs to this model, but the text model's flag also applies
        text_ties = getattr(self.text_config, "tie_word_embeddings", False)
        self.tie_word_embeddings = self.tie_word_embeddings or text_ties
        self.scales = tuple(self.scales)
        for name in ("balance_loss_coef", "router_z_loss_coef"):
            value = float(getattr(self, name))
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
            setattr(self, name, value)
        self._check()
        check_routers(self)
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        check_experts("projector_num_experts", self.projector_num_experts, self.projector_num_experts_per_tok)
        if not self.scales or any(scale < 1 for scale in self.scales):
            raise ValueError(f"scales must be one or more positive integers, got {list(self.scales)}")
        if self.vision_feature_select_strategy == "full" and self.scales != (1,):
            raise ValueError(
                "vision_feature_select_strategy must be 'default' unless scales is [1], "
                f"got 'full' with scales {list(self.scales)}"
            )
        if self.vision_feature_select_strategy == "full" and self.patch_merge_type != "flat":
            raise ValueError(
                "vision_feature_select_strategy must be 'default' unless patch_merge_type is 'flat', "
                f"got 'full' with {self.patch_merge_type!r}"
            )
        check_pinpoints(self.image_grid_pinpoints, self.vision_config.image_size)
        num_states = self.vision_config.num_hidden_layers + 1
        indices = self.feature_layers
        if not indices or any(not -num_states <= index < num_states for index in indices):
            raise ValueError(
                f"vision_feature_layer must index the tower's {num_states} hidden states, "
                f"got {self.vision_feature_layer}"
            )

    @property
    def feature_layers(self) -> list[int]:
        """The indices of vision_feature_layer, which may be one integer."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def feature_size(self) -> int:
        """Width of the features that enter the connector: all scales and all selected layers."""
        return self.vision_config.hidden_size * len(self.scales) * len(self.feature_layers)

    @property
    def router_aux_loss_coef(self) -> float:
        """1: `aux_loss` is already weighted. Trainers that add it themselves (TRL) multiply it by this."""
        return 1.0

    @property
    def image_seq_length(self) -> int:
        """Image tokens per tile, before `patch_merge_type` removes or adds any."""
        num_patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return num_patches + (self.vision_feature_select_strategy == "full")

    @property
    def picture_layout(self) -> PictureLayout:
        """How pictures are cut into tiles and arranged as tokens."""
        side = self.vision_config.image_size
        grid = side // self.vision_config.patch_size
        pinpoints = self.image_grid_pinpoints
        return PictureLayout(side, grid, self.image_seq_length, self.patch_merge_type, pinpoints)


def check_experts(name: str, num_experts: int, top_k: int) -> None:
    if num_experts < 1:
        raise ValueError(f"{name} must be at least 1 (1 is dense), got {num_experts}")
    if num_experts > 1 and not 1 <= top_k <= num_experts:
        raise ValueError(f"{name}_per_tok must be between 1 and the {num_experts} experts, got {top_k}")


def check_routers(config: CumoConfig) -> None:
    """
    Raises:
        ValueError: the options of the routers do not fit a place with experts, or compat.
    """
    options = RouterOptions.of(config.router)
    if config.compat is not None and options.changed():
        raise ValueError(
            f"router must be None with compat {config.compat!r}, which repeats the original's routers, "
            f"got {config.router}"
        )
    text, vision = config.text_config, config.vision_config
    places = [
        (vision.num_experts, vision.num_experts_per_tok),
        (config.projector_num_experts, config.projector_num_experts_per_tok),
    ]
    if text.model_type == "mixtral":
        places.append((text.num_local_experts, text.num_experts_per_tok))
    for num_experts, top_k in places:
        if num_experts > 1:
            options.check_experts(num_experts, top_k)


def check_pinpoints(pinpoints: list | None, side: int) -> None:
    if pinpoints is None:
        return
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else (pair,) for pair in pinpoints]
    if not pairs or any(
        len(pair) != 2 or any(not isinstance(n, int) or n < side or n % side for n in pair) for pair in pairs
    ):
        raise ValueError(
            f"image_grid_pinpoints must be [height, width] pairs, multiples of the image_size {side}, "
            f"got {pinpoints}"
        )


AutoConfig.register(CumoVisionConfig.model_type, CumoVisionConfig)
AutoConfig.register(CumoConfig.model_type, CumoConfig)
