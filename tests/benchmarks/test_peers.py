"""Adapters of third-party layers, without a GPU: their calls, and their use of the results.

Stand-ins (stand_ins.py) compute on the CPU what the packages document. Every recorded call must match the
real signature: the package's if it can be imported, else that in the source which `make peers` fetches.
quack's own references must give the same results as its stand-in; transformers needs no stand-in.
"""

import ast
import importlib
import inspect
import math
import site
import sys
import textwrap
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import silu

from benchmarks.cases import bench_experts, shapes
from benchmarks.cases.eager import activate
from benchmarks.peers import expert_parallel, quack_gemm, table, transformers_experts
from cumo_kernels.testing import assert_as_accurate_as_torch, make_routing
from tests.benchmarks.stand_ins import CLIP, SHAPES, STAND_INS, Quack
from tests.rounding import assert_same_formula, assert_same_sums, rounding_of

BY_NAME = {peer.name: peer for peer in table.PEERS}
SOURCES = {  # packages that cannot be imported here: the file in their wheel
    "GroupedLinear.__init__": "transformer_engine/pytorch/module/grouped_linear.py",
    "GroupedLinear.forward": "transformer_engine/pytorch/module/grouped_linear.py",
    "moe_fused": "liger_kernel/ops/cute/ops/moe.py",
    "configure": "liger_kernel/ops/configure.py",
    "MoEConfig": "liger_kernel/ops/configure.py",
    "Config": "dist_moe/api.py",
    "create_context": "dist_moe/api.py",
    "routed_experts": "dist_moe/api.py",
    "Context.close": "dist_moe/api.py",
}


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
    if table.FETCHED.is_dir():
        site.addsitedir(str(table.FETCHED))
    try:
        table._prepare(name)
        return importlib.import_module(name)
    except Exception as error:  # any error of a third-party package
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")


def layer_of(peer, shape):
    """Reference and peer for one routing plan, and their inputs."""
    torch.manual_seed(0)
    workload = bench_experts.setup(shape, torch.float32, "cpu", "skewed")
    torch.manual_seed(0)
    routing = make_routing("skewed", shape.T, shape.E, shape.K, "cpu")
    assert torch.equal(routing.topk_weights, workload.inputs[1])  # the same plan
    return workload, BY_NAME[peer].make(shape, routing)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer_of_quacks_gemms_equals_the_layer(quack, shape):
    workload, layer = layer_of("quack", shape)
    assert_as_accurate_as_torch(layer, workload.reference, *workload.inputs)
    assert {name for name, *_ in quack.calls} == {"gemm", "gemm_act", "gemm_dact"}
    for name, _, kwargs in quack.calls:  # quack gathers, adds the bias and activates
        assert name == "gemm" or kwargs["A_idx"] is not None
        assert name != "gemm_act" or (kwargs["bias"] is None) != shape.bias


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_call_matches_quack_itself(quack, shape, monkeypatch):
    workload, layer = layer_of("quack", shape)
    leaves = [t.clone().requires_grad_() for t in workload.inputs]
    layer(*leaves).square().sum().backward()
    calls = list(quack.calls)
    for name in ("quack", "quack.gemm_interface"):
        del sys.modules[name]
    package = real("quack.gemm_interface")
    for name in ("quick_gelu", "gelu_erf"):  # its kernels have them, its references do not
        assert {name} <= set(real("quack.activation").act_fn_map) - set(package.act_to_pytorch_fn_map)
        monkeypatch.setitem(package.act_to_pytorch_fn_map, name, Quack.act[name])
    assert len(calls) == 6
    for name, args, kwargs in calls:
        inspect.signature(getattr(package, name)).bind(*args, **kwargs)
        detached = lambda t: t.detach() if isinstance(t, torch.Tensor) else t
        args, kwargs = [detached(t) for t in args], {k: detached(v) for k, v in kwargs.items()}
        own = {k: v for k, v in kwargs.items() if k not in ("tuned", "dynamic_scheduler")}
        if name == "gemm_dact":  # its reference has no scale
            scale, reduce = own.pop("colvec_scale"), own.pop("colvec_reduce")
            found = getattr(quack, name)(
                *args, **own, colvec_scale=torch.ones_like(scale), colvec_reduce=reduce
            )
            reference = partial(package.gemm_dact_ref, *args, **own)
        else:
            out = own.pop("out", None)
            mine = {} if out is None else {"out": torch.empty_like(out)}
            found = getattr(quack, name)(*args, **own, **mine)
            reference = partial(getattr(package, f"{name}_ref"), *args, **own)
            if own.pop("concat_layout", None) == ("out",):  # the reference splits rows, we split columns
                plain = partial(package.gemm_ref, *args, **own)
                reference = lambda plain=plain: torch.cat([plain()[..., ::2], plain()[..., 1::2]], -1)
        found = found if isinstance(found, tuple) else (found,)

        def wanted(reference=reference, found=found):
            given = reference()
            return given[: len(found)] if isinstance(given, tuple) else (given,)

        assert_same_sums(found[: len(wanted())], wanted(), rounding_of(wanted))


