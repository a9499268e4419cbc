"""CumoModel and CumoForConditionalGeneration: image -> tower -> connector -> language model.

    total = language + balance_loss_coef * sum(balance) + router_z_loss_coef * sum(z)

over the places that are Mixture-of-Experts, in training only. The language model's own terms count only if
tower or connector have experts too: without them the original trains Mixtral on the language loss alone.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.utils.generic import can_return_tuple

from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.compat import (
    CACHE,
    CACHE_NAMES,
    EitherCheckpointing,
    cache_of,
    either_cache_name,
    enable_checkpointing,
    this_cache_name,
)
from cumo_model.model.config import CumoConfig
from cumo_model.model.image_tokens import (
    as_tiles,
    check_no_placeholders,
    check_placeholders,
    pictures_per_row,
)
from cumo_model.model.layouts import layout_of, read_config
from cumo_model.model.llm_moe import build_language_model
from cumo_model.model.losses import place_losses
from cumo_model.model.mlp_moe import CumoProjector
from cumo_model.model.moe import MoEHostMixin, RoutingRecord, record_routing
from cumo_model.model.pyramid import crop_counts, image_pyramid, merge_scales
from cumo_model.model.quantize import are_experts_quantized

PLACES = ("mlp", "clip", "llm")  # the order in which the original adds their losses


@dataclass
class CumoModelOutput(BaseModelOutputWithPast):
    image_hidden_states: Tensor | None = None  # (tiles, image_seq_length, H) after the connector


@dataclass
class CumoOutput(CausalLMOutputWithPast):
    """`loss_parts`: terms of `loss`, unweighted and detached: language, and {clip,mlp,llm}_{balance,z}.

    `router_stats`, on request: for each place, its layers' RouterStats stacked and the tokens per expert.
    """

    image_hidden_states: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None
    router_stats: dict[str, dict[str, Tensor]] | None = None


class CumoPreTrainedModel(MoEHostMixin, EitherCheckpointing, PreTrainedModel):
    config: CumoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CumoProjector):
            module.reset_parameters()
        if isinstance(module, CumoModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=module.image_newline.numel() ** -0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, from a folder in our layout or in one that is registered (layouts.py)."""
        path = pretrained_model_name_or_path
        layout = layout_of(read_config(path, **kwargs))
        if layout is None or layout.is_loader(cls):
            return super().from_pretrained(path, *args, **kwargs)
        return layout.load(cls, path, *args, **kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs) -> None:
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(
                "activation_checkpointing_kwargs (gradient_checkpointing_kwargs) must have use_reentrant "
                "False, got True: reentrant recomputation loses the gradients of the router losses"
            )
        enable_checkpointing(self, options, **kwargs)


