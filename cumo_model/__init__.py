"""cumo_model: CuMo, a vision-language model with Mixture-of-Experts in tower, connector and language model.

Importing this package registers the model with the Auto classes of transformers. It also registers the
experts of cumo_kernels for all MoE models of transformers under the name "cumo"
(`experts_implementation="cumo"`). Both happen when torch and transformers are imported, before or after this
package, which itself imports neither.
"""

from cumo_model import signals

if signals.is_command():  # the earliest moment at which this can be known
    signals.end_at_once()

from typing import TYPE_CHECKING

from cumo_model.lazy import register, watch
from cumo_model.names import attributes

if TYPE_CHECKING:
    from cumo_model.checkpoints.assemble import assemble
    from cumo_model.checkpoints.convert import convert
    from cumo_model.checkpoints.layout import original_layout
    from cumo_model.checkpoints.parts import from_parts
    from cumo_model.checkpoints.patch import patch_original
    from cumo_model.checkpoints.quantize_checkpoint import quantize_checkpoint
    from cumo_model.checkpoints.upcycle import step0_difference, upcycle
    from cumo_model.model.clip_moe import CumoVisionModel
    from cumo_model.model.config import CumoConfig, CumoVisionConfig
    from cumo_model.model.cumo import CumoForConditionalGeneration, CumoModel
    from cumo_model.model.losses import load_balancing_loss, router_z_loss
    from cumo_model.model.moe import MoELayer
    from cumo_model.model.outputs import CumoOutput
    from cumo_model.model.quantize import quantize_experts
    from cumo_model.model.quantizer import CumoQuantizationConfig
    from cumo_model.model.recording import RoutingRecord, record_routing
    from cumo_model.model.replay import replay_routing
    from cumo_model.processing.processor import CumoImageProcessor, CumoProcessor, build_processor

# the imports above, at first use; a test compares the two
_MODULES = {
    "cumo_model.checkpoints.assemble": "assemble",
    "cumo_model.checkpoints.convert": "convert",
    "cumo_model.checkpoints.layout": "original_layout",
    "cumo_model.checkpoints.parts": "from_parts",
    "cumo_model.checkpoints.patch": "patch_original",
    "cumo_model.checkpoints.quantize_checkpoint": "quantize_checkpoint",
    "cumo_model.checkpoints.upcycle": "step0_difference upcycle",
    "cumo_model.model.clip_moe": "CumoVisionModel",
    "cumo_model.model.config": "CumoConfig CumoVisionConfig",
    "cumo_model.model.cumo": "CumoForConditionalGeneration CumoModel",
    "cumo_model.model.losses": "load_balancing_loss router_z_loss",
    "cumo_model.model.moe": "MoELayer",
    "cumo_model.model.outputs": "CumoOutput",
    "cumo_model.model.quantize": "quantize_experts",
    "cumo_model.model.quantizer": "CumoQuantizationConfig",
    "cumo_model.model.recording": "RoutingRecord record_routing",
    "cumo_model.model.replay": "replay_routing",
    "cumo_model.processing.processor": "CumoImageProcessor CumoProcessor build_processor",
}
__getattr__, __dir__ = attributes(__name__, _MODULES, ("checkpoints", "model", "processing"), register)
watch()

__all__ = [
    "CumoConfig",
    "CumoForConditionalGeneration",
    "CumoImageProcessor",
    "CumoModel",
    "CumoOutput",
    "CumoProcessor",
    "CumoQuantizationConfig",
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
    "quantize_checkpoint",
    "quantize_experts",
    "record_routing",
    "replay_routing",
    "router_z_loss",
    "step0_difference",
    "upcycle",
]
