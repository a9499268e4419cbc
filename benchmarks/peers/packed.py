"""Other implementations of experts in 4 bits, each optional: bitsandbytes and grouped-nf4-gemm.

A layer is a function of (x, topk_weights), made for one routing plan and two weights in nf4.
"""

import importlib
import site
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases.eager import activate
from benchmarks.cases.shapes import Shape
from benchmarks.peers.table import FETCHED
from cumo_kernels import PackedWeight, Routing, expert_mlp
from cumo_kernels.packing.layouts import to_bitsandbytes

GROUP = 64  # weights that share a scale, in both
Layer = Callable[[Tensor, Tensor], Tensor]


def _missing(module: str) -> str | None:
    """Why a package cannot be imported, or None."""
    if FETCHED.is_dir() and str(FETCHED) not in sys.path:
        site.addsitedir(str(FETCHED))  # last in sys.path: a peer must not replace installed packages
    try:
        importlib.import_module(module)
    except Exception as error:  # any error of a third-party package is the reason
        return f"{module} cannot be imported ({type(error).__name__}: {str(error)[:100]})"
    return None


def _bitsandbytes(shape: Shape, routing: Routing, up: PackedWeight, down: PackedWeight) -> Layer:
    """Dequantise the whole layer, then multiply, as its `replace_parameter_4bit` does for stacked weights."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    code = get_4bit_type("nf4", device=up.packed.device)
    stored = [(*to_bitsandbytes(weight), weight.shape) for weight in (up, down)]

    def dense(dtype: torch.dtype) -> list[Tensor]:
        return [
            dequantize_4bit(data, QuantState(absmax, size, code, GROUP, "nf4", dtype))
            for data, absmax, size in stored
        ]

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        plan = replace(routing, topk_weights=weights)
        return expert_mlp(x, plan, *dense(x.dtype), activation=shape.activation)

    return layer


def _grouped_nf4(shape: Shape, routing: Routing, up: PackedWeight, down: PackedWeight) -> Layer:
    """Its grouped products on packed weights, which read the sizes of the groups on the host."""
    sizes = routing.tokens_per_expert.tolist()
    experts = [e for e, size in enumerate(sizes) if size]
    sizes = [size for size in sizes if size]
    packed = {}
    for name, weight in (("up", up), ("down", down)):
        data, absmax = to_bitsandbytes(weight)
        packed[name] = data.view(weight.packed.shape), absmax.view(weight.scales.shape)
    tokens = routing.token_indices

    def product(rows: Tensor, name: str) -> Tensor:
        if rows.is_cuda:
            from nf4_qlora import gemm_4bit_grouped_train

            return gemm_4bit_grouped_train(rows, *packed[name], sizes, experts)
        from cpu_grouped import gemv_nf4_grouped_cpu

        return gemv_nf4_grouped_cpu(rows.float().contiguous(), *packed[name], sizes, experts, threads=1)

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        a = activate(product(x.index_select(0, tokens), "up"), shape.activation)
        rows = product(a, "down").index_select(0, routing.inverse_permutation)
        slots = rows.unflatten(0, (-1, routing.top_k))
        return (slots * weights[..., None].to(slots.dtype)).sum(1).to(x.dtype)

    return layer


def available(
    shape: Shape, routing: Routing, up: PackedWeight, down: PackedWeight, dtype: torch.dtype
) -> tuple[dict[str, Layer], dict[str, str], dict[str, str]]:
    """Peers for weights in nf4.

    Args:
        shape: the layer.
        routing: its plan, whose weights a call replaces.
        up: (E, N, H) in nf4.
        down: (E, O, I) in nf4.
        dtype: dtype of x.

    Returns:
        name -> layer; name -> why it has no backward; name -> why it cannot run here.
    """
    layers, forward_only, gaps = {}, {}, {}
    is_cuda = up.packed.is_cuda
    for name, make, module in (
        ("bitsandbytes", _bitsandbytes, "bitsandbytes.functional"),
        ("grouped-nf4-gemm", _grouped_nf4, "nf4_qlora" if is_cuda else "cpu_grouped"),
    ):
        reason = _missing(module)
        if reason is None and (up.group != GROUP or down.group != GROUP):
            reason = f"it has blocks of {GROUP}, got {up.group} and {down.group}"
        if reason is None and name == "grouped-nf4-gemm":
            reason = _no_kernels(is_cuda, shape, dtype)
        if reason is None:
            layers[name] = make(shape, routing, up, down)
        else:
            gaps[name] = reason
    if "grouped-nf4-gemm" in layers and not is_cuda:
        forward_only["grouped-nf4-gemm"] = "its products for a CPU are for inference"
    return layers, forward_only, gaps


def _no_kernels(is_cuda: bool, shape: Shape, dtype: torch.dtype) -> str | None:
    if shape.bias:
        return "it has no biases"
    if is_cuda:
        return None if dtype == torch.bfloat16 else f"it does not compute in {dtype}"
    from cpu_grouped import cpu_kernels_available

    return None if cpu_kernels_available() else "its products for a CPU need a C compiler"
