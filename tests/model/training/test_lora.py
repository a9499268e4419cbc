"""Tests of LoRA on attention and stacked experts (peft), and of 8- and 4-bit loading (bitsandbytes)."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cumo_kernels import pack
from cumo_kernels.integrations import peft as integration
from cumo_model import CumoForConditionalGeneration, MoELayer, quantize_experts
from cumo_model.model.quantizer import packed_weights
from tests.rounding import assert_same_formula

EXPERTS = ["experts.up_proj", "experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_lora_trains_saves_and_merges(tiny_model, tiny_batch, tmp_path, text):
    peft = pytest.importorskip("peft")
    model = tiny_model(text=text)
    model.save_pretrained(tmp_path / "base")
    batch = tiny_batch()
    base = model.eval()(**batch).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    adapted = peft.get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    places = (
        "vision_tower.encoder.layers.1.mlp.experts",
        "multi_modal_projector.mlp.experts",
        "self_attn.q_proj",
    )
    places += ("language_model.layers.0.mlp.experts",) if text == "mixtral" else ()
    for place in places:
        assert any(place in name for name in trained), place
    assert torch.equal(adapted(**batch).logits, base)  # B starts as zero
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted.train()
    for _ in range(2):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = adapted.eval()(**batch).logits
    with pytest.raises(AssertionError, match=r"is off by \d"):  # more than rounding
        assert_same_formula(learned, base)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(again(**batch).logits, learned)
    merged = again.merge_and_unload()
    assert type(merged) is CumoForConditionalGeneration
    assert merged.state_dict().keys() == tiny_model(text=text).state_dict().keys()
    assert_same_formula(merged(**batch).logits, learned)


def steps(layer, x):
    """Output, and gradients of x and of the adapters of a layer, in which the weights are frozen."""
    x = x.clone().requires_grad_()
    out = layer(x)
    adapters = {name: p for name, p in layer.named_parameters() if "lora_" in name}
    return [out, *torch.autograd.grad(out.square().sum(), [x, *adapters.values()])]


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("activation", ["quick_gelu", "swiglu"])
@pytest.mark.parametrize("how", ["cumo", "eager", "compat"])
def test_experts_compute_with_the_factors_what_peft_does_with_the_sum(activation, how):
    """In the kernels, in the loop of plain PyTorch, and with the roundings of the original code."""
    peft = pytest.importorskip("peft")
    layer = MoELayer(16, 24, 4, 2, activation, compat="cumo" if how == "compat" else None)
    layer.experts.implementation = "eager" if how == "eager" else "cumo"
    names = [f"experts.{layer.experts.up_name}", "experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_parameters=names, init_lora_weights=False)
    adapted, x = peft.get_peft_model(layer, config), torch.randn(9, 16)
    found = steps(adapted, x)
    with integration.by_peft():
        wanted = steps(adapted, x)
    assert_same_formula(found, wanted)
    with adapted.disable_adapter(), pytest.raises(AssertionError, match=r"is off by \d"):
        assert_same_formula(adapted(x), found[0])


@pytest.mark.usefixtures("fp64")
def test_dropout_of_the_loop_is_that_of_the_kernels(monkeypatch):
    """Each drops the input of A for every slot; in training only. Here everything or nothing is dropped."""
    peft = pytest.importorskip("peft")
    layer = MoELayer(16, 24, 4, 2, "swiglu")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, target_parameters=names, init_lora_weights=False, lora_dropout=0.5)
    adapted, x = peft.get_peft_model(layer, config).train(), torch.randn(9, 16)
    for share in (0.0, 1.0):
        monkeypatch.setattr(
            torch.nn.functional, "dropout", lambda x, p, share=share: x * (1 - share) if p else x
        )
        outs = []
        for implementation in ("cumo", "eager"):
            layer.experts.get_base_layer().implementation = implementation
            outs.append(adapted(x))
        assert_same_formula(*outs)
        with adapted.disable_adapter():
            base = adapted(x)
        assert torch.allclose(base, outs[0]) == (share == 1.0)


@pytest.mark.parametrize("implementation", ["cumo", "eager"])
def test_adapters_of_experts_in_four_bits(implementation):
    """Equal to those of the dequantised experts, through every implementation."""
    peft = pytest.importorskip("peft")
    results = []
    torch.manual_seed(0)
    layer, x = MoELayer(64, 128, 4, 2, "swiglu").double(), torch.randn(9, 64).double()
    for is_packed in (True, False):
        one = copy.deepcopy(layer)
        one.experts.implementation = implementation
        for name in ("gate_up_proj", "down_proj"):
            weight = pack(getattr(one.experts, name).detach(), "nf4")
            weight = weight if is_packed else weight.dequantize()
            setattr(one.experts, name, torch.nn.Parameter(weight, requires_grad=False))
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=3, target_parameters=names, init_lora_weights=False)
        torch.manual_seed(1)
        results.append(steps(peft.get_peft_model(one, config), x))
    assert_same_formula(*results)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_linears_but_gates_and_experts_in_full_precision(tiny_model, tiny_batch, tmp_path, bits):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = tiny_model(text="mixtral", vision={"hidden_size": 64}, text_options={"hidden_size": 64})
    model.save_pretrained(tmp_path)
    quantisation = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    )
    small = CumoForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    )
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    names = {name for name, module in small.named_modules() if isinstance(module, kind)}
    assert "model.language_model.layers.0.self_attn.q_proj" in names
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in names
    layers = [module for module in small.modules() if isinstance(module, MoELayer)]
    assert len(layers) == 3 + 1 + 2
    before = dict(model.named_parameters())
    for name, layer in small.named_modules():
        if isinstance(layer, MoELayer):
            for key, parameter in layer.named_parameters():
                assert torch.equal(parameter, before[f"{name}.{key}"]), (name, key)
    logits = small(**tiny_batch()).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_experts_in_4_bits(tiny_model, tiny_batch, quant_type):
    """The logits equal those of a model with dequantised experts bit for bit, in a seventh of the memory.

    The dequantised experts are those of bitsandbytes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    model = tiny_model(text="mixtral", vision=sizes, text_options=sizes)
    dense, batch = copy.deepcopy(model), tiny_batch()
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    before = sum(layer.experts.down_proj.nbytes + layer.experts.up[0].nbytes for layer in layers)
    assert quantize_experts(model, quant_type, compress_statistics=False) is model
    packed = packed_weights(model)
    assert quantize_experts(model, quant_type) is model  # twice changes nothing
    assert packed_weights(model).keys() == packed.keys() and len(packed) == 2 * (3 + 1 + 2)
    assert all(packed_weights(model)[name] is weight for name, weight in packed.items())
    assert sum(weight.nbytes for weight in packed.values()) * 32 == before * (4 + 32 / 64)  # fp32
    for name, module in dense.named_modules():
        if isinstance(module, MoELayer):
            assert torch.equal(model.get_submodule(name).gate.weight, module.gate.weight)
            for weight in (module.experts.up[0], module.experts.down_proj):
                quantised, state = functional.quantize_4bit(
                    weight.data, compress_statistics=False, quant_type=quant_type, blocksize=64
                )
                rough = functional.dequantize_4bit(quantised, state)
                assert not torch.equal(rough, weight)
                weight.data = rough
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, dense.eval()(**batch).logits)
    ids = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**ids, **greedy), dense.generate(**ids, **greedy))
    # gradients through the frozen quantised experts equal those through the dequantised ones
    grads, batch = [], tiny_batch(dtype=torch.float64)
    for each in (model.double(), dense.double()):
        for parameter in each.parameters():
            parameter.requires_grad_(False)
        gate = each.model.vision_tower.encoder.layers[0].mlp.gate.weight.requires_grad_()
        each.train()(**batch).loss.backward()
        grads.append(gate.grad)
    assert_same_formula(*grads)
    assert grads[0].any()


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.bfloat16),
        ({"compress_statistics": False}, torch.float32),
        ({"quant_type": "mxfp4"}, torch.uint8),
        ({"quant_type": "int4", "group": 32}, torch.bfloat16),
    ],
)
def test_scales_of_quantised_experts_are_small_on_request(options, dtype):
    layer = MoELayer(64, 64, 2, 1, "gelu")
    quantize_experts(layer, **options)
    parts = packed_weights(layer)
    assert set(parts) == {"experts.up_proj", "experts.down_proj"}
    assert {weight.scales.dtype for weight in parts.values()} == {dtype}


def test_what_cannot_be_quantised_is_named(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"quant_type must be one of \('nf4', .*\), got 'int8'"):
        quantize_experts(model, "int8")
    with pytest.raises(ValueError, match="model must hold experts, got a Linear without any"):
        quantize_experts(torch.nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = r"layers.0.mlp.experts.up_proj must have rows of a multiple of 64 weights, the group, got 32"
    with pytest.raises(ValueError, match=wanted):
        quantize_experts(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
