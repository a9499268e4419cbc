"""One way to a model: model and processor from any starting point. Training, upcycling, conversion and chat
begin here.

A starting point is a checkpoint in our layout or the released one, or parts that others trained. The image
token of the model is set from the processor's tokenizer in one place, `describe`.
"""

import os
from pathlib import Path

import torch
from transformers import AutoProcessor, BitsAndBytesConfig

from cumo_model.checkpoints.folders import read_object
from cumo_model.checkpoints.parts import from_parts, load_whole
from cumo_model.checkpoints.upcycle import scratch_experts, upcycle
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.layouts import LAYOUTS, layout_of
from cumo_model.processing.processor import (
    ASPECT_RATIOS,
    DEFAULT_TEMPLATE,
    CumoProcessor,
    build_processor,
    has_tokenizer,
    processor_from,
)

PLACES = ("vision_experts", "projector_experts", "text_experts")


def assemble(
    checkpoint: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    *,
    experts: dict[str, int] | None = None,
    scratch: bool = False,
    dtype: torch.dtype | None = None,
    quantize: int | None = None,
    attn_implementation: str | None = None,
    template: str | None = None,
    aspect: str | None = None,
    seed: int = 0,
    **options,
) -> tuple[CumoForConditionalGeneration, CumoProcessor | None]:
    """Model and processor from a checkpoint, or from a tower, a language model and a connector.

    Args:
        checkpoint: folder of a CuMo in our layout or the released one, dense or with experts; or its parts:
        vision, text, projector, clip: as in `from_parts`.
        tokenizer: folder of the tokenizer where it is not with `text`.
        experts: keywords of `upcycle`. A place that has as many experts already keeps them.
        scratch: new experts begin with random weights instead of copies.
        dtype: of the weights; that of the files unless given.
        quantize: 4 or 8 bits through bitsandbytes, of a checkpoint that needs no new experts.
        attn_implementation: of transformers.
        template: name of the chat template; the checkpoint's own unless given, for parts DEFAULT_TEMPLATE.
        aspect: "pad" or "square"; the checkpoint's own unless given.
        seed: of new gates, experts and connector. The global generator is left as it was.
        options: fields of CumoConfig, for parts: `scales`, `compat`.

    Returns:
        The model on the CPU in evaluation mode (quantised: where bitsandbytes wants it), and its processor;
        None where the files have no tokenizer.

    Raises:
        ValueError: no or several starting points, a folder that is missing, damaged or of another kind,
            tensors that are missing or of another shape, or experts that do not fit what is there.
    """
    given = {"vision": vision, "text": text, "projector": projector, "clip": clip, "tokenizer": tokenizer}
    named = [name for name, value in given.items() if value is not None]
    if checkpoint is not None and (named or options):
        others = " and ".join([*named, *options])
        raise ValueError(f"give either a checkpoint, or vision and text; got a checkpoint and {others}")
    if checkpoint is None and (vision is None or text is None):
        raise ValueError(
            f"give either a checkpoint, or vision and text; got {' and '.join(named) or 'neither'}"
        )
    if aspect is not None and aspect not in ASPECT_RATIOS[:2]:
        raise ValueError(f"aspect must be {' or '.join(ASPECT_RATIOS[:2])}, got {aspect!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if checkpoint is not None:
            config, processor = describe(checkpoint)
            options = {} if quantize is None else {"quantization_config": _quantization(quantize, dtype)}
            if layout_of(read_object(Path(checkpoint, "config.json"))) is None:
                options["use_safetensors"] = True  # reading the released layout checks .bin files
            if attn_implementation is not None:
                options["attn_implementation"] = attn_implementation
            model = load_whole(CumoForConditionalGeneration, checkpoint, dtype or "auto", **options)
        else:
            if quantize is not None:
                raise ValueError("quantize must be None for parts: save what they make, then quantise that")
            model = from_parts(vision, text, projector, dtype, clip, **options)
            if attn_implementation is not None:
                model.set_attn_implementation(attn_implementation)
            folder = Path(text if tokenizer is None else tokenizer)
            if tokenizer is not None and not has_tokenizer(folder):
                raise ValueError(f"tokenizer must be a folder with a tokenizer, got {os.fspath(tokenizer)!r}")
            config, processor = model.config, None
            if has_tokenizer(folder):
                processor = processor_from(folder, config)
                config.image_token_index = processor.image_token_id
        model.config.image_token_index = config.image_token_index
        if processor is not None and (template is not None or aspect is not None):
            processor = _set_processor(processor, model.config, template or DEFAULT_TEMPLATE, aspect or "pad")
        if experts is not None:
            model = _with_experts(model, checkpoint, dict(experts), scratch, seed, quantize)
    return model.eval(), processor


def describe(checkpoint: str | os.PathLike) -> tuple[CumoConfig, CumoProcessor | None]:
    """Config and processor of a checkpoint in either layout, without its weights.

    Returns:
        The config, whose image token is that of the processor's tokenizer; the processor, None if the folder
        has no tokenizer.

    Raises:
        ValueError: the folder is none, or its config.json is missing, damaged or of another model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"checkpoint must be a folder, got {str(folder)!r}, which is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    values = read_object(folder / "config.json")
    if values.get("model_type") != CumoConfig.model_type and layout_of(values) is None:
        kinds = [CumoConfig.model_type, *(kind for layout in LAYOUTS for kind in layout.model_types)]
        raise ValueError(
            f"{folder / 'config.json'} must be of model_type {', '.join(kinds[:-1])} or {kinds[-1]}, "
            f"got {values.get('model_type')!r}"
        )
    config = CumoConfig.from_pretrained(folder)
    if (folder / "processor_config.json").is_file():
        processor = AutoProcessor.from_pretrained(folder)
    elif has_tokenizer(folder):
        processor = processor_from(folder, config)
    else:
        return config, None
    config.image_token_index = processor.image_token_id
    return config, processor


def _set_processor(processor: CumoProcessor, config: CumoConfig, template: str, aspect: str) -> CumoProcessor:
    """The same tokenizer and picture statistics with another template and way to make pictures square."""
    vision = config.vision_config
    again = build_processor(
        processor.tokenizer,
        vision.image_size,
        vision.patch_size,
        config.vision_feature_select_strategy,
        template,
        aspect,
        config.patch_merge_type,
    )
    again.image_processor.image_mean = processor.image_processor.image_mean
    again.image_processor.image_std = processor.image_processor.image_std
    return again


def _with_experts(
    model: CumoForConditionalGeneration,
    source: str | os.PathLike | None,
    wanted: dict[str, int],
    scratch: bool,
    seed: int,
    quantize: int | None,
) -> CumoForConditionalGeneration:
    """Experts in the places asked for. A place that has as many already keeps them: a stage that makes
    experts can begin with its own result."""
    text = model.config.text_config
    found = {
        "vision_experts": model.config.vision_config.num_experts,
        "projector_experts": model.config.projector_num_experts,
        "text_experts": text.num_local_experts if text.model_type == "mixtral" else 1,
    }
    for name in PLACES:
        asked = wanted.get(name, 0)
        if asked > 1 and found[name] > 1 and asked != found[name]:
            there = "the model" if source is None else os.fspath(source)
            raise ValueError(f"{name} must be {found[name]}, what {there} has already, got {asked}")
        wanted[name] = asked if found[name] <= 1 else 0
    if not any(wanted[name] > 1 for name in PLACES):
        return model
    if quantize is not None:
        raise ValueError("quantize must be None where experts are made: save the model, then quantise that")
    moe = upcycle(model, **wanted, seed=seed)
    if scratch:
        scratch_experts(model, moe, seed)
    return moe


def _quantization(bits: int, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    if bits not in (4, 8):
        raise ValueError(f"quantize must be 4 or 8, got {bits}")
    # routers and what is not the language model stay whole
    kept = ["gate", "lm_head", "model.vision_tower", "model.multi_modal_projector"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
