"""Routers of transformers, taken over: the same experts, and weights as accurate as theirs."""

import ast
import copy
import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cumo_kernels import route, sparsemixer
from cumo_kernels.integrations import routers
from cumo_kernels.integrations.routers import FORWARDS, REFUSED, explain, set_router_implementation
from cumo_kernels.testing import assert_as_accurate_as_torch
from tests.rounding import assert_close_after, assert_same_formula

transformers = pytest.importorskip("transformers")

SIGMOID = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
KINDS = {  # class -> class of the config, its arguments
    "DeepseekV3TopkRouter": ("DeepseekV3Config", SIGMOID),
    "Dots1TopkRouter": ("Dots1Config", SIGMOID | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "Glm4MoeTopkRouter": ("Glm4MoeConfig", SIGMOID | {"norm_topk_prob": False}),
    "GptOssTopKRouter": ("GptOssConfig", {"num_local_experts": 12, "num_experts_per_tok": 3}),
    "Llama4Router": ("Llama4TextConfig", {"num_local_experts": 12, "num_experts_per_tok": 2}),
    "MixtralTopKRouter": ("MixtralConfig", {"num_local_experts": 12}),
    "OlmoeTopKRouter": ("OlmoeConfig", {"num_experts": 12, "num_experts_per_tok": 5}),
    "PhimoeTopKRouter": ("PhimoeConfig", {"num_local_experts": 12, "router_jitter_noise": 0.2}),
    "Qwen3MoeTopKRouter": ("Qwen3MoeConfig", {"num_experts": 12, "norm_topk_prob": True}),
    "Qwen3_5MoeTopKRouter": ("Qwen3_5MoeTextConfig", {"num_experts": 12, "num_experts_per_tok": 3}),
}
EVERY = {  # what the other routers read from their configs
    "hidden_size": 32, "num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 4, "moe_topk": 4,
    "top_k_experts": 4, "n_routed_experts": 12, "zero_expert_num": 4, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "router_scaling_factor": 1.5, "route_scale": 0.7,
    "topk_method": "group_limited_greedy", "rms_norm_eps": 1e-6, "moe_norm_min": 0.4, "use_expert_bias": True,
    "moe_router_logit_softcapping": 3.0, "moe_num_experts": 16, "output_multiplier": 1.5,
    "scoring_func": "sqrtsoftplus", "expert_selection_fn": "sigmoid", "vocab_size": 50,
}  # fmt: skip
OTHERS = {  # class -> the same with other choices, tested too
    "Cohere2MoeTopKRouter": {"expert_selection_fn": "softmax"},
    "DeepseekV2TopkRouter": {"topk_method": "greedy"},
    "DeepseekV4TopKRouter": {"scoring_func": "sigmoid"},
    "Ernie4_5_MoeTopKRouter": {"moe_norm_min": 1e-12},
    "LagunaTopKRouter": {"moe_router_logit_softcapping": 0.0},
    "Lfm2MoeTopKRouter": {"use_expert_bias": False, "norm_topk_prob": False},
    "Mistral4TopkRouter": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    "Qwen2MoeTopKRouter": {"norm_topk_prob": False},
}
TAKE_A_BIAS = (
    "AfmoeTokenChoiceRouter",
    "Dots3NoteVisionTopKRouter",
    "HYV3TopKRouter",
    "Lfm2MoeTopKRouter",
    "MiniMaxM2TopKRouter",
)
ROWS = [pytest.param(name, {}, id=name) for name in FORWARDS]
ROWS += [pytest.param(name, other, id=f"{name}-other") for name, other in OTHERS.items()]


def classes():
    """Class -> module of every router of the installed transformers."""
    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Router", "TopKGating", "MoEV1Gate")):
                found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


MODULES = classes()


def build(name, other=None):
    if name not in MODULES:
        pytest.skip("not in this release of transformers")
    module, folder = importlib.import_module(MODULES[name]), MODULES[name].rpartition(".")[0]
    if name in KINDS and not other:
        config, arguments = KINDS[name]
        configs = importlib.import_module(f"{folder}.configuration_{folder.rpartition('.')[2]}")
        config = getattr(configs, config)(hidden_size=32, **arguments)
    else:
        config = SimpleNamespace(**EVERY | (other or {}))
    router = getattr(module, name)(config).eval()
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.3)
        else:  # the experts of each token of the vocabulary
            tensor.copy_(torch.rand(len(tensor), 16).topk(tensor.shape[1]).indices)
    return router


