"""grouped_gemm: every backend compared with the reference, output and every gradient, and with a loop."""

import pytest
import torch

import cumo_kernels
from cumo_kernels import use_backend
from cumo_kernels.backends import reference
from cumo_kernels.testing import PATTERNS, assert_as_accurate_as_torch, make_routing
from tests.rounding import assert_same_formula

SHAPES = [  # num_tokens, in_features, out_features, num_experts, top_k
    pytest.param(0, 32, 48, 4, 2, id="no-token"),
    pytest.param(1, 32, 48, 4, 2, id="one-token"),
    pytest.param(57, 97, 34, 7, 3, id="odd-tails-prime-experts"),
    pytest.param(32, 64, 128, 4, 4, id="top_k-equals-experts"),
    pytest.param(19, 16, 32, 1, 1, id="one-expert-in-all"),
    pytest.param(300, 128, 64, 4, 2, id="several-row-tiles"),
    pytest.param(40, 640, 72, 3, 2, id="long-reduction-more-steps-than-stages"),
]


def make_case(pattern, num_tokens, in_features, out_features, num_experts, top_k, dtype, device):
    routing = make_routing(pattern, num_tokens, num_experts, top_k, device)
    x = torch.randn(num_tokens, in_features, device=device, dtype=dtype)
    rows = torch.randn(routing.num_slots, in_features, device=device, dtype=dtype)
    weight = (
        torch.randn(num_experts, out_features, in_features, device=device, dtype=dtype) / in_features**0.5
    )
    bias = torch.randn(num_experts, out_features, device=device, dtype=dtype)
    return routing, x, rows, weight, bias


@pytest.mark.parametrize("activation", [None, "quick_gelu", "swiglu"])
def test_reference_is_the_loop(activation):
    routing, x, _, weight, bias = make_case("skewed", 21, 10, 8, 5, 2, torch.float64, "cpu")
    out = cumo_kernels.grouped_gemm(
        x, weight, routing.expert_offsets, bias=bias, gather=routing, activation=activation
    )
    for position, slot in enumerate(routing.permutation.tolist()):
        expert = int(routing.topk_indices.flatten()[slot])
        wanted = torch.nn.functional.linear(x[slot // 2], weight[expert], bias[expert])
        wanted = wanted if activation is None else cumo_kernels.activate(wanted, activation)
        assert_same_formula(out[position], wanted)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens, in_features, out_features, num_experts, top_k", SHAPES)
def test_rows(backend, device, dtype, num_tokens, in_features, out_features, num_experts, top_k, pattern):
    routing, _, rows, weight, bias = make_case(
        pattern, num_tokens, in_features, out_features, num_experts, top_k, dtype, device
    )
    offsets = routing.expert_offsets
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda x, w, b: cumo_kernels.grouped_gemm(x, w, offsets, bias=b),
            lambda x, w, b: reference.grouped_gemm(x, w, offsets, b, None, None, 1, None)[0],
            rows,
            weight,
            bias,
        )


@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("num_tokens, in_features, out_features, num_experts, top_k", SHAPES)
def test_gather_bias_activation(
    backend, device, dtype, num_tokens, in_features, out_features, num_experts, top_k, activation
):
    routing, x, _, weight, bias = make_case(
        "uniform", num_tokens, in_features, out_features, num_experts, top_k, dtype, device
    )
    offsets, permutation, inverse = routing.expert_offsets, routing.permutation, routing.inverse_permutation
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda x, w, b: cumo_kernels.grouped_gemm(
                x, w, offsets, bias=b, gather=routing, activation=activation
            ),
            lambda x, w, b: reference.grouped_gemm(x, w, offsets, b, permutation, inverse, top_k, activation)[
                0
            ],
            x,
            weight,
            bias,
        )


def test_transposed_weight_and_input(backend, device, dtype):
    routing, _, rows, weight, _ = make_case("uniform", 40, 24, 16, 3, 2, dtype, device)
    offsets = routing.expert_offsets
    with use_backend(backend):
        assert_as_accurate_as_torch(
            lambda x, w: cumo_kernels.grouped_gemm(x.T, w.transpose(1, 2), offsets),
            lambda x, w: reference.grouped_gemm(x.T, w.transpose(1, 2), offsets, None, None, None, 1, None)[
                0
            ],
            rows.T.contiguous(),
            weight.transpose(1, 2).contiguous(),
        )


