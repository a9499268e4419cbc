"""Outputs of CumoModel and CumoForConditionalGeneration."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from cumo_model.model.recording import PLACES, RoutingRecord


@dataclass
class CumoImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    Attributes:
        last_hidden_state: (crops, n, C), the tower's selected hidden state of every crop of every tile.
        pooler_output: (tokens, H) for each picture, after the connector and arranged as in the text.
        hidden_states: all hidden states of the tower, if requested.
        attentions: the tower's attention weights, if requested.
    """

    pooler_output: list[Tensor] | None = None


@dataclass
class CumoModelOutput(BaseModelOutputWithPast):
    """Output of `CumoModel`: that of a decoder, and the image features."""

    image_hidden_states: Tensor | None = None  # (tiles, image_seq_length, H) after the connector


@dataclass
class CumoOutput(CausalLMOutputWithPast):
    """Output of `CumoForConditionalGeneration`.

    Attributes:
        loss: language loss; in training plus `aux_loss`.
        aux_loss: the weighted sum of the router losses, differentiable; 0 unless tower or connector have
            experts. Given in training, and in evaluation if router logits are requested. With labels and
            `num_items_in_batch` it is also weighted by the share of this call's tokens, as in `loss`.
        router_logits: (T, E) for each sparse layer of the language model. None unless requested, like the
            two below.
        vision_router_logits: likewise for the tower's layers.
        projector_router_logits: likewise for the connector.
        image_hidden_states: (tiles, image_seq_length, H), the image features after the connector.
        loss_parts: terms of `loss` without their weights, detached: language and {clip,mlp,llm}_{balance,z}.
        router_stats: for each place, the stacked RouterStats of its layers and the tokens per expert. None
            unless requested.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    vision_router_logits: tuple[Tensor, ...] | None = None
    projector_router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None
    router_stats: dict[str, dict[str, Tensor]] | None = None


def router_logits(records: list[RoutingRecord]) -> dict[str, tuple[Tensor, ...]]:
    """The fields of `CumoOutput` with router logits, for the places that have run."""
    fields = {"router_logits": "llm", "vision_router_logits": "clip", "projector_router_logits": "mlp"}
    found = {name: tuple(r.logits for r in records if r.place == place) for name, place in fields.items()}
    return {name: logits for name, logits in found.items() if logits}


def stacked_stats(records: list[RoutingRecord]) -> dict[str, dict[str, Tensor]]:
    """`router_stats` of `CumoOutput`."""
    found = {}
    for place in PLACES:
        layers = [record for record in records if record.place == place]
        if layers:
            names = ("mean_probs", "top1_density", "mean_squared_logsumexp")
            found[place] = {
                name: torch.stack([getattr(record.routing.stats, name).detach() for record in layers])
                for name in names
            }
            found[place]["tokens_per_expert"] = torch.stack([record.tokens_per_expert for record in layers])
    return found