def inputs_of(name, dtype):
    x = torch.randn(2, 100, 32).to(dtype)
    if name == "DeepseekV4HashRouter":
        return x, torch.randint(50, (2, 100))
    return (x if name.startswith("Afmoe") else x.view(200, 32)), *(
        [torch.randn(16) / 3] if name in TAKE_A_BIAS else []
    )


def in_order(returned):
    """Indices ascending in each row, and weights beside them; Llama-4 returns a dense table of weights."""
    integers = [t for t in returned if t.dtype == torch.int64]
    if not integers:
        scores, logits = returned
        indices = scores.nonzero()[:, 1].view(len(logits), -1)
        return indices, scores.gather(1, indices)
    order = integers[0].sort(-1)
    (weights,) = [t for t in returned if t.shape == integers[0].shape and t.dtype != torch.int64]
    return order.values, weights.gather(1, order.indices)


def test_every_router_of_transformers_is_known():
    assert not set(FORWARDS) & set(REFUSED)
    assert not MODULES.keys() - FORWARDS.keys() - REFUSED.keys() - {"GraniteDoclingDensityRouter"}  # of tiles
    if transformers.__version__.startswith("5.24."):  # the newest: no name is wrong, which others would skip
        assert FORWARDS.keys() | REFUSED.keys() <= MODULES.keys()


@pytest.mark.parametrize("name, other", ROWS)
def test_the_same_experts_and_weights(name, other):
    router = build(name, other)
    ours = copy.deepcopy(router)
    assert set_router_implementation(ours, "cumo") == 1
    inputs = inputs_of(name, torch.float32)
    with torch.no_grad():
        theirs, found = router(*inputs), ours(*inputs)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in theirs]
    assert torch.equal(in_order(found)[0], in_order(theirs)[0])
    # on each side exp, a sum of 16, a quotient, a sum of 5, a quotient and two products
    assert_close_after(2 * 25, in_order(found)[1], in_order(theirs)[1])
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(copied(*inputs), found, strict=True))
    assert set_router_implementation(ours, "eager") == 1 and type(ours) is type(router)


@pytest.mark.parametrize("name, other", ROWS)
def test_in_bf16(name, other):
    """Rounded logits tie, torch.topk has no rule for ties: rows with the same experts are compared."""
    router = build(name, other)
    router = router if name.startswith("Inkling2") else router.bfloat16()  # theirs must stay in fp32
    ours = copy.deepcopy(router)
    set_router_implementation(ours, "cumo")
    inputs = inputs_of(name, torch.bfloat16)
    with torch.no_grad():
        theirs, found = router(*inputs), ours(*inputs)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in theirs]
    (mine, weights), (own, expected) = in_order(found), in_order(theirs)
    same = (mine == own).all(1)
    assert same.sum() > 150
    # scores, a sum of four, a quotient and a product in bf16 on their side, the result on ours
    assert_close_after(8, weights[same], expected[same], torch.bfloat16)


IN_FP32 = ("DeepseekV3TopkRouter", "Dots1TopkRouter", "Glm4MoeTopkRouter")  # in every model


@pytest.mark.parametrize("name", [name for name in KINDS if name not in IN_FP32])
def test_weights_by_the_rule(name):
    """Those that compute in the dtype of the model, so that there is an fp64 result."""
    router = build(name)
    ours, wide = copy.deepcopy(router), copy.deepcopy(router).double()
    set_router_implementation(ours, "cumo")
    expected = lambda x: in_order((router if x.dtype == torch.float32 else wide)(x))[1]
    assert_as_accurate_as_torch(lambda x: in_order(ours(x))[1], expected, torch.randn(200, 32))


