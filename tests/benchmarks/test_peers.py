"""Adapters of other people's layers, without a GPU: what they call, and what they make of the answers.

Stand-ins compute on the CPU what the packages document. Where a package can be imported, every recorded call
must bind to its real signature, and quack's own references must give what the stand-ins gave.
"""

import importlib
import inspect
import itertools
import site
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from benchmarks import bench_experts, peers
from benchmarks.shapes import Shape
from cumo_kernels.testing import assert_as_accurate_as_torch, make_routing
from tests.rounding import assert_same_formula

CLIP = Shape("small", 24, 32, 48, 40, 4, 2, "quick_gelu", True, groups=2)
SHAPES = {
    "clip": CLIP,
    "connector": replace(CLIP, activation="gelu", O=64),
    "mixtral": replace(CLIP, activation="swiglu", bias=False, O=32, K=3),
    "gated-with-bias": replace(CLIP, activation="swiglu"),
}


def in_turns(t, dim):
    """[first half; second half] -> one of each in turns."""
    return t.unflatten(dim, (2, -1)).transpose(dim - 1, dim).flatten(dim - 1, dim)


def segments(offsets):
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


class Quack(types.ModuleType):
    """gemm, gemm_act and gemm_dact of quack.gemm_interface 0.6, for what the adapter asks of them."""

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
             concat_layout=None):  # fmt: skip
        if concat_layout == ("B",):  # the dimension along which it is not contiguous has halves
            B = in_turns(B, -2 if B.stride(-1) == 1 else -1)
        if cu_seqlens_m is not None:
            rows = A if A_idx is None else A[A_idx.long()]
            pieces = [
                rows[a:b] @ B[e] + (0 if bias is None else bias[e])
                for e, (a, b) in enumerate(segments(cu_seqlens_m))
            ]
            return torch.cat(pieces)
        columns = A if A_idx is None else A[:, A_idx.long()]
        found = torch.stack([columns[:, a:b] @ B[a:b] for a, b in segments(cu_seqlens_k)])
        if concat_layout == ("out",):
            dim = -2 if out.stride(-1) == 1 else -1
            turns = found.unflatten(dim, (-1, 2)).transpose(dim - 1, dim)
            found = turns.flatten(dim - 1, dim)
        return out.copy_(found)

    def gemm_act(self, A, B, activation=None, cu_seqlens_m=None, A_idx=None, tuned=True, concat_layout=None):
        z = Quack.gemm(self, A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx, concat_layout=concat_layout)
        assert activation == "swiglu"
        return z, silu(z[:, ::2]) * z[:, 1::2]

    def gemm_dact(self, A, B, PreAct, activation=None, colvec_scale=None, colvec_reduce=False,
                  cu_seqlens_m=None, A_idx=None, dynamic_scheduler=True, tuned=True):  # fmt: skip
        da = Quack.gemm(self, A, B, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
        with torch.enable_grad():
            leaf = PreAct.detach().requires_grad_()
            a = silu(leaf[:, ::2]) * leaf[:, 1::2]
        scale = colvec_scale[:, None].to(da)
        (dz,) = torch.autograd.grad(a, leaf, da * scale)
        a = a.detach()
        assert activation == "swiglu" and colvec_reduce
        return dz, a * scale, (da.float() * a).sum(-1)


@pytest.fixture
def quack(monkeypatch):
    module = Quack()
    package = types.ModuleType("quack")
    package.gemm_interface = module
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    return module


def real(name):
    """The package itself if `make peers` has fetched it or it is installed, or a skip that says why not."""
    if peers.FETCHED.is_dir():
        site.addsitedir(str(peers.FETCHED))
    try:
        peers._prepare(name)
        return importlib.import_module(name)
    except Exception as error:  # whatever somebody else's package raises
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")


def layer_of(peer, shape):
    """Truth and peer on one routing plan, and their inputs."""
    torch.manual_seed(0)
    workload = bench_experts.setup(shape, torch.float32, "cpu", "skewed")
    torch.manual_seed(0)
    routing = make_routing("skewed", shape.T, shape.E, shape.K, "cpu")
    assert torch.equal(routing.topk_weights, workload.inputs[1])  # the same plan
    return workload, next(p for p in peers.PEERS if p.name == peer).make(shape, routing)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer_of_quacks_gemms_is_the_layer(quack, shape):
    workload, layer = layer_of("quack", shape)
    assert_as_accurate_as_torch(layer, workload.truth, *workload.inputs)
    names = {name for name, *_ in quack.calls}
    fused = shape.activation == "swiglu" and not shape.bias
    assert names == ({"gemm", "gemm_act", "gemm_dact"} if fused else {"gemm"})
    assert any(kwargs.get("A_idx") is not None for *_, kwargs in quack.calls)  # quack gathers


@pytest.mark.parametrize("shape", [SHAPES["clip"], SHAPES["mixtral"]], ids=["clip", "mixtral"])
def test_every_call_fits_quack_itself(quack, shape):
    workload, layer = layer_of("quack", shape)
    leaves = [t.clone().requires_grad_() for t in workload.inputs]
    layer(*leaves).square().sum().backward()
    calls = list(quack.calls)
    for name in ("quack", "quack.gemm_interface"):
        del sys.modules[name]
    package = real("quack.gemm_interface")
    assert len(calls) == 6
    for name, args, kwargs in calls:
        inspect.signature(getattr(package, name)).bind(*args, **kwargs)
        wide = lambda t: t.detach().double() if torch.is_tensor(t) and t.is_floating_point() else t
        args, kwargs = [wide(t) for t in args], {k: wide(v) for k, v in kwargs.items()}
        own = {k: v for k, v in kwargs.items() if k not in ("tuned", "dynamic_scheduler")}
        if name == "gemm_dact":  # its reference knows no scale
            scale, reduce = own.pop("colvec_scale"), own.pop("colvec_reduce")
            found = getattr(quack, name)(
                *args, **own, colvec_scale=torch.ones_like(scale), colvec_reduce=reduce
            )
            wanted = package.gemm_dact_ref(*args, **own)
        else:
            out = own.pop("out", None)
            mine = {} if out is None else {"out": torch.empty_like(out)}
            found = getattr(quack, name)(*args, **own, **mine)
            wanted = getattr(package, f"{name}_ref")(*args, **own)
            if own.get("concat_layout") == ("out",):  # the reference splits rows, and these are columns
                plain = package.gemm_ref(*args, **{k: v for k, v in own.items() if k != "concat_layout"})
                wanted = torch.cat([plain[..., ::2], plain[..., 1::2]], -1)
        pairs = zip(found, wanted, strict=False) if isinstance(found, tuple) else [(found, wanted)]
        for got, value in pairs:
            assert_same_formula(got, value)


def test_sonic_gets_our_plan_and_our_weights_as_views(monkeypatch):
    """A stand-in that reads weights and plan as sonicmoe 0.1.2 documents them."""
    calls = []

    def moe_general_routing_inputs(
        x, scores, tokens, experts, w1, b1, w2, b2, E, stream, activation_type, **options
    ):
        calls.append(((x, scores, tokens, experts, w1, b1, w2, b2, E, stream, activation_type), options))
        assert options == {"concat_layout": True} and (tokens.diff() >= 0).all()
        rows = torch.stack(
            [
                scores[i] * (silu(g) * u @ w2[:, :, experts[i]].T)
                for i in range(len(tokens))
                for g, u in [(w1[:, :, experts[i]] @ x[tokens[i]]).chunk(2)]
            ]
        )
        return torch.zeros_like(x).index_add(0, tokens.long(), rows.to(x)), None

    package, enums = types.ModuleType("sonicmoe"), types.ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs = moe_general_routing_inputs
    enums.ActivationType = types.SimpleNamespace(SWIGLU="swiglu")
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    workload, layer = layer_of("sonic-moe", SHAPES["mixtral"])
    assert_as_accurate_as_torch(layer, workload.truth, *workload.inputs)
    args, options = calls[0]
    assert args[4].shape == (96, 32, 4) and args[4].permute(2, 0, 1).is_contiguous()
    for name in ("sonicmoe", "sonicmoe.enums"):
        monkeypatch.delitem(sys.modules, name)
    inspect.signature(real("sonicmoe").moe_general_routing_inputs).bind(*args, **options)


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
    """scattermoe 0.3's parallel_experts: rows in expert order or in that of slots, in and out."""

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
    """moe_ops 0.1's grouped_gemm: weights (E, out, in) unless told otherwise, ends of groups, no zero."""

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


STAND_INS = {  # peer -> what stands in for its package, and which shapes it has
    "scattermoe": (scattermoe_of, SHAPES),
    "liger": (liger_of, ["mixtral"]),
    "moe-ops": (moe_ops_of, SHAPES),
    "triton_kernels": (triton_kernels_of, SHAPES),
}


def stand_in(peer, monkeypatch):
    """-> the modules put in place of the peer's, and the list that gets every call."""
    calls = []
    modules = STAND_INS[peer][0](calls)
    for path, content in modules.items():
        module = types.ModuleType(path)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)
    return modules, calls


