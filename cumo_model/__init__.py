"""cumo_model: CuMo, a vision-language model with Mixture-of-Experts in tower, connector and language model.

Importing this package registers the model with the Auto classes of transformers. It also registers the
experts of cumo_kernels for all MoE models of transformers under the name "cumo"
(`experts_implementation="cumo"`).
"""

import cumo_kernels.integrations.transformers  # noqa: F401
from cumo_kernels.moved import keep_old_paths
from cumo_model.checkpoints import original  # noqa: F401
from cumo_model.checkpoints.assemble import assemble
from cumo_model.checkpoints.convert import convert
from cumo_model.checkpoints.layout import original_layout
from cumo_model.checkpoints.parts import from_parts
from cumo_model.checkpoints.patch import patch_original
from cumo_model.checkpoints.upcycle import step0_difference, upcycle
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.config import CumoConfig, CumoVisionConfig
from cumo_model.model.cumo import CumoForConditionalGeneration, CumoModel
from cumo_model.model.losses import load_balancing_loss, router_z_loss
from cumo_model.model.moe import MoELayer, RoutingRecord, record_routing
from cumo_model.model.outputs import CumoOutput
from cumo_model.model.quantize import quantize_experts
from cumo_model.processing.processor import CumoImageProcessor, CumoProcessor, build_processor

# but for cumo_model.upcycle: its old module would hide the function of that name
keep_old_paths(
    "cumo_model",
    model="clip_moe compat config cumo llm_moe losses merge=image_tokens mlp_moe moe quantize vision=pyramid",
    processing="conversation sentencepieces templates",
    checkpoints="checkpoint=convert files=folders layout original_config parts patch shards "
    "tool=upcycle_checkpoint",
    training="adapters=lora flops monitor parallel recipe recover spread=expert_checkpoints start trainer "
    "zero=deepspeed",
    analysis="experts plots",
    serving="chat",
)

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
    "assemble",
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