@pytest.mark.parametrize("name, other", ROWS)
def test_gradients(name, other):
    """In fp64 as far as the router computes in it, else in fp32 after a known number of roundings."""
    router = build(name, other)
    ours = copy.deepcopy(router)
    set_router_implementation(ours, "cumo")
    inputs = inputs_of(name, torch.float32)
    draw, grads = torch.randn(200, 64), []
    for module in (router, ours):
        x = inputs[0].clone().requires_grad_()
        weights = in_order(module(x, *inputs[1:]))[1]
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        loss = (weights.double() * draw[:, : weights.shape[1]].double()).sum()
        grads.append([g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None])
    for mine, theirs in zip(*grads[::-1], strict=True):
        # operands of the last product: 50 roundings for weights, as many again for their slopes; it is the
        # same product in both, of at most 200 terms
        assert_close_after(100 * max(1, mine.shape[0] ** 0.5), mine, theirs)


def test_what_runs_is_explained():
    model = torch.nn.ModuleDict({"gate": build("MixtralTopKRouter"), "phi": build("PhimoeTopKRouter")})
    assert explain(model).splitlines() == [
        "gate: MixtralTopKRouter: eager; can be cumo",
        "phi: PhimoeTopKRouter: eager; can be cumo",
    ]
    set_router_implementation(model, "cumo")
    assert explain(model).splitlines()[0] == "gate: MixtralTopKRouter: cumo"
    assert "in training eager" in explain(model)
    assert explain(torch.nn.Linear(2, 2)) == "Linear has no router that is known here"
    module = importlib.import_module(MODULES["DbrxRouter"])
    refused = module.DbrxRouter(SimpleNamespace(hidden_size=4, moe_jitter_eps=0.0, moe_num_experts=3))
    assert explain(refused) == f"model: DbrxRouter: eager: {routers.REFUSED['DbrxRouter']}"
    with pytest.raises(ValueError, match="it returns logits"):
        set_router_implementation(refused, "cumo")


def counted(monkeypatch):
    calls = []
    monkeypatch.setattr(routers, "route", lambda *args, **more: calls.append(1) or route(*args, **more))
    return calls


def test_a_router_with_hooks_of_accelerate_is_not_said_to_be_ours(monkeypatch):
    accelerate, calls = pytest.importorskip("accelerate"), counted(monkeypatch)
    model = torch.nn.ModuleDict({"gate": build("MixtralTopKRouter")})
    accelerate.hooks.add_hook_to_module(model["gate"], accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="its forward is replaced, as by accelerate's offloading"):
        set_router_implementation(model, "cumo")
    assert "eager: its forward is replaced" in explain(model)
    later = torch.nn.ModuleDict({"gate": build("MixtralTopKRouter")})
    assert set_router_implementation(later, "cumo") == 1
    accelerate.hooks.add_hook_to_module(later["gate"], accelerate.hooks.ModelHook())
    assert explain(later) == "gate: MixtralTopKRouter: cumo"
    later["gate"](torch.randn(3, 32))
    assert len(calls) == 1 and set_router_implementation(later, "cumo") == 1
    with pytest.raises(ValueError, match="model must be as it was taken over, got gate: its forward"):
        set_router_implementation(later, "eager")


def test_a_parametrized_router_keeps_its_parametrization():
    router = build("MixtralTopKRouter")
    set_router_implementation(router, "cumo")
    torch.nn.utils.parametrize.register_parametrization(router, "weight", torch.nn.Tanh())
    x = torch.randn(5, 32)
    before = router(x)
    assert set_router_implementation(router, "cumo") == 1
    with pytest.raises(ValueError, match="its class was changed to ParametrizedMixtralTopKRouter"):
        set_router_implementation(router, "eager")
    assert all(torch.equal(a, b) for a, b in zip(router(x), before, strict=True))
    other = build("MixtralTopKRouter")
    torch.nn.utils.parametrize.register_parametrization(other, "weight", torch.nn.Tanh())
    with pytest.raises(ValueError, match="its class was changed"):
        set_router_implementation(other, "cumo")
    other(x)


