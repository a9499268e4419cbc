"""CumoGenerationMixin: transformers' generation for a model whose prompts contain pictures."""

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from cumo_kernels.hostsync import values_at_hand
from cumo_model.model.compat import this_cache_name
from cumo_model.model.image_tokens import as_tiles, pictures_per_row


def is_filled(cache: Cache) -> bool:
    """Whether a cache has tokens, without host synchronisation.

    The length of a static cache is a tensor. In compiled code and on a GPU, where it cannot be read, a static
    cache that has been allocated counts as filled.
    """
    if torch.compiler.is_compiling():
        return True
    length = cache.get_seq_length()
    return length > 0 if not isinstance(length, Tensor) else not values_at_hand(length) or bool(length > 0)


class CumoGenerationMixin(GenerationMixin):
    """GenerationMixin with pictures."""

    generate = this_cache_name(GenerationMixin.generate)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs,
    ):
        """Repeat each row for beams or samples, together with all pictures of the row, in order."""
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
