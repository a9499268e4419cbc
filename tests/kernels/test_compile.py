"""Every op under torch.library's own checks and under torch.compile without a graph break."""

import contextlib
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

from cumo_kernels import (
    activate,
    combine,
    dispatch,
    expert_mlp,
    grouped_gemm,
    permute,
    route,
    routing_from_topk,
)
from cumo_kernels.ops.activation import _activate
from cumo_kernels.ops.experts import _expert_mlp, _expert_mlp_backward
from cumo_kernels.ops.grouped_gemm import _grouped_gemm, _grouped_gemm_weight_grad
from cumo_kernels.ops.permutation import _combine, _permute
from cumo_kernels.ops.routing import _route, _sort_by_expert
from cumo_kernels.ops.scores import scored_route
from cumo_kernels.testing import make_routing
from cumo_kernels.tiles import hardware, measured
from cumo_kernels.types import Scoring
from tests.rounding import assert_same_formula

T, H, I, O, E, K = 12, 6, 8, 5, 4, 2


def make_op_calls():
    plan = make_routing("uniform", T, E, K)
    leaf = lambda *size: torch.randn(*size, requires_grad=True)
    perm, inverse, offsets = plan.permutation, plan.inverse_permutation, plan.expert_offsets
    weights = plan.topk_weights.clone().requires_grad_()
    groups = torch.tensor([0, 5, T], dtype=torch.int32)
    ref = "reference"
    yield "route", _route, (leaf(T, E), None, None, 3, K, True, None, ref)
    yield "route-gate", _route, (leaf(T, H), leaf(E, H), groups, 2, K, True, None, ref)
    scored = (torch.rand(E), groups, 2, K, True, str(Scoring("sigmoid", 2, 1, "top2", 2.5)), None, ref)
    yield "scored-route", scored_route, (leaf(T, E), None, *scored)
    yield "scored-route-gate", scored_route, (leaf(T, H), leaf(E, H), *scored)
    given = (None, groups, 2, K, True, str(Scoring()), plan.topk_indices, ref)
    yield "scored-route-given", scored_route, (leaf(T, H), leaf(E, H), *given)
    yield "sort", _sort_by_expert, (plan.topk_indices, E, ref)
    yield "permute", _permute, (leaf(T, H), perm, inverse, K, ref)
    yield "combine", _combine, (leaf(T * K, H), weights, perm, inverse, K, ref)
    yield "combine-unit", _combine, (leaf(T * K, H), None, perm, inverse, K, ref)
    yield "activate", _activate, (leaf(T, 2 * I), "swiglu", ref)
    yield (
        "gemm",
        _grouped_gemm,
        (leaf(T * K, H), leaf(E, I, H), offsets, leaf(E, I), None, None, 1, None, ref),
    )
    yield (
        "gemm-gather",
        _grouped_gemm,
        (leaf(T, H), leaf(E, I, H), offsets, None, perm, inverse, K, "geglu", ref),
    )
    arguments = (
        leaf(T, H),
        weights,
        perm,
        inverse,
        offsets,
        leaf(E, I, H),
        leaf(E, O, I),
        leaf(E, I),
        leaf(E, O),
    )
    yield "expert_mlp", _expert_mlp, (*arguments, "gelu", "preact", ref)
    yield "expert_mlp-x", _expert_mlp, (*arguments[:7], None, None, "gelu", "x", ref)
    # the fakes, without a bias and with one that needs no gradient
    rows, grad, none = torch.randn(T * K, H), torch.randn(T, O), torch.empty(0)
    for need_bias in (False, True):
        yield (
            f"weight_grad-{need_bias}",
            _grouped_gemm_weight_grad,
            (torch.randn(T * K, I), rows, offsets, None, None, 1, need_bias, ref),
        )
        given = [t.detach() for t in arguments[: 9 if need_bias else 7]] + [None] * (0 if need_bias else 2)
        for needs in ("xwubdc", "xwub", "d", "bc") if need_bias else ("xwud", "u", "d"):
            needs = [flag in needs for flag in "xwubdc"]  # x, weights, up, its bias, down, its bias
            yield (
                f"expert_mlp_backward-{need_bias}-{sum(needs)}-{needs.index(True)}",
                _expert_mlp_backward,
                (grad, *given, none, none, "gelu", "x", *needs, ref),
            )


