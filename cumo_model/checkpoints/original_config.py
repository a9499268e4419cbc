"""config.json of the released checkpoints (`llava_mistral`, `llava_mixtral`) to ours and back.

Theirs is the language model's config with the multimodal keys beside; the tower's sizes are only named, by a
CLIP of the hub or a folder. Ours keeps theirs whole in `original`, so that nothing is lost on the way back.
"""

import ast
import json
import os
from pathlib import Path
from typing import Any

from cumo_model.model.image_tokens import MERGES

TEXT_TYPE = {"llava_mistral": "mistral", "llava_mixtral": "mixtral"}
ARCHITECTURE = {
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_mixtral": "LlavaMixtralForCausalLM",
}
TOWERS = {  # what config.json of these says; the original reads it from the hub
    "openai/clip-vit-large-patch14-336": {},
    "openai/clip-vit-large-patch14": {"image_size": 224},
}
TOWER_FOLDER = "vision_tower"  # of an exported checkpoint whose tower has no name
RUN_TIME = ("training", "local_rank", "transformers_version")  # leaked into their files
NOT_MODELLED = (  # written for a model that comes from nowhere else, and read by nothing of ours
    "mm_vision_select_layer", "num_layers", "dropout", "image_aspect_ratio",
    "tokenizer_padding_side", "tokenizer_model_max_length", "mm_use_im_start_end", "mm_use_im_patch_token",
    "use_mm_proj",
)  # fmt: skip
MULTIMODAL = (
    "mm_vision_tower", "scales", "mm_projector_type", "mm_hidden_size", "mm_vision_select_layer",
    "mm_vision_select_feature", "mm_patch_merge_type", "num_experts", "num_selected", "num_layers", "dropout",
    "mlp_smoe", "clip_smoe", "balance_loss_coef", "router_z_loss_coef", "image_aspect_ratio",
    "tokenizer_padding_side", "tokenizer_model_max_length", "mm_use_im_start_end", "mm_use_im_patch_token",
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "mm_projector_lr", "use_mm_proj", "image_grid_pinpoints",
    "tune_mm_vision_tower", "pretrain_mm_mlp_adapter", "unfreeze_mm_vision_tower", "vision_tower_dir",
    "image_token_index",
)  # fmt: skip


def is_original(values: dict[str, Any]) -> bool:
    return values.get("model_type") in TEXT_TYPE


def from_original(values: dict[str, Any], folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """Their config.json as keywords of CumoConfig.

    Args:
        values: what config.json holds.
        folder: the checkpoint, beside which a tower named by a relative path may lie.

    Raises:
        ValueError: it asks for a part that CuMo's published models do not have.
    """
    if not is_original(values):
        raise ValueError(f"model_type must be one of {sorted(TEXT_TYPE)}, got {values.get('model_type')!r}")
    kept = {key: value for key, value in values.items() if key not in RUN_TIME}
    if not isinstance(values.get("vocab_size"), int):
        raise ValueError(f"config.json must have an integer vocab_size, got {values.get('vocab_size')!r}")
    scales = values.get("scales", [1])
    try:
        scales = [int(s) for s in (scales.split(",") if isinstance(scales, str) else scales)]
    except (TypeError, ValueError):
        raise ValueError(f"scales must be integers, got {values['scales']!r}") from None
    feature = values.get("mm_vision_select_feature", "patch")
    projector = values.get("mm_projector_type", "linear")
    experts, selected = values.get("num_experts") or 1, values.get("num_selected") or 1
    for key, wanted in (
        ("mm_projector_type", ("smoe_mlp", "mlp2x_gelu")),
        ("mm_vision_select_feature", ("patch", "cls_patch")),
        ("mm_patch_merge_type", (*MERGES, None)),
        ("mm_use_im_start_end", (False, None)),
        ("mm_use_im_patch_token", (False, None)),
    ):
        if values.get(key, wanted[-1]) not in wanted:
            raise ValueError(f"{key} must be one of {wanted}, got {values[key]!r}")
    text = {
        key: value
        for key, value in kept.items()
        if key not in MULTIMODAL and key not in ("architectures", "torch_dtype", "dtype")
    }
    text["model_type"] = TEXT_TYPE[values["model_type"]]
    dtype = values.get("torch_dtype") or values.get("dtype")
    moe = {"num_experts": experts, "num_experts_per_tok": selected} if values.get("clip_smoe") else None
    is_moe = projector == "smoe_mlp"
    return {
        "text_config": text,
        "vision_config": _tower(values, folder) | (moe or {"num_experts": 1}),
        "projector_num_experts": experts if is_moe else 1,
        **({"projector_num_experts_per_tok": selected} if is_moe else {}),
        "scales": [1, *scales[1:]],  # the original never applies its first scale
        "vision_feature_layer": -2,  # the original stores mm_vision_select_layer and never reads it
        "vision_feature_select_strategy": "default" if feature == "patch" else "full",
        # ours writes the id of its `<image>`; theirs has a marker outside of any tokenizer
        "image_token_index": values.get("image_token_index") or values["vocab_size"],
        "patch_merge_type": values.get("mm_patch_merge_type") or "flat",
        "image_grid_pinpoints": _pinpoints(values),
        "balance_loss_coef": values.get("balance_loss_coef") or 0.0,
        "router_z_loss_coef": values.get("router_z_loss_coef") or 0.0,
        **({"dtype": dtype} if dtype else {}),
        "original": kept,
    }


def _pinpoints(values: dict[str, Any]) -> list[list[int]] | None:
    """Theirs are (width, height), in a list or written as one; ours [height, width], and only for anyres."""
    found = values.get("image_grid_pinpoints")
    if values.get("image_aspect_ratio") != "anyres" or not found:
        return None
    try:
        pairs = ast.literal_eval(found) if isinstance(found, str) else found
        return [[height, width] for width, height in pairs]
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"image_grid_pinpoints must be pairs (width, height), got {found!r}") from None