def test_empty_expert_has_exactly_zero_gradients_and_tail_rows_are_zero(backend, device):
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    x = torch.randn(9, 8, device=device, requires_grad=True)
    weight = torch.randn(3, 5, 8, device=device, requires_grad=True)
    bias = torch.randn(3, 5, device=device, requires_grad=True)
    with use_backend(backend):
        out = cumo_kernels.grouped_gemm(x, weight, offsets, bias=bias)
        out.backward(torch.randn_like(out))
    assert torch.equal(out[7:], torch.zeros_like(out[7:]))
    assert torch.equal(x.grad[7:], torch.zeros_like(x[7:]))
    assert torch.equal(weight.grad[1], torch.zeros_like(weight[1])) and bool((weight.grad[0] != 0).any())
    assert torch.equal(bias.grad[1], torch.zeros_like(bias[1])) and bool((bias.grad[2] != 0).any())


def test_gradcheck():
    routing, x, _, weight, bias = make_case("uniform", 6, 4, 6, 3, 2, torch.float64, "cpu")
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for activation in (None, "gelu", "geglu"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, name=activation: cumo_kernels.grouped_gemm(
                x, w, routing.expert_offsets, bias=b, gather=routing, activation=name
            ),
            inputs,
        )


def test_names_the_bad_argument():
    routing, _, rows, weight, bias = make_case("uniform", 8, 16, 6, 4, 2, torch.float32, "cpu")
    offsets = routing.expert_offsets
    with pytest.raises(ValueError, match=r"weight must be \(E, N, 16\), got \(4, 6, 15\)"):
        cumo_kernels.grouped_gemm(rows, weight[..., :15], offsets)
    with pytest.raises(
        ValueError, match=r"weight must have the dtype of x, torch.float32, got torch.bfloat16"
    ):
        cumo_kernels.grouped_gemm(rows, weight.bfloat16(), offsets)
    with pytest.raises(ValueError, match=r"expert_offsets must be \(5,\), got \(4,\)"):
        cumo_kernels.grouped_gemm(rows, weight, offsets[:4])
    with pytest.raises(ValueError, match=r"expert_offsets must be int32, got torch.int64"):
        cumo_kernels.grouped_gemm(rows, weight, offsets.long())
    for values in ([2, 3, 4, 5, 6], [0, 3, 4, 5, 60], [0, 9, 4, 5, 16]):
        with pytest.raises(ValueError, match="expert_offsets must ascend from 0 to at most 16, got "):
            cumo_kernels.grouped_gemm(rows, weight, torch.tensor(values, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"bias must be \(4, 6\), got \(4, 5\)"):
        cumo_kernels.grouped_gemm(rows, weight, offsets, bias=bias[:, :5])
    with pytest.raises(ValueError, match=r"x must be \(8, K\), got \(16, 16\)"):
        cumo_kernels.grouped_gemm(rows, weight, offsets, gather=routing)


@pytest.mark.parametrize("training", ["x", "weight", "bias"])
def test_a_single_needed_gradient_is_the_same(backend, device, training):
    routing, x, _, weight, bias = make_case("skewed", 57, 33, 34, 5, 2, torch.float32, device)
    tensors = {"x": x, "weight": weight, "bias": bias}
    found = []
    for wanted in (tuple(tensors), (training,)):
        leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
        with use_backend(backend):
            out = cumo_kernels.grouped_gemm(
                leaves["x"], leaves["weight"], routing.expert_offsets, bias=leaves["bias"], gather=routing
            )
            out.square().sum().backward()
        found.append(leaves[training].grad)
        assert all((leaf.grad is None) == (name not in wanted) for name, leaf in leaves.items())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_tf32_does_not_truncate_bias_gradients(backend, device, monkeypatch):
    monkeypatch.setattr("cumo_kernels.backends.triton.weight_grad.input_precision", lambda dtype: "tf32")
    routing, x, rows, weight, bias = make_case("skewed", 45, 32, 24, 5, 2, torch.float32, device)
    offsets = routing.expert_offsets
    # 17 bits each, so that fp32 adds them up exactly in any order, and tf32 cannot represent one
    upstream = torch.randint(1 << 16, 1 << 17, (90, 24), device=device) + 0.0
    wanted = [part.sum(0) for part in upstream.tensor_split(offsets[1:-1].tolist())]
    bias.requires_grad_()
    with use_backend(backend):
        out = cumo_kernels.grouped_gemm(rows, weight, offsets, bias=bias)
        assert torch.equal(torch.autograd.grad(out, bias, upstream)[0], torch.stack(wanted))

        weights = torch.full((45, 2), 0.5, device=device)
        plan = cumo_kernels.routing_from_topk(weights, routing.topk_indices, 5)
        down = torch.randn(5, 24, 24, device=device)
        out = cumo_kernels.expert_mlp(x, plan, weight, down, None, bias, "gelu")
        upstream = upstream[::2]
        slots = upstream[plan.permutation.long() // 2] / 2
        wanted = [part.sum(0) for part in slots.tensor_split(plan.expert_offsets[1:-1].tolist())]
        assert torch.equal(torch.autograd.grad(out, bias, upstream)[0], torch.stack(wanted))
