"""CumoModel and CumoForConditionalGeneration: image -> vision tower -> connector -> language model.

The training loss is

    total = language + balance_loss_coef * sum(balance) + router_z_loss_coef * sum(z)

The sums run over the places with experts: tower, connector and language model. The terms of the language
model are added only if tower or connector have experts too. Otherwise only the language loss is used,
because the original code trains such a Mixtral without them. In evaluation only the language loss is used.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.auto import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.utils.generic import can_return_tuple

from cumo_model.model.base import CumoPreTrainedModel
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.compat import CACHE, cache_of, either_cache_name
from cumo_model.model.config import CumoConfig
from cumo_model.model.generation import CumoGenerationMixin, is_filled
from cumo_model.model.image_tokens import (
    as_tiles,
    check_lengths,
    check_no_placeholders,
    check_placeholders,
)
from cumo_model.model.llm_moe import build_language_model
from cumo_model.model.losses import check_labels, language_loss, place_losses
from cumo_model.model.mlp_moe import CumoProjector
from cumo_model.model.moe import PLACES, RoutingRecord, record_routing
from cumo_model.model.outputs import CumoModelOutput, CumoOutput, stacked_stats
from cumo_model.model.pyramid import crop_counts, image_pyramid, merge_scales
from cumo_model.model.quantize import are_experts_quantized


class CumoModel(CumoPreTrainedModel):
    """Vision tower, connector and language model without the language model head."""

    def __init__(self, config: CumoConfig):
        super().__init__(config)
        config.vision_config.compat = config.compat  # compat may be set after the config was created
        self.vision_tower = CumoVisionModel(config.vision_config)
        self.multi_modal_projector = CumoProjector(config)
        self.language_model = build_language_model(config.text_config, config.compat)
        width = config.text_config.hidden_size
        self.image_newline = (
            nn.Parameter(torch.empty(width)) if config.patch_merge_type == "spatial_unpad" else None
        )
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, all_routers: bool = False) -> Tensor:
        """Image features after the connector.

        Args:
            pixel_values: (N, 3, s, s), N tiles; s is the tower's image_size.
            all_routers: as in `CumoVisionModel.forward`.

        Returns:
            (N, image_seq_length, H), H the hidden size of the language model.

        Raises:
            ValueError: `pixel_values` has another shape.
        """
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
        """Embeddings (B, S, H) with the image features at the placeholders, and the features of all tiles."""
        embed_tokens = self.get_input_embeddings()
        if pixel_values is None and continues and (input_ids.shape[1] == 1 or torch.compiler.is_compiling()):
            return embed_tokens(input_ids), None  # decoding one token; a further turn is checked below
        token, layout = self.config.image_token_index, self.config.picture_layout
        is_image = input_ids == token
        if pixel_values is None:
            check_no_placeholders(is_image, token)
            return embed_tokens(input_ids), None
        num_tiles = pixel_values.shape[0] - num_dummy_images
        if image_sizes is None and torch.compiler.is_compiling():
            check_lengths(image_lengths, num_tiles)  # a list of pictures would make their number a constant
        else:
            sizes = [None] * num_tiles
            if image_sizes is not None:
                sizes = [tuple(size) for size in image_sizes.tolist()]
            tiles = [layout.tiles(size) for size in sizes]
            if sum(tiles) != num_tiles:
                raise ValueError(
                    f"pixel_values must have {sum(tiles)} tiles for the {len(sizes)} image_sizes, "
                    f"got {num_tiles}"
                )
            what = "images" if image_sizes is None else "pictures"
            check_placeholders(is_image, token, [layout.tokens(size) for size in sizes], image_lengths, what)
        # the placeholder id may be outside the vocabulary
        embeds = embed_tokens(input_ids.masked_fill(is_image, 0))
        features = self.get_image_features(pixel_values, all_routers)
        used = features[:num_tiles]
        if image_sizes is not None:
            pictures = [
                layout.arrange(part, size, self.image_newline)
                for part, size in zip(used.split(tiles), sizes, strict=True)
            ]
            if image_lengths is not None:
                pictures = [p[:n] for p, n in zip(pictures, image_lengths.tolist(), strict=True)]
            used = torch.cat(pictures) if pictures else used
        else:
            used = layout.arrange_single(used, self.image_newline)
            if image_lengths is not None:
                order = torch.arange(used.shape[1], device=used.device)
                used = used[order < image_lengths[:, None].to(used.device)]
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

        The last `num_dummy_images` of pixel_values have no placeholders in the text. They run through tower
        and connector and count in the router losses. They serve two purposes: the original code adds one for
        every row without an image, and all ranks of a sharded model must run the same modules.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given, got both or neither")
        features = None
        if input_ids is not None:
            continues = cache is not None and is_filled(cache)
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
                # padding counts in Mixtral's router losses; the original code pads with zero vectors
                inputs_embeds = inputs_embeds * attention_mask[:, :, None].to(inputs_embeds.dtype)
        elif pixel_values is not None:
            raise ValueError("pixel_values must come with input_ids, whose image tokens mark their positions")
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


class CumoForConditionalGeneration(CumoPreTrainedModel, CumoGenerationMixin):
    """CuMo with a language model head, for training and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # so the Trainer divides the whole loss, auxiliary losses included, by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, config: CumoConfig):
        super().__init__(config)
        self.model = CumoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """Save as transformers does, with the names and shapes of this model's state_dict.

        Experts are saved as stacked tensors, so that `load_state_dict` can read them; the Trainer resumes
        this way. `save_original_format=True` writes one tensor per expert of Mixtral.

        Raises:
            ValueError: the experts are quantised; no loader could read such a checkpoint.
        """
        if are_experts_quantized(self):
            raise ValueError("save_pretrained must come before quantize_experts, got experts in 4 bits")
        return super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """As `CumoModel.get_image_features`."""
        return self.model.get_image_features(pixel_values)

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
        """Compute logits and, if `labels` are given, the loss.

        Args:
            input_ids: (B, S) int64. Each picture is represented by `config.picture_layout.tokens(size)`
                placeholders (id image_token_index), in order: image_seq_length per tile for "flat".
            pixel_values: (number of tiles, 3, s, s), or (B, tiles, 3, s, s), or a list of pictures of shape
                (3, s, s) or (tiles, 3, s, s).
            image_sizes: (number of pictures, 2) integers: height and width in pixels of the pictures that
                anyres has cut into tiles, needed by `patch_merge_type`. None: each tile is one picture.
            image_lengths: (number of pictures,) integers: how many placeholders `input_ids` has for each
                picture; they take its first tokens. 0 for a picture that counts in the router losses only,
                like the dummy images of the original code. None: all tokens of each picture.
            attention_mask: (B, S), 0 on padding, which may be left or right.
            position_ids: (B, S) int64, as in transformers.
            cache: key-value cache of transformers; also accepted as past_key_values.
            inputs_embeds: (B, S, H), instead of `input_ids`; without pictures.
            labels: (B, S) int64, -100 where no token is predicted. Image tokens are never predicted.
            use_cache: as in transformers; by default True in evaluation and False in training.
            logits_to_keep: number of last positions, or indices of the positions, that get logits. 0: all
                positions, as `labels` require.
            skip_logits: with `labels`, run the head only at positions that predict a token, and return no
                logits. The loss is the same; the head needs less time and memory.
            output_router_stats: also return, for each place with experts ("clip", "mlp", "llm"), mean_probs
                and top1_density (L, G, E), mean_squared_logsumexp (L, G) and tokens_per_expert (L, E) of the
                L layers that ran, detached.
            **kwargs (Any): passed on to the language model.

        Returns:
            CumoOutput with logits (B, S, V), or (B, kept positions, V) with `logits_to_keep`.

        Raises:
            ValueError: placeholders and pictures do not match, or an argument has a wrong shape.
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
        if labels is not None:  # image tokens are not predicted, and their id may be outside the vocabulary
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
            router_stats=stacked_stats(records) if output_router_stats else None,
        )

    def _loss_without_logits(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """`language_loss` of hidden states (B, S, H); the head runs only where a token is predicted."""
        check_labels(labels, hidden_states)
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


AutoModel.register(CumoConfig, CumoModel)
AutoModelForImageTextToText.register(CumoConfig, CumoForConditionalGeneration)
AutoModelForMultimodalLM.register(CumoConfig, CumoForConditionalGeneration)
