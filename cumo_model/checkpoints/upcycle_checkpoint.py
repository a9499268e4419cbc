"""Upcycling from folder to folder: what `python -m cumo_model upcycle` does."""

import os

import torch

from cumo_model.checkpoints.assemble import assemble
from cumo_model.checkpoints.folders import new_directory
from cumo_model.checkpoints.upcycle import step0_difference, upcycle
from cumo_model.model.cumo import CumoForConditionalGeneration


def upcycle_checkpoint(
    out: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    dtype: str | None = None,
    clip: str | os.PathLike | None = None,
    **options,
) -> float:
    """Load a dense model, make experts, print the step-0 difference, save.

    Args:
        out: new folder, appears in one move: config, safetensors, and a processor if there is a tokenizer.
        checkpoint: a CuMo in our layout or the original's; or
        vision, text, projector, clip: its parts, as in `from_parts`.
        dtype: name of a float dtype, that of the files unless given.
        options: of `upcycle`; vision_experts and projector_experts None are 4 where the place is dense.

    Returns:
        The largest difference of a logit at step 0, on random input.

    Raises:
        ValueError: nothing to do, or what `assemble` and `upcycle` refuse.
    """
    kind = None if dtype is None else getattr(torch, dtype)
    dense, processor = assemble(checkpoint, vision, text, projector, clip, dtype=kind)
    has_experts = {
        "vision_experts": dense.config.vision_config.num_experts > 1,
        "projector_experts": dense.config.projector_num_experts > 1,
    }
    for place, sparse in has_experts.items():
        if options.get(place) is None:
            options[place] = 0 if sparse else 4
    if not any(options.get(place, 0) > 1 for place in (*has_experts, "text_experts")):
        raise ValueError(
            "there is nothing to upcycle: tower and connector have experts already, or 0 leaves them, and "
            f"text_experts is {options.get('text_experts', 0)}; such a checkpoint trains on as it is"
        )
    moe = upcycle(dense, **options)
    difference, largest = step0_difference(dense, moe, batch := probe(dense)), _largest_logit(dense, batch)
    counts = [sum(p.numel() for p in model.parameters()) for model in (dense, moe)]
    print(f"parameters: {counts[0]:,} -> {counts[1]:,}")
    print(f"step-0 difference: {difference:.3g} at most (logits up to {largest:.3g})")
    with new_directory(out) as work:
        if processor is not None:
            processor.save_pretrained(work)
        moe.save_pretrained(work)
    return difference


def probe(model: CumoForConditionalGeneration, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of a random picture and 16 random tokens."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    vision = config.vision_config
    ids = torch.randint(config.text_config.vocab_size, (1, 16), generator=generator)
    ids[ids == config.image_token_index] = (config.image_token_index + 1) % config.text_config.vocab_size
    picture = torch.full((1, config.picture_layout.tokens(None)), config.image_token_index)
    shape = (1, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    return {"input_ids": torch.cat([picture, ids], 1).to(model.device), "pixel_values": pixels}


@torch.no_grad()
def _largest_logit(model: CumoForConditionalGeneration, batch: dict[str, torch.Tensor]) -> float:
    return model.eval()(**batch, use_cache=False).logits.abs().max().item()