def on_the_cpu(function):
    """quack's scalar formula as a function of tensors: its own source, with torch's names for the DSL's."""
    source = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    source.body[0].decorator_list.clear()
    maths = types.SimpleNamespace(erf=lambda x, **_: torch.erf(x), exp2=lambda x, **_: torch.exp2(x))
    names = {
        "sigmoid": lambda x, **_: torch.sigmoid(x), "const_expr": bool, "math": math, "Tuple": tuple,
        "F32_or_F32x2": torch.Tensor, "cute": types.SimpleNamespace(math=maths),
    }  # fmt: skip
    exec(compile(source, "quack", "exec"), names)
    return names[source.body[0].name]


@pytest.mark.parametrize("ours, theirs", [("quick_gelu", "quick_gelu"), ("gelu", "gelu_erf")])
def test_quacks_activations_are_these(ours, theirs):
    package = real("quack.activation")
    z = torch.linspace(-6, 6, 241, dtype=torch.float64, requires_grad=True)
    wanted, upstream = activate(z, ours), torch.linspace(1, 2, 241, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(wanted, z, upstream)
    assert quack_gemm.ACTIVATIONS[ours] == theirs
    assert_same_formula(on_the_cpu(package.act_fn_map[theirs])(z), wanted)
    found = on_the_cpu(package.dact_fn_map[theirs])(z, upstream)
    assert_same_formula(list(found), [gradient, wanted])


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
    assert_as_accurate_as_torch(layer, workload.reference, *workload.inputs)
    args, options = calls[0]
    assert args[4].shape == (96, 32, 4) and args[4].permute(2, 0, 1).is_contiguous()
    for name in ("sonicmoe", "sonicmoe.enums"):
        monkeypatch.delitem(sys.modules, name)
    inspect.signature(real("sonicmoe").moe_general_routing_inputs).bind(*args, **options)


def stand_in(peer, monkeypatch):
    """-> the modules that replace the peer's, and the list of all calls."""
    calls = []
    monkeypatch.setattr(expert_parallel, "_group", lambda: "of one")  # an NCCL group needs a GPU
    expert_parallel._reserve.cache_clear()
    modules = STAND_INS[peer][0](calls)
    for path, content in modules.items():
        module = types.ModuleType(path)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)
    return modules, calls


cases = [(peer, shape) for peer, (_, shapes) in STAND_INS.items() for shape in shapes]


@pytest.mark.parametrize("peer, name", cases)
def test_a_layer_of_a_peers_calls_equals_the_layer(peer, name, monkeypatch):
    """Detects a wrong order of arguments, a transposition or an extra row."""
    _, calls = stand_in(peer, monkeypatch)
    workload, layer = layer_of(peer, SHAPES[name])
    assert_as_accurate_as_torch(layer, workload.reference, *workload.inputs)
    assert calls


