"""How many positions a decoder has been trained for, and what is refused beyond them.

Beyond its positions a decoder answers with noise, so longer prompts are errors. An answer that may become
longer is a warning, as it may end earlier, and so is a longer row of `forward`, as in experiments with scaled
positions.
"""

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def position_limit(text_config: PreTrainedConfig) -> int | None:
    """The longest sequence of a decoder in tokens, or None if its positions have no limit.

    It is max_position_embeddings; with scaled rotary embeddings at least the scaled length. There is no limit
    with ALiBi, with rotary embeddings that adapt to the length ("dynamic"), and if all layers attend to a
    window within max_position_embeddings only, as positions are relative to each other.
    """
    limit = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(text_config, "alibi", False):
        return None
    rope = getattr(text_config, "rope_parameters", None)
    if rope and _only_near(text_config, limit):
        return None
    parts = [part for part in (rope or {}).values() if isinstance(part, dict)] or [rope or {}]
    lengths = [_scaled(part, limit) for part in parts]
    return None if None in lengths else max(lengths)


def _only_near(config: PreTrainedConfig, limit: int) -> bool:
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window > limit or getattr(config, "use_sliding_window", True) is False:
        return False
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return all(kind == "sliding_attention" for kind in kinds)


def _scaled(rope: dict, limit: int) -> int | None:
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        return None
    factor = rope.get("factor")
    if kind == "default" or not isinstance(factor, int | float):
        return limit
    return max(limit, int(factor * rope.get("original_max_position_embeddings", limit)))


def warn_of_length(text_config: PreTrainedConfig, length: int, what: str) -> None:
    """Warn if `length` is more than the decoder's positions; the message begins with `what`."""
    limit = position_limit(text_config)
    if limit is not None and length > limit:
        warnings.warn(
            f"{what} has {length} tokens, more than text_config.max_position_embeddings {limit}: beyond them "
            "the output is noise",
            stacklevel=3,
        )


def check_length(text_config: PreTrainedConfig, length: int, what: str) -> None:
    """
    Raises:
        ValueError: `length` is more than the decoder's positions; the message begins with `what`.
    """
    limit = position_limit(text_config)
    if limit is not None and length > limit:
        raise ValueError(
            f"{what} must have at most {limit} tokens, text_config.max_position_embeddings, got {length}"
        )


def positions_of(position_ids: Tensor) -> int:
    """How many positions these use: their largest + 1. A host synchronisation."""
    return int(position_ids.max()) + 1 if position_ids.numel() else 0


def longest_prompt(prompt: Tensor, attention_mask: Tensor | None) -> int:
    """Tokens of the longest row of a prompt (B, S) or (B, S, H), without padding. A host synchronisation."""
    is_padding = isinstance(attention_mask, Tensor) and attention_mask.shape == prompt.shape[:2]
    if not is_padding or not prompt.shape[0] or torch.compiler.is_compiling():
        return prompt.shape[1]
    return int(attention_mask.sum(1).max())
