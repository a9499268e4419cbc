"""Every wrong argument of MoELayer is a ValueError that names it, with wanted and got."""

import numpy as np
import pytest
import torch

import cumo_model
from cumo_model import MoELayer
from tests.kernels.test_arguments import (
    ANYTHING,
    E,
    H,
    I,
    K,
    O,
    T,
    X,
    check_docstrings,
    check_signatures,
    check_wrong_values,
    only,
    rows_of,
)

LAYER = MoELayer(H, I, E, K, "gelu")
CALLS = {  # function -> good arguments, wrong values of each
    MoELayer: (
        {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K, "activation": "gelu",
         "output_size": O, "bias": True, "compat": None, "place": "", "layer": 0, "router": None},
        {"hidden_size": only(), "intermediate_size": only(), "num_experts": [*only(), 0],
         "top_k": [*only(), 0, 5], "activation": only(), "output_size": [*only(None), 0], "bias": only(True),
         "compat": only(None), "place": [None, 1, torch.ones(1)], "layer": [None, "a", 1.5, True],
         "router": [*ANYTHING[1:5], {"K": 2}, {"score": 1}]},
    ),
    LAYER.forward: (
        {"x": X, "groups": 1, "router_only": False, "counted": torch.ones(T, dtype=torch.bool)},
        {"x": [*ANYTHING, torch.tensor(1.0), X[:, :4], X.double(), X.long(), X.to("meta")], "groups": only(),
         "router_only": only(True), "counted": [*ANYTHING[1:], torch.ones(T), torch.ones(2).bool()]},
    ),
}  # fmt: skip


def test_every_argument_is_here():
    check_signatures(CALLS)


@pytest.mark.parametrize("function, name", rows_of(CALLS))
def test_a_wrong_argument_is_named(function, name):
    check_wrong_values(CALLS, function, name)


def test_numpy_integers_are_integers():
    assert MoELayer(np.int64(H), np.int64(I), np.int64(E), np.int64(K), "gelu")(X).shape == (T, H)


def test_every_public_class_has_its_own_docstring():
    check_docstrings(cumo_model)
