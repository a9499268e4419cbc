"""A dense CuMo from parts that others trained: a CLIP, a language model, a connector of stage 1 or 2."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel
from transformers.initialization import no_init_weights

from cumo_model.clip_moe import CumoVisionModel
from cumo_model.config import CumoConfig
from cumo_model.cumo import CumoForConditionalGeneration
from cumo_model.files import read_object
from cumo_model.layout import original_names
from cumo_model.llm_moe import CumoMixtralModel
from cumo_model.processing import CumoProcessor, load_tokenizer, processor_for
from cumo_model.shards import Shards, check_tensors, read_bin

PROJECTOR = "model.mm_projector."
CLIPS = ("clip", "clip_vision_model")
UNUSED = "post_layernorm."  # of a CLIP: the tower has none, so a folder may lack it


def from_parts(
    vision: str | os.PathLike,
    text: str | os.PathLike,
    projector: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> CumoForConditionalGeneration:
    """Put a CLIP and a language model of transformers together; `upcycle` then makes experts of their MLPs.

    Args:
        vision: folder of a CLIP (whole, or its vision model alone).
        text: folder of a mixtral or of a dense decoder (mistral, llama, ...).
        projector: `mm_projector.bin` of the original's stages, dense or with experts. None: a new one, dense.
        dtype: of all parameters; that of the language model's files unless given.
        options: further fields of CumoConfig, such as `scales`.

    Raises:
        ValueError: a file is missing or damaged, or its tensors do not fit the others.
    """
    for name, folder in (("vision", vision), ("text", text)):
        if not Path(folder, "config.json").is_file():
            raise ValueError(f"{name} must be a folder with a config.json, got {os.fspath(folder)!r}")
    kind = read_object(Path(vision, "config.json")).get("model_type")
    if kind not in CLIPS:
        raise ValueError(f"vision must be a folder of model_type {' or '.join(CLIPS)}, got {kind!r}")
    tower_config = CLIPVisionConfig.from_pretrained(vision).to_dict()
    tower_config = {
        k: v for k, v in tower_config.items() if k not in ("model_type", "architectures", "dtype")
    }
    text_config = AutoConfig.from_pretrained(text)
    connector = {} if projector is None else _projector_tensors(projector)
    experts = {int(key.split(".")[1]) for key in connector if key.startswith("experts.")}
    options = {
        "image_token_index": text_config.vocab_size,
        "projector_num_experts": len(experts) or 1,
    } | options
    config = CumoConfig(vision_config=tower_config | {"num_experts": 1}, text_config=text_config, **options)
    if text_config.model_type == "mixtral":
        language_class = CumoMixtralModel
    elif type(text_config) in MODEL_MAPPING:
        language_class = MODEL_MAPPING[type(text_config)]
    else:
        raise ValueError(f"text must be a text model of transformers, got a {text_config.model_type}")

    language = load_whole(language_class, text, dtype or "auto")
    dtype = dtype or language.dtype
    config.text_config = language.config
    with no_init_weights(), torch.device("meta"):  # the parts replace what this makes
        model = CumoForConditionalGeneration(config)
    model.model.language_model = language
    model.model.vision_tower = _tower(vision, config, dtype)
    with torch.device("cpu"):
        model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config).to(dtype)
    if connector:
        _load_projector(model.model.multi_modal_projector, connector, os.fspath(projector))
    model.lm_head = _head(text, model, dtype)
    model.config.dtype = dtype
    model.tie_weights()
    return model.eval()


def load_whole(
    kind: type,
    folder: str | os.PathLike,
    dtype: torch.dtype | str,
    unused: str | None = None,
    **options,
) -> PreTrainedModel:
    """`from_pretrained` that starts nothing at random.

    Args:
        kind: the model's class.
        folder: with config.json and the tensors.
        dtype: as in transformers.
        unused: beginning of the names that may be missing.
        options: further keywords of from_pretrained.

    Raises:
        ValueError: a tensor of the model is missing in the folder, or has another shape there.
    """
    model, info = kind.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    missing = [name for name in info["missing_keys"] if unused is None or not name.startswith(unused)]
    wrong = [entry[0] for entry in info["mismatched_keys"]]
    problems = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])})"
        for what, names in (("missing", missing), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder} does not hold what its config.json promises: of {len(model.state_dict())} tensors "
            f"{'; '.join(problems)}"
        )
    return model


def parts_processor(
    text: str | os.PathLike, config: CumoConfig, template: str = "mistral_instruct_system"
) -> CumoProcessor:
    """The processor of `from_parts`: the language model's tokenizer, with `<image>` behind its vocabulary."""
    return processor_for(config, load_tokenizer(text), template)


def _tower(folder: str | os.PathLike, config: CumoConfig, dtype: torch.dtype) -> CumoVisionModel:
    source = load_whole(CLIPVisionModel, folder, dtype, unused=UNUSED).state_dict()
    tower = CumoVisionModel._from_config(config.vision_config, dtype=dtype)
    wanted = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    found = {name: value for name, value in source.items() if not name.startswith(UNUSED)}
    assert {name: tuple(value.shape) for name, value in found.items()} == wanted
    tower.load_state_dict(found)
    return tower


def _projector_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """name behind `mm_projector.` -> tensor."""
    tensors = read_bin(path)
    foreign = [name for name in tensors if PROJECTOR.removeprefix("model.") not in name]
    if foreign or not tensors:
        raise ValueError(f"{path} must hold mm_projector tensors, got {foreign[:1] or 'nothing'}")
    return {name.split("mm_projector.", 1)[1]: value for name, value in tensors.items()}


def _load_projector(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    own = dict(module.named_parameters())
    parts = {
        name: original_names(f"model.multi_modal_projector.{name}", tuple(p.shape)) for name, p in own.items()
    }
    wanted = {k.removeprefix(PROJECTOR): shape for names in parts.values() for k, shape in names.items()}
    check_tensors({name: tuple(value.shape) for name, value in tensors.items()}, wanted, source)
    with torch.no_grad():
        for name, parameter in own.items():
            pieces = [tensors[key.removeprefix(PROJECTOR)].flatten() for key in parts[name]]
            parameter.copy_(torch.cat(pieces).view(parameter.shape))


def _head(text: str | os.PathLike, model: CumoForConditionalGeneration, dtype: torch.dtype) -> nn.Linear:
    config = model.config.text_config
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
    if model.config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
        return head
    shards = Shards(text)
    if "lm_head.weight" not in shards.files:
        raise ValueError(f"{text} has no lm_head.weight and config.json does not tie it to the embedding")
    head.weight = nn.Parameter(shards["lm_head.weight"].to(dtype).clone())
    return head
