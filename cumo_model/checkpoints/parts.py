"""Assembly of a dense CuMo from pretrained parts: a CLIP, a language model, a connector of stage 1 or 2."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import logging

from cumo_model.checkpoints.configs import check_generation, read_checked
from cumo_model.checkpoints.folders import first_line
from cumo_model.checkpoints.layout import original_names
from cumo_model.checkpoints.shards import (
    Shards,
    check_tensors,
    is_refused_pickle,
    read_tensors,
    refusal,
)
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.cumo import CumoForConditionalGeneration
from cumo_model.model.head import head_of
from cumo_model.model.indexes import check_indexes
from cumo_model.model.json_files import read_object
from cumo_model.model.llm_moe import CumoMixtralModel

EXPERT = re.compile(r"\.experts\.(\d+)\.")
WHOLE_CLIP = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
TOWERS = ("clip", "clip_vision_model", CumoVisionConfig.model_type)
UNUSED = "post_layernorm."  # of CLIP; the vision tower does not use it, so it may be missing


def from_parts(
    vision: str | os.PathLike,
    text: str | os.PathLike,
    projector: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    clip: str | os.PathLike | None = None,
    **options: Any,
) -> CumoForConditionalGeneration:
    """Assemble a CLIP and a language model of transformers; `upcycle` can then make experts of their MLPs.

    Args:
        vision: folder of a CLIP (the whole model or its vision model only), or of a CumoVisionModel.
        text: folder of a mixtral or of a dense decoder (mistral, llama, ...).
        projector: `mm_projector.bin` written by a stage of the original code, dense or with experts, or its
            tensors as .safetensors. None: a new dense connector.
        dtype: dtype of all parameters; by default that of the language model's files.
        clip: `clip.bin` written by a stage of the original code, dense or with experts, or its tensors as
            .safetensors. It replaces the weights in `vision`.
        **options: further fields of CumoConfig, such as `scales`.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged, or its tensors do not fit the other parts.
    """
    check_dtype(dtype)
    return load_parts(read_parts(vision, text, projector, clip, **options), dtype)


@dataclass(frozen=True)
class Parts:
    """Parts of a model before their weights are loaded, but for those in mm_projector.bin and clip.bin.

    Attributes:
        config: of the model that they make.
        vision: folder of the tower.
        text: folder of the language model.
        projector: mm_projector.bin, or None.
        clip: clip.bin, or None.
        connector: tensors of `projector`.
        tower: tensors of `clip`.
        is_ours: whether `vision` is a CumoVisionModel.
    """

    config: CumoConfig
    vision: str | os.PathLike
    text: str | os.PathLike
    projector: str | os.PathLike | None
    clip: str | os.PathLike | None
    connector: dict[str, Tensor]
    tower: dict[str, Tensor]
    is_ours: bool


def read_parts(
    vision: str | os.PathLike,
    text: str | os.PathLike,
    projector: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    **options: Any,
) -> Parts:
    """Read the configs of parts and check that they fit; arguments and errors are those of `from_parts`."""
    unknown = sorted(
        set(options) - set(CumoConfig.__annotations__) | set(options) & {"text_config", "vision_config"}
    )
    if unknown:
        raise ValueError(f"options must be fields of CumoConfig, got {', '.join(unknown)}")
    for name, folder in (("vision", vision), ("text", text)):
        if not Path(folder, "config.json").is_file():
            raise ValueError(f"{name} must be a folder with a config.json, got {os.fspath(folder)!r}")
    kind = read_object(Path(vision, "config.json")).get("model_type")
    if kind not in TOWERS:
        raise ValueError(f"vision must be a folder of model_type {' or '.join(TOWERS)}, got {kind!r}")
    is_ours = kind == CumoVisionConfig.model_type
    read_tower = _read_our_tower if is_ours else _read_clip
    tower_config = read_checked(Path(vision, "config.json"), read_tower).to_dict()
    tower_config = {
        k: v for k, v in tower_config.items() if k not in ("model_type", "architectures", "dtype")
    }
    text_config = read_checked(Path(text, "config.json"), lambda values: _read_text(values, text))
    check_generation(text)
    connector = {} if projector is None else _original_tensors(projector, "mm_projector.")
    tower = {} if clip is None else _original_tensors(clip, "vision_model.")
    tower = {name: value for name, value in tower.items() if not name.startswith(UNUSED)}
    experts = {int(key.split(".")[1]) for key in connector if key.startswith("experts.")}
    if clip is not None or not is_ours:
        tower_config["num_experts"] = len({m[1] for key in tower if (m := EXPERT.search(key))}) or 1
    options = {
        "image_token_index": text_config.vocab_size,
        "projector_num_experts": len(experts) or 1,
    } | options
    config = CumoConfig(vision_config=tower_config, text_config=text_config, **options)
    return Parts(config, vision, text, projector, clip, connector, tower, is_ours)


def _read_our_tower(values: dict[str, Any]) -> CumoVisionConfig:
    config = CumoVisionConfig.from_dict(values)
    with torch.device("meta"):
        CumoVisionModel(config)
    return config


def _read_clip(values: dict[str, Any]) -> CLIPVisionConfig:
    # config.json of a whole CLIP has one of its vision model in it
    config = CLIPVisionConfig.from_dict(values["vision_config"] if values["model_type"] == "clip" else values)
    with torch.device("meta"):
        CLIPVisionModel(config)
    return config


def _read_text(values: dict[str, Any], folder: str | os.PathLike) -> PreTrainedConfig:
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type must be known to transformers, got {kind!r}")
    config = CONFIG_MAPPING[kind].from_dict(values)
    if kind != "mixtral" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"text must be a folder of a causal language model, got a {kind}")
    try:
        head_of(config)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be the language model: {error}") from None
    with torch.device("meta"):
        AutoModel.from_config(config)
    return config


def load_parts(parts: Parts, dtype: torch.dtype | None = None) -> CumoForConditionalGeneration:
    """Load the weights of parts; arguments and errors are those of `from_parts`."""
    config, text_config = parts.config, parts.config.text_config
    language, lm_head = _decoder_and_head(parts.text, config, dtype)
    dtype = dtype or language.dtype
    config.text_config = language.config
    with no_init_weights(), torch.device("meta"):  # the parts replace these modules
        model = CumoForConditionalGeneration(config)
    model.model.language_model = language
    if parts.clip is None and parts.is_ours:
        model.model.vision_tower = load_whole(CumoVisionModel, parts.vision, dtype, use_safetensors=True)
    elif parts.clip is None:
        model.model.vision_tower = _tower(parts.vision, config, dtype)
    else:
        model.model.vision_tower = CumoVisionModel._from_config(config.vision_config, dtype=dtype)
        _load(
            model.model.vision_tower, parts.tower, "vision_tower.", "vision_tower.vision_model.", parts.clip
        )
    projector = type(model.model.multi_modal_projector)
    with torch.device("cpu"):
        model.model.multi_modal_projector = projector(config).to(dtype)
        if model.model.image_newline is not None:
            width = text_config.hidden_size
            model.model.image_newline = nn.Parameter((torch.randn(width) / width**0.5).to(dtype))
    if parts.connector:
        places = ("multi_modal_projector.", "mm_projector.")
        _load(model.model.multi_modal_projector, parts.connector, *places, parts.projector)
    model.lm_head = lm_head
    model.config.dtype = dtype
    model.tie_weights()
    if Path(parts.text, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(parts.text)
    return model.eval()


def check_dtype(dtype: torch.dtype | None) -> None:
    """
    Raises:
        ValueError: `dtype` is neither None nor a floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be None or a floating-point torch.dtype, got {dtype!r}")