def _tower(values: dict[str, Any], folder: str | os.PathLike | None) -> dict[str, Any]:
    name = values.get("mm_vision_tower")
    for path in [Path(base, str(name), "config.json") for base in (folder, ".") if base is not None]:
        if path.is_file():
            config = json.loads(path.read_text())
            config = config.get("vision_config", config)
            skipped = ("model_type", "architectures", "num_experts", "num_experts_per_tok", *RUN_TIME)
            return {key: value for key, value in config.items() if key not in skipped}
    if name not in TOWERS:
        raise ValueError(
            f"mm_vision_tower must be one of {', '.join(TOWERS)} or a folder with a CLIP config.json, "
            f"got {name!r}"
        )
    return dict(TOWERS[name])


def to_original(config) -> dict[str, Any]:
    """A CumoConfig as their config.json.

    Raises:
        ValueError: the original has no such model.
    """
    text, vision = config.text_config, config.vision_config
    model_type = next((ours for ours, theirs in TEXT_TYPE.items() if theirs == text.model_type), None)
    if model_type is None:
        raise ValueError(
            "text_config.model_type must be mistral or mixtral for the original layout, "
            f"got {text.model_type!r}"
        )
    places = [
        (vision.num_experts, vision.num_experts_per_tok, "tower"),
        (config.projector_num_experts, config.projector_num_experts_per_tok, "connector"),
    ]
    sparse = [place for place in places if place[0] > 1]
    if len({place[:2] for place in sparse}) > 1:
        raise ValueError(
            "num_experts and num_experts_per_tok must agree in tower and connector, for which the original "
            f"layout has one pair, got {places[0][:2]} and {places[1][:2]}"
        )
    if config.vision_feature_layer not in (-2, vision.num_hidden_layers - 1):
        raise ValueError(
            f"vision_feature_layer must be -2 for the original layout, got {config.vision_feature_layer}"
        )
    known = next((name for name, sizes in TOWERS.items() if _has_sizes(vision, sizes)), TOWER_FOLDER)
    before = dict(config.original or {})
    found = text.to_dict()
    rope = found.pop("rope_parameters", None) or {}
    skipped = ("model_type", "architectures", "dtype", *RUN_TIME)
    skipped += ("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states")
    skipped += ("return_dict", "is_encoder_decoder", "chunk_size_feed_forward", "_name_or_path")
    flat = {key: value for key, value in found.items() if key not in skipped}
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    num_experts, selected = sparse[0][:2] if sparse else (None, None)
    flat |= {
        "model_type": model_type,
        "architectures": [ARCHITECTURE[model_type]],
        "mm_vision_tower": known,
        "scales": list(config.scales),
        "mm_projector_type": "smoe_mlp" if config.projector_num_experts > 1 else "mlp2x_gelu",
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": (
            "patch" if config.vision_feature_select_strategy == "default" else "cls_patch"
        ),
        "mm_patch_merge_type": config.patch_merge_type,
        "image_token_index": config.image_token_index,
        "mlp_smoe": config.projector_num_experts > 1,
        "clip_smoe": vision.num_experts > 1,
        "num_layers": 3,
        "dropout": False,
        "balance_loss_coef": config.balance_loss_coef,
        "router_z_loss_coef": config.router_z_loss_coef,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 4096,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "training": False,
    } | ({"num_experts": num_experts, "num_selected": selected} if sparse else {})
    if config.image_grid_pinpoints is not None:
        flat["image_grid_pinpoints"] = [[width, height] for height, width in config.image_grid_pinpoints]
        before["image_aspect_ratio"] = flat["image_aspect_ratio"] = "anyres"
    if config.dtype is not None:
        flat["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    # this model decides about what it models; what it does not stays as they had it
    return flat | {key: value for key, value in before.items() if key not in flat or key in NOT_MODELLED}


def _has_sizes(vision, sizes: dict[str, Any]) -> bool:
    standard = type(vision)(**sizes)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    return all(getattr(vision, n) == getattr(standard, n) for n in (*names, "patch_size", "hidden_act"))