@pytest.mark.parametrize("peer", STAND_INS)
def test_every_call_matches_the_package(peer, monkeypatch):
    modules, calls = stand_in(peer, monkeypatch)
    for name in STAND_INS[peer][1]:
        workload, layer = layer_of(peer, SHAPES[name])
        layer(*workload.inputs)
    for path in modules:
        monkeypatch.delitem(sys.modules, path)
    assert calls
    for function, args, kwargs in calls:
        signature, bound = signature_of(peer, function)
        signature.bind(*bound, *args, **kwargs)


def signature_of(peer, function):
    """-> the signature, and the leading arguments that replace a context or self."""
    if function in SOURCES:
        return declared(SOURCES[function], function), ()
    found = getattr(real(BY_NAME[peer].module), function)
    if isinstance(found, type) and issubclass(found, torch.autograd.Function):
        return inspect.signature(found.forward), (None,)
    return inspect.signature(found), ()


def source_of(path):
    """A file of a fetched wheel, or a skip."""
    found = [place / path for place in (table.FETCHED, table.FETCHED / "sources") if (place / path).is_file()]
    if not found:
        pytest.skip(f"there is no {path}: make peers fetches it")
    return found[0].read_text()


def declared(path, name):
    """The signature of a function, a method or a dataclass, read without importing the package."""
    node = ast.parse(source_of(path))
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    empty, place = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    if isinstance(node, ast.ClassDef):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        found = [(field.target.id, place, field.value) for field in fields]
    else:
        args = node.args
        assert not (args.posonlyargs or args.vararg or args.kwarg), name
        defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
        found = [(arg.arg, place, value) for arg, value in zip(args.args, defaults, strict=True)]
        by_name = zip(args.kwonlyargs, args.kw_defaults, strict=True)
        found += [(arg.arg, inspect.Parameter.KEYWORD_ONLY, value) for arg, value in by_name]
    return inspect.Signature(
        [
            inspect.Parameter(key, kind, default=empty if value is None else value)
            for key, kind, value in found
        ]
    )


def test_this_triton_has_the_name_that_triton_kernels_needs(monkeypatch):
    target_info = pytest.importorskip("triton.language.target_info")
    monkeypatch.delattr(target_info, "is_hip_gfx1250", raising=False)
    table._prepare("triton_kernels.matmul")
    assert not target_info.is_hip_gfx1250()


def test_buffers_of_dist_moe_are_freed_with_the_layer(monkeypatch):
    _, calls = stand_in("dist-moe", monkeypatch)
    workload, layer = layer_of("dist-moe", SHAPES["mixtral"])
    for _ in range(2):
        layer(*workload.inputs)
    assert [name for name, *_ in calls].count("create_context") == 1
    del layer
    assert calls[-1][0] == "Context.close"


