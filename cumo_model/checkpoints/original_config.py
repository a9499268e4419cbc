"""Conversion between CumoConfig and config.json of released checkpoints (`llava_mistral`, `llava_mixtral`).

A released config.json is the config of the language model with additional multimodal keys. It names the
vision tower (a CLIP of the hub or a folder) but does not contain its sizes.

Neither conversion loses anything. CumoConfig keeps the whole released config.json in `original`. An exported
config.json keeps the CumoConfig in the key `cumo`, which the original code ignores, if its other keys do not
say all of it. Each of the two is used as far as it still agrees: values that were changed later win.
"""

import ast
import copy
import json
import os
from pathlib import Path
from typing import Any

from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.image_tokens import MERGES
from cumo_model.model.json_files import read_object
from cumo_model.processing.processor import aspect_of

TEXT_TYPE = {"llava_mistral": "mistral", "llava_mixtral": "mixtral"}
ARCHITECTURE = {
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_mixtral": "LlavaMixtralForCausalLM",
}
TOWERS = {  # config values of these CLIP models, which the original code reads from the hub
    "openai/clip-vit-large-patch14-336": {},
    "openai/clip-vit-large-patch14": {"image_size": 224},
}
TOWER_FOLDER = "vision_tower"  # in an exported checkpoint whose tower is not a known CLIP
TOWER_FIELDS = (  # that decide what a tower computes
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
EXPORTED = "cumo"  # key of an exported config.json: the CumoConfig, and the pictures of the processor
# keys of the released files that do not describe the model
RUN_TIME = ("training", "local_rank", "transformers_version")
SYNONYMS = (("rope_theta", "rope_scaling", "rope_parameters"), ("torch_dtype", "dtype"))
NOT_MODELLED = (  # kept from `original`, otherwise written with a default; CumoConfig does not use them
    "mm_vision_select_layer", "num_layers", "dropout", "tokenizer_padding_side",
    "tokenizer_model_max_length", "mm_use_im_start_end", "mm_use_im_patch_token", "use_mm_proj",
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
    """Whether a config.json is in the released layout."""
    kind = values.get("model_type")
    return isinstance(kind, str) and kind in TEXT_TYPE


def from_original(values: dict[str, Any], folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """Translate a released config.json to keyword arguments of CumoConfig.

    Args:
        values: content of config.json.
        folder: folder of the checkpoint; a relative path of the tower is also searched here. Only its
            config.json is read.

    Raises:
        ValueError: config.json describes a part that no published CuMo model has.
    """
    if not is_original(values):
        raise ValueError(f"model_type must be one of {sorted(TEXT_TYPE)}, got {values.get('model_type')!r}")
    tower, exported = _tower(values, folder), values.get(EXPORTED)
    if exported is None:
        return _translate(values, tower)
    if not isinstance(exported, dict) or not isinstance(exported.get("config"), dict):
        raise ValueError(f"{EXPORTED} of config.json must be an object with a config, got {exported!r}")
    own = exported["config"]
    config = CumoConfig.from_dict(dict(own))
    before = to_original(config, exported.get("pictures"))
    before["mm_vision_tower"] = values.get("mm_vision_tower")
    before, now = (
        {key: value for key, value in found.items() if key not in (EXPORTED, *RUN_TIME)}
        for found in (before, values)
    )
    merged = _merge(own, *(_content(CumoConfig(**_translate(values, tower))) for values in (before, now)))
    vision = CumoVisionConfig(**tower, num_experts=1)
    differ = {name: getattr(vision, name) for name in _differing(vision, config.vision_config)}
    return merged | {"vision_config": merged["vision_config"] | differ}


def _merge(own: Any, before: Any, now: Any) -> Any:
    """`own`, with the changes from `before` to `now`."""
    if now == before:
        return own
    if not all(isinstance(value, dict) for value in (own, before, now)):
        return now
    merged = dict(own)
    for key in before.keys() | now.keys():
        if key not in now:
            merged.pop(key, None)
        elif key not in before or now[key] != before[key]:
            merged[key] = _merge(own.get(key), before.get(key), now[key])
    return merged


def _translate(values: dict[str, Any], tower: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in (EXPORTED, "_commit_hash")}
    if not isinstance(values.get("vocab_size"), int):
        raise ValueError(f"config.json must have an integer vocab_size, got {values.get('vocab_size')!r}")
    scales = values.get("scales", [1])
    try:
        scales = [int(s) for s in (scales.split(",") if isinstance(scales, str) else scales)]
    except (TypeError, ValueError):
        raise ValueError(f"scales must be integers, got {values['scales']!r}") from None
    if not scales:
        raise ValueError(f"scales must be one or more integers, got {values['scales']!r}")
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
        key: copy.deepcopy(value)  # configs of transformers change dicts that they are given
        for key, value in kept.items()
        if key not in (*MULTIMODAL, *RUN_TIME, "architectures", "torch_dtype", "dtype")
    }
    text["model_type"] = TEXT_TYPE[values["model_type"]]
    dtype = values.get("torch_dtype") or values.get("dtype")
    moe = {"num_experts": experts, "num_experts_per_tok": selected} if values.get("clip_smoe") else None
    is_moe = projector == "smoe_mlp"
    return {
        "text_config": text,
        "vision_config": tower | (moe or {"num_experts": 1}),
        "projector_num_experts": experts if is_moe else 1,
        **({"projector_num_experts_per_tok": selected} if is_moe else {}),
        "scales": [1, *scales[1:]],  # the original code never applies its first scale
        "vision_feature_layer": -2,  # the original code never reads mm_vision_select_layer
        "vision_feature_select_strategy": "default" if feature == "patch" else "full",
        # this project writes the id of `<image>`; the original code uses a marker outside the tokenizer
        "image_token_index": values.get("image_token_index") or values["vocab_size"],
        "patch_merge_type": values.get("mm_patch_merge_type") or "flat",
        "image_grid_pinpoints": _pinpoints(values),
        "balance_loss_coef": values.get("balance_loss_coef") or 0.0,
        "router_z_loss_coef": values.get("router_z_loss_coef") or 0.0,
        **({"dtype": dtype} if dtype else {}),
        "original": kept,
    }


def _pinpoints(values: dict[str, Any]) -> list[list[int]] | None:
    """[height, width] pairs from (width, height) pairs, a list or its text; None unless anyres is used."""
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
    bases = [base for base in (folder, ".") if base is not None and name and isinstance(name, str)]
    for path in [Path(base, name, "config.json") for base in bases]:
        if path.is_file():
            config = read_object(path)
            return _tower_values(config.get("vision_config", config))
    if not isinstance(name, str) or name not in TOWERS:
        raise ValueError(
            f"mm_vision_tower must be one of {', '.join(TOWERS)} or a folder with a CLIP config.json, "
            f"got {name!r}"
        )
    return dict(TOWERS[name])


def _tower_values(config: dict[str, Any]) -> dict[str, Any]:
    skipped = (
        "model_type",
        "architectures",
        "num_experts",
        "num_experts_per_tok",
        "compat",
        "router",
        *RUN_TIME,
    )
    return {key: value for key, value in config.items() if key not in skipped}


def _differing(one: CumoVisionConfig, other: CumoVisionConfig) -> list[str]:
    return [name for name in TOWER_FIELDS if getattr(one, name) != getattr(other, name)]


def to_original(
    config: CumoConfig, pictures: dict[str, Any] | None = None, folder: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Translate a CumoConfig to a config.json in the released layout.

    Args:
        config: configuration of the model.
        pictures: image_aspect_ratio and image_grid_pinpoints of the image processor; None if the checkpoint
            has no processor.
        folder: folder of the checkpoint, where the tower that `config.original` names is searched.

    Raises:
        ValueError: the released layout cannot describe this model.
    """
    _check_describable(config)
    source, flat = dict(config.original or {}), _flat(config, pictures)
    if is_original(source) and isinstance(source.get("vocab_size"), int):
        tower = _tower_values(config.vision_config.to_dict())
        before = _flat(CumoConfig(**_translate(source, tower)))
        if pictures is not None:  # the tokenizer beside it gives the image token
            before["image_token_index"] = flat["image_token_index"]
        values = _with_changes(source, before, flat)
    else:
        values = flat | {key: v for key, v in source.items() if key not in flat or key in NOT_MODELLED}
    values["mm_vision_tower"], tower = _tower_name(config.vision_config, source, folder)
    again = CumoConfig(**_translate(values, tower))
    if pictures is not None:
        again.image_token_index = config.image_token_index
    if differing(again, config):
        own = json.loads(json.dumps(config.to_diff_dict(), default=str))
        values[EXPORTED] = {"config": own} | ({"pictures": pictures} if pictures else {})
    return values


def _check_describable(config: CumoConfig) -> None:
    text, vision = config.text_config, config.vision_config
    if config.router is not None:
        raise ValueError(
            "router must be None for the original layout, whose code routes by a softmax without a bias or "
            f"noise, got {config.router}"
        )
    if text.model_type not in TEXT_TYPE.values():
        raise ValueError(
            "text_config.model_type must be mistral or mixtral for the original layout, "
            f"got {text.model_type!r}"
        )
    places = [
        (vision.num_experts, vision.num_experts_per_tok),
        (config.projector_num_experts, config.projector_num_experts_per_tok),
    ]
    if len({place for place in places if place[0] > 1}) > 1:
        raise ValueError(
            "num_experts and num_experts_per_tok must agree in tower and connector, for which the original "
            f"layout has one pair, got {places[0]} and {places[1]}"
        )
    if config.feature_layers not in ([-2], [vision.num_hidden_layers - 1]):
        raise ValueError(
            f"vision_feature_layer must be -2 for the original layout, got {config.vision_feature_layer}"
        )
    if config.scales[0] != 1:
        raise ValueError(
            f"scales must begin with 1 for the original layout, whose code never applies the first scale, "
            f"got {list(config.scales)}"
        )


def _flat(config: CumoConfig, pictures: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys of config.json that this project knows."""
    text, vision = config.text_config, config.vision_config
    model_type = next(released for released, own in TEXT_TYPE.items() if own == text.model_type)
    places = [
        (vision.num_experts, vision.num_experts_per_tok),
        (config.projector_num_experts, config.projector_num_experts_per_tok),
    ]
    sparse = [place for place in places if place[0] > 1]
    found = text.to_dict()
    rope = found.pop("rope_parameters", None) or {}
    skipped = ("model_type", "architectures", "dtype", *RUN_TIME)
    skipped += ("id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states")
    skipped += ("return_dict", "is_encoder_decoder", "chunk_size_feed_forward", "_name_or_path")
    flat = {key: value for key, value in found.items() if key not in skipped}
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    pictures = pictures or {
        "image_aspect_ratio": aspect_of(config),
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }
    flat |= {
        "model_type": model_type,
        "architectures": [ARCHITECTURE[model_type]],
        "tie_word_embeddings": config.tie_word_embeddings,
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
        "image_aspect_ratio": pictures["image_aspect_ratio"],
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 4096,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "training": False,
    }
    if sparse:
        flat["num_experts"], flat["num_selected"] = sparse[0]
    if pictures["image_aspect_ratio"] == "anyres" and pictures["image_grid_pinpoints"] is not None:
        flat["image_grid_pinpoints"] = [[w, h] for h, w in pictures["image_grid_pinpoints"]]
    if config.dtype is not None:
        flat["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return flat


def _with_changes(source: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`source` with the values that differ between `before`, its translation and back, and `now`."""
    values, missing = dict(source), object()
    changed = {key for key in before | now if before.get(key, missing) != now.get(key, missing)}
    for key in changed:
        for group in SYNONYMS:
            if key in group:
                values = {name: value for name, value in values.items() if name not in group}
                values |= {name: now[name] for name in group if name in now}
        if key in now:
            values[key] = now[key]
        else:
            values.pop(key, None)
    if "image_grid_pinpoints" in now:  # always a list, not its text
        values["image_grid_pinpoints"] = now["image_grid_pinpoints"]
    return values | ({"training": False} if "training" in source else {})


def _tower_name(
    vision: CumoVisionConfig, source: dict[str, Any], folder: str | os.PathLike | None
) -> tuple[str, dict[str, Any]]:
    """The name of a tower in config.json, and what will be read under this name."""
    named = source.get("mm_vision_tower")
    for name in (*(() if named is None else (named,)), *TOWERS):
        try:
            values = _tower({"mm_vision_tower": name}, folder if name == named else None)
        except ValueError:
            continue
        if not _differing(CumoVisionConfig(**values, num_experts=1), vision):
            return name, values
    return TOWER_FOLDER, _tower_values(vision.to_dict())


def _content(config: CumoConfig) -> dict[str, Any]:
    """What must survive a conversion."""
    values = json.loads(json.dumps(config.to_diff_dict(), default=str))
    for name in ("transformers_version", "architectures", "_name_or_path"):
        values.pop(name, None)
    for name in ("training", "image_grid_pinpoints"):  # they are written in one way
        (values.get("original") or {}).pop(name, None)
    return values


def differing(one: CumoConfig, other: CumoConfig) -> list[str]:
    """Names of the fields in which two configs differ; versions and class names do not count."""
    one, other = _content(one), _content(other)
    return sorted(key for key in one | other if one.get(key, "") != other.get(key, ""))
