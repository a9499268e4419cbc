"""cumo_kernels: Mixture-of-Experts kernels for multimodal models, exact, deterministic, sync-free.

routing = route(router_logits, top_k=2)
out = expert_mlp(x, routing, up_proj, down_proj, up_bias, down_bias, activation="quick_gelu")
"""

# ruff: noqa: E402  the warning comes first, since an untested release may break a later import
from cumo_kernels import interrupts

if interrupts.program() is not None:  # the earliest moment at which this can be known
    interrupts.end_at_once()

from importlib import metadata

from cumo_kernels.versions import warn_of_untested

warn_of_untested()

from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.dispatch import explain, use_backend
from cumo_kernels.moved import keep_old_paths
from cumo_kernels.ops import (
    NoisyRouting,
    activate,
    combine,
    expert_mlp,
    grouped_gemm,
    noisy_top_k,
    permute,
    route,
    routing_from_topk,
    sparsemixer,
    update_selection_bias,
    with_capacity,
)
from cumo_kernels.packing.tensor import PackedWeight, pack
from cumo_kernels.types import Adapter, RouterStats, Routing

try:
    __version__ = metadata.version("cumo")
except metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+uninstalled"

keep_old_paths(
    "cumo_kernels",
    tiles="candidates codegen hardware measured problems tune tuning",
    verification="cases fuzz guards proofs rounding selfcheck=self_check shards verdict_file verdicts "
    "verified verify",
)

__all__ = [
    "ACTIVATIONS",
    "Adapter",
    "NoisyRouting",
    "PackedWeight",
    "RouterStats",
    "Routing",
    "activate",
    "combine",
    "expert_mlp",
    "explain",
    "grouped_gemm",
    "noisy_top_k",
    "pack",
    "permute",
    "route",
    "routing_from_topk",
    "sparsemixer",
    "update_selection_bias",
    "use_backend",
    "with_capacity",
]