cases = [(peer, shape) for peer, (_, shapes) in STAND_INS.items() for shape in shapes]


@pytest.mark.parametrize("peer, name", cases)
def test_a_layer_of_other_peoples_calls_is_the_layer(peer, name, monkeypatch):
    """A wrong order of arguments, a transposition or a row too many shows."""
    _, calls = stand_in(peer, monkeypatch)
    workload, layer = layer_of(peer, SHAPES[name])
    assert_as_accurate_as_torch(layer, workload.truth, *workload.inputs)
    assert calls


@pytest.mark.parametrize("peer", STAND_INS)
def test_every_call_fits_the_package(peer, monkeypatch):
    modules, calls = stand_in(peer, monkeypatch)
    for name in STAND_INS[peer][1]:
        workload, layer = layer_of(peer, SHAPES[name])
        layer(*workload.inputs)
    for path in modules:
        monkeypatch.delitem(sys.modules, path)
    package = real(next(p for p in peers.PEERS if p.name == peer).module)
    for function, args, kwargs in calls:
        found = getattr(package, function)
        if isinstance(found, type):  # an autograd.Function: behind its context
            inspect.signature(found.forward).bind(None, *args, **kwargs)
        else:
            inspect.signature(found).bind(*args, **kwargs)


def test_this_triton_has_the_name_that_triton_kernels_wants(monkeypatch):
    target_info = pytest.importorskip("triton.language.target_info")
    monkeypatch.delattr(target_info, "is_hip_gfx1250", raising=False)
    peers._prepare("triton_kernels.matmul")
    assert not target_info.is_hip_gfx1250()


def test_what_a_peer_cannot_do_is_a_reason():
    by_name = {peer.name: peer for peer in peers.PEERS}
    sonic = by_name["sonic-moe"]
    assert "only SwiGLU" in sonic.refuse(CLIP, torch.bfloat16, "cuda")
    wide = replace(SHAPES["mixtral"], O=64)
    for name in ("sonic-moe", "liger"):  # liger would read behind a narrower weight
        assert "as wide as their input" in by_name[name].refuse(wide, torch.bfloat16, "cuda")
    for name in ("quack", "sonic-moe"):
        assert by_name[name].refuse(SHAPES["mixtral"], torch.bfloat16, "cpu") == "it needs a cuda device"


def test_a_missing_package_is_a_gap_with_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", None)
    monkeypatch.setitem(sys.modules, "quack", None)
    _, gaps = peers.available(CLIP, torch.bfloat16, "cuda")
    assert gaps["quack"].startswith("quack.gemm_interface cannot be imported (ModuleNotFoundError")
