"""The rule, from both sides: sums may be added in any order, and what is wrong is far outside.

K is how many terms a sum has. In fp32 a lost term shows at every K. In 16 bits one of K terms, about
1 / sqrt(K) of the result, has the result's rounding beside it: with bf16 it drowns at K = 16384, and a bias,
whose largest is smaller than the largest product, is seen at K = 1024 but by no wide margin.
"""

import re
from itertools import pairwise as neighbours

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cumo_kernels
from cumo_kernels.backends import reference
from cumo_kernels.rounding import UnsplitSums
from cumo_kernels.testing import Yardstick, make_routing

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN = [(K, dtype) for K in (64, 1024, 16384) for dtype in FLOATS]
aten = torch.ops.aten


def chain(term, begin, end):
    total = term(begin).clone()
    for k in range(begin + 1, end):
        total += term(k)
    return total


def pairwise(term, begin, end):
    if end - begin == 1:
        return term(begin)
    middle = (begin + end) // 2
    return pairwise(term, begin, middle) + pairwise(term, middle, end)


def split(term, begin, end):
    """16 chains, as a BLAS or a split-K kernel adds, and their sum."""
    cuts = [begin + (end - begin) * i // 16 for i in range(17)]
    parts = [chain(term, a, b) for a, b in neighbours(cuts) if b > a]
    return chain(parts.__getitem__, 0, len(parts))


def one_lost(term, begin, end):
    return chain(term, begin, end) - (term(begin) if end - begin > 16 else 0)


class Sums(TorchDispatchMode):
    """Inside, products and sums below fp64 are added in fp32 in the order of `add`, also in backward."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, kwargs = func.overloadpacket, kwargs or {}
        if op not in (aten.mm, aten.addmm, aten.sum) or args[0].dtype not in FLOATS:
            return func(*args, **kwargs)
        tensors = [t.float() for t in args if isinstance(t, torch.Tensor)]
        if op is aten.sum:
            dims, keep = args[1] if len(args) > 1 else None, len(args) > 2 and args[2]
            assert len(dims) == 1
            rows = tensors[0].movedim(dims[0], 0)
            total = self.add(rows.__getitem__, 0, len(rows))
            total = total.unsqueeze(dims[0]) if keep else total
        else:
            *bias, a, b = tensors
            assert not kwargs
            total = self.add(lambda k: a[:, k, None] * b[k], 0, len(b))
            total = bias[0] + total if bias else total
        return total.to(kwargs.get("dtype") or args[0].dtype)


def measured(yardstick, add, function):
    with Sums(add), torch.autograd.set_multithreading_enabled(False):
        return yardstick.measure(function)


def reasons(rows):
    return [row.reason for row in rows if row.reason is not None]


def margin(rows):
    """How many times more than allowed the output errs; 0 where it is not refused."""
    (output,) = (row for row in rows if row.name == "output 0")
    found = re.search(r"by (\S+), allowed (\S+) ", output.reason or "")
    return float(found[1]) / float(found[2]) if found else 0


def operands(K, dtype):
    return torch.randn(16, K).to(dtype), torch.randn(K, 64).to(dtype), torch.randn(64).to(dtype)


def product(a, b, bias):
    return torch.addmm(bias, a, b)


@pytest.mark.parametrize(("K", "dtype"), HIDDEN, ids=str)
@pytest.mark.parametrize("add", [chain, pairwise, split])
def test_every_order_passes(K, dtype, add):
    yardstick = Yardstick(product, operands(K, dtype))
    assert reasons(measured(yardstick, add, product)) == []


@pytest.mark.parametrize(
    ("K", "dtype"), [(K, d) for K, d in HIDDEN if (K, d) != (16384, torch.bfloat16)], ids=str
)
def test_a_lost_term_is_refused(K, dtype):
    yardstick = Yardstick(product, operands(K, dtype))
    assert margin(measured(yardstick, one_lost, product)) > (500 if dtype == torch.float32 else 2)


@pytest.mark.parametrize(
    ("K", "dtype"), [(K, d) for K, d in HIDDEN if K == 64 or d != torch.bfloat16], ids=str
)
def test_a_dropped_bias_is_refused(K, dtype):
    yardstick = Yardstick(product, operands(K, dtype))
    without = lambda a, b, bias: torch.mm(a, b) + (bias - bias.detach())
    assert margin(measured(yardstick, chain, without)) > (100 if dtype == torch.float32 else 2)


def test_one_of_16384_terms_drowns_in_bf16():
    yardstick = Yardstick(product, operands(16384, torch.bfloat16))
    assert margin(measured(yardstick, one_lost, product)) == 0


@pytest.mark.parametrize("K", [64, 1024, 16384])
def test_what_fp32_must_show(K):
    """tanh-gelu in place of erf-gelu, and a result that went through bf16."""
    a, b, bias = operands(K, torch.float32)
    gelu = torch.nn.functional.gelu
    truth = lambda *inputs: gelu(product(*inputs))
    yardstick = Yardstick(truth, (a, b / K**0.5, bias))
    assert reasons(measured(yardstick, chain, truth)) == []
    tanh = lambda *inputs: gelu(product(*inputs), approximate="tanh")
    assert margin(measured(yardstick, chain, tanh)) > 5
    rounded = lambda *inputs: truth(*inputs).bfloat16().float()
    assert margin(measured(yardstick, chain, rounded)) > 100


def layer(activation="gelu", with_bias=True):
    """Sums over 512 rows of one expert, 256 of hidden and 512 of intermediate size."""
    routing = make_routing("one_expert", 512, 2, 1)
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)
    size = lambda *shape: torch.randn(shape)
    weights = size(2, 512, 256) / 16, size(2, 128, 512) / 512**0.5
    inputs = size(512, 256), routing.topk_weights, *weights, size(2, 512), size(2, 128)

    def run(x, topk_weights, up, down, up_bias, down_bias):
        down_bias = down_bias if with_bias else 0 * down_bias
        sizes = up, down, up_bias, down_bias
        return reference.expert_mlp(x, topk_weights, *plan, *sizes, activation, "none")[0]

    return run, inputs


@pytest.fixture
def blas():
    """A yardstick whose torch splits its sums by 16: that of a GPU, on any machine."""

    def make(function, inputs):
        with Sums(split), torch.autograd.set_multithreading_enabled(False):
            return Yardstick(function, inputs)

    return make


CASES = {
    "layer": layer,
    "down-bias": lambda: (lambda rows: rows.sum(0), (torch.randn(4600, 384) / 2,)),
    "llm": lambda: (lambda x, w: x @ w.T, (torch.randn(16, 4096), torch.randn(512, 4096) / 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_chain_passes_where_torch_splits_by_16(name, blas, monkeypatch):
    function, inputs = CASES[name]()
    yardstick = blas(function, inputs)
    assert reasons(measured(yardstick, chain, function)) == []
    monkeypatch.setattr(yardstick, "unsplit", lambda name: (0.0, 0.0))
    assert reasons(measured(yardstick, chain, function)), "nothing here needs unsplit sums"


@pytest.mark.parametrize("wrong", ["gelu_tanh", "no bias", "bf16"])
def test_a_wrong_layer_is_refused_where_torch_splits_by_16(wrong, blas):
    torch.manual_seed(1)
    right, inputs = layer()
    torch.manual_seed(1)
    function, _ = layer("gelu_tanh" if wrong == "gelu_tanh" else "gelu", wrong != "no bias")
    op = (lambda *inputs: function(*inputs).bfloat16().float()) if wrong == "bf16" else function
    assert margin(measured(blas(right, inputs), chain, op)) > 30


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("K", [2, 64, 1024, 16384])
def test_the_derivation(K, mean, device):
    """Chains err as derived, less sqrt(3 / (8 ln 2)) = 0.74: sums are seldom just above a power of 2."""
    terms = torch.randn(K, 2048, device=device) + mean
    truth = terms.double().sum(0)
    errors = chain(terms.__getitem__, 0, K).double() - truth
    with UnsplitSums(2**-23, torch.Generator(device).manual_seed(0)):
        derived = terms.double().sum(0) - truth
    assert 0.6 < errors.norm() / derived.norm() < 0.9


def test_products_and_means_err_like_their_sums():
    a, b, bias = (t.double() for t in operands(1024, torch.float32))

    def deviation(function):
        with UnsplitSums(2**-23, torch.Generator().manual_seed(0)):
            got = function()
        return float((got - function()).norm()) / got.numel() ** 0.5

    wanted = deviation(lambda: (a[:, :, None] * b).sum(1))
    assert 5e-6 < wanted < 5e-5
    for function in (
        lambda: a @ b,
        lambda: torch.bmm(a[None], b[None]),
        lambda: torch.addmm(0 * bias, a, b),
        lambda: torch.addmm(bias, a, b, beta=0, alpha=2) / 2,
        lambda: torch.mm(a, b, out=torch.empty(16, 64, dtype=a.dtype)),
        lambda: (a[:, :, None] * b).mean(1) * 1024,
        lambda: torch.stack([a @ column for column in b.T], 1),
        lambda: torch.stack([row.dot(b[:, 0]) for row in a]),
    ):
        assert 0.7 * wanted < deviation(function) < 1.4 * wanted
    assert deviation(lambda: a.exp()) == 0


@pytest.mark.parametrize("through", ["plain", "op"])
def test_backward_and_ops_of_ours_are_seen(through, device):
    """Every gradient errs, and by as much as chains of these lengths: a few times u sqrt(n / 6)."""
    run, inputs = layer()
    inputs = [t.double().to(device) for t in inputs]
    if through == "op":
        routing = make_routing("one_expert", 512, 2, 1, device)

        def run(x, topk_weights, *parameters):
            plan = cumo_kernels.routing_from_topk(topk_weights, routing.topk_indices, 2)
            with cumo_kernels.use_backend("reference"):
                return cumo_kernels.expert_mlp(x, plan, *parameters, activation="gelu", memory="preact")

    elif device == "cuda":
        pytest.skip("its plan lies on the CPU")

    def both():
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    with UnsplitSums(2**-23, torch.Generator(device).manual_seed(0)):
        with torch.autograd.set_multithreading_enabled(False):
            got = both()
    for mine, wanted in zip(got, both(), strict=True):
        assert 1e-7 < (mine - wanted).norm() / wanted.norm() < 5e-6


def test_nobody_pays_who_does_not_ask(monkeypatch):
    a, b, bias = operands(64, torch.float32)
    yardstick = Yardstick(product, (a, b, bias))
    monkeypatch.setattr(yardstick, "unsplit", lambda name: pytest.fail("asked"))
    assert reasons(yardstick.measure(product)) == []
