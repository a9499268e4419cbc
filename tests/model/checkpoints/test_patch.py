"""patch_original: layers with the interface of the original code, before and after the patch."""

import copy
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import softmax
from transformers.activations import ACT2FN

from cumo_kernels import route
from cumo_model import patch_original, record_routing
from cumo_model.checkpoints.patch import _say_once
from tests.rounding import assert_same_formula


def routing_loop(x, logits, experts, top_k, width):
    """cumo_spec.md 2.1 for x (N, n, H): output, L_b, L_z; one crop and one expert at a time."""
    E, balance, z = logits.shape[-1], 0, 0
    out = []
    for crop, scores in zip(x, logits, strict=True):
        p = softmax(scores, -1)
        values, index = p.topk(top_k)
        weights = values / values.sum(-1, keepdim=True)
        result = crop.new_zeros(len(crop), width)
        for e, expert in enumerate(experts):
            token, choice = torch.where(index == e)
            result = result.index_add(0, token, weights[token, choice, None] * expert(crop[token]))
        out.append(result)
        density = torch.stack([(index[:, 0] == e).to(p.dtype).mean() for e in range(E)])
        balance = balance + (density * p.mean(0)).mean() * E**2 / len(x)
        z = z + scores.logsumexp(-1).square().mean() / len(x)
    return torch.stack(out), balance, z


class CLIPMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation_fn = ACT2FN["quick_gelu"]
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class CLIPEncoderMoELayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_of_experts, self.num_selected = 4, 2
        self.self_attn = nn.Linear(16, 16)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(CLIPMLP() for _ in range(4))

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        x = self.layer_norm2(hidden_states)
        out, balance, z = routing_loop(x, self.gate(x), self.experts, 2, 16)
        return hidden_states + out, balance, z


class MLPMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.num_selected = 4, 2
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 20)) for _ in range(4)
        )

    def forward(self, x_img):
        return routing_loop(x_img, self.gate(x_img), self.experts, 2, 20)


class MixtralBLockSparseTop2MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.w2, self.act_fn = nn.Linear(24, 16, bias=False), nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class MixtralSparseMoeBlock(nn.Module):
    def __init__(self, with_losses=True):
        super().__init__()
        self.top_k, self.num_experts = 2, 5
        self.gate = nn.Linear(16, 5, bias=False)
        self.experts = nn.ModuleList(MixtralBLockSparseTop2MLP() for _ in range(5))
        if with_losses:  # as the original training code does
            self.forward = lambda hidden_states: self.run(hidden_states, True)

    def run(self, hidden_states, with_losses):
        rows = hidden_states.flatten(0, 1)[None]
        logits = self.gate(rows)
        out, balance, z = routing_loop(rows, logits, self.experts, 2, 16)
        return out.view_as(hidden_states), ((balance, z) if with_losses else logits[0])

    def forward(self, hidden_states):
        return self.run(hidden_states, False)


LAYERS = {
    "clip": CLIPEncoderMoELayer,
    "mlp": MLPMoE,
    "llm": MixtralSparseMoeBlock,
    "llm-inference": lambda: MixtralSparseMoeBlock(with_losses=False),
}


def flat(output):
    return [t for item in output for t in (item if isinstance(item, tuple) else (item,))]


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("moved", [False, True], ids=["shared", "moved"])
def test_patched_layers_return_and_learn_what_they_did(kind, moved):
    theirs = LAYERS[kind]()
    ours = LAYERS[kind]()
    ours.load_state_dict(theirs.state_dict())
    assert patch_original(ours) is ours and ours._z3_leaf  # DeepSpeed reads it
    if moved:  # each parameter gets its own storage, as with .to(device)
        for parameter in ours.parameters():
            parameter.data = parameter.data.clone()
    names = [name for name, _ in theirs.named_parameters()]

    x, results = torch.randn(3, 7, 16), []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = flat(layer(leaf))
        upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(7)) for o in out]
        results.append([*out, *torch.autograd.grad(out, [leaf, *layer.parameters()], upstream)])
    keys = [f"out {i}" for i in range(len(out))] + ["x", *names]
    wanted, got = (dict(zip(keys, found, strict=True)) for found in results)
    assert_same_formula(got, wanted)


def test_parameters_are_shared_not_copied_and_keep_their_names(tmp_path):
    layer = CLIPEncoderMoELayer()
    before = copy.deepcopy(layer.state_dict())
    identities = {name: id(p) for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    patch_original(layer)
    assert {name: id(p) for name, p in layer.named_parameters()} == identities
    state = layer.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)
    save_file(state, tmp_path / "layer.safetensors")
    assert all(
        torch.equal(value, before[k]) for k, value in load_file(tmp_path / "layer.safetensors").items()
    )
    weights = [expert.fc1.weight for expert in layer.experts]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    x = torch.randn(2, 5, 16)
    first = layer(x)[0]
    first.square().sum().backward()
    optimizer.step()  # an optimizer created before the patch updates the weights that the kernels read
    second = layer(x)[0]
    assert not torch.equal(first, second)
    with torch.no_grad():
        layer.load_state_dict(before)
    assert torch.equal(layer(x)[0], first)


def test_moved_weights_are_read_where_they_are():
    """After a change of device or dtype, the parameters are no longer views of one tensor."""
    layer = patch_original(MLPMoE())
    x = torch.randn(1, 4, 16)
    layer(x)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data.clone()
            parameter.mul_(2)
    plain = MLPMoE()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], patch_original(plain)(x)[0])


