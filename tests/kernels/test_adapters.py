"""Low-rank additions to expert weights, and weights in four bits: the ops against summed weights."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cumo_kernels import (
    ACTIVATIONS,
    Adapter,
    PackedWeight,
    expert_mlp,
    grouped_gemm,
    pack,
    routing_from_topk,
    use_backend,
)
from cumo_kernels.testing import make_routing
from tests.rounding import assert_same_formula

T, H, I, O, E, K = 13, 64, 32, 40, 4, 2
KINDS = [None, "nf4", "fp4", "mxfp4", "int4"]


def draw(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype)


def make_adapters(ranks, rows, columns, dtype=torch.float64):
    return [
        Adapter(draw(E, r, columns, dtype=dtype) / columns**0.5, draw(E, rows, r, dtype=dtype), 1 / (1 + r))
        for r in ranks
    ]


def packed(weight, kind):
    return weight if kind is None else pack(weight, kind, 32, symmetric=kind != "int4")


def plain(weight):
    return weight.dequantize(torch.float64) if isinstance(weight, PackedWeight) else weight


def summed(weight, adapters):
    """W + the sum of scaling * B A, which the ops never form."""
    return plain(weight) + sum(adapter.scaling * adapter.b @ adapter.a for adapter in adapters)


def make_layer(activation, kind, ranks, bias=True):
    width = I * (1 + ACTIVATIONS[activation].is_gated)
    up, down = packed(draw(E, width, H) / 8, kind), packed(draw(E, O, I) / 6, kind)
    biases = (draw(E, width), draw(E, O)) if bias else (None, None)
    return up, down, biases, make_adapters(ranks, width, H), make_adapters(ranks, O, I)


def leaves_of(x, weights, up, down, biases, *adapters):
    found = [x, weights, *(w for w in (up, down) if not isinstance(w, PackedWeight))]
    found += [b for b in biases if b is not None]
    found += [t for some in adapters for one in some for t in (one.a, one.b)]
    return [leaf.requires_grad_() for leaf in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("memory", ["x", "preact", "all"])
@pytest.mark.parametrize("ranks", [(), (5,), (1, 4)], ids=str)
def test_the_layer_is_that_of_the_summed_weights(activation, kind, memory, ranks):
    """In fp64: the output and the gradient of everything but packed weights, with dropped slots."""
    routing = make_routing("uniform", T, E, K)
    indices = routing.topk_indices.clone()
    indices[::4, 1] = E
    x, weights = draw(T, H), routing.topk_weights.double()
    up, down, biases, up_adapters, down_adapters = make_layer(activation, kind, ranks)
    leaves = leaves_of(x, weights, up, down, biases, up_adapters, down_adapters)
    plan = routing_from_topk(weights, indices, E)
    found = expert_mlp(
        x, plan, up, down, *biases, activation, memory, up_adapters=up_adapters, down_adapters=down_adapters
    )
    wanted = torch.zeros(T, O, dtype=torch.float64)
    up, down = summed(up, up_adapters), summed(down, down_adapters)
    for token, choice in itertools.product(range(T), range(K)):
        if (e := int(indices[token, choice])) < E:
            hidden = ACTIVATIONS[activation].forward(up[e] @ x[token] + biases[0][e])
            row = down[e] @ hidden + biases[1][e]
            wanted = wanted.index_add(0, torch.tensor([token]), (weights[token, choice] * row)[None])
    upstream = draw(T, O)
    assert_same_formula(
        [found, *torch.autograd.grad(found, leaves, upstream)],
        [wanted, *torch.autograd.grad(wanted, leaves, upstream)],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [None, "relu", "swiglu"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_product_is_that_of_the_summed_weights(kind, activation, gathered, is_transposed):
    routing = make_routing("empty", T, E, K)
    shape = (E, H, 2 * I) if is_transposed else (E, 2 * I, H)
    weight = packed(draw(*shape) / 8, kind)
    weight = weight.transpose(1, 2) if is_transposed else weight
    x, bias, adapters = draw(T if gathered else T * K, H), draw(E, 2 * I), make_adapters((3,), 2 * I, H)
    leaves = [x, bias, adapters[0].a, adapters[0].b] + ([] if kind else [weight])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    some = {"bias": bias, "gather": routing if gathered else None, "activation": activation}
    upstream = None
    for given in ((), adapters):
        found = grouped_gemm(x, weight, routing.expert_offsets, adapters=given, **some)
        wanted = grouped_gemm(x, summed(weight, given), routing.expert_offsets, **some)
        upstream = draw(*found.shape)
        wrt = (
            leaves
            if given
            else [leaf for leaf in leaves if leaf is not adapters[0].a and leaf is not adapters[0].b]
        )
        assert_same_formula(
            [found, *torch.autograd.grad(found, wrt, upstream)],
            [wanted, *torch.autograd.grad(wanted, wrt, upstream)],
        )


def test_gradcheck():
    routing = make_routing("uniform", 4, 2, 1)
    shapes = [
        (4, 3),
        (4, 1),
        (2, 6, 3),
        (2, 5, 3),
        (2, 6),
        (2, 5),
        (2, 2, 3),
        (2, 6, 2),
        (2, 2, 3),
        (2, 5, 2),
    ]
    values = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]

    def layer(x, w, up, down, up_bias, down_bias, a1, b1, a2, b2):
        plan = routing_from_topk(w, routing.topk_indices, 2)
        return expert_mlp(
            x, plan, up, down, up_bias, down_bias, "swiglu",
            up_adapters=[Adapter(a1, b1, 0.5)], down_adapters=[Adapter(a2, b2)],
        )  # fmt: skip

    assert torch.autograd.gradcheck(layer, values)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_a_single_needed_gradient_is_the_same(kind):
    routing = make_routing("uniform", T, E, K)
    up, down, biases, up_adapters, down_adapters = make_layer("swiglu", kind, (3,))
    x, weights = draw(T, H), routing.topk_weights.double()
    leaves, upstream = leaves_of(x, weights, up, down, biases, up_adapters, down_adapters), draw(T, O)

    def run():
        plan = routing_from_topk(weights, routing.topk_indices, E)
        return expert_mlp(x, plan, up, down, *biases, up_adapters=up_adapters, down_adapters=down_adapters)

    everything = torch.autograd.grad(run(), leaves, upstream)
    for leaf, wanted in zip(leaves, everything, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        assert torch.equal(torch.autograd.grad(run(), [leaf], upstream)[0], wanted)


@pytest.mark.parametrize("only", ["up", "down"])
def test_one_layer_alone_may_have_adapters_or_be_packed(only):
    routing = make_routing("uniform", T, E, K)
    up, down, biases, up_adapters, down_adapters = make_layer("gelu", None, (3,))
    weights, adapters = {"up": up, "down": down}, {"up": up_adapters, "down": down_adapters}
    x, weights[only] = draw(T, H), pack(weights[only], "nf4", 32)
    found = expert_mlp(
        x, routing, weights["up"], weights["down"], *biases, "gelu", **{f"{only}_adapters": adapters[only]}
    )
    weights[only] = summed(weights[only], adapters[only])
    assert_same_formula(found, expert_mlp(x, routing, weights["up"], weights["down"], *biases, "gelu"))


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "cumo":  # views of arguments are no new memory
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t._base is None]
            self.largest = max([self.largest, *(t.numel() for t in made)])
        return out


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_tensor_has_the_size_of_the_weights(backend):
    rows, columns = 96, 128
    routing = make_routing("uniform", 4, E, K)
    draw32 = lambda *size: torch.randn(*size).requires_grad_()
    weight = torch.randn(E, rows, columns)
    x, adapter = draw32(4, columns), Adapter(draw32(E, 3, columns), draw32(E, rows, 3))
    down = torch.randn(E, columns, rows)
    other = Adapter(draw32(E, 3, rows), draw32(E, columns, 3))
    with use_backend(backend), Sizes() as sizes:
        out = expert_mlp(
            x, routing, weight, down, activation="gelu", up_adapters=[adapter], down_adapters=[other]
        )
        torch.autograd.grad(out.sum(), [x, adapter.a, adapter.b, other.a, other.b])
    assert 0 < sizes.largest < rows * columns


def test_on_a_cpu_only_experts_with_rows_are_dequantized(monkeypatch):
    from cumo_kernels.backends.reference import adapted

    seen = []

    def watched(packed, *rest):
        seen.append(packed.shape[0])
        return unpack(packed, *rest)

    unpack = adapted.unpack
    monkeypatch.setattr(adapted, "unpack", watched)
    routing = make_routing("one_expert", T, E, 1)
    weight = pack(torch.randn(E, 16, H))
    with use_backend("torch"):
        grouped_gemm(torch.randn(T, H), weight, routing.expert_offsets)
    assert seen == [1]


@pytest.mark.parametrize("ranks", [(), (4,), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", [None, "int4"])
def test_flops_are_counted(kind, ranks):
    routing = make_routing("uniform", T, E, K)
    up, down, _, up_adapters, down_adapters = make_layer("swiglu", kind, ranks)
    x = draw(T, H).requires_grad_()
    for leaf in (leaf for one in (*up_adapters, *down_adapters) for leaf in (one.a, one.b)):
        leaf.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = expert_mlp(x, routing, up, down, up_adapters=up_adapters, down_adapters=down_adapters)
    rank = sum(ranks)
    wanted = 2 * T * K * (2 * I * H + O * I + rank * (2 * I + H) + rank * (O + I))
    assert counter.get_total_flops() == wanted
    if kind is not None:
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == wanted


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("op", ["layer", "product"])
def test_dropout_is_that_of_a_linear_layer(kind, op, monkeypatch):
    """B A dropout(x) for every slot; the mask is that of torch's own dropout."""
    routing = make_routing("uniform", T, E, K)
    up, down, biases, up_adapters, down_adapters = make_layer("gelu", kind, (3, 2))
    up_adapters = [dataclasses.replace(one, dropout=0.5) for one in up_adapters]
    down_adapters = [dataclasses.replace(one, dropout=0.25) for one in down_adapters]
    x, masks = draw(T, H).requires_grad_(), {}

    def dropped(rows, p):  # the same mask for the same shape and share
        generator = torch.Generator().manual_seed(int(100 * p) + rows.shape[1])
        mask = masks.setdefault((rows.shape, p), torch.rand(rows.shape, generator=generator) >= p)
        return rows * mask / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropped)

    def layer(rows, weight, bias, adapters):
        total = torch.zeros(rows.shape[0], plain(weight).shape[1], dtype=rows.dtype)
        for e, (begin, end) in enumerate(itertools.pairwise(routing.expert_offsets.tolist())):
            total = total.index_add(
                0, torch.arange(begin, end), rows[begin:end] @ plain(weight)[e].T + bias[e]
            )
            for one in adapters:
                kept = dropped(rows, one.dropout)[begin:end]
                total = total.index_add(
                    0, torch.arange(begin, end), one.scaling * kept @ one.a[e].T @ one.b[e].T
                )
        return total

    rows = x[routing.token_indices]
    z = layer(rows, up, biases[0], up_adapters)
    if op == "product":
        found = grouped_gemm(
            x, up, routing.expert_offsets, bias=biases[0], gather=routing, adapters=up_adapters
        )
        wanted = z
    else:
        found = expert_mlp(
            x, routing, up, down, *biases, "gelu", up_adapters=up_adapters, down_adapters=down_adapters
        )
        y = layer(ACTIVATIONS["gelu"].forward(z), down, biases[1], down_adapters)
        y = y[routing.inverse_permutation].view(T, K, O)
        wanted = (y * routing.topk_weights.double()[:, :, None]).sum(1)
    assert masks
    upstream = draw(*found.shape)
    assert_same_formula(
        [found, *torch.autograd.grad(found, x, upstream)], [wanted, *torch.autograd.grad(wanted, x, upstream)]
    )


