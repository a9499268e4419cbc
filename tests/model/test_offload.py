"""Every parameter is read inside its module's forward: offloading, hooks, replaced forwards, fp32 gates."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForImageTextToText

from cumo_model import CumoForConditionalGeneration, MoELayer, record_routing
from cumo_model.model.moe import Gate, is_untouched


def anyres(tiny_config, text):
    """A model that has every kind of parameter, image_newline among them, and a batch for it."""
    config = tiny_config(
        text=text, scales=(1,), patch_merge_type="spatial_unpad", image_grid_pinpoints=[[12, 24], [24, 12]]
    )
    model = CumoForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    ids = torch.randint(3, 50, (1, 40))
    tokens = config.picture_layout.tokens((12, 24))
    ids[0, 3 : 3 + tokens] = 60
    return model, {
        "input_ids": ids,
        "pixel_values": torch.randn(3, 3, 12, 12),
        "image_sizes": torch.tensor([[12, 24]]),
    }


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_compute_the_same(tiny_config, tmp_path, text, where):
    model, batch = anyres(tiny_config, text)
    picture = {key: batch[key] for key in ("pixel_values", "image_sizes")}
    wanted, features = model(**batch).logits, model.get_image_features(**picture).pooler_output[0]
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, wanted)
    assert torch.equal(model.get_image_features(**picture).pooler_output[0], features)
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None), tokens)
    training = {"labels": batch["input_ids"], "output_router_logits": True}
    assert (
        model.train()(**batch, **training).loss.isfinite() and model.eval()(**batch, **training).aux_loss > 0
    )
    stats = model(**batch, output_router_stats=True).router_stats
    assert stats["clip"]["mean_probs"].shape[0] == 2  # the last layer's router does not run


def test_a_device_map_that_leaves_most_of_the_model_on_disk(tiny_config, tmp_path):
    model, batch = anyres(tiny_config, "mixtral")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=tmp_path / "off"
    )
    places = {name: parameter.is_meta for name, parameter in loaded.named_parameters()}
    assert any(places.values()) and not all(places.values())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def always_first(gate):
    """A forward that chooses expert 0, then 1, for every token."""
    return lambda x: torch.arange(gate.out_features, 0, -1.0).expand(len(x), -1)


def test_a_forward_replaced_on_a_gate_is_called(tiny_model, tiny_batch):
    model = tiny_model(text="mixtral").eval()
    for module in model.modules():
        if isinstance(module, Gate):
            module.forward = always_first(module)
    with record_routing() as records:
        model(**tiny_batch())
    assert {record.place for record in records} == {"clip", "mlp", "llm"}
    assert all(record.routing.topk_indices.unique().tolist() == [0, 1] for record in records)


@pytest.mark.parametrize(
    "register",
    [
        lambda gate: gate.register_forward_hook(lambda module, args, out: out * 0 + torch.arange(4.0, 0, -1)),
        lambda gate: gate.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
    ],
    ids=["forward", "pre"],
)
def test_hooks_of_a_gate_change_its_logits(register):
    layer, x = MoELayer(8, 6, 4, 2, "gelu"), torch.randn(5, 8)
    register(layer.gate)
    assert not is_untouched(layer.gate)
    assert layer.route(x).topk_indices.unique().tolist() == [0, 1]


def test_a_gates_class_may_be_patched(monkeypatch):
    monkeypatch.setattr(Gate, "forward", lambda self, x: always_first(self)(x))
    layer = MoELayer(8, 6, 4, 2, "gelu")
    assert layer.route(torch.randn(5, 8)).topk_indices.unique().tolist() == [0, 1]


def test_a_model_generates_with_its_head_alone_on_disk(tiny_config, tmp_path):
    model, batch = anyres(tiny_config, "mistral")
    model.config.image_token_index = 2
    batch["input_ids"][batch["input_ids"] == 2], batch["input_ids"][batch["input_ids"] == 60] = 3, 2
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(**batch, **options)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(**batch, **options), wanted)


def test_a_gate_of_another_class_or_with_a_bias_is_called():
    x = torch.randn(5, 8)
    layer = MoELayer(8, 6, 4, 2, "gelu")
    layer.gate = nn.Sequential(layer.gate, nn.Hardtanh(-0.1, 0.1))
    assert layer.route(x).stats.mean_squared_logsumexp < torch.tensor(4.0).exp().log().add(0.2).square()
    layer = MoELayer(8, 6, 4, 2, "gelu")
    layer.gate.bias = nn.Parameter(torch.tensor([30.0, 20.0, 0.0, 0.0]))
    assert layer.route(x).topk_indices.unique().tolist() == [0, 1]


def test_a_layers_own_hooks_run_where_only_its_router_is_needed(tiny_model, tiny_batch):
    model, seen = tiny_model().train(), []
    last = model.model.vision_tower.encoder.layers[-1].mlp
    last.register_forward_pre_hook(lambda *_: seen.append("before"))
    last.register_forward_hook(lambda *_: seen.append("after"))
    model(**tiny_batch())
    assert seen == ["before", "after"]


def test_an_fp32_gate_in_a_bf16_layer():
    """Its logits are those of fp32: x in bf16 is exact in fp32."""
    layer = MoELayer(16, 12, 4, 2, "gelu").bfloat16()
    layer.gate.float()
    x = torch.randn(9, 16).bfloat16()
    leaf = x.clone().requires_grad_()
    routing = layer.route(leaf)
    assert routing.topk_weights.dtype == torch.float32
    assert torch.equal(routing.topk_weights, copy.deepcopy(layer).float().route(x.float()).topk_weights)
    out = layer(leaf)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.gate.weight.grad.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert MoELayer(16, 12, 4, 2, "gelu")(x.float()).dtype == torch.bfloat16


def test_a_bf16_model_with_fp32_gates_runs(tiny_model, tiny_batch):
    model = tiny_model(text="mixtral").bfloat16().train()
    for module in model.modules():
        if isinstance(module, Gate):
            module.float()
    out = model(**tiny_batch(dtype=torch.bfloat16))
    out.loss.backward()
    assert (
        out.loss.isfinite()
        and model.model.language_model.layers[0].mlp.gate.weight.grad.dtype == torch.float32
    )
