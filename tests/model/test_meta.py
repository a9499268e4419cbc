"""Whole models and MoE layers on meta and fake tensors: forward and backward, with pictures."""

import pytest
import torch
from accelerate import init_empty_weights
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cumo_model import CumoForConditionalGeneration, MoELayer
from cumo_model.model import head


def like(batch, device):
    return {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in batch.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_a_model_runs_forward_and_backward(monkeypatch, tiny_config, tiny_batch, text, kind, mask, training):
    monkeypatch.setattr(head, "_heads", {})  # else known from an earlier model
    batch = tiny_batch()
    if not mask:
        del batch["attention_mask"]
    device = "meta" if kind == "meta" else "cpu"
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        model = CumoForConditionalGeneration(tiny_config(text=text)).train(training)
        out = model(**like(batch, device))
        out.loss.backward()
    assert out.logits.shape == (2, 20, 50) and out.logits.device.type == device
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad and p.grad is not None)
    assert model.model.vision_tower.encoder.layers[0].mlp.experts.down_proj.grad is not None


def test_fake_tensors_of_a_gpu_run_forward_without_one(tiny_config, tiny_batch):
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        out = CumoForConditionalGeneration(tiny_config(text="mixtral"))(**like(tiny_batch(), "cuda"))
    assert out.logits.device.type == "cuda" and out.logits.shape == (2, 20, 50)


@pytest.mark.parametrize("compat", [None, "cumo"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_layer_with_empty_weights(compat, tokens):
    with init_empty_weights():
        layer = MoELayer(8, 12, 4, 2, "gelu", compat=compat)
    x = torch.empty(tokens, 8, device="meta", requires_grad=True)
    out = layer(x, counted=torch.empty(tokens, dtype=torch.bool, device="meta"))
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape and layer.gate.weight.grad.is_meta
    with pytest.raises(ValueError, match="x must be on the device of the gate, meta, got cpu"):
        layer(torch.ones(5, 8))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_a_traced_layer_computes_the_same(tracing_mode):
    layer = MoELayer(8, 12, 4, 2, "swiglu")
    x, other = torch.rand(5, 8), torch.rand(5, 8)
    traced = make_fx(layer, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    assert torch.equal(traced(other), layer(other))


def test_a_batched_layer_equals_a_loop_also_when_empty():
    layer, x = MoELayer(8, 12, 4, 2, "gelu").double(), torch.rand(3, 5, 8, dtype=torch.float64)
    assert torch.equal(torch.vmap(layer)(x), torch.stack([layer(row) for row in x]))
    assert torch.vmap(layer)(x[:0]).shape == (0, 5, 8)
