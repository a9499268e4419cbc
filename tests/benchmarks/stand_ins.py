"""Stand-ins for third-party packages: CPU versions, after their documentation, of what the adapters call.

Each records its calls, which must match the real signatures (test_peers.py).
"""

import itertools
import types
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import silu

from benchmarks.cases.eager import activate
from benchmarks.cases.shapes import Shape

CLIP = Shape("small", 24, 32, 48, 40, 4, 2, "quick_gelu", True, groups=2)
SHAPES = {
    "clip": CLIP,
    "connector": replace(CLIP, activation="gelu", O=64),
    "mixtral": replace(CLIP, activation="swiglu", bias=False, O=32, K=3),
    "gated-with-bias": replace(CLIP, activation="swiglu"),
}


def in_turns(t, dim):
    """[first half; second half] -> alternating elements of both."""
    return t.unflatten(dim, (2, -1)).transpose(dim - 1, dim).flatten(dim - 1, dim)


def segments(offsets):
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


class Quack(types.ModuleType):
    """gemm, gemm_act and gemm_dact of quack.gemm_interface 0.6, as far as the adapter uses them."""

    act = {  # of a GEMM's output; gate and up columns alternate
        "quick_gelu": lambda z: activate(z, "quick_gelu"),
        "gelu_erf": lambda z: activate(z, "gelu"),
        "swiglu": lambda z: silu(z[:, ::2]) * z[:, 1::2],
    }

    def __init__(self):
        super().__init__("quack.gemm_interface")
        self.calls = []

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name not in ("gemm", "gemm_act", "gemm_dact"):
            return value

        def recorded(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return value(*args, **kwargs)

        return recorded

    def gemm(self, A, B, out=None, bias=None, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, tuned=True,
             concat_layout=()):  # fmt: skip
        if "B" in concat_layout:  # the dimension along which it is not contiguous has the halves
            B = in_turns(B, -2 if B.stride(-1) == 1 else -1)
        if "bias" in concat_layout:
            bias = in_turns(bias, -1)
        if cu_seqlens_m is not None:
            rows = A if A_idx is None else A[A_idx.long()]
            pieces = [
                rows[a:b] @ B[e] + (0 if bias is None else bias[e])
                for e, (a, b) in enumerate(segments(cu_seqlens_m))
            ]
            return torch.cat(pieces)
        columns = A if A_idx is None else A[:, A_idx.long()]
        found = torch.stack([columns[:, a:b] @ B[a:b] for a, b in segments(cu_seqlens_k)])
        if "out" in concat_layout:
            dim = -2 if out.stride(-1) == 1 else -1
            turns = found.unflatten(dim, (-1, 2)).transpose(dim - 1, dim)
            found = turns.flatten(dim - 1, dim)
        return out.copy_(found)

    def gemm_act(self, A, B, bias=None, activation=None, cu_seqlens_m=None, A_idx=None, tuned=True,
                 concat_layout=()):  # fmt: skip
        z = Quack.gemm(
            self, A, B, bias=bias, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx, concat_layout=concat_layout
        )
        return z, self.act[activation](z)

    def gemm_dact(self, A, B, PreAct, activation=None, colvec_scale=None, colvec_reduce=False,
                  cu_seqlens_m=None, A_idx=None, dynamic_scheduler=True, tuned=True):  # fmt: skip
        da = Quack.gemm(self, A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
        with torch.enable_grad():
            leaf = PreAct.detach().requires_grad_()
            a = self.act[activation](leaf)
        scale = colvec_scale[:, None].to(da)
        (dz,) = torch.autograd.grad(a, leaf, da * scale)
        a = a.detach()
        assert colvec_reduce
        return dz, a * scale, (da.float() * a).sum(-1)


def products(rows, weights, ends, biases=None):
    """Rows of expert e by its (in, out) weight; an expert's rows end where `ends` says."""
    assert rows.shape[1] == weights.shape[1] and len(ends) == len(weights) and ends[-1] == len(rows)
    begins = [0, *ends.tolist()]
    return torch.cat(
        [
            rows[a:b] @ weights[e] + (0 if biases is None else biases[e])
            for e, (a, b) in enumerate(itertools.pairwise(begins))
        ]
    )


def scattermoe_of(calls):
    """scattermoe 0.3's parallel_experts: input and output rows in expert order or in slot order."""

    def flatten_sort_count(expert_idxs, num_experts):
        experts, slots = torch.sort(expert_idxs.flatten(), stable=True)
        return experts, slots, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,
                        expert_biases=None, gates=None, grouped_in=False, grouped_out=False):  # fmt: skip
        assert len(sorted_scattered_idxs) == len(inputs) * k and (sorted_expert_idxs.diff() >= 0).all()
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        out = products(rows, expert_weights, expert_offsets, expert_biases)
        if not grouped_out:
            out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
        if gates is None:
            return out
        return (gates[:, None] @ out.view(*gates.shape, -1))[:, 0]

    return {
        "scattermoe": {},
        "scattermoe.parallel_experts": {
            "flatten_sort_count": flatten_sort_count,
            "parallel_linear": noted("parallel_linear", parallel_linear, calls),
        },
    }


def liger_of(calls):
    """liger_kernel 0.8's LigerFusedMoEFunction: gate rows before up rows."""

    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32 and top_k_index.shape == top_k_weights.shape
        assert down_proj.shape[1:] == (x.shape[1], gate_up_proj.shape[1] // 2)
        index = top_k_index.long()
        gate, up = (gate_up_proj[index] @ x[:, None, :, None])[..., 0].chunk(2, -1)
        each = (down_proj[index] @ (silu(gate) * up)[..., None])[..., 0]
        return (each * top_k_weights[..., None]).sum(1).to(x)

    function = types.SimpleNamespace(apply=noted("LigerFusedMoEFunction", apply, calls))
    return {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.fused_moe": {"LigerFusedMoEFunction": function},
    }


def moe_ops_of(calls):
    """moe_ops 0.1's grouped_gemm: weights (E, out, in) by default, group ends without the leading zero."""

    def grouped_gemm(A, B, offsets, trans_b=True):
        return products(A, B.transpose(1, 2) if trans_b else B, offsets)

    return {"moe_ops": {"grouped_gemm": noted("grouped_gemm", grouped_gemm, calls)}}


def triton_kernels_of(calls):
    """triton_kernels' matmul: weights (E, in, out), fp32 biases, rows gathered by index."""

    def make_ragged_tensor_metadata(slice_sizes, n_total_rows):
        assert slice_sizes.sum() == n_total_rows
        return slice_sizes.cumsum(0)

    def matmul(a, b, bias, a_ragged_metadata=None, b_ragged_metadata=None, gather_indx=None):
        assert (bias is None or bias.dtype == torch.float32) and b_ragged_metadata is None
        rows = a if gather_indx is None else a[gather_indx.long()]
        return products(rows, b, a_ragged_metadata, bias).to(a)

    return {
        "triton_kernels": {},
        "triton_kernels.matmul": {"matmul": noted("matmul", matmul, calls)},
        "triton_kernels.tensor": {"make_ragged_tensor_metadata": make_ragged_tensor_metadata},
    }


def noted(name, function, calls):
    def call(*args, **kwargs):
        calls.append((name, args, kwargs))
        return function(*args, **kwargs)

    return call


def transformer_engine_of(calls):
    """GroupedLinear of transformer_engine 2.20: a weight and a bias for every expert, sizes on the host."""

    class GroupedLinear(torch.nn.Module):
        def __init__(self, num_gemms, in_features, out_features, bias=True, params_dtype=None, device="cuda",
                     single_grouped_weight=False, single_grouped_bias=False):  # fmt: skip
            super().__init__()
            assert not (single_grouped_weight or single_grouped_bias)
            empty = lambda *size: torch.nn.Parameter(torch.empty(*size, dtype=params_dtype, device=device))
            self.experts, self.with_bias = range(num_gemms), bias
            self.shape = (num_gemms, out_features, in_features)
            for e in self.experts:
                self.register_parameter(f"weight{e}", empty(out_features, in_features))
                if bias:
                    self.register_parameter(f"bias{e}", empty(out_features))

        def forward(self, inp, m_splits):
            assert m_splits.device.type == "cpu" and m_splits.dtype == torch.int64
            weights, biases = (
                [getattr(self, f"{name}{e}") for e in self.experts] if wanted else None
                for name, wanted in (("weight", True), ("bias", self.with_bias))
            )
            stacked = torch.stack(weights)
            assert stacked.shape == self.shape
            return products(inp, stacked.mT, m_splits.cumsum(0), biases)

    for name in ("__init__", "forward"):
        setattr(GroupedLinear, name, noted(f"GroupedLinear.{name}", getattr(GroupedLinear, name), calls))
    return {"transformer_engine": {}, "transformer_engine.pytorch": {"GroupedLinear": GroupedLinear}}


def by_slot(x, experts, weights, gate, up, down):
    """SwiGLU experts, weights (E, out, in)."""
    chosen = experts.long()
    rows = x[:, None, :, None]
    a = silu(gate[chosen] @ rows) * (up[chosen] @ rows)
    return ((down[chosen] @ a)[..., 0] * weights[..., None]).sum(1).to(x)


def liger_cute_of(calls):
    """configure and moe_fused of liger_kernel 0.8.5: gate and up separate, combined only in forward."""

    @dataclass(frozen=True)
    class MoEConfig:
        max_tokens: int
        hidden_size: int
        num_experts: int
        top_k: int
        num_hosts: int
        gpus_per_host: int

    reserved = []

    def configure(bootstrap_group=None, device=None, moe=None):
        assert not reserved, "reserved twice"
        reserved.append(moe)
        return True

    def moe_fused(X, expert_indices, expert_weights, all_B, all_C, all_A, num_experts, top_k):
        (room,) = reserved
        assert X.shape[0] <= room.max_tokens and X.shape[1] <= room.hidden_size
        assert num_experts == len(all_A) <= room.num_experts and top_k <= room.top_k
        assert expert_indices.dtype == torch.int32 and expert_weights.dtype == X.dtype
        assert not torch.is_grad_enabled() or (all_B.is_contiguous() and all_C.is_contiguous())
        return by_slot(X, expert_indices, expert_weights, all_B, all_C, all_A)

    note = lambda function: noted(function.__name__, function, calls)
    return {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.configure": {"MoEConfig": note(MoEConfig), "configure": note(configure)},
        "liger_kernel.ops.cute": {},
        "liger_kernel.ops.cute.ops": {},
        "liger_kernel.ops.cute.ops.moe": {"moe_fused": note(moe_fused)},
    }


def dist_moe_of(calls):
    """Config, create_context and routed_experts of dist_moe 0.1: gate rows before up rows."""

    def create_context(group, config, device):
        close = lambda: calls.append(("Context.close", (None,), {}))
        return types.SimpleNamespace(config=config, close=close)

    def routed_experts(x_TD, topk_expert_ids_TK, topk_scores_TK, w13_weight, w2_weight, context):
        sizes = context.config
        assert x_TD.shape == (sizes.num_local_input_tokens, sizes.hidden_dim)
        assert topk_scores_TK.shape == topk_expert_ids_TK.shape == (len(x_TD), sizes.top_k)
        assert w13_weight.shape == (sizes.num_experts, 2 * sizes.intermediate_dim, sizes.hidden_dim)
        for given in (x_TD, topk_expert_ids_TK, topk_scores_TK, w13_weight, w2_weight):
            assert given.is_contiguous()
        gate, up = w13_weight.chunk(2, 1)
        return by_slot(x_TD, topk_expert_ids_TK, topk_scores_TK, gate, up, w2_weight)

    config = lambda **sizes: types.SimpleNamespace(**sizes)
    named = {"Config": config, "create_context": create_context, "routed_experts": routed_experts}
    return {"dist_moe": {name: noted(name, function, calls) for name, function in named.items()}}


STAND_INS = {  # peer -> the stand-in for its package, and its shapes
    "scattermoe": (scattermoe_of, SHAPES),
    "liger": (liger_of, ["mixtral"]),
    "moe-ops": (moe_ops_of, SHAPES),
    "triton_kernels": (triton_kernels_of, SHAPES),
    "transformer-engine": (transformer_engine_of, SHAPES),
    "liger-cute": (liger_cute_of, ["mixtral"]),
    "dist-moe": (dist_moe_of, ["mixtral"]),
}
