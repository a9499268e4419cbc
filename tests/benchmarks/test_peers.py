"""Adapters of other people's layers, without a GPU: what they call, and what they make of the answers.

Stand-ins compute on the CPU what the packages document. Where a package can be imported, every recorded call
must bind to its real signature, and quack's own references must give what the stand-ins gave.
"""

import importlib
import inspect
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
        detached = lambda t: t.detach() if isinstance(t, torch.Tensor) else t
        args, kwargs = [detached(t) for t in args], {k: detached(v) for k, v in kwargs.items()}
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
            torch.testing.assert_close(got, value)


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
