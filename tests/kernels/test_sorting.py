"""sort_by_expert: compared with the reference, and its properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cumo_kernels import dispatch, routing_from_topk
from cumo_kernels.backends import reference

SORTS = [  # num_tokens, num_experts, top_k; one program sorts 4 blocks of slots, smaller for more experts
    pytest.param(0, 4, 2, id="no-slot"),
    pytest.param(1, 1, 1, id="one-slot"),
    pytest.param(577, 4, 2, id="clip-crop"),
    pytest.param(9001, 4, 2, id="several-programs"),
    pytest.param(2500, 7, 3, id="odd-tails"),
    pytest.param(40, 256, 8, id="256-experts"),
    pytest.param(3, 1024, 32, id="1024-experts-several-programs"),
    pytest.param(4, 1000, 8, id="1000-experts-one-program"),
    pytest.param(20, 384, 11, id="384-experts"),
    pytest.param(1200, 512, 32, id="512-experts-counted-first", marks=pytest.mark.large),
    pytest.param(30, 200, 1, id="mostly-empty-experts"),
    pytest.param(16500, 3, 2, id="few-experts-counted-first"),
]


@pytest.mark.parametrize("dropping", [False, True], ids=["all", "dropping"])
@pytest.mark.parametrize("num_tokens, num_experts, top_k", SORTS)
def test_sort(backend, device, num_tokens, num_experts, top_k, dropping):
    indices = torch.randint(num_experts + dropping, (num_tokens, top_k), device=device, dtype=torch.int32)
    found = dispatch.implementation(backend, "sort_by_expert")(indices, num_experts)
    for got, wanted in zip(found, reference.sort_by_expert(indices, num_experts), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, wanted)


@settings(deadline=None, max_examples=40)
@given(num_tokens=st.integers(0, 60), num_experts=st.integers(1, 9), data=st.data())
def test_sort_properties(num_tokens, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(num_experts + 1, (num_tokens, top_k), generator=generator)  # E drops the slot
    routing = routing_from_topk(torch.ones(num_tokens, top_k), indices, num_experts)
    flat, end = indices.flatten(), int(routing.expert_offsets[-1])
    assert routing.tokens_per_expert.tolist() == [int((flat == e).sum()) for e in range(num_experts)]
    assert routing.expert_offsets[0] == 0
    assert torch.equal(routing.expert_offsets.diff(), routing.tokens_per_expert)
    assert sorted(routing.permutation.tolist()) == list(range(num_tokens * top_k))
    slots = routing.permutation[:end].tolist()
    assert slots == sorted(slots, key=lambda s: (int(flat[s]), s))  # by expert, stable inside
    assert torch.equal(routing.inverse_permutation[slots], torch.arange(end, dtype=torch.int32))
    assert torch.equal(routing.inverse_permutation < 0, flat == num_experts)
