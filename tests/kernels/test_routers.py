"""Routers of transformers, taken over: the same experts, and weights as accurate as theirs."""

import copy
import importlib

import pytest
import torch

from cumo_kernels import route
from cumo_kernels.integrations.routers import FORWARDS, set_router_implementation
from cumo_kernels.ops.noisy import sparsemixer
from cumo_kernels.testing import assert_as_accurate_as_torch
from tests.rounding import assert_close_after

SIGMOID = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
KINDS = {  # class -> module, class of the config, its arguments
    "DeepseekV3TopkRouter": ("deepseek_v3", "DeepseekV3Config", SIGMOID),
    "Dots1TopkRouter": (
        "dots1",
        "Dots1Config",
        SIGMOID | {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "Glm4MoeTopkRouter": ("glm4_moe", "Glm4MoeConfig", SIGMOID | {"norm_topk_prob": False}),
    "GptOssTopKRouter": ("gpt_oss", "GptOssConfig", {"num_local_experts": 12, "num_experts_per_tok": 3}),
    "Llama4Router": ("llama4", "Llama4TextConfig", {"num_local_experts": 12, "num_experts_per_tok": 2}),
    "MixtralTopKRouter": ("mixtral", "MixtralConfig", {"num_local_experts": 12}),
    "OlmoeTopKRouter": ("olmoe", "OlmoeConfig", {"num_experts": 12, "num_experts_per_tok": 5}),
    "PhimoeTopKRouter": ("phimoe", "PhimoeConfig", {"num_local_experts": 12, "router_jitter_noise": 0.2}),
    "Qwen3MoeTopKRouter": ("qwen3_moe", "Qwen3MoeConfig", {"num_experts": 12, "norm_topk_prob": True}),
    "Qwen3_5MoeTopKRouter": (
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        {"num_experts": 12, "num_experts_per_tok": 3},
    ),
}


def build(name):
    pytest.importorskip("transformers")
    module, config, arguments = KINDS[name]
    folder = f"transformers.models.{module}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{module}"), config)
    router = getattr(importlib.import_module(f"{folder}.modeling_{module}"), name)(
        config(hidden_size=32, **arguments)
    ).eval()
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)
    return router


def in_order(returned):
    """Indices ascending in each row, and weights beside them; Llama-4 returns a dense table of weights."""
    if len(returned) == 2:
        scores, logits = returned
        indices = scores.nonzero()[:, 1].view(len(logits), -1)
        return indices, scores.gather(1, indices)
    order = returned[2].sort(-1)
    return order.values, returned[1].gather(1, order.indices)


def test_every_router_is_tested():
    assert KINDS.keys() == FORWARDS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_experts_and_weights(name, dtype):
    router = build(name).to(dtype)
    ours = copy.deepcopy(router)
    assert set_router_implementation(ours, "cumo") == 1
    x = torch.randn(200, 32).to(dtype)
    with torch.no_grad():
        theirs, found = router(x), ours(x)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in theirs]
    if dtype == torch.float32:  # rounded logits tie, and torch.topk has no rule for ties
        assert torch.equal(in_order(found)[0], in_order(theirs)[0])
        if name in ("DeepseekV3TopkRouter", "Dots1TopkRouter", "Glm4MoeTopkRouter"):  # fp32 in an fp64 model
            # on each side three sums of four scores, a quotient and a product
            assert_close_after(10, in_order(found)[1], in_order(theirs)[1])
        else:
            wide = copy.deepcopy(router).double()
            expected = lambda x: in_order((router if x.dtype == torch.float32 else wide)(x))[1]
            assert_as_accurate_as_torch(lambda x: in_order(ours(x))[1], expected, x)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(copied(x), found, strict=True))
    assert set_router_implementation(ours, "eager") == 1 and type(ours) is type(router)


def test_gradients_of_deepseek_v3():
    router = build("DeepseekV3TopkRouter")
    ours, x = copy.deepcopy(router), torch.randn(64, 32)
    set_router_implementation(ours, "cumo")
    upstream = torch.randn(64, 16)
    grads = []
    for module in (router, ours):
        _, weights, indices = module(x)
        dense = torch.zeros(64, 16).scatter(1, indices, weights)
        (dense * upstream).sum().backward()
        grads.append(module.weight.grad)
    # one product of 64 rows in both; its operands differ by a few roundings
    assert (grads[0] - grads[1]).norm() < 64 * torch.finfo(torch.float32).eps * grads[0].norm()


def test_training_of_phimoe_samples_like_the_model():
    """The distribution of the first choice and the gradient of a weight, for one token many times."""
    logits = torch.tensor([[1.0, 0.9, 0.95, -2.0]]).expand(20000, 4).clone().requires_grad_()
    found = sparsemixer(logits, jitter=0.2, seed=3)
    wanted = torch.tensor([1.0, 0.9, 0.95, -torch.inf]).softmax(-1)
    share = torch.bincount(found.topk_indices[:, 0].long(), minlength=4) / 20000
    assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / 20000).sqrt()).all()
    best = found.topk_indices[:, 0] == 0
    assert_close_after(6, found.topk_weights[best, 0].mean(), wanted[0])  # exp, two sums, quotient, mean
    third = (found.topk_weights[~best, 0] < 0.2).float().mean()
    assert abs(float(third) - 0.75) < 4 * (0.75 * 0.25 / float((~best).sum())) ** 0.5
    again = sparsemixer(logits, jitter=0.2, seed=3)
    assert torch.equal(again.topk_indices, found.topk_indices)
    assert not torch.equal(sparsemixer(logits, jitter=0.2, seed=4).topk_indices, found.topk_indices)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="implementation must be one of"):
        set_router_implementation(torch.nn.Linear(2, 2), "triton")
    with pytest.raises(ValueError, match="model must have a router of"):
        set_router_implementation(torch.nn.Linear(2, 2), "cumo")
    with pytest.raises(ValueError, match="top_k must be between 1 and the 1 experts"):
        sparsemixer(torch.randn(3, 1))


def test_llama4_in_plain_words():
    logits = torch.randn(9, 6)
    found = route(logits, 2, score="sigmoid", renormalize=False)
    assert torch.equal(found.topk_weights, logits.topk(2).values.sigmoid())
