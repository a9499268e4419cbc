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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from cumo_model.model.base import CumoPreTrainedModel
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.compat import cache_argument, cache_of, either_cache_name
from cumo_model.model.config import CumoConfig
from cumo_model.model.generation import CumoGenerationMixin
from cumo_model.model.head import head_of, input_embedding_name
from cumo_model.model.host import check_router_gradients
from cumo_model.model.image_tokens import (
    as_tiles,
    check_lengths,
    check_no_placeholders,
    check_placeholders,
    picture_sizes,
)
from cumo_model.model.llm_moe import CumoMixtralModel, build_language_model, mask_for_meta
from cumo_model.model.losses import Targets, router_losses, takes_rows
from cumo_model.model.mlp_moe import CumoProjector
from cumo_model.model.outputs import (
    CumoImageFeatures,
    CumoModelOutput,
    CumoOutput,
    router_logits,
    stacked_stats,
)
from cumo_model.model.positions import warn_of_length
from cumo_model.model.pyramid import crop_counts, image_pyramid, merge_scales
from cumo_model.model.recording import RoutingRecord, record_routing


class CumoModel(CumoPreTrainedModel):
    """Vision tower, connector and language model without the language model head."""

    def __init__(self, config: CumoConfig):
        super().__init__(config)
        # both may be set after the config was created
        config.vision_config.compat, config.vision_config.router = config.compat, config.router
        self.vision_tower = CumoVisionModel(config.vision_config)
        self.multi_modal_projector = CumoProjector(config)
        self.language_model = build_language_model(config.text_config, config.compat, config.router)
        width = config.text_config.hidden_size
        self.image_newline = (
            nn.Parameter(torch.empty(width)) if config.patch_merge_type == "spatial_unpad" else None
        )
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_sizes: Tensor | None = None,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> CumoImageFeatures | tuple:
        """Image features as the text takes them: after the connector, one tensor for each picture.

        Args:
            pixel_values: as in `CumoForConditionalGeneration.forward`.
            image_sizes: likewise.
            vision_feature_layer: hidden state or states of the tower, instead of the config's.
            vision_feature_select_strategy: "default" or "full", instead of the config's.
            **kwargs (Any): output_hidden_states, output_attentions and interpolate_pos_encoding of the tower;
                return_dict.

        Returns:
            CumoImageFeatures with pooler_output, a list of (tokens, H) for the pictures, H the hidden size of
            the language model.

        Raises:
            ValueError: `pixel_values` has another shape, or does not fit `image_sizes`.
        """
        # through __call__: the hooks of this module (offloading, FSDP) make its parameters available
        options = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        return_dict = kwargs.pop("return_dict", None)
        given = options | {name: value for name, value in kwargs.items() if value is not None}
        return self(
            pixel_values=pixel_values, image_sizes=image_sizes, image_options=given, return_dict=return_dict
        )

    def _encode_tiles(
        self,
        pixel_values: Tensor,
        all_routers: bool = False,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> CumoImageFeatures:
        """Tower and connector: (N, 3, s, s) tiles -> pooler_output (N, image_seq_length, H), not arranged."""
        config, vision = self.config, self.config.vision_config
        layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy must be 'default' or 'full', got {strategy!r}")
        wanted = (vision.num_channels, vision.image_size, vision.image_size)
        other_sizes = kwargs.get("interpolate_pos_encoding", False)
        if other_sizes and config.scales != (1,):
            raise ValueError(
                "interpolate_pos_encoding must be False unless scales is [1], "
                f"got True with scales {list(config.scales)}"
            )
        if pixel_values.ndim != 4 or (tuple(pixel_values.shape[1:]) != wanted and not other_sizes):
            raise ValueError(
                f"pixel_values must be (B, {', '.join(map(str, wanted))}), got {tuple(pixel_values.shape)}"
            )
        crops = image_pyramid(pixel_values, config.scales)
        encoded = self.vision_tower(crops, feature_layer=layer, all_routers=all_routers, **kwargs)
        features = encoded.last_hidden_state
        if strategy == "default":
            features = merge_scales(features[:, 1:], config.scales, vision.image_size // vision.patch_size)
        return CumoImageFeatures(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.multi_modal_projector(features),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _arrange(self, features: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """Features (N, image_seq_length, H) of tiles -> a (tokens, H) for each picture."""
        layout = self.config.picture_layout
        sizes = picture_sizes(features.shape[0], image_sizes)
        parts = features.split(layout.tiles_of(sizes, features.shape[0]))
        return [
            layout.arrange(part, size, self.image_newline) for part, size in zip(parts, sizes, strict=True)
        ]

    def is_image(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S) bool, True at the placeholders of pictures: by id if the ids are those of the embeddings."""
        token, words = self.config.image_token_index, self.config.text_config.vocab_size
        if input_ids is not None and (inputs_embeds is None or input_ids.shape == inputs_embeds.shape[:2]):
            return input_ids == token
        if not 0 <= token < words:
            raise ValueError(
                "input_ids must be given with inputs_embeds and pixel_values, to mark the image tokens: "
                f"their id {token} has no embedding in a vocabulary of {words}"
            )
        ids = torch.full((1,), token, device=inputs_embeds.device)  # no copy from the host
        marker = self.get_input_embeddings()(ids)
        return (inputs_embeds == marker.to(inputs_embeds)).all(-1)

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, pixel_values=None, **pictures
    ) -> Tensor:
        """Embeddings (B, S, H) of a prompt with its pictures; arguments as in `forward`.

        `input_ids` of another length than `inputs_embeds` are ignored.
        """
        if not (input_ids is None or inputs_embeds is None) and (
            as_tiles(pixel_values) is None or input_ids.shape != inputs_embeds.shape[:2]
        ):
            input_ids = None
        prompt = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "pixel_values": pixel_values}
        return self(**prompt, **pictures, embed_only=True, return_dict=True).last_hidden_state

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        image_lengths: Tensor | None,
        has_cache: bool,
        all_routers: bool,
        num_dummy_images: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, S, H) with the image features at the placeholders, and the features of all tiles."""
        embed_tokens, token = self.get_input_embeddings(), self.config.image_token_index
        if pixel_values is None:
            if inputs_embeds is not None:
                return inputs_embeds, None
            # Decoding one token needs no check, but a further turn does. The length of the cache is not read:
            # that of a static cache is a tensor, on which a compiled graph cannot branch.
            if not (torch.compiler.is_compiling() or (has_cache and input_ids.shape[1] == 1)):
                check_no_placeholders(input_ids == token, token)
            return embed_tokens(input_ids), None
        is_image, layout = self.is_image(input_ids, inputs_embeds), self.config.picture_layout
        num_tiles = pixel_values.shape[0] - num_dummy_images
        if image_sizes is None and torch.compiler.is_compiling():
            check_lengths(image_lengths, num_tiles)  # a list of pictures would make their number a constant
        else:
            sizes = picture_sizes(num_tiles, image_sizes)
            layout.tiles_of(sizes, num_tiles)
            what = "images" if image_sizes is None else "pictures"
            wanted = [layout.tokens(size) for size in sizes]
            check_placeholders(is_image, token, wanted, image_lengths, what, input_ids)
        if inputs_embeds is None:  # the placeholder id may be outside the vocabulary
            inputs_embeds = embed_tokens(input_ids.masked_fill(is_image, 0))
        features = self._encode_tiles(pixel_values, all_routers).pooler_output
        used = features[:num_tiles]
        if image_sizes is not None:
            pictures = self._arrange(used, image_sizes)
            if image_lengths is not None:
                pictures = [p[:n] for p, n in zip(pictures, image_lengths.tolist(), strict=True)]
            used = torch.cat(pictures) if pictures else used
        else:
            used = layout.arrange_single(used, self.image_newline)
            if image_lengths is not None:
                order = torch.arange(used.shape[1], device=used.device)
                used = used[order < image_lengths[:, None].to(used.device)]
        used = used.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image[:, :, None], used), features

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
        router_mask: Tensor | None = None,
        all_routers: bool = False,
        num_dummy_images: int = 0,
        image_options: dict | None = None,
        embed_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CumoModelOutput | CumoImageFeatures:
        """As `CumoForConditionalGeneration.forward`, without head and loss.

        The last `num_dummy_images` of pixel_values have no placeholders in the text. They run through tower
        and connector and count in the router losses. They serve two purposes: the original code adds one for
        every row without an image, and all ranks of a sharded model must run the same modules.
        `image_options` is for `get_image_features` only, and `embed_only` for `embed`.
        """
        has_argument, pixel_values = pixel_values is not None, as_tiles(pixel_values)
        if image_options is not None:
            if pixel_values is None:
                return CumoImageFeatures(pooler_output=[])
            found = self._encode_tiles(pixel_values, **image_options)
            found.pooler_output = self._arrange(found.pooler_output, image_sizes)
            return found
        if (inputs_embeds is None and input_ids is None) or (
            inputs_embeds is not None and input_ids is not None and not has_argument
        ):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given, got both or neither")
        if inputs_embeds is not None and input_ids is not None and input_ids.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"input_ids must be {tuple(inputs_embeds.shape[:2])} like inputs_embeds, "
                f"got {tuple(input_ids.shape)}"
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        if position_ids is None and not torch.compiler.is_compiling():  # packed rows give them
            before = cache.get_seq_length() if isinstance(cache, Cache) else 0
            if isinstance(before, int):  # of a static cache it is a tensor
                warn_of_length(self.config.text_config, before + given.shape[1], "a row")
        inputs_embeds, features = self._embed(
            input_ids,
            inputs_embeds,
            pixel_values,
            image_sizes,
            image_lengths,
            cache is not None,
            all_routers,
            num_dummy_images,
        )
        if embed_only:
            return CumoModelOutput(last_hidden_state=inputs_embeds, image_hidden_states=features)
        if router_mask is not None and isinstance(self.language_model, CumoMixtralModel):
            kwargs["router_mask"] = router_mask  # no other decoder has routers
        if (
            self.config.compat is not None
            and self.training
            and getattr(attention_mask, "shape", None) == inputs_embeds.shape[:2]
        ):
            # padding then counts in Mixtral's router losses; the original code pads with zero vectors
            inputs_embeds = inputs_embeds * attention_mask[:, :, None].to(inputs_embeds.dtype)
        outputs = self.language_model(
            attention_mask=mask_for_meta(attention_mask, inputs_embeds, cache),
            position_ids=position_ids,
            **cache_argument(cache),
            inputs_embeds=inputs_embeds,
            use_cache=not self.training if use_cache is None else use_cache,
            return_dict=True,
            **kwargs,
        )
        return CumoModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **cache_of(outputs),
            hidden_states=getattr(outputs, "hidden_states", None),  # some decoders give neither
            attentions=getattr(outputs, "attentions", None),
            image_hidden_states=features,
        )


class CumoForConditionalGeneration(CumoPreTrainedModel, CumoGenerationMixin):
    """CuMo with a language model head, for training and generation."""

    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CumoConfig):
        super().__init__(config)
        text, self._head = config.text_config, head_of(config.text_config)
        self.model = CumoModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=self._head.has_bias)
        embedding = input_embedding_name(self.model.language_model)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{embedding}.weight"}
        self.post_init()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is averaged over the tokens of a step; transformers' Trainer reads this.

        If not, the Trainer divides the micro-batches' losses by their number, as the original code does.
        """
        return self.config.average_loss_over == "tokens"

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], *args, **kwargs):
        """As `CumoModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

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
        router_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        output_router_stats: bool = False,
        output_router_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CumoOutput:
        """Compute logits and, if `labels` are given, the loss.

        Args:
            input_ids: (B, S) int64. Each picture is represented by `config.picture_layout.tokens(size)`
                placeholders (id image_token_index), in order: image_seq_length per tile for "flat".
            pixel_values: (number of tiles, 3, s, s), or (B, tiles, 3, s, s), or a list of pictures of shape
                (3, s, s) or (tiles, 3, s, s). No tiles and an empty list are the same as None.
            image_sizes: (number of pictures, 2) integers: height and width in pixels of the pictures that
                anyres has cut into tiles, needed by `patch_merge_type`. None: each tile is one picture.
            image_lengths: (number of pictures,) integers: how many placeholders `input_ids` has for each
                picture; they take its first tokens. 0 for a picture that counts in the router losses only,
                like the dummy images of the original code. None: all tokens of each picture.
            attention_mask: (B, S), 0 on padding, which may be left or right. Padding does not count in the
                router losses and statistics of the language model; with config.compat it does, as in the
                original code. With a mask of another shape, and with none, all tokens count.
            position_ids: (B, S) int64, as in transformers.
            cache: key-value cache of transformers; also accepted as past_key_values.
            inputs_embeds: (B, S, H), instead of `input_ids`. With pictures, `input_ids` may also be given, to
                mark the placeholders; otherwise they are where the embedding is that of the image token.
            labels: (B, S) int64, -100 where no token is predicted. Image tokens are never predicted.
            router_mask: (B, S), 0 on tokens that do not count in the router losses and statistics of the
                language model, instead of `attention_mask`, which packed rows do not have; also with
                config.compat.
            use_cache: as in transformers; by default True in evaluation and False in training.
            logits_to_keep: number of last positions, or indices of the positions, that get logits. 0: all
                positions, as `labels` require.
            skip_logits: with `labels`, run the head only at positions that predict a token, and return no
                logits. The loss is the same; the head needs less time and memory.
            output_router_stats: also return, for each place with experts ("clip", "mlp", "llm"), mean_probs
                and top1_density (L, G, E), mean_squared_logsumexp (L, G) and tokens_per_expert (L, E) of the
                L layers that ran, detached.
            output_router_logits: also return the router logits of every layer, differentiable; by default as
                config.output_router_logits.
            num_items_in_batch: number of labels in all calls of an optimizer step, on all processes. The
                language loss is then the sum over tokens divided by it, and the router losses are weighted by
                this call's share of the labels. None: the mean over this call's tokens.
            **kwargs (Any): passed on to the language model and, with labels, to `loss_function`; except
                shift_labels, (B, S) int64, `labels` that are already shifted: position t predicts
                shift_labels[:, t].

        Returns:
            CumoOutput with logits (B, S, V), or (B, kept positions, V) with `logits_to_keep`.

        Raises:
            ValueError: placeholders and pictures do not match, or an argument has a wrong shape.
        """
        # no parameter of its own: the Trainer would take it for a label that every batch must have
        shift_labels = kwargs.pop("shift_labels", None)
        tiles = as_tiles(pixel_values)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        with_aux = self.training or output_router_logits
        has_losses = with_aux and self.has_expert_losses
        recorded = has_losses or output_router_stats or output_router_logits
        with record_routing(output_router_logits, of=self) if recorded else nullcontext([]) as records:
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values if tiles is None else tiles,
                image_sizes=image_sizes,
                image_lengths=image_lengths,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                router_mask=router_mask,
                use_cache=use_cache,
                all_routers=has_losses,
                return_dict=True,
                **kwargs,
            )
        hidden_states = outputs.last_hidden_state
        targets = Targets.of(
            labels, shift_labels, num_items_in_batch, self.config.image_token_index, hidden_states.shape[:2]
        )
        loss, logits, parts, aux_loss = None, None, {}, None
        loss_function = self.loss_function
        if skip_logits and targets is not None and takes_rows(loss_function):
            rows = self._head.logits(self.lm_head, hidden_states[targets.tokens != -100])
            loss = targets.loss_of_rows(loss_function, rows)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._head.logits(self.lm_head, hidden_states[:, kept, :])
            if targets is not None:
                if logits.shape[1] != hidden_states.shape[1]:
                    raise ValueError(f"logits_to_keep must be 0 with labels, got {logits_to_keep}")
                loss = targets.loss(loss_function, logits, **kwargs)
                logits = None if skip_logits else logits
        if loss is not None:
            mean = loss if num_items_in_batch is None else loss * (targets.num_items / targets.count)
            parts["language"] = mean.detach()
        if with_aux:
            check_router_gradients(self, records)
            num_images = 0 if tiles is None else tiles.shape[0]
            aux_loss = self._aux_loss(records if has_losses else [], parts, num_images, hidden_states)
            if targets is not None:
                aux_loss = targets.share * aux_loss
            if self.training and loss is not None:
                loss = loss + aux_loss.to(loss.device)
        return CumoOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            **cache_of(outputs),
            **(router_logits(records) if output_router_logits else {}),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            loss_parts=parts or None,
            router_stats=stacked_stats(records) if output_router_stats else None,
        )

    @property
    def has_expert_losses(self) -> bool:
        """Whether the training loss has router losses: tower or connector have experts."""
        return self.config.vision_config.num_experts > 1 or self.config.projector_num_experts > 1

    def _aux_loss(
        self, records: list[RoutingRecord], parts: dict[str, Tensor], num_images: int, like: Tensor
    ) -> Tensor:
        """Weighted sum of the router losses, on the device of `like`.

        Adds the terms without their weights to `parts`.
        """
        coefficients = self.config.balance_loss_coef, self.config.router_z_loss_coef
        losses = router_losses(records, crop_counts(num_images, self.config.scales))
        total = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        for place, terms in losses.items():
            for name, value, coef in zip(("balance", "z"), terms, coefficients, strict=True):
                parts[f"{place}_{name}"] = value.detach()
                if coef:
                    total = total + coef * value.to(like.device)
        return total


# transformers' Trainer shifts the labels for label smoothing only if it finds the class here
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CumoConfig.model_type] = CumoForConditionalGeneration.__name__
AutoModel.register(CumoConfig, CumoModel)
AutoModelForImageTextToText.register(CumoConfig, CumoForConditionalGeneration)
AutoModelForMultimodalLM.register(CumoConfig, CumoForConditionalGeneration)