def test_frozen_experts_get_no_gradient():
    layer = patch_original(CLIPEncoderMoELayer())
    frozen = {"experts.1.fc1.weight", "experts.2.fc2.bias", "experts.0.fc2.weight"}
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    layer(torch.randn(2, 5, 16))[0].sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None} == frozen


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_patched_layer_has_its_own_number_of_choices(kind):
    layer, x = LAYERS[kind](), torch.randn(2, 5, 16)
    name = "top_k" if kind.startswith("llm") else "num_selected"
    outputs = []
    for choices in (1, 3):
        patched = LAYERS[kind]()
        patched.load_state_dict(layer.state_dict())
        setattr(patched, name, choices)
        patch_original(patched)
        with record_routing() as records:
            outputs.append(flat(patched(x))[0])
        assert [record.routing.topk_indices.shape[1] for record in records] == [choices]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_compat_rounds_each_place_as_the_original_does(kind):
    """The weights are those of `route` with "cumo" in tower and connector and "cumo_llm" in a Mixtral."""
    layer, x = LAYERS[kind]().bfloat16(), torch.randn(2, 5, 16).bfloat16()
    weights = {}
    for compat in (None, "cumo"):
        patched = copy.deepcopy(layer)
        if kind == "llm":
            patched.forward = lambda hidden_states, patched=patched: patched.run(hidden_states, True)
        patch_original(patched, compat)
        logits = []
        patched.gate.register_forward_hook(lambda m, a, out, logits=logits: logits.append(out))
        with record_routing() as records:
            patched(x)
        weights[compat] = records[0].routing.topk_weights
        rounding = compat and ("cumo_llm" if kind.startswith("llm") else "cumo")
        wanted = {mode: route(logits[0], 2, compat=mode).topk_weights for mode in (None, "cumo", "cumo_llm")}
        assert torch.equal(weights[compat], wanted[rounding])
        assert not any(torch.equal(wanted[rounding], wanted[mode]) for mode in wanted.keys() - {rounding})


def test_a_model_is_patched_once_and_its_routing_can_be_recorded():
    model = nn.Sequential(CLIPEncoderMoELayer(), CLIPEncoderMoELayer())
    patch_original(model)
    forwards = [layer.forward for layer in model]
    patch_original(model)
    assert [layer.forward for layer in model] == forwards
    with record_routing() as records:
        model[1](model[0](torch.randn(2, 5, 16))[0])
    assert [(r.place, r.layer, r.routing.num_tokens) for r in records] == [("clip", 0, 10), ("clip", 1, 10)]


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    layer = MLPMoE()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[1:3] = 1
    patch_original(layer)
    layer(torch.ones(1, 4, 16))[0].sum().backward()
    for expert in (layer.experts[0], layer.experts[3]):
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in expert.parameters())
    assert layer.experts[1][0].weight.grad.abs().sum() > 0


# the lambda that replaces the original's patch of Mixtral cannot be pickled
@pytest.mark.parametrize(
    "kind, how",
    [(kind, how) for kind in LAYERS for how in ("deepcopy", "file") if (kind, how) != ("llm", "file")],
)
def test_a_copy_computes_and_learns_with_its_own_weights(kind, how, tmp_path):
    layer = patch_original(LAYERS[kind]())
    x = torch.randn(2, 5, 16)
    wanted = flat(layer(x))
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        torch.save(layer, tmp_path / "layer.pt")
        other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert other.forward.layer is other
    for got, value in zip(flat(other(x)), wanted, strict=True):
        assert torch.equal(got, value)
    assert len({parameter.untyped_storage().data_ptr() for parameter in other.experts.parameters()}) <= 4
    with torch.no_grad():
        for parameter in other.experts.parameters():
            parameter.zero_()
    out = other(x)[0]
    out.sum().backward()
    assert not torch.equal(out, wanted[0]) and torch.equal(layer(x)[0], wanted[0])
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(parameter.grad is not None for parameter in other.experts.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_lora_on_experts_is_refused_before_and_computes_as_before_after(kind, caplog):
    peft = pytest.importorskip("peft")
    names = {"clip": ["fc1", "fc2"], "mlp": r".*experts\.\d+\.[02]"}.get(kind, ["w1", "w2", "w3"])

    def with_lora(layer):
        model = nn.ModuleDict({"layer": layer})
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        return model["layer"]

    theirs, ours = LAYERS[kind](), LAYERS[kind]()
    ours.load_state_dict(theirs.state_dict())
    patch_original(ours)
    theirs, ours = with_lora(theirs), with_lora(ours)
    with pytest.raises(ValueError, match=r"must be made of plain nn.Linear, got peft.* as experts.0"):
        patch_original(theirs)
    x = torch.randn(2, 5, 16)
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for got, wanted in zip(flat(ours(x)), flat(theirs(x)), strict=True):
            assert torch.equal(got, wanted)
        ours(x)[0].sum().backward()
    assert sum("computes as before the patch" in record.message for record in caplog.records) == 1
    assert all(p.grad is not None for n, p in ours.experts[0].named_parameters() if "lora_B" in n)


def test_what_cannot_be_patched_is_named():
    with pytest.raises(
        ValueError, match=r"model must hold sparse layers of the original CuMo .* got a Linear"
    ):
        patch_original(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="compat must be None or 'cumo', got 'bf16'"):
        patch_original(MLPMoE(), compat="bf16")
    layer = MLPMoE()
    layer.experts[2][0].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=re.escape("experts.2.0.weight is empty")):
        patch_original(layer)
    layer = MLPMoE()
    for expert in layer.experts:
        expert[1] = nn.Tanh()
    with pytest.raises(ValueError, match="got Tanh"):
        patch_original(layer)