def test_one_adapter_drops_and_the_other_does_not():
    """Nearly all of one is dropped: what is left is the other."""
    routing = make_routing("uniform", T, E, K)
    weight, x = draw(E, I, H), draw(T, H)
    most, none = make_adapters((3, 2), I, H)
    most = dataclasses.replace(most, dropout=1 - 1e-12)
    run = lambda *adapters: grouped_gemm(x, weight, routing.expert_offsets, gather=routing, adapters=adapters)
    assert_same_formula(run(most, none), run(none))
    assert_same_formula(run(none, most), run(none))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_fp32_are_computed_in_the_dtype_of_x(dtype):
    """peft keeps them in fp32; their gradients are fp32 too."""
    routing = make_routing("uniform", T, E, K)
    up, adapters = pack(draw(E, I, H), "nf4", 32), make_adapters((4,), I, H, torch.float32)
    adapters[0].a.requires_grad_()
    x = draw(T, H, dtype=dtype)
    found = grouped_gemm(x, up, routing.expert_offsets, gather=routing, adapters=adapters)
    assert found.dtype == dtype
    found.sum().backward()
    assert adapters[0].a.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        cast = grouped_gemm(x.float(), up, routing.expert_offsets, gather=routing, adapters=adapters)
    assert cast.dtype == dtype and torch.equal(cast, found)


