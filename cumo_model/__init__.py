"""cumo_model: CuMo, a vision-language model with Mixture-of-Experts in tower, connector and language model.

Importing registers the model with transformers' Auto classes, and our experts for everybody else's models
under the name "cumo" (`experts_implementation="cumo"`).
"""

import cumo_kernels.integrations.transformers  # noqa: F401
from cumo_model.checkpoints import original  # noqa: F401
from cumo_model.checkpoints.convert import convert
from cumo_model.checkpoints.layout import original_layout
from cumo_model.checkpoints.parts import from_parts
from cumo_model.checkpoints.patch import patch_original
from cumo_model.checkpoints.upcycle import step0_difference, upcycle
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.cumo import CumoForConditionalGeneration, CumoModel, CumoOutput
from cumo_model.model.losses import load_balancing_loss, router_z_loss
from cumo_model.model.moe import MoELayer, RoutingRecord, record_routing
from cumo_model.model.quantize import quantize_experts
from cumo_model.processing.processor import CumoImageProcessor, CumoProcessor, build_processor

__all__ = [
    "CumoConfig",
    "CumoForConditionalGeneration",
    "CumoImageProcessor",
    "CumoModel",
    "CumoOutput",
    "CumoProcessor",
    "CumoVisionConfig",
    "CumoVisionModel",
    "MoELayer",
    "RoutingRecord",
    "build_processor",
    "convert",
    "from_parts",
    "load_balancing_loss",
    "original_layout",
    "patch_original",
    "quantize_experts",
    "record_routing",
    "router_z_loss",
    "step0_difference",
    "upcycle",
]
