"""Every wrong argument of a public function is a ValueError that names the argument, with wanted and got."""

import inspect
import re

import numpy as np
import pytest
import torch

import cumo_kernels
from cumo_kernels import expert_mlp, route
from cumo_kernels.testing import make_routing

T, H, I, O, E, K = 6, 5, 8, 3, 4, 2
PLAN = make_routing("uniform", T, E, K)
OFFSETS = PLAN.expert_offsets
META_PLAN = cumo_kernels.routing_from_topk(
    torch.empty(T, K, device="meta"), torch.empty(T, K, dtype=torch.int32, device="meta"), E
)
ANYTHING = [None, 1.5, True, "word", [1], {}, (1, 2), object(), torch.float32]


def tensors(good, none=False):
    """Wrong values for a tensor: other types, ranks, dtypes and another device."""
    yield from (value for value in ANYTHING if not (none and value is None))
    yield from (
        good[0],
        good[None],
        torch.tensor(1.0),
        good.to("meta"),
        good.bool(),
        good.to(torch.complex64),
    )
    yield good.long() if good.is_floating_point() else good.float()


def on_cpu(good):
    """The same for a function that takes tensors of any device."""
    yield from (value for value in tensors(good) if not getattr(value, "is_meta", False))


def only(*good):
    yield from (v for v in [*ANYTHING, torch.ones(2), -1] if not any(v is g for g in good))


def plans(none=False):
    yield from (value for value in [*ANYTHING, torch.ones(2), META_PLAN] if not (none and value is None))
    broken = dict(vars(PLAN))
    for name in ("topk_weights", "permutation", "expert_offsets", "inverse_permutation", "topk_indices"):
        for value in (None, broken[name].to(torch.int64), broken[name][:1], torch.tensor(1)):
            yield cumo_kernels.Routing(**broken | {name: value})


def adapters():
    """Wrong values for a sequence of adapters; test_adapters.py has wrong fields of one."""
    yield from (value for value in [*ANYTHING, torch.ones(2)] if not isinstance(value, str | tuple))
    yield from ([None], [X, X])


X, GATE, ROWS = torch.rand(T, H), torch.rand(E, H), torch.rand(T * K, H)
UP, DOWN, UP_BIAS, DOWN_BIAS = (
    torch.rand(E, 2 * I, H),
    torch.rand(E, O, I),
    torch.rand(E, 2 * I),
    torch.rand(E, O),
)
WIDE, BIAS = torch.rand(E, O, 64), torch.rand(E)
CALLS = {  # function -> good arguments, wrong values of each
    cumo_kernels.activate: (
        {"x": X[:, :4], "name": "swiglu"},
        {"x": [*ANYTHING, X[:, :4].long()], "name": only()},
    ),
    cumo_kernels.combine: (
        {"rows": ROWS, "routing": PLAN, "weighted": True},
        {"rows": tensors(ROWS), "routing": plans(), "weighted": only(True)},
    ),
    cumo_kernels.expert_mlp: (
        {"x": X, "routing": PLAN, "up_proj": UP, "down_proj": DOWN, "up_bias": UP_BIAS,
         "down_bias": DOWN_BIAS,
         "activation": "swiglu", "memory": "preact", "up_adapters": [], "down_adapters": [],
         "interleaved": False},
        {"x": tensors(X), "routing": plans(), "up_proj": tensors(UP), "down_proj": tensors(DOWN),
         "up_bias": tensors(UP_BIAS, none=True), "down_bias": tensors(DOWN_BIAS, none=True),
         "activation": only(), "memory": only(), "up_adapters": adapters(),
         "down_adapters": adapters(), "interleaved": only(True)},
    ),
    cumo_kernels.explain: (
        {"op": "route", "x": X, "num_experts": E, "with_backward": True},
        {"op": only(), "x": ANYTHING[:-1], "num_experts": only(), "with_backward": only(True)},
    ),
    cumo_kernels.grouped_gemm: (
        {"x": X, "weight": UP, "expert_offsets": OFFSETS, "bias": UP_BIAS, "gather": PLAN,
         "activation": "geglu", "adapters": []},
        {"x": tensors(X), "weight": tensors(UP), "expert_offsets": tensors(OFFSETS),
         "bias": tensors(UP_BIAS, none=True), "gather": plans(none=True), "activation": only(None),
         "adapters": adapters()},
    ),
    cumo_kernels.noisy_top_k: (
        {"x": X, "top_k": K, "gate_weight": GATE, "noise_weight": GATE, "seed": 3},
        {"x": tensors(X), "top_k": [*only(), 0, E + 1], "gate_weight": tensors(GATE),
         "noise_weight": [*tensors(GATE), GATE[:2], GATE * torch.nan],
         "seed": [*ANYTHING[1:], 2**63, torch.tensor(1.0)]},
    ),
    cumo_kernels.pack: (
        {"weight": WIDE, "format": "int4", "group": 32, "symmetric": True, "scale_dtype": None},
        {"weight": on_cpu(WIDE), "format": only(), "group": [*only(None), 0, 48],
         "symmetric": only(True), "scale_dtype": [*only(None, torch.float32), torch.int8]},
    ),
    cumo_kernels.permute: ({"x": X, "routing": PLAN}, {"x": tensors(X), "routing": plans()}),
    cumo_kernels.route: (
        {"x": X, "top_k": K, "gate_weight": GATE, "groups": 2, "renormalize": True, "compat": None,
         "score": "sigmoid", "selection_bias": BIAS, "expert_groups": 2, "top_groups": 1,
         "group_score": "top2", "scale": 2.5, "capacity": 3, "drop": "weight", "jitter": 0.1, "seed": 3,
         "topk_indices": None},
        {"x": tensors(X), "top_k": [*only(), 0, E + 1, 2.0, "2"], "gate_weight": tensors(GATE, none=True),
         "groups": [*only(), 0, 4, torch.ones(2), torch.tensor(1)], "renormalize": only(True),
         "compat": [*only(None), "cumo"], "score": only(),
         "selection_bias": [*tensors(BIAS, none=True), BIAS[:3], BIAS * torch.nan],
         "expert_groups": [*only(), 0, 3, 2.0], "top_groups": [*only(None), 0, 3],
         "group_score": only(), "scale": [*only(ANYTHING[1]), 0, torch.inf, torch.nan],
         "capacity": [*only(None), 0], "drop": only(), "jitter": [*only(), -1, 1, torch.nan],
         "seed": [*ANYTHING, 2**63, torch.tensor(1.0)],
         "topk_indices": [*tensors(PLAN.topk_indices, none=True), PLAN.topk_indices + E]},
    ),
    cumo_kernels.routing_from_topk: (
        {"topk_weights": PLAN.topk_weights, "topk_indices": PLAN.topk_indices, "num_experts": E},
        {"topk_weights": tensors(PLAN.topk_weights), "topk_indices": tensors(PLAN.topk_indices),
         "num_experts": [*only(), 0]},
    ),
    cumo_kernels.sparsemixer: (
        {"logits": ROWS, "jitter": 0.1, "seed": 3},
        {"logits": [*on_cpu(ROWS), ROWS[:, :1]], "jitter": [*only(), -1, 1, torch.nan],
         "seed": [*ANYTHING[1:], 2**63, torch.tensor(1.0)]},
    ),
    cumo_kernels.update_selection_bias: (
        {"bias": torch.zeros(E), "tokens_per_expert": PLAN.tokens_per_expert, "rate": 0.1},
        {"bias": [*tensors(torch.zeros(E))],
         "tokens_per_expert": [*ANYTHING, torch.zeros(E), PLAN.tokens_per_expert[0],
                               PLAN.tokens_per_expert[None, None], PLAN.tokens_per_expert.to("meta")],
         "rate": [None, True, "word", [1], {}, object(), -0.1, float("inf")]},
    ),
    cumo_kernels.use_backend: ({"name": "reference"}, {"name": only(None)}),
    cumo_kernels.with_capacity: (
        {"routing": PLAN, "capacity": 2, "drop": "weight"},
        {"routing": [plan for plan in plans() if plan is not META_PLAN],
         "capacity": [*only(), 0], "drop": only()},
    ),
}  # fmt: skip