@pytest.mark.parametrize("op, arguments", [pytest.param(op, a, id=name) for name, op, a in make_op_calls()])
def test_opcheck(op, arguments):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.op, arguments, test_utils=checks)
    # when traced, an upstream gradient may have another layout: equal to half of the digits of fp64
    floats = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()
    wide = [t.detach().double().requires_grad_(t.requires_grad) if floats(t) else t for t in arguments]
    half = math.sqrt(torch.finfo(torch.float64).eps)
    torch.library.opcheck(op.op, wide, test_utils="test_aot_dispatch_dynamic", rtol=half, atol=half)


def layer(x, gate, up_proj, down_proj, up_bias, down_bias):
    plan = route(x, K, gate, groups=3)
    out = expert_mlp(x, plan, up_proj, down_proj, up_bias, down_bias, activation="quick_gelu")
    return out, plan.stats.mean_probs, plan.stats.mean_squared_logsumexp


def layer_of_primitives(x, gate, up_proj, down_proj, up_bias, down_bias):
    plan = route(x @ gate.T, K, groups=3)
    rows = permute(x, plan)
    hidden = grouped_gemm(rows, up_proj, plan.expert_offsets, bias=up_bias, activation="quick_gelu")
    out = combine(grouped_gemm(hidden, down_proj, plan.expert_offsets, bias=down_bias), plan)
    return out, plan.stats.mean_probs, plan.stats.mean_squared_logsumexp


