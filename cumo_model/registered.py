"""Importing this module registers CuMo with transformers, and its experts and ops; `lazy` does it in time."""

# ruff: noqa: F401
import cumo_kernels.integrations.transformers
import cumo_model.checkpoints.assemble
import cumo_model.checkpoints.convert
import cumo_model.checkpoints.original
import cumo_model.checkpoints.patch
import cumo_model.checkpoints.upcycle
import cumo_model.model.cumo
import cumo_model.model.quantize
import cumo_model.processing.processor
from cumo_kernels.moved import MovedModules
from cumo_model.old_paths import MOVED

OLD_PATHS = MovedModules("cumo_model", MOVED)