# masks, positions and versions that earlier releases of transformers saved and that models now compute
OLD_BUFFERS = re.compile(
    r"(^|\.)(attn|attention|self_attn)\.(attention\.)?(bias|masked_bias|causal_mask|embed_positions)$"
    r"|(^|\.)(rotary_emb\.inv_freq|position_ids|embed_positions\.weights|(de|en)coder\.version)$"
)


def load_whole(
    kind: type,
    folder: str | os.PathLike,
    dtype: torch.dtype | str,
    unused: str | None = None,
    known: tuple[str, ...] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """`from_pretrained` that raises an error for missing tensors instead of initialising them randomly.

    Args:
        kind: class of the model.
        folder: contains config.json and the tensors.
        dtype: as in transformers.
        unused: prefix of tensor names that may be missing.
        known: names of tensors in the folder that the model may lack; others are an error, unless the class
            ignores them by itself. None: all are ignored.
        **options: further keyword arguments of from_pretrained.

    Raises:
        ValueError: a tensor of the model is missing in the folder or has another shape there, or the model
            has no place for a tensor of the folder; or an index names a file outside the folder.
    """
    check_indexes(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the error below replaces the long report of the loader
    try:
        model, info = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except OSError as error:
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        if not is_refused_pickle(error):
            raise
        raise ValueError(refusal(folder, error)) from None
    finally:
        logging.set_verbosity(verbosity)
    missing = [name for name in info["missing_keys"] if unused is None or not name.startswith(unused)]
    wrong = [
        f"{name} is {tuple(found)}, config.json says {tuple(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    ]
    extra = [] if known is None else sorted(set(info["unexpected_keys"]) - set(known))
    extra = [name for name in extra if not OLD_BUFFERS.search(name)]
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])})"
        for what, names in (("missing", missing), ("of another shape", wrong), ("not known", extra))
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder} does not match its config.json: of {len(model.state_dict())} tensors "
            f"{'; '.join(problems)}"
        )
    return model


