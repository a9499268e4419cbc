"""activate: every backend compared with the table, output and gradient; the table, with its formulas."""

import math

import pytest
import torch

import cumo_kernels
from cumo_kernels import ACTIVATIONS, use_backend
from cumo_kernels.activations import get_activation
from cumo_kernels.backends import reference
from cumo_kernels.testing import assert_as_accurate_as_torch
from tests.rounding import assert_same_formula

FORMULAS = {  # written out again from the papers, in plain numbers
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "relu2": lambda z: torch.where(z > 0, z * z, 0),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def below(z, limit):
    return torch.where(z > limit, limit, z)


def within(z, limit):
    return torch.where(z < -limit, -limit, below(z, limit))


def of_oai(gate, up, alpha=1.702, limit=7.0):
    gate = below(gate, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (within(up, limit) + 1)


CLAMPED = {  # of gate and up, with the default parameters
    "swiglu_clamped": lambda gate, up, limit=10.0: FORMULAS["silu"](below(gate, limit)) * within(up, limit),
    "swiglu_oai": of_oai,
    "clamped_swiglu": lambda gate, up, limit=10.0: below(FORMULAS["silu"](gate), limit) * within(up, limit),
}
SPELLED = [  # limits in reach of random numbers, and an order of columns
    "swiglu_clamped(limit=0.75)",
    "swiglu_oai(alpha=1.25,limit=0.5)",
    "clamped_swiglu(limit=0.375)",
    "swiglu_oai(alpha=1.25,limit=0.5,interleaved)",
    "geglu(interleaved)",
]
NAMES = [*ACTIVATIONS, *SPELLED]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name):
    z = torch.linspace(-12, 12, 4002, dtype=torch.float64).view(-1, 2)
    if name in CLAMPED:
        wanted = CLAMPED[name](z[:, :1], z[:, 1:].flip(0))
        z = torch.cat([z[:, :1], z[:, 1:].flip(0)], 1)
    elif ACTIVATIONS[name].is_gated:
        wanted = FORMULAS[GATES[name]](z[:, :1]) * z[:, 1:]
    else:
        wanted = FORMULAS[name](z)
    assert_same_formula(cumo_kernels.activate(z, name), wanted)


@pytest.mark.parametrize("name", SPELLED)
def test_parameters(name):
    row = get_activation(name)
    z = torch.linspace(-3, 3, 1202, dtype=torch.float64)
    gate, up = z[:601], z[601:].flip(0)
    formula = CLAMPED.get(row.kind, lambda gate, up: FORMULAS["gelu"](gate) * up)
    order = (gate[:, None], up[:, None])  # rows of width 1: side by side and interleaved are the same
    wanted = formula(*order, **row.parameters)
    assert_same_formula(cumo_kernels.activate(torch.cat(order, 1), name), wanted)
    wide = torch.stack([gate, up], 1).flatten() if row.is_interleaved else torch.cat([gate, up])
    assert_same_formula(cumo_kernels.activate(wide, name), wanted[:, 0])


@pytest.mark.parametrize("name", ["swiglu_clamped(limit=2.0)", "swiglu_oai(limit=2.0)"])
def test_slope_at_a_bound_is_one(backend, device, name):
    """Beyond it 0, whatever torch.clamp of this release does; NaN in either half stays visible."""
    values = [-2.5, -2.0, 0.0, 2.0, 2.5]
    z = torch.tensor([[g, u] for g in values for u in values], device=device, requires_grad=True)
    gate, up = z.detach().unbind(1)
    shift = get_activation(name).shift
    with use_backend(backend):
        (ours,) = torch.autograd.grad(cumo_kernels.activate(z, name).sum(), z)
        (traced,) = torch.autograd.grad(get_activation(name).forward(z).sum(), z)
        assert torch.equal(traced == 0, ours == 0)
        nan = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")]], device=device)
        assert cumo_kernels.activate(nan, name).isnan().all()
    assert torch.equal(ours[:, 0] == 0, (gate > 2.0) | (up + shift == 0.0))
    assert torch.equal(ours[:, 1] == 0, (up.abs() > 2.0) | (gate == 0.0))


def test_a_name_is_the_same_for_every_spelling_of_its_parameters():
    assert get_activation("swiglu_oai(limit=7, alpha=1.702)") == get_activation("swiglu_oai")
    names = ("swiglu_oai( limit = 3 )", "swiglu_oai(limit=3.0,alpha=1.702)")
    assert {get_activation(name).name for name in names} == {"swiglu_oai(alpha=1.702,limit=3.0)"}
    assert get_activation("geglu(interleaved)").spelled == "geglu(interleaved)"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swiglu_oai(beta=1)", r"swiglu_oai with alpha=... and limit=... and interleaved, got"),
        ("swiglu(limit=1)", r"swiglu with interleaved, got"),
        ("gelu(interleaved)", r"gelu with no parameter, got"),
        ("swiglu_oai(limit=inf)", r"finite limit above 0"),
        ("swiglu_oai(limit=nan)", r"finite limit above 0"),
        ("swiglu_oai(alpha=-1)", r"finite alpha above 0"),
        ("swiglu_oai(limit=seven)", r"a number as limit"),
        ("swiglu_oai(limit=7,limit=8)", r"each of its parameters once"),
        ("swiglu(,)", r"each of its parameters once"),
        ("swiglu(,interleaved)", r"swiglu with interleaved"),
        ("swiglu_oai(limit=7", r"one of"),
        ("swigluoai()", r"one of"),
        (None, r"one of .*, got None"),
    ],
)
def test_wrong_parameters_are_named(name, words):
    with pytest.raises(ValueError, match=f"activation must be .*{words}"):
        get_activation(name)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cumo_kernels.activate(z, name), z)


@pytest.mark.parametrize("shape", [(0, 64), (1, 2), (57, 194), (2, 3, 128), (3, 3072)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_activate(backend, device, dtype, name, shape):
    z = torch.randn(shape, device=device, dtype=dtype)
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda z: cumo_kernels.activate(z, name), lambda z: reference.activate(z, name), z
        )


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous(backend, device, name):
    z = torch.randn(32, 14, device=device).T
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda z: cumo_kernels.activate(z, name), lambda z: reference.activate(z, name), z
        )


def test_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"name must be one of .*'gelu'.*, got 'tanh'"):
        cumo_kernels.activate(torch.randn(2, 2), "tanh")
    with pytest.raises(ValueError, match=r"x must have an even last dimension for swiglu .*\(2, 3\)"):
        cumo_kernels.activate(torch.randn(2, 3), "swiglu")
    with pytest.raises(ValueError, match=r"x must be float32, .*int64"):
        cumo_kernels.activate(torch.ones(2, 2, dtype=torch.int64), "gelu")


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_number_of_tokens_does_not_change_the_plan(backend, device):
    from cumo_kernels.backends.triton import activation

    plans = []
    for num_rows in (3, 5):
        with use_backend(backend):
            cumo_kernels.activate(torch.randn(num_rows, 32, device=device), "quick_gelu")
        plans.append(activation._plan.cache_info().misses)
    assert plans[0] == plans[1]
