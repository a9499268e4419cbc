"""QLoRA: quantised linear layers and experts with peft's preparation, in any order."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from cumo_kernels.packing.tensor import PackedWeight
from cumo_model import quantize_checkpoint, quantize_experts
from cumo_model.model.moe import MoELayer
from cumo_model.model.quantizer import packed_weights
from cumo_model.training.recipe import load_recipe
from cumo_model.training.start import start_model
from cumo_model.training.trainer import build_trainer, run_recipe
from tests.model.training.small_runs import write_data, write_model, write_recipe
from tests.rounding import assert_close_after

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

PLAIN = peft.prepare_model_for_kbit_training
LAYERS = 3 + 1 + 2  # tower, connector, language model
ORDERS = {
    "experts": lambda model: quantize_experts(model),
    "prepared": lambda model: PLAIN(model),
    "experts-prepared": lambda model: PLAIN(quantize_experts(model)),
    "prepared-experts": lambda model: quantize_experts(PLAIN(model)),
    "without-checkpointing": lambda model: PLAIN(quantize_experts(model), use_gradient_checkpointing=False),
}


@pytest.fixture
def saved(tiny_model, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    text = sizes | {"num_key_value_heads": 2}
    tiny_model(text="mixtral", vision=sizes, text_options=text).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def plain(weight):
    return weight.dequantize(torch.float32) if isinstance(weight, PackedWeight) else weight.float()


def load(folder):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=options
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_every_order_of_quantising_and_preparing_trains(saved, tiny_batch, order, autocast):
    model = ORDERS[order](load(saved))
    packed = packed_weights(model)
    assert len(packed) == (2 * LAYERS if order != "prepared" else 0)
    assert not any(weight.requires_grad for weight in packed.values())
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).train()
    assert model.is_gradient_checkpointing == ("prepared" in order)
    batch = tiny_batch(dtype=torch.bfloat16 if order == "experts" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = model(**batch).loss
    first.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    moved = [p for n, p in trained.items() if "lora_B" in n]
    # the tower's last layer runs only for the router losses
    assert sum(bool(p.grad.any()) for p in moved) >= len(moved) - 2
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model(**batch).loss != first


def test_experts_quantised_before_the_preparation_keep_their_values(saved, tiny_batch):
    """peft makes the other parameters fp32; the experts are the same numbers, in a wider dtype."""
    first, second = quantize_experts(load(saved)), PLAIN(quantize_experts(load(saved)))
    for one, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(one, MoELayer):
            x = torch.zeros(1, one.hidden_size)
            for a, b in zip(one.experts._weights(x), other.experts._weights(x), strict=True):
                assert (a is None and b is None) or torch.equal(plain(a), plain(b))
                assert b is None or b.dtype == torch.float32


def test_a_quantised_stage_trains_adapters_and_saves_an_unquantised_model(tmp_path, tiny_config):
    """New experts are made of unquantised weights; the result is the first one plus products of adapters."""
    write_data(tmp_path, text_rows=0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    text = {**sizes, "num_key_value_heads": 2}
    write_model(tmp_path, tiny_config, vision=sizes, text_options=text)
    experts = {"model__projector_experts": 0, "model__text_experts": 0, "model__vision_experts": 4}
    lora = {"r": 2, "alpha": 6, "dropout": 0.0, "targets": r".*language_model.*\.(q|v)_proj"}
    options = {"stage__trains": ["projector", "language"], "stage__lora": lora, "trainer__max_steps": 2}
    recipe = load_recipe(write_recipe(tmp_path, model__quantize=4, **options, **experts))
    made = build_trainer(recipe)
    packed = [n for n, m in made.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert any("k_proj" in name for name in packed) and (tmp_path / "run" / ".start").is_dir()
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        name for name, _ in made.model.named_parameters() if "multi_modal_projector" in name
    }
    result = run_recipe(recipe)
    assert not (tmp_path / "run" / ".start").exists()
    found, wanted = load_file(result / "model.safetensors"), start_model(
        dataclasses.replace(recipe.model, quantize=None), recipe.data
    )[0].state_dict()  # fmt: skip
    adapters = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    beside = load_file(tmp_path / "run" / "checkpoint-2" / "beside_adapters.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        first = wanted[name]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapters:
            product = adapters[f"{key}.lora_B.weight"] @ adapters[f"{key}.lora_A.weight"]
            first = first + product * (6 / 2)
            assert product.any()
        elif f"base_model.model.{name}" in beside:
            first = beside[f"base_model.model.{name}"]
            assert not torch.equal(first, wanted[name])
        assert torch.equal(value, first), name


def lora_recipe(folder, tiny_config, **changes):
    """A recipe of a LoRA stage on attention, for a model with experts in all places."""
    write_data(folder, text_rows=0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    places = {"text": "mixtral", "vision_experts": 4, "projector_num_experts": 4}
    start = write_model(
        folder, tiny_config, vision=sizes, text_options={**sizes, "num_key_value_heads": 2}, **places
    )
    lora = {"r": 2, "alpha": 6, "dropout": 0.0, "targets": r".*language_model.*\.(q|v)_proj"}
    experts = {f"model__{place}_experts": 0 for place in ("vision", "projector", "text")}
    options = {"stage__trains": ["language"], "stage__lora": lora, "trainer__max_steps": 2}
    return start, lambda **more: write_recipe(folder, **experts, **(options | changes | more))


def test_a_quantised_stage_packs_the_experts_of_the_language_model(tmp_path, tiny_config):
    _, recipe = lora_recipe(tmp_path, tiny_config)
    made = build_trainer(load_recipe(recipe(model__quantize=4)))
    packed = packed_weights(made.model)
    assert len(packed) == 2 * 2 and all("language_model" in name for name in packed)
    assert {weight.format for weight in packed.values()} == {"nf4"}
    assert made.model._ddp_params_and_buffers_to_ignore == list(packed)
    made.train()
    assert not any(weight.requires_grad for weight in packed_weights(made.model).values())


def test_a_stage_starts_from_a_quantised_checkpoint(tmp_path, tiny_config):
    """Its experts stay packed, bit for bit, in the result, into which the adapters are merged."""
    start, recipe = lora_recipe(tmp_path, tiny_config)
    quantize_checkpoint(start, tmp_path / "packed", progress=False)
    result = run_recipe(load_recipe(recipe(model__start=str(tmp_path / "packed"))))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "packed", result))
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all(re.search(r"language_model.*\.(q|v)_proj", name) for name in moved)
    assert len(packed_weights(AutoModelForImageTextToText.from_pretrained(result))) == 2 * LAYERS


@pytest.mark.parametrize("names", [["experts.down_proj"], ["up_proj", "experts.gate_up_proj", "down_proj"]])
def test_what_experts_in_four_bits_learn_is_not_rounded_away(tmp_path, tiny_config, names):
    """The result has W + B A of experts with adapters in full; other experts stay packed."""
    start, recipe = lora_recipe(tmp_path, tiny_config)
    quantize_checkpoint(start, tmp_path / "packed", progress=False)
    lora = {"r": 2, "alpha": 6, "dropout": 0.0, "targets": [], "target_parameters": names}
    changed = load_recipe(recipe(model__start=str(tmp_path / "packed"), stage__lora=lora))
    result = run_recipe(changed)
    packed = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    after = AutoModelForImageTextToText.from_pretrained(result)
    adapters = load_file(next((tmp_path / "run").glob("checkpoint-*")) / "adapter_model.safetensors")
    adapted = {name for name in packed_weights(packed) if any(name.endswith(f".{one}") for one in names)}
    assert adapted and packed_weights(after).keys() == packed_weights(packed).keys() - adapted
    assert (getattr(after, "hf_quantizer", None) is None) == (not packed_weights(after))
    moved = 0
    for name, weight in packed_weights(packed).items():
        found = after.get_parameter(name)
        if name in adapted:
            moved += not torch.equal(found, weight.dequantize(found.dtype))
        else:
            assert torch.equal(found.packed, weight.packed)
    assert moved and any("lora_B" in key and value.any() for key, value in adapters.items())


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_ddp_does_not_touch_experts_in_four_bits(saved, caplog, is_wrapped):
    model = quantize_experts(AutoModelForImageTextToText.from_pretrained(saved))
    if is_wrapped:
        names = ["experts.gate_up_proj", "experts.down_proj", "experts.up_proj"]
        lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
        model = peft.get_peft_model(model, lora)
    before = {name: weight.packed.clone() for name, weight in packed_weights(model).items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()
    assert before and not [record for record in caplog.records if "dequantised" in record.message]
    assert all(torch.equal(weight.packed, before[name]) for name, weight in packed_weights(model).items())


def test_a_quantised_checkpoint_is_trained_with_adapters_only(tmp_path, tiny_config):
    start, recipe = lora_recipe(tmp_path, tiny_config)
    quantize_checkpoint(start, tmp_path / "packed", progress=False)
    packed = {"model__start": str(tmp_path / "packed")}
    with pytest.raises(ValueError, match=r"model.start must have unquantised experts without stage.lora"):
        build_trainer(load_recipe(recipe(**packed), ["stage.lora=null"]))
    with pytest.raises(ValueError, match=r"model.quantize must be left out for model.start .*packed"):
        build_trainer(load_recipe(recipe(**packed, model__quantize=4)))


def test_a_quantised_stage_trains_adapters_of_its_quantised_experts(tmp_path, tiny_config):
    """QLoRA on experts, with dropout: the weights stay packed, and the result is unquantised and merged."""
    write_data(tmp_path, text_rows=0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    write_model(tmp_path, tiny_config, vision=sizes, text_options={**sizes, "num_key_value_heads": 2})
    places = {"model__projector_experts": 0, "model__text_experts": 4, "model__vision_experts": 0}
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = {"r": 2, "alpha": 6, "dropout": 0.1, "targets": [], "target_parameters": names}
    options = {"stage__trains": ["language"], "stage__lora": lora, "trainer__max_steps": 2}
    recipe = load_recipe(write_recipe(tmp_path, model__quantize=4, **options, **places))
    layers = [m for m in build_trainer(recipe).model.modules() if isinstance(m, MoELayer)]
    assert len(layers) == 2
    for layer in layers:
        base = layer.experts.get_base_layer()
        assert all(isinstance(getattr(base, name), PackedWeight) for name in ("gate_up_proj", "down_proj"))
        assert type(layer.gate.weight) is torch.nn.Parameter
    result = run_recipe(recipe)
    found, wanted = load_file(result / "model.safetensors"), start_model(
        dataclasses.replace(recipe.model, quantize=None), recipe.data
    )[0].state_dict()  # fmt: skip
    adapters = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    changed = 0
    for name, value in found.items():
        module, _, own = name.rpartition(".")
        key = f"base_model.model.{module}" + (".base_layer" if own == "gate_up_proj" else "")
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert torch.equal(value, wanted[name]), name
            continue
        a, b = (adapters[f"{key}.lora_{kind}.weight"] for kind in "AB")
        a, b = a.reshape(4, 2, -1), b.reshape(b.shape[0], 2, 4).permute(2, 0, 1)
        assert a.any() and b.any()
        # a product of two terms and its scale, the sum, in either order
        assert_close_after(8, value, wanted[name] + (b @ a) * (6 / 2))
        changed += not torch.equal(value, wanted[name])
    assert changed == 2 * 2