def test_packed_weights_are_frozen_and_stored_by_rows():
    routing, up, down = make_routing("uniform", T, E, K), draw(E, 2 * I, H), draw(E, O, I)
    x = draw(T, H)
    trained = pack(up, "nf4", 32).requires_grad_()
    with pytest.raises(ValueError, match="up_proj must not require a gradient: weights in 4 bits are frozen"):
        expert_mlp(x, routing, trained, down)
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        grouped_gemm(x, trained, routing.expert_offsets, gather=routing)
    flipped = pack(draw(E, H, 2 * I), "nf4", 32).transpose(1, 2)
    with pytest.raises(ValueError, match="up_proj must be packed along its rows, got a transposed one"):
        expert_mlp(x, routing, flipped, down)
    with pytest.raises(ValueError, match="up_proj must be on the device of x, cpu, got meta"):
        expert_mlp(x, routing, pack(up, "nf4", 32).to("meta"), down)


def test_wrong_adapters_are_named():
    routing, up, down, x = make_routing("uniform", T, E, K), draw(E, 2 * I, H), draw(E, O, I), draw(T, H)
    good = make_adapters((3,), 2 * I, H)[0]
    change = lambda **fields: [dataclasses.replace(good, **fields)]
    for words, adapters in (
        ("up_adapters must be a sequence of Adapter, got Adapter", good),
        ("up_adapters must be a sequence of Adapter, got None", None),
        ("up_adapters must be a sequence of Adapter, got one of int", [1]),
        (r"a of up_adapters must be \(4, R, 64\), got \(4, 3, 63\)", change(a=good.a[..., 1:])),
        (r"a of up_adapters must be \(4, R, 64\), got \(3, 3, 64\)", change(a=good.a[1:])),
        (r"b of up_adapters must be \(4, 64, 3\), got \(4, 3, 64\)", change(b=good.b.mT)),
        ("b of up_adapters must be a tensor, got NoneType", change(b=None)),
        ("a of up_adapters must be float32", change(a=good.a.int())),
        ("a of up_adapters must be on the device of x", change(a=good.a.to("meta"))),
        ("scaling of up_adapters must be a number, got '1'", change(scaling="1")),
        ("dropout of up_adapters must be from 0 to below 1, got 1", change(dropout=1)),
        ("dropout of up_adapters must be from 0 to below 1, got -0.5", change(dropout=-0.5)),
    ):
        with pytest.raises(ValueError, match=words):
            expert_mlp(x, routing, up, down, up_adapters=adapters)