def test_a_router_that_is_ours_is_pickled():
    router, x = build("MixtralTopKRouter"), torch.randn(5, 32)
    set_router_implementation(router, "cumo")
    again = pickle.loads(pickle.dumps(router))
    assert type(again) is type(router)
    assert all(torch.equal(a, b) for a, b in zip(again(x), router(x), strict=True))
    assert set_router_implementation(again, "eager") == 1 and type(again) is not type(router)


def test_an_empty_table_of_tokens_is_named():
    router = build("DeepseekV4HashRouter")
    router.tid2eid.zero_()
    with pytest.raises(ValueError, match="tid2eid must name each expert once in a row, got others in model"):
        set_router_implementation(router, "cumo")


def test_a_score_that_is_unknown_is_named():
    router = build("DeepseekV4TopKRouter", {"scoring_func": "tanh"})
    with pytest.raises(ValueError, match=r"scoring_func must be one of .*, got Tanh"):
        set_router_implementation(router, "cumo")
    assert "eager; can be cumo" in explain(router)


@pytest.mark.parametrize("seed", [1, 2])
def test_sparsemixer_in_training_is_that_of_phimoe(seed):
    """Weights and gradients of each turn, for the experts and the thirds that were drawn here."""
    phimoe = importlib.import_module(MODULES["PhimoeTopKRouter"])
    logits = torch.randn(300, 6, dtype=torch.float64, requires_grad=True)
    found = sparsemixer(logits, jitter=0.3, seed=seed)
    upstream = torch.randn(300, 2, dtype=torch.float64)
    (mine,) = torch.autograd.grad(found.topk_weights, logits, upstream)
    chosen, left, total = found.topk_indices.long(), logits.detach(), 0
    for turn in range(2):
        top = left.max(-1, keepdim=True).values
        far = (top - logits.detach()) / logits.detach().abs().clamp(min=top) > 0.6
        gates = left.masked_fill(far, -torch.inf).softmax(-1)
        expert = chosen[:, turn : turn + 1]
        weight = gates.gather(1, expert)
        whole = found.topk_weights[:, turn : turn + 1].detach() > 0.5 * weight
        assert whole[expert == gates.argmax(-1, keepdim=True)].all() and not whole.all()
        leaf = logits.detach().requires_grad_()
        factor = torch.where(whole, 1.0, 1 / 3).double()
        theirs = phimoe.PhimoeMultiplier.apply(leaf, weight, expert, gates, factor)
        assert_same_formula(found.topk_weights[:, turn : turn + 1], theirs)
        total = total + torch.autograd.grad(theirs, leaf, upstream[:, turn : turn + 1])[0]
        left = left.scatter(1, expert, -torch.inf)
    assert_same_formula(mine, total)


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
    with pytest.raises(ValueError, match="model must have a router that can be taken over, got Linear"):
        set_router_implementation(torch.nn.Linear(2, 2), "cumo")
    with pytest.raises(ValueError, match="logits must have at least two experts"):
        sparsemixer(torch.randn(3, 1))


def test_llama4_in_plain_words():
    logits = torch.randn(9, 6)
    found = route(logits, 2, score="sigmoid", renormalize=False)
    assert torch.equal(found.topk_weights, logits.topk(2).values.sigmoid())


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral", "DeepseekV3"])
def test_a_whole_model(kind, tmp_path):
    """Logits, router logits and auxiliary loss; a saved model has no trace of it."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, output_router_logits=True,
        **({"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 16} if kind == "Qwen3Moe" else {}),
        **({"moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1} | SIGMOID
           if kind == "DeepseekV3" else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    tokens = torch.randint(40, (2, 9))
    with torch.no_grad():
        before = model(tokens)
        assert set_router_implementation(model, "cumo") == 2 - (kind == "DeepseekV3")
        after = model(tokens)
    # 50 roundings of the weights of each of two layers, and as many in what follows
    assert_close_after(4 * 50, after.logits, before.logits)
    if kind != "DeepseekV3":  # which does not return them
        assert len(after.router_logits) == len(before.router_logits) == 2
        assert_close_after(4 * 50, after.router_logits, before.router_logits)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, before.logits)
