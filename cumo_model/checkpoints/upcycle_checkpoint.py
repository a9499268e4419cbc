"""Upcycling of a checkpoint on disk, the command `python -m cumo_model upcycle`."""

import os
from typing import Any

import torch

from cumo_model.checkpoints.assemble import experts_of, is_quantized, starting_point
from cumo_model.checkpoints.folders import new_directory
from cumo_model.checkpoints.upcycle import step0_difference, upcycle, upcycled_config
from cumo_model.model.cumo import CumoForConditionalGeneration


def upcycle_checkpoint(
    out: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    dtype: str | None = None,
    clip: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    **options: Any,
) -> float:
    """Load a dense model, upcycle it, print the step-0 difference, and save the result.

    Args:
        out: new folder, created atomically, with config, safetensors, and a processor if there is a
            tokenizer.
        checkpoint: a CuMo in this project's or the released layout. Give either this or `vision` and `text`.
        vision: as in `from_parts`.
        text: as in `from_parts`.
        projector: as in `from_parts`.
        dtype: name of a float dtype; by default that of the files.
        clip: as in `from_parts`.
        tokenizer: as in `assemble`.
        **options: keyword arguments of `upcycle`. If vision_experts or projector_experts is None, a dense
            place gets 4 experts.

    Returns:
        The largest absolute difference of a logit at step 0, on random input.

    Raises:
        ValueError: there is nothing to upcycle, or `assemble` or `upcycle` raises it.
    """
    for folder in (checkpoint, text):
        if is_quantized(folder):
            raise ValueError(f"{os.fspath(folder)!r} has experts in four bits: upcycle, then quantize")
    kind = None if dtype is None else getattr(torch, dtype)
    start = starting_point(checkpoint, vision, text, projector, clip, tokenizer)
    found = experts_of(start.config)
    for place in ("vision_experts", "projector_experts"):
        if options.get(place) is None:
            options[place] = 0 if found[place][0] > 1 else 4
    if not any(options.get(place, 0) > 1 for place in found):
        raise ValueError(
            "there is nothing to upcycle: tower and connector have experts already, or 0 keeps them dense, "
            f"and text_experts is {options.get('text_experts', 0)}; such a checkpoint can be trained as it is"
        )
    upcycled_config(start.config, **options)  # it refuses before the weights are loaded
    dense, processor = start.load(kind), start.processor
    if processor is None:
        source = checkpoint if text is None else text
        print(
            f"{os.fspath(source)!r} has no tokenizer, so no processor is written: give --tokenizer, or copy "
            f"the tokenizer files of the language model into {os.fspath(out)!r}"
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
    """A batch of one row: a random picture followed by 16 random tokens."""
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
