"""No backend except the reference synchronises a GPU with the host; detected on CPU tensors too."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cumo_kernels import (
    Adapter,
    activate,
    combine,
    expert_mlp,
    grouped_gemm,
    hostsync,
    noisy_top_k,
    pack,
    permute,
    route,
    routing_from_topk,
    sparsemixer,
    update_selection_bias,
    use_backend,
    with_capacity,
)
from cumo_kernels.backends import reference
from cumo_kernels.hostsync import HostSync, no_host_sync
from cumo_kernels.testing import Yardstick, make_routing

T, H, I, E, K = 24, 32, 48, 4, 2


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: x.int().abs().bincount(),
        lambda x: x.repeat_interleave(x.int().abs(), 0),
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: torch.nn.functional.one_hot(x.abs().long()),
        lambda x: x.int().unique(),
    ],
)
def test_a_read_by_the_host_is_an_error(read):
    x = torch.arange(4.0)
    read(x)
    with pytest.raises(HostSync), no_host_sync():
        read(x)


def leaf(*size, dtype, device):
    return torch.randn(*size, dtype=dtype, device=device).requires_grad_()


def every_op(dtype, device):
    """(name, function of no argument that runs it, its leaves): all five stems, forward."""
    make = lambda *size: leaf(*size, dtype=dtype, device=device)
    routing = make_routing("empty", T, E, K, device)
    weights = routing.topk_weights.clone().requires_grad_()
    x, gate, rows, hidden = make(T, H), make(E, H), make(T * K, H), make(T * K, 2 * I)
    up, up_bias, down, down_bias = make(E, I, H), make(E, I), make(E, H, I), make(E, H)
    dropped = routing.topk_indices.clone()
    dropped[0, 0] = E
    plan = lambda indices: routing_from_topk(weights, indices, E)
    yield "route", lambda: route(x, K, gate).topk_weights, (x, gate)
    yield "permute", lambda: permute(x, plan(dropped)), (x,)
    yield "combine", lambda: combine(rows, plan(dropped)), (rows, weights)
    yield "activate", lambda: activate(hidden, "swiglu"), (hidden,)
    offsets = routing.expert_offsets
    for name, rows_in, gathered in (("rows", rows, None), ("gathered", x, routing)):
        yield (
            f"grouped_gemm, {name}",
            lambda rows_in=rows_in, gathered=gathered: grouped_gemm(
                rows_in, up, offsets, bias=up_bias, gather=gathered, activation="gelu"
            ),
            (rows_in, up, up_bias),
        )
    packed_up = pack(torch.rand(E, H, H).to(device), "nf4", 32)
    packed_down = pack(torch.rand(E, H, H).to(device), "mxfp4")
    bias, low, high = make(E, H), make(E, 3, H), make(E, H, 3)
    yield (
        "grouped_gemm, packed",
        lambda: grouped_gemm(x, packed_up, offsets, bias=bias, gather=routing, activation="gelu"),
        (x, bias),
    )
    yield (
        "expert_mlp, packed with adapters",
        lambda: expert_mlp(
            x, plan(dropped), packed_up, packed_down, activation="gelu", up_adapters=[Adapter(low, high)]
        ),
        (x, weights, low, high),
    )
    for memory in ("x", "preact", "all"):
        yield (
            f"expert_mlp, {memory}",
            lambda memory=memory: expert_mlp(
                x, plan(dropped), up, down, up_bias, down_bias, "quick_gelu", memory
            ),
            (x, weights, up, down, up_bias, down_bias),
        )


def test_no_op_waits_for_the_host(backend, device, dtype):
    if backend == "reference":
        pytest.skip("it reads the expert offsets on the host and loops over them")
    for name, op, leaves in every_op(dtype, device):
        if backend == "cuda" and "packed" in name:  # which it refuses
            continue
        with use_backend(backend):
            out = op()  # compile and plan once first
            upstream = torch.randn_like(out)
            torch.autograd.grad(out, leaves, upstream)
            try:
                with no_host_sync():
                    torch.autograd.grad(op(), leaves, upstream)
            except HostSync as error:
                raise AssertionError(f"{backend}, {name}: {error}") from error


@pytest.mark.parametrize("activation", ["quick_gelu", "swiglu"])
@pytest.mark.parametrize("sizes", [(57, 48, 64, 32), (57, 49, 66, 35)], ids=["aligned", "odd"])
def test_backends_are_as_accurate_where_no_value_can_be_read(
    backend, device, dtype, activation, sizes, monkeypatch
):
    """Some backends read values on a CPU; here they cannot, as on a GPU."""
    if backend == "reference":
        pytest.skip("it reads the expert offsets on the host")
    num_tokens, hidden, inner, out = sizes
    routing = make_routing("empty", num_tokens, 5, 2, device)
    draw = lambda *size: torch.randn(*size, dtype=dtype, device=device)
    width = inner * (1 + (activation == "swiglu"))
    weights = draw(5, width, hidden) / hidden**0.5, draw(5, out, inner) / inner**0.5
    inputs = (draw(num_tokens, hidden), routing.topk_weights, *weights, draw(5, width), draw(5, out))
    plan = (routing.permutation, routing.inverse_permutation, routing.expert_offsets)

    def op(x, topk_weights, *rest):
        mine = routing_from_topk(topk_weights, routing.topk_indices, 5)
        return expert_mlp(x, mine, *rest, activation)

    def expected(x, topk_weights, *rest):
        return reference.expert_mlp(x, topk_weights, *plan, *rest, activation, "none")[0]

    yardstick = Yardstick(expected, inputs)
    monkeypatch.setattr(hostsync._guard, "active", True)
    with use_backend(backend):
        found = yardstick.measure(op)
    assert [accuracy.reason for accuracy in found if accuracy.reason] == []


def test_the_reference_is_detected_to_synchronise():
    with use_backend("reference"), pytest.raises(HostSync), no_host_sync():
        for _, op, _ in every_op(torch.float32, "cpu"):
            op()


ROUTERS = {
    "jitter": lambda x, gate, seed: route(x, 2, gate, jitter=0.1, seed=seed),
    "scores": lambda x, gate, seed: route(x, 2, gate, score="sigmoid", capacity=3),
    "noisy": lambda x, gate, seed: noisy_top_k(x, 2, gate, gate, seed=seed),
    "sparsemixer": lambda x, gate, seed: sparsemixer(x[:, :4], seed=seed),
    "capacity": lambda x, gate, seed: with_capacity(route(x[:, :4], 2), 3, "weight"),
    "bias": lambda x, gate, seed: update_selection_bias(gate[:, 0], gate[:, 1].int(), 1e-3),
}
# without a fixed order on a GPU, or compiled by torch at the first call, which a capture forbids
AVOIDED = ("index_add", "scatter_add", "special_ndtri")


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("seed", ["number", "tensor"])
def test_routers_in_plain_torch_on_a_gpu(name, seed):
    """On CUDA tensors without values: nothing is copied between host and GPU, and every result repeats."""
    with FakeTensorMode(), torch.device("cuda"), Operators() as seen, no_host_sync():
        x, gate = torch.empty(16, 8), torch.empty(4, 8)
        ROUTERS[name](x, gate, 7 if seed == "number" else torch.empty((), dtype=torch.int64))
    assert seen.names and not seen.names & set(AVOIDED)


def test_a_copy_from_pageable_memory_waits():
    with FakeTensorMode(), no_host_sync():
        for copy in (
            lambda: torch.empty(3).to("cuda"),
            lambda: torch.empty(3, device="cuda").copy_(torch.empty(3)),
        ):
            with pytest.raises(HostSync, match="pageable"):
                copy()


def test_a_seed_must_be_on_the_device_of_the_tokens():
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match="seed must be on the device of the tokens, cuda:0, got cpu"),
    ):
        sparsemixer(torch.empty(5, 4, device="cuda"), seed=torch.empty((), dtype=torch.int64, device="cpu"))