def rows_of(calls):
    """One row for each argument of each function."""
    return [
        pytest.param(function, name, id=f"{function.__name__}-{name}")
        for function, (_, wrong) in calls.items()
        for name in wrong
    ]


def check_wrong_values(calls, function, name):
    good, wrong = calls[function]
    values = [*wrong[name]]
    assert values
    for value in values:
        with pytest.raises(ValueError, match=r"(?s)must .*, got ") as caught:
            function(**good | {name: value})
        assert re.search(rf"\b{name}\b", str(caught.value)), (name, value, caught.value)


def check_signatures(calls):
    for function, (good, wrong) in calls.items():
        assert set(inspect.signature(function).parameters) == set(good) == set(wrong), function


def test_every_public_function_and_argument_is_here():
    data = ("ACTIVATIONS", "Adapter", "NoisyRouting", "PackedWeight", "Routing", "RouterStats")
    functions = {getattr(cumo_kernels, name) for name in cumo_kernels.__all__ if name not in data}
    assert functions <= set(CALLS)
    check_signatures(CALLS)


@pytest.mark.parametrize("function, name", rows_of(CALLS))
def test_a_wrong_argument_is_named(function, name):
    check_wrong_values(CALLS, function, name)


def test_numpy_integers_are_integers():
    plan = route(X, np.int64(2), GATE, groups=np.int32(3))
    assert plan.top_k == 2 and plan.stats.mean_probs.shape == (3, E)
    with pytest.raises(ValueError, match="top_k must be an int between 1 and the 4 experts, got True"):
        route(X, True, GATE)


def test_weights_for_another_kind_of_activation_are_explained():
    up, down = torch.rand(E, I, H), torch.rand(E, O, I)
    words = (
        r"down_proj must be \(4, O, 4\), got \(4, 3, 8\): activation 'swiglu', the default, is gated, so "
        r"that up_proj has 2I = 8 rows; the weights fit activation 'quick_gelu', .* or 'silu'"
    )
    with pytest.raises(ValueError, match=words):
        expert_mlp(X, PLAN, up, down)
    with pytest.raises(
        ValueError, match=r"'gelu' is plain.*; the weights fit activation 'swiglu', .*'geglu_tanh'"
    ):
        expert_mlp(X, PLAN, UP, DOWN, activation="gelu")
    with pytest.raises(ValueError, match=r"up_proj must be \(E, 2I, H\) for swiglu, got \(4, 7, 5\)"):
        expert_mlp(X, PLAN, torch.rand(E, 7, H), torch.rand(E, O, 7))


def check_docstrings(package):
    classes = [value for name in package.__all__ if isinstance(value := getattr(package, name), type)]
    assert classes and all(value.__dict__.get("__doc__") for value in classes)


def test_every_public_class_has_its_own_docstring():
    check_docstrings(cumo_kernels)
