"""Where a stage begins: a CuMo checkpoint, or a tower and a language model to join; experts as asked."""

import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from cumo_model.checkpoints.parts import from_parts, load_whole, parts_processor
from cumo_model.checkpoints.upcycle import upcycle
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.moe import MoELayer
from cumo_model.processing.conversation import IMAGE_MARKER
from cumo_model.processing.processor import build_processor, load_tokenizer
from cumo_model.training.recipe import DataSection, ModelSection


def start_model(model: ModelSection, data: DataSection) -> tuple[CumoForConditionalGeneration, object]:
    """The model and processor of a recipe, experts included.

    Raises:
        ValueError: a folder is missing or of another kind, or experts do not fit what is there.
    """
    if (model.start is None) == (model.vision is None or model.language is None):
        raise ValueError("model must name start, or vision and language, got both or neither")
    dtype = getattr(torch, model.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"model.dtype must be a float type of torch, got {model.dtype!r}")
    if model.start is not None:
        built, processor = _load(model, dtype)
    else:
        built, processor = join(model, dtype)
    processor = _set_processor(processor, data, built.config)
    return with_experts(built, model), processor


def _folder(name: str, path: str) -> str:
    if not os.path.isdir(path):
        raise ValueError(f"{name} must be a folder, got {path!r}, which is none")
    return path


def _load(model: ModelSection, dtype: torch.dtype):
    path = _folder("model.start", model.start)
    options = {"attn_implementation": model.attn_implementation, "use_safetensors": True}
    if model.quantize is not None:
        options["quantization_config"] = _quantization(model.quantize, dtype)
        built = CumoForConditionalGeneration.from_pretrained(path, dtype=dtype, **options)
    else:
        built = load_whole(CumoForConditionalGeneration, path, dtype, **options)
    return built, AutoProcessor.from_pretrained(path)


def _quantization(bits: int, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    if bits not in (4, 8):
        raise ValueError(f"model.quantize must be 4 or 8, got {bits}")
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


def join(model: ModelSection, dtype: torch.dtype):
    """A tower, a language model and a connector between them, new unless there is an mm_projector.bin."""
    tower_path, text_path = _folder("model.vision", model.vision), _folder("model.language", model.language)
    torch.manual_seed(model.seed)
    if AutoConfig.from_pretrained(tower_path).model_type != CumoVisionConfig.model_type:
        built = from_parts(
            tower_path, text_path, model.projector, dtype, scales=model.scales, compat=model.compat
        )
        if model.attn_implementation:
            built.set_attn_implementation(model.attn_implementation)
        return built, parts_processor(model.tokenizer or text_path, built.config)
    tower = load_whole(CumoVisionModel, tower_path, dtype, use_safetensors=True)
    language = load_whole(AutoModelForCausalLM, text_path, dtype, use_safetensors=True)
    tokenizer = load_tokenizer(model.tokenizer or text_path)
    config = CumoConfig(
        vision_config=tower.config,
        text_config=language.config,
        projector_num_experts=1,
        scales=model.scales,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARKER),  # may lie outside the vocabulary
        compat=model.compat,
    )
    built = CumoForConditionalGeneration._from_config(
        config, dtype=dtype, attn_implementation=model.attn_implementation
    )
    built.model.vision_tower.load_state_dict(tower.state_dict())
    built.model.language_model.load_state_dict(language.model.state_dict())
    built.lm_head.load_state_dict(language.lm_head.state_dict())
    built.generation_config = language.generation_config
    return built, build_processor(tokenizer, tower.config.image_size, tower.config.patch_size)


def _set_processor(processor, data: DataSection, config: CumoConfig):
    if data.aspect not in ("pad", "square"):
        raise ValueError(f"data.aspect must be pad or square, got {data.aspect!r}")
    vision = config.vision_config
    again = build_processor(
        processor.tokenizer,
        vision.image_size,
        vision.patch_size,
        config.vision_feature_select_strategy,
        data.template,
        data.aspect,
        config.patch_merge_type,
    )
    again.image_processor.image_mean = processor.image_processor.image_mean
    again.image_processor.image_std = processor.image_processor.image_std
    return again


def with_experts(built: CumoForConditionalGeneration, model: ModelSection) -> CumoForConditionalGeneration:
    """Experts in the places asked for. A place that has as many already keeps them: stage 3 can start again
    from its own result."""
    config, wanted = built.config, {}
    text = config.text_config
    places = {
        "vision_experts": config.vision_config.num_experts,
        "projector_experts": config.projector_num_experts,
        "text_experts": text.num_local_experts if text.model_type == "mixtral" else 1,
    }
    for name, found in places.items():
        asked = getattr(model, name)
        if asked > 1 and found > 1 and asked != found:
            raise ValueError(f"model.{name} must be {found}, what {model.start} has already, got {asked}")
        wanted[name] = asked if found <= 1 else 0
    if not any(number > 1 for number in wanted.values()):
        return built
    moe = upcycle(built, **wanted, top_k=model.top_k, seed=model.seed)
    if model.scratch:
        scratch_experts(built, moe, model.seed)
    return moe


@torch.no_grad()
def scratch_experts(
    dense: CumoForConditionalGeneration, moe: CumoForConditionalGeneration, seed: int
) -> None:
    """Random experts in the new places, each from where nn.Linear starts; gates as upcycled."""
    had = {name for name, module in dense.named_modules() if isinstance(module, MoELayer)}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    for name, module in moe.named_modules():
        if isinstance(module, MoELayer) and name not in had:
            module.experts.reset_parameters()
    torch.random.set_rng_state(state)