class CumoModel(CumoPreTrainedModel):
    def __init__(self, config: CumoConfig):
        super().__init__(config)
        config.vision_config.compat = config.compat  # which may be set after the config was made
        self.vision_tower = CumoVisionModel(config.vision_config)
        self.multi_modal_projector = CumoProjector(config)
        self.language_model = build_language_model(config.text_config, config.compat)
        width = config.text_config.hidden_size
        self.image_newline = (
            nn.Parameter(torch.empty(width)) if config.patch_merge_type == "spatial_unpad" else None
        )
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, all_routers: bool = False) -> Tensor:
        """Tiles (N, 3, s, s) -> (N, image_seq_length, text's H); `all_routers` as in the tower's forward."""
        config, vision = self.config, self.config.vision_config
        wanted = (vision.num_channels, vision.image_size, vision.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values must be (B, {', '.join(map(str, wanted))}), got {tuple(pixel_values.shape)}"
            )
        crops = image_pyramid(pixel_values, config.scales)
        features = self.vision_tower(
            crops, feature_layer=config.vision_feature_layer, all_routers=all_routers
        ).last_hidden_state
        if config.vision_feature_select_strategy == "default":
            features = merge_scales(features[:, 1:], config.scales, vision.image_size // vision.patch_size)
        return self.multi_modal_projector(features)

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        image_lengths: Tensor | None,
        continues: bool,
        all_routers: bool,
        num_dummy_images: int,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S) -> embeddings (B, S, H) with the pictures' features at their placeholders; the features."""
        embed_tokens = self.get_input_embeddings()
        if pixel_values is None and continues and (input_ids.shape[1] == 1 or torch.compiler.is_compiling()):
            return embed_tokens(input_ids), None  # the next token; a further turn is looked through
        token, layout = self.config.image_token_index, self.config.picture_layout
        is_image = input_ids == token
        if pixel_values is None:
            check_no_placeholders(is_image, token)
            return embed_tokens(input_ids), None
        num_tiles = pixel_values.shape[0] - num_dummy_images
        sizes = [None] * num_tiles if image_sizes is None else [tuple(size) for size in image_sizes.tolist()]
        tiles = [layout.tiles(size) for size in sizes]
        if sum(tiles) != num_tiles:
            raise ValueError(
                f"pixel_values must have {sum(tiles)} tiles for the {len(sizes)} image_sizes, got {num_tiles}"
            )
        what = "images" if image_sizes is None else "pictures"
        check_placeholders(is_image, token, [layout.tokens(size) for size in sizes], image_lengths, what)
        # the placeholder may lie outside the vocabulary
        embeds = embed_tokens(input_ids.masked_fill(is_image, 0))
        features = self.get_image_features(pixel_values, all_routers)
        used = features[:num_tiles]
        if layout.merge != "flat" or image_sizes is not None:
            pictures = [
                layout.arrange(part, size, self.image_newline)
                for part, size in zip(used.split(tiles), sizes, strict=True)
            ]
            if image_lengths is not None:
                pictures = [p[:n] for p, n in zip(pictures, image_lengths.tolist(), strict=True)]
            used = torch.cat(pictures) if pictures else used
        elif image_lengths is not None:
            order = torch.arange(features.shape[1], device=features.device)
            used = used[order < image_lengths[:, None].to(features.device)]
        return embeds.masked_scatter(is_image[:, :, None], used.to(embeds.dtype)), features

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        image_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        all_routers: bool = False,
        num_dummy_images: int = 0,
        **kwargs,
    ) -> CumoModelOutput:
        """As `CumoForConditionalGeneration.forward`, without head and loss.

        The last `num_dummy_images` of pixel_values run through tower and connector, and into their losses,
        but stand nowhere in the text: the original does so for every row without an image, and ranks of one
        sharded model must run the same modules.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given, got both or neither")
        features = None
        if input_ids is not None:
            continues = cache is not None and cache.get_seq_length() > 0
            inputs_embeds, features = self._embed(
                input_ids,
                as_tiles(pixel_values),
                image_sizes,
                image_lengths,
                continues,
                all_routers,
                num_dummy_images,
            )
            if self.training and attention_mask is not None and attention_mask.shape == input_ids.shape:
                # padding counts in Mixtral's router losses, and the original pads with zero vectors
                inputs_embeds = inputs_embeds * attention_mask[:, :, None].to(inputs_embeds.dtype)
        elif pixel_values is not None:
            raise ValueError("pixel_values must come with input_ids, whose image tokens say where they go")
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            use_cache=not self.training if use_cache is None else use_cache,
            **kwargs,
        )
        return CumoModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **cache_of(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class CumoForConditionalGeneration(CumoPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # the Trainer divides by the accumulation steps itself, for the auxiliary losses too
    accepts_loss_kwargs = False

    def __init__(self, config: CumoConfig):
        super().__init__(config)
        self.model = CumoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    generate = this_cache_name(GenerationMixin.generate)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, in the layout of this model's own state_dict.

        Stacked experts on disk load through `load_state_dict` too, which is how the Trainer resumes.
        `save_original_format=True` writes Mixtral's experts one by one.

        Raises:
            ValueError: the experts are quantised, which no loader could read back.
        """
        if are_experts_quantized(self):
            raise ValueError("save_pretrained must come before quantize_experts, got experts in 4 bits")
        return super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs,
    ):
        """Copies of a row for beams or samples take all of the row's pictures along, in order."""
        names = ("pixel_values", "image_sizes", "image_lengths")
        images = {key: value for key in names if (value := kwargs.pop(key, None)) is not None}
        pixels = as_tiles(images.get("pixel_values"))
        if expand_size > 1 and input_ids is not None and pixels is not None:
            layout, sizes = self.config.picture_layout, [None] * len(pixels)
            if "image_sizes" in images:
                sizes = [tuple(size) for size in images["image_sizes"].tolist()]
            tokens = (input_ids == self.config.image_token_index).sum(1)
            lengths = images.get("image_lengths", tokens.new_tensor([layout.tokens(size) for size in sizes]))
            counts = pictures_per_row(tokens, lengths.to(tokens.device))
            tiles = torch.tensor([layout.tiles(size) for size in sizes]).split(counts)
            images["pixel_values"] = pixels
            for key, value in images.items():
                parts = [int(part.sum()) for part in tiles] if key == "pixel_values" else counts
                rows = value.split(parts)
                images[key] = torch.cat([row for row in rows for _ in range(expand_size)])
        expanded, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return expanded, kwargs | images

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        image_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        output_router_stats: bool = False,
        **kwargs,
    ) -> CumoOutput:
        """Logits, and with `labels` the loss.

        Args:
            input_ids: (B, S) int64; image_seq_length tokens image_token_index stand for each tile, in order
                (for each picture `config.picture_layout.tokens(size)`).
            pixel_values: (number of tiles, 3, s, s), also as (B, tiles, 3, s, s) or a list of pictures,
                (3, s, s) or (tiles, 3, s, s) each.
            image_sizes: (number of pictures, 2) integers, height and width of pictures that anyres has cut
                into tiles, for `patch_merge_type`. None: every tile is a picture.
            image_lengths: (number of pictures,) integers: how many of each one's tokens `input_ids` has, the
                first ones; 0 for one that only counts in the router losses, as the original's dummies of
                rows without a picture. None: all of them.
            attention_mask: (B, S), 0 on padding, left or right.
            cache: of transformers, also called past_key_values.
            labels: (B, S) int64, -100 where no token is to be predicted; image tokens never are.
            logits_to_keep: how many last positions, or which, get logits; 0 is all, as labels need.
            skip_logits: with labels, run the head only where a token is to be predicted and return no logits:
                the same loss for a fraction of the head's time and memory.
            output_router_stats: return, for each place with experts ("clip", "mlp", "llm"), mean_probs and
                top1_density (L, G, E), mean_squared_logsumexp (L, G) and tokens_per_expert (L, E) of its L
                layers that ran, without gradients.

        Raises:
            ValueError: placeholders and images do not match, or a shape does not fit.
        """
        pixel_values = as_tiles(pixel_values)
        with_aux = self.training and labels is not None and self._has_expert_losses()
        with record_routing() if with_aux or output_router_stats else nullcontext([]) as records:
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                image_sizes=image_sizes,
                image_lengths=image_lengths,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                all_routers=with_aux,
                **kwargs,
            )
        if labels is not None:  # nobody predicts a picture, and its id may lie outside the vocabulary
            labels = labels.masked_fill(labels == self.config.image_token_index, -100)
        hidden_states = outputs.last_hidden_state
        loss, logits, loss_parts = None, None, None
        if skip_logits and labels is not None:
            loss = self._loss_without_logits(hidden_states, labels)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])
            if labels is not None:
                loss = language_loss(logits, labels)
        if loss is not None:
            loss_parts = {"language": loss.detach()}
            if with_aux:
                num_images = 0 if pixel_values is None else pixel_values.shape[0]
                loss = self._add_expert_losses(loss, loss_parts, records, num_images)
        return CumoOutput(
            loss=loss,
            logits=logits,
            **cache_of(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            loss_parts=loss_parts,
            router_stats=_stacked_stats(records) if output_router_stats else None,
        )

    def _loss_without_logits(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """`language_loss` of (B, S, H) states, whose head runs on the rows before a label only."""
        _check_labels(labels, hidden_states)
        targets = labels[:, 1:]
        predicts = targets != -100
        logits = self.lm_head(hidden_states[:, :-1][predicts]).float()
        total = nn.functional.cross_entropy(logits, targets[predicts], reduction="sum")
        return total / max(1, len(logits))

    def _has_expert_losses(self) -> bool:
        return self.config.vision_config.num_experts > 1 or self.config.projector_num_experts > 1

    def _add_expert_losses(
        self, loss: Tensor, loss_parts: dict[str, Tensor], records: list[RoutingRecord], num_images: int
    ) -> Tensor:
        for place in PLACES:
            layers = [record.routing.stats for record in records if record.place == place]
            if not layers:
                continue
            scales = crop_counts(num_images, self.config.scales) if place == "clip" else None
            terms = zip(("balance", "z"), place_losses(layers, scales), strict=True)
            for (name, value), coef in zip(
                terms, (self.config.balance_loss_coef, self.config.router_z_loss_coef), strict=True
            ):
                loss_parts[f"{place}_{name}"] = value.detach()
                if coef:
                    loss = loss + coef * value
        return loss


def _stacked_stats(records: list[RoutingRecord]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for place in PLACES:
        layers = [record.routing for record in records if record.place == place]
        if layers:
            names = ("mean_probs", "top1_density", "mean_squared_logsumexp")
            found[place] = {
                name: torch.stack([getattr(routing.stats, name).detach() for routing in layers])
                for name in names
            }
            found[place]["tokens_per_expert"] = torch.stack([r.tokens_per_expert for r in layers])
    return found


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the tokens to predict; position t predicts labels[:, t + 1].

    Args:
        logits: (B, S, V), cast to fp32.
        labels: (B, S) int64, -100 is ignored.

    Returns:
        Scalar fp32; 0 if there is no token to predict.
    """
    _check_labels(labels, logits)
    targets = nn.functional.pad(
        labels[:, 1:], (0, 1), value=-100
    ).flatten()  # shifting labels spares a copy of logits
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def _check_labels(labels: Tensor, rows: Tensor) -> None:
    if labels.shape != rows.shape[:2]:
        raise ValueError(f"labels must be {tuple(rows.shape[:2])} like input_ids, got {tuple(labels.shape)}")


AutoModel.register(CumoConfig, CumoModel)
AutoModelForImageTextToText.register(CumoConfig, CumoForConditionalGeneration)
AutoModelForMultimodalLM.register(CumoConfig, CumoForConditionalGeneration)
