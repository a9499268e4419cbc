"""Other implementations of the expert layer, each optional; `make peers` fetches the pinned wheels.

A peer is a function of (x, topk_weights, up_proj, down_proj, *biases) made for one routing plan. Peers use
the same gate and the same clock as our backends. A peer that is not installed, or that cannot run a case, is
listed as a gap with its reason.
"""

import functools
import importlib
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases.eager import activate, experts_loop
from benchmarks.cases.shapes import Shape
from benchmarks.peers import expert_parallel, quack_gemm, transformers_experts
from benchmarks.steps import room
from cumo_kernels import Routing

FETCHED = Path(__file__).resolve().parents[2] / ".peers"  # where `make peers` installs
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    module: str | None  # what must be importable
    make: Callable[[Shape, Routing], Layer] | None  # None: `never` has the reason
    no_backward: str | None = None  # why only its forward pass is measured
    devices: tuple[str, ...] = ("cuda",)
    capabilities: tuple[tuple[int, int], ...] = ()  # of the supported GPUs, later minors included
    max_experts: int | None = None
    only: str | None = None  # "swiglu": gated experts without bias
    square: bool = False  # output as wide as the input
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    needs: Callable[[Shape, torch.dtype], int] | None = None  # bytes, if more than others need
    never: str | None = None  # why it can never be timed
    hurdle: str | None = None  # why `make peers` does not install it

    def refuse(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        """Why it cannot run the case here, or None."""
        if device not in self.devices:
            return f"it needs a {' or '.join(self.devices)} device"
        if self.capabilities and (reason := _too_old_or_new(self.capabilities)) is not None:
            return reason
        if self.max_experts is not None and shape.E > self.max_experts:
            return f"it has at most {self.max_experts} experts, got {shape.E}"
        if self.only == "swiglu" and (shape.activation != "swiglu" or shape.bias):
            return "it has only SwiGLU experts without bias"
        if self.square and shape.O != shape.H:
            return "it has only layers whose output is as wide as their input"
        if dtype not in self.dtypes:
            return f"it does not compute in {dtype}"
        if self.needs is not None and (wanted := self.needs(shape, dtype)) > room(device):
            return f"it needs {wanted / 2**30:.0f} GiB, but {room(device) / 2**30:.0f} are available"
        if self.never is not None:
            return self.never
        if self.module is not None:
            if FETCHED.is_dir() and str(FETCHED) not in sys.path:
                # last in sys.path: a peer must not replace our packages; its .pth files are used
                site.addsitedir(str(FETCHED))
            try:
                _prepare(self.module)
                importlib.import_module(self.module)
            except Exception as error:  # any error of a third-party package is the reason
                why = f"{self.module} cannot be imported ({type(error).__name__}: {str(error)[:100]})"
                return why if self.hurdle is None else f"{why}; {self.hurdle}"
        return None


def _too_old_or_new(capabilities: tuple[tuple[int, int], ...]) -> str | None:
    """Why this machine's GPU is not among those, or None."""
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if here is not None and any(here[0] == major and here[1] >= minor for major, minor in capabilities):
        return None
    wanted = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
    found = "no GPU is here" if here is None else f"this GPU has {here[0]}.{here[1]}"
    return f"it needs compute capability {wanted}, {found}"


def _prepare(module: str) -> None:
    if module.startswith("triton_kernels"):
        # written for a later Triton: this one name is missing in 3.6
        import triton
        from triton.language import target_info

        def is_hip_gfx1250():  # Triton reads its source, and wants a def
            return False

        if not hasattr(target_info, "is_hip_gfx1250"):
            target_info.is_hip_gfx1250 = triton.constexpr_function(is_hip_gfx1250)


def _membership(routing: Routing) -> Tensor:
    """(S, E): 1 where the sorted row belongs to the expert.

    Biases are added as a product with it. Indexing would be simpler, but its gradient sums rows one after the
    other, for bf16 in bf16, which the gate refuses.
    """
    rows = torch.arange(routing.num_slots, dtype=torch.int32, device=routing.permutation.device)
    experts = torch.searchsorted(routing.expert_offsets[1:], rows, right=True)
    return torch.nn.functional.one_hot(experts, routing.num_experts)


def _weighted_sum(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    by_slot = rows.index_select(0, routing.inverse_permutation).unflatten(0, (-1, routing.top_k))
    return (by_slot * weights[..., None].to(by_slot)).sum(1)


def _with_bias(shape: Shape, routing: Routing, gemm: Callable[[Tensor, Tensor], Tensor]) -> Layer:
    """(rows, weight, *bias): `gemm`, which has no biases, followed by the bias."""
    member = _membership(routing) if shape.bias else None

    def linear(rows: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        out = gemm(rows, weight)
        return torch.addmm(out, member.to(rows), bias[0]) if bias else out

    return linear


def _composed(shape: Shape, routing: Routing, first: Layer, second: Layer) -> Layer:
    """Gather, GEMM and bias, activation, GEMM and bias, weighted sum; a GEMM takes (rows, weight, *bias)."""
    tokens = routing.token_indices

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        z = first(x.index_select(0, tokens), up, *biases[:1])
        return _weighted_sum(second(activate(z, shape.activation), down, *biases[1:]), weights, routing)

    return layer


def _eager_loop(shape: Shape, routing: Routing) -> Layer:
    indices = routing.topk_indices.long()
    return lambda x, weights, *rest: experts_loop(
        x, weights, indices, *rest, activation=shape.activation, groups=shape.groups
    )


def _grouped_linear(shape: Shape, routing: Routing) -> Layer:
    ends = routing.expert_offsets[1:].contiguous()
    gemm = lambda x, w: torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=ends)
    return _with_bias(shape, routing, gemm)


def _grouped_mm(shape: Shape, routing: Routing) -> Layer:
    linear = _grouped_linear(shape, routing)
    return _composed(shape, routing, linear, linear)


def grouped_mm_first(shape: Shape, routing: Routing) -> Layer:
    """Only the layer's first half: gather, torch's grouped_mm, bias, activation."""
    tokens, linear = routing.token_indices, _grouped_linear(shape, routing)
    return lambda x, *rest: activate(linear(x.index_select(0, tokens), *rest), shape.activation)


def _moe_ops(shape: Shape, routing: Routing) -> Layer:
    from moe_ops import grouped_gemm

    ends = routing.expert_offsets[1:].contiguous()
    linear = _with_bias(shape, routing, lambda x, w: grouped_gemm(x, w, ends))
    return _composed(shape, routing, linear, linear)


def _transformer_engine(shape: Shape, routing: Routing) -> Layer:
    from transformer_engine.pytorch import GroupedLinear

    splits = routing.tokens_per_expert.long().cpu()  # the host needs the sizes to launch its bf16 GEMMs

    def linear(columns: int, rows: int) -> Layer:
        @functools.cache
        def module(dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
            return GroupedLinear(
                shape.E, columns, rows, bias=shape.bias, params_dtype=dtype, device=device,
                # each expert's weight is a separate parameter, and so is its gradient
                single_grouped_weight=False, single_grouped_bias=False,
            )  # fmt: skip

        def call(x: Tensor, *stacked: Tensor) -> Tensor:
            given = {
                f"{name}{e}": part
                for name, whole in zip(("weight", "bias"), stacked, strict=False)
                for e, part in enumerate(whole.unbind())
            }
            return torch.func.functional_call(module(x.dtype, x.device), given, (x, splits))

        return call

    return _composed(shape, routing, linear(shape.H, shape.width), linear(shape.I, shape.O))


def _liger(shape: Shape, routing: Routing) -> Layer:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    indices = routing.topk_indices
    return lambda x, weights, up, down: LigerFusedMoEFunction.apply(x, up, down, indices, weights)


def _triton_kernels(shape: Shape, routing: Routing) -> Layer:
    from triton_kernels.matmul import matmul
    from triton_kernels.tensor import make_ragged_tensor_metadata

    ragged = make_ragged_tensor_metadata(routing.tokens_per_expert, routing.num_slots)
    tokens = routing.token_indices.int()

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        up_bias, down_bias = (b.float() for b in biases) if biases else (None, None)
        z = matmul(x, up.transpose(1, 2), up_bias, a_ragged_metadata=ragged, gather_indx=tokens)
        a = activate(z, shape.activation)
        y = matmul(a, down.transpose(1, 2), down_bias, a_ragged_metadata=ragged)
        return _weighted_sum(y, weights, routing)

    return layer


def _scattermoe(shape: Shape, routing: Routing) -> Layer:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    order, slots, ends = flatten_sort_count(routing.topk_indices.long(), num_experts=routing.num_experts)
    top_k = routing.top_k

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
        up_bias, down_bias = biases or (None, None)
        z = parallel_linear(
            x, up.transpose(1, 2), top_k, order, slots, ends, expert_biases=up_bias, grouped_out=True
        )
        return parallel_linear(
            activate(z, shape.activation), down.transpose(1, 2), 1, order, slots, ends,
            expert_biases=down_bias, grouped_in=True, gates=weights.to(x.dtype),
        )  # fmt: skip

    return layer


def _quack(shape: Shape, routing: Routing) -> Layer:
    return quack_gemm.make(shape, routing, _membership(routing) if shape.bias else None)


def _sonic(shape: Shape, routing: Routing) -> Layer:
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    tokens = torch.arange(shape.T, dtype=torch.int32, device=routing.topk_indices.device)
    tokens = tokens.repeat_interleave(routing.top_k)
    experts = routing.topk_indices.flatten().int()

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        # its weights are (rows, columns, E) views of ours, gate rows before up rows
        out, _ = moe_general_routing_inputs(
            x, weights.flatten(), tokens, experts, up.permute(1, 2, 0), None, down.permute(1, 2, 0), None,
            shape.E, torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, concat_layout=True,
        )  # fmt: skip
        return out

    return layer


ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PEERS = (
    Peer("cumo-original", None, _eager_loop, devices=("cpu", "cuda"), dtypes=ALL_DTYPES),
    Peer("torch-grouped_mm", None, _grouped_mm, devices=("cpu", "cuda"), dtypes=ALL_DTYPES),
    Peer(
        "transformers-grouped_mm", "transformers.integrations.moe",
        functools.partial(transformers_experts.make, "grouped_mm"),
        devices=("cpu", "cuda"), square=True, dtypes=ALL_DTYPES,
    ),
    Peer(
        "transformers-batched_mm", "transformers.integrations.moe",
        functools.partial(transformers_experts.make, "batched_mm"),
        devices=("cpu", "cuda"), square=True, dtypes=ALL_DTYPES, needs=transformers_experts.copied_bytes,
    ),
    Peer("moe-ops", "moe_ops", _moe_ops),
    Peer("liger", "liger_kernel.ops.fused_moe", _liger, only="swiglu", square=True, dtypes=(torch.bfloat16,)),
    Peer("triton_kernels", "triton_kernels.matmul", _triton_kernels, no_backward="it has no backward"),
    Peer("scattermoe", "scattermoe.parallel_experts", _scattermoe),
    Peer("quack", "quack.gemm_interface", _quack),
    Peer("sonic-moe", "sonicmoe", _sonic, only="swiglu", square=True),
    Peer(
        "transformer-engine", "transformer_engine.pytorch", _transformer_engine,
        hurdle="transformer-engine-torch 2.20.2 has no wheel: nvcc builds it against transformer-engine-cu13",
    ),
    Peer(
        "liger-cute", "liger_kernel.ops.cute.ops.moe", expert_parallel.liger_cute,
        no_backward=expert_parallel.ONE_BACKWARD, capabilities=((9, 0), (10, 0)), only="swiglu", square=True,
        dtypes=(torch.bfloat16,),
        hurdle="liger-cute-kernels 0.8.5 pins nvidia-nvshmem-cu13 3.6.5, torch 2.11 pins 3.4.5",
    ),
    Peer(
        "dist-moe", "dist_moe", expert_parallel.dist_moe,
        no_backward=expert_parallel.ONE_BACKWARD, capabilities=((10, 0),), only="swiglu", square=True,
        dtypes=(torch.bfloat16,),
        hurdle="dist-moe 0.1.0 needs Python 3.11 or 3.12, torch 2.14 and Triton 3.8",
    ),
    Peer(
        "lightmoe", "lightmoe", None, capabilities=((10, 0),), max_experts=256, only="swiglu", square=True,
        dtypes=(torch.bfloat16,), never="its products are only in NVFP4, which cannot pass a bf16 gate",
    ),
)  # fmt: skip


def available(shape: Shape, dtype: torch.dtype, device: str) -> tuple[list[Peer], dict[str, str]]:
    """-> peers that can run the case here, and the reason for each of the others."""
    reasons = {peer.name: peer.refuse(shape, dtype, device) for peer in PEERS}
    runnable = [peer for peer in PEERS if reasons[peer.name] is None]
    return runnable, {name: reason for name, reason in reasons.items() if reason is not None}


def compared_as_experts() -> dict[str, str]:
    """The gap of each peer where more than the experts is timed; the original's loop has everything."""
    reason = "its adapter has only the experts for a given plan, no router and no losses: see expert_mlp"
    return {peer.name: reason for peer in PEERS if peer.name != "cumo-original"}