@pytest.mark.parametrize("function", [layer, layer_of_primitives])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fullgraph_compile_equals_eager(function, dtype):
    torch._dynamo.reset()
    shapes = [(T, H), (E, H), (E, I, H), (E, O, I), (E, I), (E, O)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outs = run(*leaves)
        sum(o.float().square().sum() for o in outs).backward()
        results.append([*outs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_with_different_limits_are_graphs_of_their_own():
    torch._dynamo.reset()
    plan, x = make_routing("uniform", T, E, K), torch.randn(T, H)
    up, down = 9 * torch.randn(E, 2 * I, H), torch.randn(E, H, I)

    class Clamped(torch.nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.activation = f"swiglu_clamped(limit={limit!r})"

        def forward(self, x):
            return expert_mlp(x, plan, up, down, activation=self.activation)

    layers = [Clamped(limit) for limit in (10.0, 7.0, 1.0)]
    counter = CompileCounterWithBackend("aot_eager")
    for _ in range(2):
        outs = [torch.compile(layer, fullgraph=True, backend=counter)(x) for layer in layers]
        assert counter.frame_count == 3
    assert all(torch.equal(out, layer(x)) for out, layer in zip(outs, layers, strict=True))
    assert len({out.sum().item() for out in outs}) == 3
    both = torch.compile(torch.nn.Sequential(*layers), fullgraph=True, backend=counter)
    assert torch.equal(both(x), layers[2](layers[1](layers[0](x)))) and counter.frame_count == 4


class _Watch(TorchDispatchMode):
    """Records every op that goes through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [layer, layer_of_primitives])
def test_direct_calls_equal_those_through_the_dispatcher(function):
    """Eager calls bypass the dispatcher unless a mode is active: the same bits both ways."""
    shapes = [(T, H), (E, H), (E, I, H), (E, O, I), (E, I), (E, O)]
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for watch in (contextlib.nullcontext(), _Watch()):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with (
            watch,
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
            ) as profile,
        ):
            outs = function(*leaves)
            sum(o.square().sum() for o in outs).backward()
        results.append([*outs, *(leaf.grad for leaf in leaves)])
        names = {event.name for event in profile.events()}
        watched = isinstance(watch, _Watch)
        assert any(name.startswith("cumo::") for name in names) == watched
        assert not watched or {"route", "route_backward"} <= watch.seen
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_transforms_and_second_derivatives_use_the_dispatcher():
    plan, x = make_routing("uniform", T, E, K), torch.randn(T, H, requires_grad=True)
    up, down = torch.randn(E, I, H), torch.randn(E, O, I)
    out = lambda x: expert_mlp(x, plan, up, down, activation="gelu").square().sum()
    (first,) = torch.autograd.grad(out(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_mlp_backward"):
        torch.autograd.grad(first.sum(), x)
    rows = permute(x, plan)  # linear, so its derivative has a derivative too
    (first,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.full_like(x, 2.0 * K))


def test_layer_and_primitives_agree():
    shapes = [(T, H), (E, H), (E, I, H), (E, O, I), (E, I), (E, O)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert_same_formula(layer(*inputs), layer_of_primitives(*inputs))


def test_autocast_reaches_gate_and_grouped_gemm():
    plan = make_routing("uniform", T, E, K)
    x, gate, weight = torch.randn(T, H), torch.randn(E, H), torch.randn(E, I, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_gemm(x, weight, plan.expert_offsets, gather=plan)
        routing = route(x, K, gate)
    low = (x.bfloat16(), gate.bfloat16(), weight.bfloat16())
    assert torch.equal(out, grouped_gemm(low[0], low[2], plan.expert_offsets, gather=plan))
    assert torch.equal(routing.topk_weights, route(low[0], K, low[1]).topk_weights)
    assert out.dtype == torch.bfloat16 and routing.topk_weights.dtype == torch.float32


SIZES = [(4, 8), (5, 8), (40, 8), (300, 8), (2000, 8), (2001, 8), (2001, 300)]
# (rows, columns, ms of triton, ms of cuda), and the number of compilations with symbolic sizes
DECIDED = [
    pytest.param([(16, 8, 1, 2), (1000, 8, 2, 1), (1000, 512, 1, 2)], 3, id="by-rows-and-columns"),
    pytest.param([(16, 8, 1, 2), (1000, 8, 2, 1)], 2, id="by-rows"),
    pytest.param([(16, 8, 1, 2), (1000, 8, 1, 2), (1000, 512, 1, 3)], 1, id="by-no-size"),
]


@pytest.fixture
def measured_as(monkeypatch):
    """Factory: timings replace those of measured.json; CPU tensors and the reference, a GPU's kernels.

    It returns the list of backends that have run."""
    yield partial(_pretend, monkeypatch)
    measured.forget()


def _pretend(monkeypatch, times) -> list[str]:
    row = {"op": "activate", "dtype": "float32", "mode": "forward"}
    rows = [{**row, "shape": [t, h], "ms": {"triton": a, "cuda": b}} for t, h, a, b in times]
    monkeypatch.setattr(measured, "TABLE", {"nvidia_h100": rows})
    able = tuple(replace(row, refuse=lambda *_: None, needs_proof=False) for row in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", able)
    monkeypatch.setattr(dispatch._forced, "name", None)
    plain, ran = dispatch.implementation("reference", "activate"), []
    for name in ("triton", "cuda"):
        spy = lambda *args, name=name: ran.append(name) or plain(*args)
        monkeypatch.setitem(dispatch._implementations, (name, "activate"), spy)
    measured.forget()
    return ran


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("times", "compiled"), DECIDED)
def test_graphs_get_the_choice_of_eager_code(measured_as, times, compiled, dynamic):
    ran = measured_as(times)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x: activate(x, "gelu"), backend=counter, fullgraph=True, dynamic=dynamic)
    chosen = []
    with hardware.assume(hardware.find("nvidia_h100")):
        for size in SIZES:
            x = torch.randn(size)
            function(x)
            chosen.append(dispatch.choose("activate", x))
    assert ran == chosen
    assert counter.frame_count == (compiled if dynamic else len(SIZES))
    assert len(set(chosen)) == (1 if compiled == 1 else 2)


class Activate(torch.nn.Module):
    def forward(self, x):
        return activate(x, "gelu")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("times", [pytest.param(row.values[0], id=row.id) for row in DECIDED])
def test_an_exported_program_has_one_choice_for_all_sizes(measured_as, times, strict):
    ran = measured_as(times)
    largest = SIZES[-1]
    rows, columns = Dim("rows"), Dim("columns")
    below = Dim("below", max=100)  # fewer rows than the limit between 16 and 1000
    with hardware.assume(hardware.find("nvidia_h100")):
        wanted = {
            (rows, columns): dispatch.choose("activate", torch.empty(largest)),
            (below, None): dispatch.choose("activate", torch.empty(5, 8)),
            (None, None): dispatch.choose("activate", torch.empty(5, 8)),
        }
        for dims, name in wanted.items():
            shapes = {"x": dict(enumerate(dims))}
            program = export(Activate(), (torch.randn(5, 8),), dynamic_shapes=shapes, strict=strict)
            for size in SIZES[:2] if dims[0] is None else SIZES[:3] if dims[1] is None else SIZES:
                if dims[0] is None and size[0] != 5:
                    continue
                ran.clear()
                x = torch.randn(size)
                assert torch.equal(program.module()(x), activate(x, "gelu"))
                assert ran[0] == name, (dims, size)


class Layer(torch.nn.Module):
    """`layer`, its primitives, or the experts alone, as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def experts_alone(x, weights, indices, up_proj, down_proj):
    return (expert_mlp(x, routing_from_topk(weights, indices, E), up_proj, down_proj, activation="gelu"),)


def route_alone(x):
    plan = route(x, K)
    return plan.topk_weights, plan.topk_indices, plan.stats.mean_probs, plan.expert_offsets


def make_weights(dtype):
    shapes = [(E, H), (E, I, H), (E, O, I), (E, I), (E, O)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


SYMBOLIC = {  # function -> inputs for a number of tokens; those with True have it as first dimension
    layer: lambda t, dtype: ([torch.randn(t, H, dtype=dtype), *make_weights(dtype)], [True] + [False] * 5),
    layer_of_primitives: lambda t, dtype: (
        [torch.randn(t, H, dtype=dtype), *make_weights(dtype)],
        [True] + [False] * 5,
    ),
    experts_alone: lambda t, dtype: (
        [
            torch.randn(t, H, dtype=dtype),
            torch.rand(t, K, dtype=dtype),
            torch.randint(0, E + 1, (t, K)),
            *make_weights(dtype)[1:3],
        ],
        [True] * 3 + [False] * 2,
    ),
    route_alone: lambda t, dtype: ([torch.randn(t, E, dtype=dtype)], [True]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("function", SYMBOLIC)
def test_export_with_any_number_of_tokens(function, strict, dtype):
    inputs, counted = SYMBOLIC[function](T, dtype)
    tokens = 3 * Dim("tokens")  # `layer` has 3 groups of tokens
    shapes = (tuple({0: tokens} if is_counted else None for is_counted in counted),)
    program = export(Layer(function), tuple(inputs), dynamic_shapes=shapes, strict=strict)
    for num_tokens in (T, 3, 300):
        others, _ = SYMBOLIC[function](num_tokens, dtype)
        found, wanted = program.module()(*others), function(*others)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), num_tokens


@pytest.mark.parametrize("function", SYMBOLIC)
def test_one_graph_for_any_number_of_tokens(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (T, 6, 300):
        inputs, _ = SYMBOLIC[function](num_tokens, torch.float32)
        found, wanted = compiled(*inputs), function(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), num_tokens
    assert counter.frame_count == 1
    torch._dynamo.reset()
