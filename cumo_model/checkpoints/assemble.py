"""Loading of a model and its processor from any starting point. All commands use `assemble`.

A starting point is a checkpoint in this project's layout or in the released one, or a set of pretrained
parts. `describe` reads config and processor only; conversion uses it. Both set the model's image token from
the tokenizer of the processor.
"""

import inspect
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from cumo_model.checkpoints.configs import check_generation, read_checked
from cumo_model.checkpoints.layout import own_layout
from cumo_model.checkpoints.parts import Parts, check_dtype, load_parts, load_whole, read_parts
from cumo_model.checkpoints.processors import agree, read_processor, with_settings
from cumo_model.checkpoints.upcycle import router_of, scratch_experts, upcycle, upcycled_config
from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.json_files import read_object
from cumo_model.model.layouts import LAYOUTS, known_image_token, layout_of, read_config
from cumo_model.model.quantize import quantize_experts
from cumo_model.model.quantizer import NAME as QUANTIZED
from cumo_model.processing.processor import (
    ASPECT_RATIOS,
    DEFAULT_TEMPLATE,
    CumoProcessor,
    processor_from,
)
from cumo_model.processing.templates import get_template
from cumo_model.processing.tokenizer_files import has_tokenizer

PLACES = ("vision_experts", "projector_experts", "text_experts")
EXPERT_OPTIONS = set(inspect.signature(upcycle).parameters) - {"dense", "seed"}


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
    **options: Any,
) -> tuple[CumoForConditionalGeneration, CumoProcessor | None]:
    """Load model and processor from a checkpoint, or from a vision tower, a language model and a connector.

    Args:
        checkpoint: folder of a CuMo in this project's or the released layout, dense or with experts. Give
            either this or `vision` and `text`.
        vision: as in `from_parts`.
        text: as in `from_parts`.
        projector: as in `from_parts`.
        clip: as in `from_parts`.
        tokenizer: folder of the tokenizer, if it is not in `text` or `checkpoint`.
        experts: keyword arguments of `upcycle`. A place that already has the requested number of experts
            keeps them.
        scratch: initialise new experts with random weights instead of copies.
        dtype: dtype of the weights; by default that of the files.
        quantize: 4 or 8 bits, of the language model only: its linear layers with bitsandbytes, and with 4 its
            experts in nf4. Parts and new experts are first written to a temporary folder (TMPDIR), because
            bitsandbytes quantises weights while it reads them.
        attn_implementation: as in transformers.
        template: name of the chat template; by default that of the checkpoint, and DEFAULT_TEMPLATE for
            parts.
        aspect: "pad" or "square"; by default that of the checkpoint.
        seed: seed of new gates, experts and connector. The state of the global generator is restored.
        **options: fields of CumoConfig for a model made of parts, such as `scales` and `compat`.

    Returns:
        The model in evaluation mode, on the CPU (if quantised: on the device bitsandbytes uses), and its
        processor, None if the files contain no tokenizer.

    Raises:
        ValueError: there is no starting point or more than one; a folder is missing, damaged or of another
            kind; tensors are missing or have another shape; or the requested experts do not fit the model.
    """
    if aspect is not None and aspect not in ASPECT_RATIOS[:2]:
        raise ValueError(f"aspect must be {' or '.join(ASPECT_RATIOS[:2])}, got {aspect!r}")
    if template is not None:
        get_template(template)
    if quantize not in (None, 4, 8):
        raise ValueError(f"quantize must be 4 or 8, got {quantize}")
    check_dtype(dtype)
    experts = dict(experts or {})
    if unknown := sorted(set(experts) - EXPERT_OPTIONS):
        raise ValueError(f"experts must be keyword arguments of upcycle, got {', '.join(unknown)}")
    wanted = [name for name in PLACES if experts.get(name)]
    for folder in (checkpoint, text):
        if wanted and folder is not None and read_config(folder).get("quantization_config"):
            raise ValueError(
                f"experts must be None for {os.fspath(folder)!r}, whose quantization_config says that its "
                f"weights are quantised, got {', '.join(wanted)}"
            )
        if quantize is not None and is_quantized(folder):
            raise ValueError(
                f"quantize must be None for {os.fspath(folder)!r}, whose experts are quantised already, "
                f"got {quantize}"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = starting_point(checkpoint, vision, text, projector, clip, tokenizer, **options)
        new = _new_experts(start.config, checkpoint, experts)
        if new:
            upcycled_config(start.config, **new)  # it refuses before the weights are loaded
        elif experts.get("router") is not None:
            router_of(start.config, experts["router"])
        loading = {}
        if quantize is not None and checkpoint is not None and not new:
            loading["quantization_config"] = _quantization(quantize, dtype or start.config.dtype)
        model = start.load(dtype, attn_implementation, **loading)
        processor = start.processor
        if processor is not None:
            processor = with_settings(processor, template, aspect)
        if new:
            dense, model = model, upcycle(model, **new, seed=seed)
            if scratch:
                scratch_experts(dense, model, seed)
    if quantize is not None and not getattr(model, "is_quantized", False):
        model = _quantized(model, quantize)
    if quantize == 4 and experts_of(model.config)["text_experts"][0] > 1:
        _quantize_experts_of(model.model.language_model)
    return model.eval(), processor


@dataclass(frozen=True)
class Start:
    """A starting point before its weights are loaded.

    Attributes:
        config: of the model.
        processor: of the model; None if there is no tokenizer.
        checkpoint: folder of the checkpoint, or None.
        parts: the parts, if it is no checkpoint.
    """

    config: CumoConfig
    processor: CumoProcessor | None
    checkpoint: str | os.PathLike | None = None
    parts: Parts | None = None

    def load(
        self, dtype: torch.dtype | None = None, attn_implementation: str | None = None, **options: Any
    ) -> CumoForConditionalGeneration:
        """Load the model; arguments are those of `assemble` and, for a checkpoint, of `from_pretrained`."""
        if self.parts is not None:
            model = load_parts(self.parts, dtype)
            if attn_implementation is not None:
                model.set_attn_implementation(attn_implementation)
        else:
            if layout_of(read_object(Path(self.checkpoint, "config.json"))) is None:
                options["use_safetensors"] = True  # .bin files are checked in the released layout only
            if attn_implementation is not None:
                options["attn_implementation"] = attn_implementation
            token = self.config.image_token_index
            with known_image_token(token):
                kind = CumoForConditionalGeneration
                model = load_whole(kind, self.checkpoint, dtype or "auto", known=(), **options)
            model.config.image_token_index = token
        return model


def starting_point(
    checkpoint: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    projector: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    **options: Any,
) -> Start:
    """Read config and processor of a starting point; arguments and errors are those of `assemble`.

    A checkpoint without a tokenizer may be given one too.
    """
    given = {"vision": vision, "text": text, "projector": projector, "clip": clip}
    named = [name for name, value in given.items() if value is not None]
    if checkpoint is not None and (named or options):
        others = " and ".join([*named, *options])
        raise ValueError(f"give either a checkpoint, or vision and text; got a checkpoint and {others}")
    if checkpoint is None and (vision is None or text is None):
        raise ValueError(
            f"give either a checkpoint, or vision and text; got {' and '.join(named) or 'neither'}"
        )
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ValueError(f"tokenizer must be a folder with a tokenizer, got {os.fspath(tokenizer)!r}")
    if checkpoint is not None:
        config, processor = describe(checkpoint)
        parts = None
    else:
        parts = read_parts(vision, text, projector, clip, **options)
        config, processor = parts.config, None
        tokenizer = text if tokenizer is None and has_tokenizer(text) else tokenizer
    if tokenizer is not None:
        template = DEFAULT_TEMPLATE if checkpoint is None else None
        processor = processor_from(tokenizer, config, template)
        agree(config, processor)
    return Start(config, processor, checkpoint, parts)


def describe(checkpoint: str | os.PathLike) -> tuple[CumoConfig, CumoProcessor | None]:
    """Read config and processor of a checkpoint in either layout, without its weights.

    Args:
        checkpoint: folder of the checkpoint.

    Returns:
        The config, with the image token of the processor's tokenizer; the processor, None if the folder has
        no tokenizer.

    Raises:
        ValueError: as `config_of`, or a file of the processor is damaged.
    """
    folder, config = Path(checkpoint), config_of(checkpoint)
    processor = read_processor(folder, config)
    if processor is not None:
        agree(config, processor)
    return config, processor


def is_quantized(folder: str | os.PathLike | None) -> bool:
    """Whether a folder holds experts in four bits, as `quantize_checkpoint` writes them."""
    found = read_config(folder).get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == QUANTIZED


def config_of(checkpoint: str | os.PathLike) -> CumoConfig:
    """Read the config of a checkpoint in either layout, as its files say it.

    Raises:
        ValueError: `checkpoint` is not a folder, or its config.json is missing, damaged or of another
            model, or its generation_config.json cannot be read.
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
    config = read_checked(folder / "config.json", lambda values: _read(values, folder))
    check_generation(folder)
    return config


def _read(values: dict[str, Any], folder: Path) -> CumoConfig:
    if (layout := layout_of(values)) is not None:
        values = {"model_type": CumoConfig.model_type, **layout.config_values(values, folder)}
    config = CumoConfig.from_dict(values)
    own_layout(config)  # it fails for sizes that do not fit
    return config


def experts_of(config: CumoConfig) -> dict[str, tuple[int, int]]:
    """Experts, and experts per token, of each of PLACES; (1, 1) in a dense language model."""
    text, vision = config.text_config, config.vision_config
    is_sparse = text.model_type == "mixtral"
    return {
        "vision_experts": (vision.num_experts, vision.num_experts_per_tok),
        "projector_experts": (config.projector_num_experts, config.projector_num_experts_per_tok),
        "text_experts": (text.num_local_experts, text.num_experts_per_tok) if is_sparse else (1, 1),
    }


def _new_experts(
    config: CumoConfig, source: str | os.PathLike | None, wanted: dict[str, int]
) -> dict[str, int]:
    """Keyword arguments of `upcycle` for the places that need new experts; {} if no place does.

    A place that already has the requested number keeps its experts, so a stage that adds experts can also
    start from its own result.
    """
    found = {name: number for name, (number, _) in experts_of(config).items()}
    new = dict(wanted)
    for name in PLACES:
        asked = wanted.get(name) or 0
        if asked < 0:
            raise ValueError(f"{name} must not be negative (0 leaves the place as it is), got {asked}")
        if asked > 1 and found[name] > 1 and asked != found[name]:
            there = "the model" if source is None else os.fspath(source)
            raise ValueError(f"{name} must be {found[name]}, what {there} has already, got {asked}")
        new[name] = asked if found[name] <= 1 else 0
    return new if any(new[name] > 1 for name in PLACES) else {}


def _quantized(model: CumoForConditionalGeneration, bits: int) -> CumoForConditionalGeneration:
    """The same model, written to a temporary folder and loaded quantised."""
    options = {"attn_implementation": model.config._attn_implementation, "use_safetensors": True}
    with tempfile.TemporaryDirectory(prefix="cumo-") as folder:
        model.save_pretrained(folder)
        options["quantization_config"] = _quantization(bits, model.dtype)
        return load_whole(CumoForConditionalGeneration, folder, model.dtype, **options)


def _quantize_experts_of(decoder: torch.nn.Module) -> None:
    try:
        quantize_experts(decoder)
    except ValueError as error:  # sizes that no group divides; bitsandbytes has quantised the rest
        warnings.warn(f"the experts keep their precision: {error}", stacklevel=3)


def _quantization(bits: int, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    # routers and all modules outside the language model are not quantised
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
