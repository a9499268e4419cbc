"""The accuracy rule: it accepts sums in any order, and refuses wrong results by a wide margin.

K is the number of terms of a sum. In fp32 a lost term is detected at every K. In 16 bits one of K terms,
about 1 / sqrt(K) of the result, competes with the result's rounding: in bf16 it is detected by a small margin
at K = 4096 and not at K = 16384. A missing bias, whose largest value is smaller than the largest product, is
detected at K = 1024, also by a small margin.
"""

import re
from itertools import pairwise as neighbours
from itertools import permutations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cumo_kernels
from cumo_kernels.backends import reference
from cumo_kernels.testing import Yardstick, make_routing
from cumo_kernels.verification.rounding import UnsplitSums
from tests.rounding import assert_same_formula

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN = [(K, dtype) for K in (64, 256, 1024, 4096, 16384) for dtype in FLOATS]
aten = torch.ops.aten


class Products:
    """The terms of every element of a @ b, one after the other, a megabyte at a time."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __len__(self):
        return len(self.b)

    def __getitem__(self, part):
        return Products(self.a[:, part], self.b[part])

    def __iter__(self):
        size = max(1, 2**18 // (self.a.shape[0] * self.b.shape[1]))
        for a, b in zip(self.a.T.contiguous().split(size), self.b.contiguous().split(size), strict=True):
            yield from a[:, :, None] * b[:, None]


def chain(terms):
    total = None
    for term in terms:
        total = term.clone() if total is None else total.add_(term)
    return total


def pairwise(terms):
    """Pairwise summation: neighbours, then their sums, and so on."""
    waiting = []
    for number, term in enumerate(terms, 1):
        while number % 2 == 0:
            term, number = waiting.pop() + term, number // 2
        waiting.append(term)
    return chain(waiting[::-1])


def split(terms):
    """16 chains, as a BLAS or a split-K kernel adds, and their sum."""
    cuts = [len(terms) * i // 16 for i in range(17)]
    return chain([chain(terms[a:b]) for a, b in neighbours(cuts) if b > a])


def one_lost(terms):
    return chain(terms) - (chain(terms[:1]) if len(terms) > 16 else 0)


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
            total = self.add(tensors[0].movedim(dims[0], 0))
            total = total.unsqueeze(dims[0]) if keep else total
        else:
            *bias, a, b = tensors
            assert not kwargs
            total = self.add(Products(a, b))
            total = bias[0] + total if bias else total
        return total.to(kwargs.get("dtype") or args[0].dtype)


def measured(yardstick, add, function):
    with Sums(add), torch.autograd.set_multithreading_enabled(False):
        return yardstick.measure(function)


def reasons(rows):
    return [row.reason for row in rows if row.reason is not None]


def margin(rows):
    """The output's error divided by the allowed error; 0 if it is not refused."""
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
    least = 500 if dtype == torch.float32 else 2 if (K, dtype) != (4096, torch.bfloat16) else 1
    assert margin(measured(yardstick, one_lost, product)) > least


@pytest.mark.parametrize(
    ("K", "dtype"), [(K, d) for K, d in HIDDEN if K == 64 or d != torch.bfloat16], ids=str
)
def test_a_dropped_bias_is_refused(K, dtype):
    yardstick = Yardstick(product, operands(K, dtype))
    without = lambda a, b, bias: torch.mm(a, b) + (bias - bias.detach())
    assert margin(measured(yardstick, chain, without)) > (100 if dtype == torch.float32 else 2)


def test_one_of_16384_terms_is_not_detected_in_bf16():
    yardstick = Yardstick(product, operands(16384, torch.bfloat16))
    assert margin(measured(yardstick, one_lost, product)) == 0


@pytest.mark.parametrize("K", [64, 1024, 16384])
def test_what_fp32_must_show(K):
    """tanh-gelu instead of erf-gelu, and a result rounded to bf16."""
    a, b, bias = operands(K, torch.float32)
    gelu = torch.nn.functional.gelu
    expected = lambda *inputs: gelu(product(*inputs))
    yardstick = Yardstick(expected, (a, b / K**0.5, bias))
    assert reasons(measured(yardstick, chain, expected)) == []
    tanh = lambda *inputs: gelu(product(*inputs), approximate="tanh")
    assert margin(measured(yardstick, chain, tanh)) > 5
    rounded = lambda *inputs: expected(*inputs).bfloat16().float()
    assert margin(measured(yardstick, chain, rounded)) > 100


def layer(activation="gelu", with_bias=True):
    """Sums over 512 rows of one expert, 128 of hidden and 256 of intermediate size."""
    routing = make_routing("one_expert", 512, 2, 1)
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)
    size = lambda *shape: torch.randn(shape)
    weights = size(2, 256, 128) / 128**0.5, size(2, 64, 256) / 16
    inputs = size(512, 128), routing.topk_weights, *weights, size(2, 256), size(2, 64)

    def run(x, topk_weights, up, down, up_bias, down_bias):
        down_bias = down_bias if with_bias else 0 * down_bias
        sizes = up, down, up_bias, down_bias
        return reference.expert_mlp(x, topk_weights, *plan, *sizes, activation, "none")[0]

    return run, inputs