def test_liger_cute_reserves_for_every_shape_that_it_has(monkeypatch):
    _, calls = stand_in("liger-cute", monkeypatch)
    workload, layer = layer_of("liger-cute", SHAPES["mixtral"])
    layer(*workload.inputs)
    room = next(kwargs for name, _, kwargs in calls if name == "MoEConfig")
    sizes = {"max_tokens": "T", "hidden_size": "H", "num_experts": "E", "top_k": "K"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    peer = replace(BY_NAME["liger-cute"], module=None)
    taken = [s for s in shapes.SHAPES.values() if peer.refuse(s, torch.bfloat16, "cuda") is None]
    assert len(taken) > 3
    for name, letter in sizes.items():
        assert room[name] == max(getattr(shape, letter) for shape in taken)


TRANSFORMERS = ("grouped_mm", "batched_mm")
SQUARE = {name: replace(shape, O=shape.H) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("shape", SQUARE.values(), ids=SQUARE)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_implementations_equal_the_layer(name, shape):
    pytest.importorskip("transformers")
    workload, layer = layer_of(f"transformers-{name}", shape)
    assert_as_accurate_as_torch(layer, workload.reference, *workload.inputs)


def test_weights_copied_for_every_slot_must_fit(monkeypatch):
    shape = SQUARE["clip"]
    peer = replace(BY_NAME["transformers-batched_mm"], module=None)
    wanted = transformers_experts.copied_bytes(shape, torch.bfloat16)
    rows, (H, I) = shape.T * shape.K, (shape.H, shape.I)
    assert wanted == 2 * 2 * rows * (I * H + I + H * I + H)  # a copy and its gradient, two bytes each
    for room, reason in ((wanted, None), (wanted - 1, "it needs 0 GiB, but 0 are available")):
        monkeypatch.setattr(table, "room", lambda device, room=room: room)
        assert peer.refuse(shape, torch.bfloat16, "cpu") == reason
    monkeypatch.undo()
    quarter = shapes.SHAPES["mixtral-quarter"]
    assert peer.refuse(quarter, torch.float32, "cpu") == "it needs 42 GiB, but 4 are available"
    assert replace(peer, needs=None).refuse(quarter, torch.float32, "cpu") is None


@pytest.mark.parametrize(
    "here, reasons",
    [
        ((8, 0), {"liger-cute": "9.0 or 10.0", "dist-moe": "10.0", "lightmoe": "10.0"}),
        ((9, 0), {"dist-moe": "10.0", "lightmoe": "10.0"}),
        ((10, 0), {}),
        ((10, 3), {}),
        ((12, 0), {"liger-cute": "9.0 or 10.0", "dist-moe": "10.0", "lightmoe": "10.0"}),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_unsupported_gpu_is_the_reason_of_a_gap(monkeypatch, here, reasons):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    for peer in table.PEERS:
        reason = replace(peer, module=None, needs=None).refuse(SHAPES["mixtral"], torch.bfloat16, "cuda")
        if peer.name in reasons:
            found = f"this GPU has {here[0]}.{here[1]}"
            assert reason == f"it needs compute capability {reasons[peer.name]}, {found}"
        else:
            assert reason == peer.never


def test_lightmoe_is_a_gap_for_its_experts_and_precision(monkeypatch):
    peer = BY_NAME["lightmoe"]
    assert peer.refuse(SHAPES["mixtral"], torch.bfloat16, "cuda").endswith("10.0, no GPU is here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    many = replace(SHAPES["mixtral"], E=257)
    assert peer.refuse(many, torch.bfloat16, "cuda") == "it has at most 256 experts, got 257"
    assert "NVFP4" in peer.refuse(replace(many, E=256), torch.bfloat16, "cuda")


def test_lightmoe_offers_no_other_precision():
    for path, name in (("training", "MoEExpertLayer.__init__"), ("inference", "InferenceMoE.__init__")):
        parameters = declared(f"lightmoe/{path}.py", name).parameters
        assert {"hidden_size", "activation"} < set(parameters)
        assert not [p for p in parameters if "dtype" in p or "precision" in p or "format" in p]
    assert "at most 256 local experts" in source_of("lightmoe/inference.py")


def test_an_unsupported_case_is_the_reason_of_a_gap():
    sonic = BY_NAME["sonic-moe"]
    assert "only SwiGLU" in sonic.refuse(CLIP, torch.bfloat16, "cuda")
    wide = replace(SHAPES["mixtral"], O=64)
    for name in ("sonic-moe", "liger"):  # liger would read past a narrower weight
        assert "as wide as their input" in BY_NAME[name].refuse(wide, torch.bfloat16, "cuda")
    for name in ("quack", "sonic-moe"):
        assert BY_NAME[name].refuse(SHAPES["mixtral"], torch.bfloat16, "cpu") == "it needs a cuda device"


def test_a_missing_package_is_a_gap_with_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", None)
    monkeypatch.setitem(sys.modules, "quack", None)
    _, gaps = table.available(CLIP, torch.bfloat16, "cuda")
    assert gaps["quack"].startswith("quack.gemm_interface cannot be imported (ModuleNotFoundError")
