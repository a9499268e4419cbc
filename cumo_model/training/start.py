"""Loading of the model and processor from which a stage starts."""

import os

import torch

from cumo_model.checkpoints.assemble import assemble
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.processing.processor import CumoProcessor
from cumo_model.processing.tokenizer_files import no_tokenizer
from cumo_model.training.recipe import DataSection, ModelSection

DEFAULT_TOP_K = 2  # of new experts


def start_model(model: ModelSection, data: DataSection) -> tuple[CumoForConditionalGeneration, CumoProcessor]:
    """Load the model, with experts, and the processor of a recipe.

    Args:
        model: section of the recipe with the folders of the weights and the numbers of experts.
        data: section of the recipe with the template and the aspect ratio.

    Raises:
        ValueError: a folder is missing or of another kind, the requested experts do not fit the model, or the
            model cuts pictures into tiles and the recipe does not say otherwise.
    """
    if (model.start is None) == (model.vision is None or model.language is None):
        raise ValueError("model must have either start, or vision and language, got both or neither")
    dtype = getattr(torch, model.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"model.dtype must be a float type of torch, got {model.dtype!r}")
    for name in ("start", "vision", "language", "tokenizer"):
        path = getattr(model, name)
        if path is not None and not os.path.isdir(path):
            raise ValueError(f"model.{name} must be a folder, got {path!r}, which is not a folder")
    parts = {}
    if model.start is None:
        parts = {
            "vision": model.vision,
            "text": model.language,
            "projector": model.projector,
            "tokenizer": model.tokenizer,
            "scales": model.scales,
            "compat": model.compat,
        }
    experts = {
        "vision_experts": model.vision_experts,
        "projector_experts": model.projector_experts,
        "text_experts": model.text_experts,
        "top_k": DEFAULT_TOP_K if model.top_k is None else model.top_k,
        "router": model.router,
    }
    try:
        built, processor = assemble(
            model.start,
            **parts,
            experts=experts,
            scratch=model.scratch,
            dtype=dtype,
            quantize=model.quantize,
            attn_implementation=model.attn_implementation,
            template=data.template,
            aspect=data.aspect,
            seed=model.seed,
        )
    except (ValueError, ImportError) as error:  # a package of attn_implementation is missing
        raise ValueError(f"model: {' '.join(str(error).split())}") from error
    if processor is None:
        where = model.tokenizer or model.language or model.start
        key = "model.start" if model.start is not None else "model.tokenizer"
        raise ValueError(
            f"{key} must be a folder with a tokenizer, got {where!r}, which {no_tokenizer(where)}"
        )
    if isinstance(processor, CumoProcessor) and processor.is_tiled():
        raise ValueError(
            "data.aspect must be pad or square for a model that cuts pictures into tiles (anyres), because "
            f"training uses one tile per picture, got {data.aspect}"
        )
    return built, processor
