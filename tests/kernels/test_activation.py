"""activate: every backend compared with the table, output and gradient; the table, with its formulas."""

import math

import pytest
import torch

import cumo_kernels
from cumo_kernels import ACTIVATIONS, use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import assert_as_accurate_as_torch
from tests.rounding import assert_same_formula

FORMULAS = {  # written out again from the papers, in plain numbers
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + torch.exp(-z)),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_formula(name):
    z = torch.linspace(-8, 8, 4002, dtype=torch.float64).view(-1, 2)
    if ACTIVATIONS[name].is_gated:
        wanted = FORMULAS[GATES[name]](z[:, :1]) * z[:, 1:]
    else:
        wanted = FORMULAS[name](z)
    assert_same_formula(cumo_kernels.activate(z, name), wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name):
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: cumo_kernels.activate(z, name), z)


@pytest.mark.parametrize("shape", [(0, 64), (1, 2), (57, 194), (2, 3, 128), (3, 3072)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate(backend, device, dtype, name, shape):
    z = torch.randn(shape, device=device, dtype=dtype)
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda z: cumo_kernels.activate(z, name), lambda z: reference.activate(z, name), z
        )


@pytest.mark.parametrize("name", ACTIVATIONS)
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
