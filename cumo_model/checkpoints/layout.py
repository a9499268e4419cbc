"""Names and shapes of tensors in this project's layout and in the released SHI-Labs/CuMo layout.

This project's layout stacks the experts of a layer in one tensor. The released layout has one tensor per
expert and, in Mixtral, per half of the gated projection. Dense places have the names used in the checkpoints
of stages 1 and 2. The released tensors that correspond to one stacked tensor, flattened and concatenated in
the order of the table, are its content.
"""

import re

import torch
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration

PREFIXES = (  # this project's layout -> released layout
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("model.multi_modal_projector.mlp.", "model.mm_projector."),
    ("model.language_model.", "model."),
)
CLIP_EXPERT = {"up_proj": "fc1.weight", "up_proj_bias": "fc1.bias", "down_proj": "fc2.weight",
               "down_proj_bias": "fc2.bias"}  # fmt: skip
PROJECTOR_EXPERT = {"up_proj": "0.weight", "up_proj_bias": "0.bias", "down_proj": "2.weight",
                    "down_proj_bias": "2.bias"}  # fmt: skip
MIXTRAL_EXPERT = {"gate_up_proj": ("w1.weight", "w3.weight"), "down_proj": ("w2.weight",)}


def own_layout(config: CumoConfig) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a model with this config in this project's layout."""
    with torch.device("meta"):
        model = CumoForConditionalGeneration(config)
    layout = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del layout["lm_head.weight"]
    return layout


def original_layout(config: CumoConfig) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a model in the layout of the released SHI-Labs/CuMo checkpoints.

    Args:
        config: configuration of the model.

    Returns:
        Name -> shape.
    """
    layout: dict[str, tuple[int, ...]] = {}
    for key, shape in own_layout(config).items():
        layout.update(original_names(key, shape))
    return layout


def original_names(key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the released layout that correspond to one parameter of this project's layout.

    Experts are in ascending order. The halves of a gated projection are gate (w1), then up (w3).

    Args:
        key: name of the parameter.
        shape: its shape.
    """
    own, released = next((pair for pair in PREFIXES if key.startswith(pair[0])), ("", ""))
    rest = key.removeprefix(own)
    place = released.split(".")[1] if released else ""
    if match := re.fullmatch(r"(?:(.*\.)mlp\.)?experts\.(\w+)", rest):
        layer, name = match[1] or "", match[2]
        if place == "vision_tower":
            halves, stem = (CLIP_EXPERT[name],), f"{released}{layer}experts"
        elif place == "mm_projector":
            halves, stem = (PROJECTOR_EXPERT[name],), f"{released}experts"
        else:
            halves, stem = MIXTRAL_EXPERT[name], f"{released}{layer}block_sparse_moe.experts"
        part = (shape[1] // len(halves), *shape[2:])
        return {f"{stem}.{e}.{half}": part for e in range(shape[0]) for half in halves}
    if place == "vision_tower":
        rest = rest.replace(".mlp.gate.", ".gate.")
    elif place == "mm_projector":
        rest = re.sub(r"^fc1\.", "0.", re.sub(r"^fc2\.", "2.", rest))
    else:
        rest = rest.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    return {released + rest: shape}


def _stacked(released: str, own: str) -> WeightConverter:
    return WeightConverter(source_patterns=released, target_patterns=own, operations=[MergeModulelist(dim=0)])


# The same table as rules for the loader of transformers, which has its own rules for Mixtral's experts.
# Biases come last, because a pattern also matches the beginning of a longer name.
LOADING_RULES = [
    WeightRenaming(r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
    WeightRenaming(r"(vision_tower\.encoder\.layers\.\d+)\.gate\.", r"\1.mlp.gate."),
    WeightRenaming(r"(vision_tower\.encoder\.layers\.\d+)\.experts\.", r"\1.mlp.experts."),
    WeightRenaming(r"^model\.mm_projector\.0\.", "model.multi_modal_projector.mlp.fc1."),
    WeightRenaming(r"^model\.mm_projector\.2\.", "model.multi_modal_projector.mlp.fc2."),
    WeightRenaming(r"^model\.mm_projector\.", "model.multi_modal_projector.mlp."),
    WeightRenaming(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    _stacked("mlp.experts.*.fc1.weight", "mlp.experts.up_proj"),
    _stacked("mlp.experts.*.fc2.weight", "mlp.experts.down_proj"),
    _stacked("projector.mlp.experts.*.0.weight", "projector.mlp.experts.up_proj"),
    _stacked("projector.mlp.experts.*.2.weight", "projector.mlp.experts.down_proj"),
    _stacked("mlp.experts.*.fc1.bias", "mlp.experts.up_proj_bias"),
    _stacked("mlp.experts.*.fc2.bias", "mlp.experts.down_proj_bias"),
    _stacked("projector.mlp.experts.*.0.bias", "projector.mlp.experts.up_proj_bias"),
    _stacked("projector.mlp.experts.*.2.bias", "projector.mlp.experts.down_proj_bias"),
]
