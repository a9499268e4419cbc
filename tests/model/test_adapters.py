"""LoRA on attention and stacked experts (peft), and 8- and 4-bit loading (bitsandbytes)."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cumo_model import CumoForConditionalGeneration, MoELayer

EXPERTS = ["experts.up_proj", "experts.gate_up_proj", "experts.down_proj"]


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
    torch.testing.assert_close(adapted(**batch).logits, base)  # B starts as zero
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted.train()
    for _ in range(2):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = adapted.eval()(**batch).logits
    assert (learned - base).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**batch).logits, learned)
    merged = again.merge_and_unload()
    assert type(merged) is CumoForConditionalGeneration
    assert merged.state_dict().keys() == tiny_model(text=text).state_dict().keys()
    torch.testing.assert_close(merged(**batch).logits, learned, rtol=1e-4, atol=1e-4)


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
