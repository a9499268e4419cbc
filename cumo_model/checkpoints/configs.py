"""Reading of config.json: wrong values are named by file and key, before a model is built."""

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig

from cumo_model.model.json_files import read_object

Read = TypeVar("Read")
NESTED = ("text_config", "vision_config")
LAYERS = 10_000  # each is an object, so that a larger number would only end with the memory
WHOLE = {  # keys whose values, where they are numbers, are whole -> smallest and largest
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels"),
        (1, 2**31 - 1),
    ),
    **dict.fromkeys(("num_hidden_layers",), (1, LAYERS)),
    **dict.fromkeys(  # 0 for none
        ("num_experts", "num_local_experts", "num_experts_per_tok", "num_selected", "projector_num_experts",
         "projector_num_experts_per_tok"),
        (0, LAYERS),
    ),
    "sliding_window": (1, 2**31 - 1),
    "image_token_index": (-(2**31), 2**31 - 1),
}  # fmt: skip
REAL = {  # keys of finite numbers -> smallest and largest
    "rms_norm_eps": (0, 1),
    "layer_norm_eps": (0, 1),
    "rope_theta": (1e-6, 1e30),
    "attention_dropout": (0, 1),
    "initializer_range": (0, 1e6),
    "initializer_factor": (0, 1e6),
    "balance_loss_coef": (-1e6, 1e6),
    "router_z_loss_coef": (-1e6, 1e6),
    "router_aux_loss_coef": (-1e6, 1e6),
    "router_jitter_noise": (0, 1e6),
}
TEXTS = ("model_type", "hidden_act")
DTYPES = ("dtype", "torch_dtype")
SHARED = ("model_type", "num_hidden_layers", *DTYPES)  # mean the same for every model
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # -1 of early Llamas is none


def read_checked(
    path: str | os.PathLike, read: Callable[[dict[str, Any]], Read], is_own: bool = True
) -> Read:
    """Read a config.json with `read`, a function of its content that fails for what it cannot use.

    Args:
        path: the file.
        read: the function.
        is_own: whether its keys mean what those of a CuMo and its parts mean. Other models give some of them
            other values, such as 0 for none; of them only the keys in SHARED are checked.

    Raises:
        ValueError: the file is missing or damaged, or a value is refused; the message, one line, names the
            file and, where one key alone is to blame, the key and its value.
    """
    values = read_object(path)
    _check_values(values, path, keys=None if is_own else SHARED)
    try:
        return read(copy.deepcopy(values))
    except Exception as error:  # wrong values make transformers and torch raise many kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        key = _culprit(values, read)
        if key is not None and not re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", reason):
            reason = f"{key} cannot be used, got {_brief(_at(values, key))}: {reason}"
        raise ValueError(f"{path}: {reason}") from error


def check_generation(folder: str | os.PathLike) -> None:
    """Refuse a generation_config.json, if there is one, that transformers cannot read.

    Raises:
        ValueError: as `read_checked`. transformers passes over some of these files in silence.
    """
    path = os.path.join(folder, "generation_config.json")
    if os.path.isfile(path):
        read_checked(path, GenerationConfig.from_dict)


def _check_values(
    values: dict[str, Any],
    path: str | os.PathLike,
    within: str = "",
    keys: tuple[str, ...] | None = None,
) -> None:
    for key, value in values.items():
        if key in NESTED and isinstance(value, dict):
            _check_values(value, path, f"{key}.", keys)
        elif keys is not None and key not in keys:
            continue
        elif key in WHOLE and not isinstance(value, list) and value is not None:
            least, most = WHOLE[key]
            if type(value) is not int or not least <= value <= most:
                wanted = f"a whole number from {least} to {most}"
                raise ValueError(f"{path}: {within}{key} must be {wanted}, got {_brief(value)}")
        elif key in REAL and value is not None:
            least, most = REAL[key]
            if type(value) not in (int, float) or not (math.isfinite(value) and least <= value <= most):
                wanted = f"a number from {least:g} to {most:g}"
                raise ValueError(f"{path}: {within}{key} must be {wanted}, got {_brief(value)}")
        elif key in TEXTS and not isinstance(value, str):
            raise ValueError(f"{path}: {within}{key} must be a text, got {_brief(value)}")
        elif key in DTYPES and value is not None and not _is_dtype(value):
            raise ValueError(f"{path}: {within}{key} must be a dtype of torch, got {_brief(value)}")
        elif key in TOKENS and value is not None:
            ids = value if isinstance(value, list) and value else [value]
            if any(type(token) is not int or not -1 <= token < 2**31 for token in ids):
                raise ValueError(f"{path}: {within}{key} must be the id of a token, got {_brief(value)}")
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{path}: {within}{key} must be a value that JSON has, got nan")


def _is_dtype(value: Any) -> bool:
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    return isinstance(getattr(torch, name, None), torch.dtype)


def _culprit(values: dict[str, Any], read: Callable[[dict[str, Any]], Any]) -> str | None:
    """The key without which `read` succeeds, with dots for nested keys; None if no single key is to blame."""

    def succeeds(attempt: dict[str, Any]) -> bool:
        try:
            read(copy.deepcopy(attempt))
        except Exception:
            return False
        return True

    for key, value in values.items():
        if key == "model_type":  # without it the file is read as that of another model
            continue
        inner = None
        if isinstance(value, dict):
            inner = _culprit(value, lambda part, key=key: read({**values, key: part}))
        if inner is not None:
            return f"{key}.{inner}"
        if succeeds({name: other for name, other in values.items() if name != key}):
            return key
    return None


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
