"""FLOPs of a training step, used for MFU (model FLOPs utilisation).

Only matrix products are counted, with 2 FLOPs per multiply-add; attention is counted without the causal
mask. A trained part costs three times its forward pass, a frozen part that passes gradients on costs two,
and a frozen part before all trained parts costs one. Recomputation by activation checkpointing is not
counted.
"""

from collections.abc import Collection

from cumo_model.model.config import CumoConfig
from cumo_model.model.routers import RouterOptions


def text_flops(config: CumoConfig, tokens: int, width: int, predicted: int) -> float:
    """Forward FLOPs of the language model.

    Args:
        config: configuration of the model.
        tokens: tokens of the batch, padding included.
        width: tokens per row, the number of keys per query in attention.
        predicted: tokens that get logits.
    """
    text = config.text_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention = text.hidden_size * head_dim * (2 * heads + 2 * kv_heads)
    active, gate = 1, 0
    if text.model_type == "mixtral":
        active, gate = text.num_experts_per_tok, _gates(config) * text.num_local_experts * text.hidden_size
    mlp = active * 3 * text.hidden_size * text.intermediate_size + gate
    scores = 2 * width * heads * head_dim
    layers = text.num_hidden_layers * (attention + mlp + scores)
    return 2.0 * (tokens * layers + predicted * text.hidden_size * text.vocab_size)


def _gates(config: CumoConfig) -> int:
    """Linear layers of a router: noisy top-k has a second one."""
    return 1 + RouterOptions.of(config.router).noisy


def vision_flops(config: CumoConfig, with_routers: bool) -> float:
    """Forward FLOPs of the tower for one image at all scales; `with_routers` adds the last layer's router."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    hidden, tokens = vision.hidden_size, patches + 1
    moe = vision.num_experts > 1
    attention = tokens * (4 * hidden * hidden + 2 * tokens * hidden)
    gate = _gates(config) * tokens * vision.num_experts * hidden if moe else 0
    active = vision.num_experts_per_tok if moe else 1
    layer = attention + gate + tokens * active * 2 * hidden * vision.intermediate_size
    states = range(vision.num_hidden_layers + 1)
    selected = max(states[index] for index in config.feature_layers)
    total = selected * layer
    if moe and with_routers and selected < vision.num_hidden_layers:
        total += (vision.num_hidden_layers - 1 - selected) * layer + attention + gate
    total += patches * hidden * vision.num_channels * vision.patch_size**2
    return 2.0 * total * sum(scale * scale for scale in config.scales)


def projector_flops(config: CumoConfig) -> float:
    """Forward FLOPs of the connector for one image."""
    wide, out = config.feature_size, config.text_config.hidden_size
    moe = config.projector_num_experts > 1
    active = config.projector_num_experts_per_tok if moe else 1
    gate = _gates(config) * config.projector_num_experts * wide if moe else 0
    return 2.0 * config.image_seq_length * (active * (wide * out + out * out) + gate)


def step_flops(
    config: CumoConfig, trains: Collection[str], tokens: int, width: int, predicted: int, images: int
) -> float:
    """Forward and backward FLOPs of one batch.

    Args:
        config: configuration of the model.
        trains: parts whose weights get gradients. With LoRA the language model is not among them; the
            products of the adapters are not counted.
        tokens: tokens of the batch, padding included.
        width: tokens per row.
        predicted: tokens that get logits.
        images: images of the batch.
    """
    vision = 3 if "vision" in trains else 1
    projector = 3 if "projector" in trains else (2 if vision == 3 else 1)
    language = 3 if "language" in trains else 2
    return language * text_flops(config, tokens, width, predicted) + images * (
        vision * vision_flops(config, True) + projector * projector_flops(config)
    )