@pytest.fixture
def blas():
    """A yardstick in which torch splits its sums by 16, like a GPU's, on any machine."""

    def make(function, inputs):
        with Sums(split), torch.autograd.set_multithreading_enabled(False):
            return Yardstick(function, inputs)

    return make


CASES = {
    "layer": layer,
    "down-bias": lambda: (lambda rows: rows.sum(0), (torch.randn(4600, 384) / 2,)),
    "llm": lambda: (lambda x, w: x @ w.T, (torch.randn(16, 4096), torch.randn(128, 4096) / 64)),
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


def root_mean_square(t):
    return float(t.square().mean().sqrt())


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("K", [2, 64, 1024, 16384])
def test_the_derivation(K, mean, device):
    """Rounding errors are independent, and the squares of the partial sums are as derived.

    A factor of 2 wrong in either would be sqrt(2) here, and half of that is allowed: five times the spread of
    512 draws.
    """
    terms = torch.randn(K, 512, device=device) + mean
    partial = terms.double().cumsum_(0)
    # uniform over one spacing of fp32, which is 2^-24 times the next power of 2; a term is not rounded
    spacing = torch.exp2(partial.frexp().exponent.double() - 24)[1:]
    one = (chain(terms) - partial[-1]) / (spacing.square().sum(0) / 12).sqrt()
    with UnsplitSums(2**-23, torch.Generator(device).manual_seed(0)):
        derived = terms.double().sum(0)
    squares = partial.square().sum(0).mean() / 3
    for ratio in (root_mean_square(one), root_mean_square(derived - partial[-1]) / 2**-24 / squares**0.5):
        assert 2**-0.25 < ratio < 2**0.25


def test_the_mean_over_all_orders():
    terms = torch.randn(5, dtype=torch.float64)
    orders = torch.stack([terms[list(order)] for order in permutations(range(5))])
    found = orders.cumsum(1).square().sum(1).mean()
    assert_same_formula(found, 6 * (2 * terms.sum().square() + terms.square().sum()) / 6)


def test_products_and_means_err_like_their_sums(monkeypatch):
    a, b, bias = (t.double() for t in operands(1024, torch.float32))
    terms = a[:, :, None] * b
    # the standard deviation instead of a random draw
    monkeypatch.setattr(torch, "randn", lambda shape, generator, **kind: torch.ones(shape, **kind))

    def deviation(function):
        with UnsplitSums(2.0, torch.Generator()):
            got = function()
        return got - function()

    def derived(total, squares, n):
        return ((n + 1) * (2 * total.square() + squares) / 18).sqrt()

    plain = derived(terms.sum(1), terms.square().sum(1), 1024)
    added = lambda c: derived(terms.sum(1) + c, terms.square().sum(1) + c.square(), 1025)
    for wanted, function in (
        (plain, lambda: terms.sum(1)),
        (plain, lambda: a @ b),
        (plain, lambda: torch.bmm(a[None], b[None])[0]),
        (added(bias), lambda: torch.addmm(bias, a, b)),
        (added(0 * bias), lambda: torch.addmm(bias, a, b, beta=0, alpha=2) / 2),
        (plain, lambda: torch.mm(a, b, out=torch.empty(16, 64, dtype=a.dtype))),
        (plain, lambda: terms.mean(1) * 1024),
        (plain, lambda: torch.stack([a @ column for column in b.T], 1)),
        (plain[:, 0], lambda: torch.stack([row.dot(b[:, 0]) for row in a])),
        (0 * a, lambda: a.exp()),
    ):
        assert_same_formula(deviation(function), wanted)


@pytest.mark.parametrize("through", ["plain", "op"])
def test_backward_and_ops_of_ours_are_seen(through, device):
    """Every gradient has the error of chains of these lengths: u sqrt(n / 6) each."""
    run, inputs = layer()
    inputs = [t.double().to(device) for t in inputs]
    if through == "op":
        routing = make_routing("one_expert", 512, 2, 1, device)

        def run(x, topk_weights, *parameters):
            plan = cumo_kernels.routing_from_topk(topk_weights, routing.topk_indices, 2)
            with cumo_kernels.use_backend("reference"):
                return cumo_kernels.expert_mlp(x, plan, *parameters, activation="gelu", memory="preact")

    elif device == "cuda":
        pytest.skip("its plan is on the CPU")

    def both():
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    with UnsplitSums(2**-23, torch.Generator(device).manual_seed(0)):
        with torch.autograd.set_multithreading_enabled(False):
            got = both()
    # each has its own sum, of 64 to 512 terms, followed by at most four more
    least, most = (2**-24 * (n / 6) ** 0.5 for n in (64, 512))
    for mine, wanted in zip(got, both(), strict=True):
        assert least < (mine - wanted).norm() / wanted.norm() < 5 * most


def test_unsplit_sums_run_only_when_needed(monkeypatch):
    a, b, bias = operands(64, torch.float32)
    yardstick = Yardstick(product, (a, b, bias))
    monkeypatch.setattr(yardstick, "unsplit", lambda name: pytest.fail("asked"))
    assert reasons(yardstick.measure(product)) == []