def _tower(folder: str | os.PathLike, config: CumoConfig, dtype: torch.dtype) -> CumoVisionModel:
    source = load_whole(CLIPVisionModel, folder, dtype, unused=UNUSED).state_dict()
    tower = CumoVisionModel._from_config(config.vision_config, dtype=dtype)
    wanted = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    found = {name: value for name, value in source.items() if not name.startswith(UNUSED)}
    assert {name: tuple(value.shape) for name, value in found.items()} == wanted
    tower.load_state_dict(found)
    return tower


def _original_tensors(path: str | os.PathLike, place: str) -> dict[str, Tensor]:
    """Tensors by the part of their name after `place`; other tensors of a whole CLIP are left out."""
    tensors = read_tensors(path)
    found = {name.split(place, 1)[1]: value for name, value in tensors.items() if place in name}
    others = [name for name in tensors if place not in name and not name.startswith(WHOLE_CLIP)]
    if others or not found:
        raise ValueError(f"{path} must hold {place.rstrip('.')} tensors, got {others[:1] or 'nothing'}")
    return {name: value for name, value in found.items() if not name.endswith("position_ids")}


def _load(
    module: nn.Module, tensors: dict[str, Tensor], own: str, released: str, source: str | os.PathLike
) -> None:
    """Copy `tensors` into all parameters of a part; `own` and `released` are its prefixes in both layouts."""
    parameters, own, released = dict(module.named_parameters()), f"model.{own}", f"model.{released}"
    parts = {name: original_names(f"{own}{name}", tuple(p.shape)) for name, p in parameters.items()}
    wanted = {k.removeprefix(released): shape for names in parts.values() for k, shape in names.items()}
    check_tensors({name: tuple(value.shape) for name, value in tensors.items()}, wanted, os.fspath(source))
    with torch.no_grad():
        for name, parameter in parameters.items():
            pieces = [tensors[key.removeprefix(released)].flatten() for key in parts[name]]
            parameter.copy_(torch.cat(pieces).view(parameter.shape))


def _decoder_and_head(
    folder: str | os.PathLike, config: CumoConfig, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, nn.Linear]:
    """The decoder and the output embedding of a language model, loaded under its own names."""
    text = config.text_config
    head = head_of(text)
    if text.model_type == "mixtral":
        decoder = load_whole(CumoMixtralModel, folder, dtype or "auto", known=("lm_head.weight",))
        output = nn.Linear(text.hidden_size, text.vocab_size, bias=False, device="meta")
        output.weight = decoder.get_input_embeddings().weight
        if not text.tie_word_embeddings or "lm_head.weight" in Shards(folder).shapes:
            weight = _mixtral_head(folder, decoder.dtype)
            if not (text.tie_word_embeddings and torch.equal(weight, output.weight)):
                output.weight = weight
    else:
        causal = load_whole(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], folder, dtype or "auto", known=())
        decoder, output = causal.get_submodule(head.decoder), causal.get_submodule(head.weight)
    if config.tie_word_embeddings and output.weight is not decoder.get_input_embeddings().weight:
        raise ValueError(
            f"tie_word_embeddings must be False for {folder}, whose output embedding has weights of its own, "
            "got True"
        )
    return decoder, output


def _mixtral_head(folder: str | os.PathLike, dtype: torch.dtype) -> nn.Parameter:
    shards = Shards(folder)
    if "lm_head.weight" not in shards.files:
        raise ValueError(f"{folder} has no lm_head.weight and config.json does not tie it to the embedding")
    return nn.Parameter(shards["lm_head.weight"].to(dtype).clone())
