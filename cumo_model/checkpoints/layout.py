"""Names and shapes in a checkpoint: ours, those of the released SHI-Labs/CuMo ones, and the table between.

Ours stack the experts of a layer in one tensor; theirs are one tensor per expert and, in Mixtral, per half
of the gated projection. Dense places follow the checkpoints of stages 1 and 2. Their parts of one of our
tensors, in the order of the table, are its memory from front to back.
"""

import re

import torch
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from cumo_model.model.config import CumoConfig
from cumo_model.model.cumo import CumoForConditionalGeneration

PREFIXES = (  # ours -> theirs
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
    """What a model of this config holds in our layout, name -> shape; built on the meta device."""
    with torch.device("meta"):
        model = CumoForConditionalGeneration(config)
    layout = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del layout["lm_head.weight"]
    return layout


def original_layout(config: CumoConfig) -> dict[str, tuple[int, ...]]:
    """What a model of this config holds in the original layout, name -> shape."""
    layout: dict[str, tuple[int, ...]] = {}
    for key, shape in own_layout(config).items():
        layout.update(original_names(key, shape))
    return layout


def original_names(key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """One parameter of ours, by name and shape -> the names and shapes that hold it in the original layout.

    Experts in ascending order; the two halves of a gated projection are gate (w1), then up (w3).
    """
    ours, theirs = next((pair for pair in PREFIXES if key.startswith(pair[0])), ("", ""))
    rest = key.removeprefix(ours)
    place = theirs.split(".")[1] if theirs else ""
    if match := re.fullmatch(r"(?:(.*\.)mlp\.)?experts\.(\w+)", rest):
        layer, name = match[1] or "", match[2]
        if place == "vision_tower":
            halves, stem = (CLIP_EXPERT[name],), f"{theirs}{layer}experts"
        elif place == "mm_projector":
            halves, stem = (PROJECTOR_EXPERT[name],), f"{theirs}experts"
        else:
            halves, stem = MIXTRAL_EXPERT[name], f"{theirs}{layer}block_sparse_moe.experts"
        part = (shape[1] // len(halves), *shape[2:])
        return {f"{stem}.{e}.{half}": part for e in range(shape[0]) for half in halves}
    if place == "vision_tower":
        rest = rest.replace(".mlp.gate.", ".gate.")
    elif place == "mm_projector":
        rest = re.sub(r"^fc1\.", "0.", re.sub(r"^fc2\.", "2.", rest))
    else:
        rest = rest.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    return {theirs + rest: shape}


def _stacked(theirs: str, ours: str) -> WeightConverter:
    return WeightConverter(source_patterns=theirs, target_patterns=ours, operations=[MergeModulelist(dim=0)])


# The same table as rules for transformers' loader, which reads Mixtral's experts by rules of its own.
# Biases come last: its patterns know no end of a word.
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
