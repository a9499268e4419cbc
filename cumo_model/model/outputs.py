"""Outputs of CumoModel and CumoForConditionalGeneration."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from cumo_model.model.moe import PLACES, RoutingRecord


@dataclass
class CumoModelOutput(BaseModelOutputWithPast):
    """Output of `CumoModel`: that of a decoder, and the image features."""

    image_hidden_states: Tensor | None = None  # (tiles, image_seq_length, H) after the connector


@dataclass
class CumoOutput(CausalLMOutputWithPast):
    """Output of `CumoForConditionalGeneration`.

    Attributes:
        image_hidden_states: (tiles, image_seq_length, H), the image features after the connector.
        loss_parts: terms of `loss` without their weights, detached: language and {clip,mlp,llm}_{balance,z}.
        router_stats: for each place, the stacked RouterStats of its layers and the tokens per expert. None
            unless requested.
    """

    image_hidden_states: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None
    router_stats: dict[str, dict[str, Tensor]] | None = None


def stacked_stats(records: list[RoutingRecord]) -> dict[str, dict[str, Tensor]]:
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
