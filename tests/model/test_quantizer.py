"""The quantiser "cumo" of transformers: loading, quantising while loading, saving again, refusing."""

import importlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
)

from cumo_kernels.packing.tensor import PackedWeight, pack
from cumo_model import (
    CumoForConditionalGeneration,
    CumoModel,
    CumoQuantizationConfig,
    quantize_checkpoint,
    quantize_experts,
)
from cumo_model.model import quantizer
from cumo_model.model.quantizer import expert_weights, packed_weights

SIZES = {"hidden_size": 64, "intermediate_size": 128}
WAYS = {
    "nf4": {},
    "fp4": {"format": "fp4", "group": 32, "scale_dtype": "bfloat16"},
    "mxfp4": {"format": "mxfp4"},
    "int4": {"format": "int4", "group": 64, "scale_dtype": torch.float16},
    "zeros": {"format": "int4", "group": 32, "symmetric": False},
    "some": {"whole": ["vision_tower", "multi_modal_projector.mlp.experts.up_proj"]},
}
SMALL = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    **SIZES,
}


@pytest.fixture
def saved(tiny_model, tmp_path):
    """(model, folder): a CuMo with experts in all places, in bf16."""
    model = tiny_model(text="mixtral", vision=SIZES, text_options=SIZES).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    return model, tmp_path / "plain"


@pytest.fixture
def mixtral(tmp_path):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL)).bfloat16()
    model.save_pretrained(tmp_path / "mixtral")
    return model, tmp_path / "mixtral"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def assert_same_files(one, other):
    """The same tensors, bit for bit, and the same config.json."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_quantised_saved_and_loaded_bit_for_bit(saved, tiny_batch, tmp_path, way):
    model, folder = saved
    config = CumoQuantizationConfig(**WAYS[way])
    first = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    before = dict(model.named_parameters())
    packed = packed_weights(first)
    assert len(packed) == (12 if way != "some" else 5)
    for name, value in first.named_parameters():
        if name in packed:
            wanted = pack(before[name], **config.packing)
            assert value.format == config.format and not value.requires_grad and value.dtype == torch.bfloat16
            for part, other in zip(value.parts(), wanted.parts(), strict=True):
                assert (part is None and other is None) or torch.equal(part, other), name
        else:
            assert torch.equal(value, before[name]), name
    first.save_pretrained(tmp_path / "once")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "once")
    assert not any(weight.requires_grad for weight in packed_weights(again).values())
    again.save_pretrained(tmp_path / "twice")
    assert_same_files(tmp_path / "once", tmp_path / "twice")
    batch = tiny_batch(dtype=torch.bfloat16)
    assert torch.equal(again(**batch).logits, first(**batch).logits)


@pytest.mark.parametrize(
    "kind, options",
    [
        (AutoModelForImageTextToText, {"dtype": torch.float32}),
        (CumoForConditionalGeneration, {"device_map": "cpu", "dtype": torch.float16}),
        (AutoModel, {"dtype": torch.float32, "low_cpu_mem_usage": True}),
        (CumoModel, {"dtype": "auto"}),
    ],
)
def test_every_way_to_load_gives_the_dtype_that_was_asked_for(saved, tmp_path, kind, options):
    """Also where names of the file differ from those of the model, for which transformers keeps dtypes."""
    quantize_experts(saved[0]).save_pretrained(tmp_path / "packed")
    model = kind.from_pretrained(tmp_path / "packed", **options)
    wanted = torch.bfloat16 if options["dtype"] == "auto" else options["dtype"]
    assert {value.dtype for value in model.parameters()} == {wanted}
    kept = packed_weights(saved[0])
    for name, weight in packed_weights(model).items():
        whole = name if name in kept else f"model.{name}"
        assert torch.equal(weight.scales, kept[whole].scales) and weight.scales.dtype == torch.bfloat16
    assert len(packed_weights(model)) == len(kept)


@pytest.mark.parametrize("implementation", ["cumo", "eager"])
def test_mixtral_of_transformers_runs_with_packed_experts(mixtral, tmp_path, implementation):
    model, folder = mixtral
    config = CumoQuantizationConfig("int4", group=32, symmetric=False)
    options = {"experts_implementation": implementation}
    first = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    first.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once", **options)
    again.save_pretrained(tmp_path / "twice")
    assert_same_files(tmp_path / "once", tmp_path / "twice")
    assert "model.layers.0.mlp.experts.gate_up_proj_packed" in tensors(tmp_path / "once")
    plain = AutoModelForCausalLM.from_pretrained(folder, **options)
    weights = dict(plain.named_parameters())
    for name, weight in packed_weights(again).items():
        weights[name].data = weight.dequantize()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain(ids).logits)
        assert not torch.equal(again(ids).logits, model(ids).logits)


def test_gpt_oss_keeps_its_transposed_shapes(tmp_path):
    """Groups lie along the dimension that is summed, which is the second one in that model."""
    torch.manual_seed(0)
    config = GptOssConfig(**SMALL, layer_types=["full_attention"] * 2)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    first = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=CumoQuantizationConfig("mxfp4"), experts_implementation="cumo"
    )
    before = dict(model.named_parameters())
    assert len(packed_weights(first)) == 4
    for name, weight in packed_weights(first).items():
        assert weight.shape == before[name].shape and weight.is_transposed
        wanted = pack(before[name].transpose(1, 2).contiguous(), "mxfp4").dequantize().transpose(1, 2)
        assert torch.equal(weight.dequantize(), wanted)
    first.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once", experts_implementation="cumo")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, first(ids).logits)


@pytest.mark.parametrize("part", ["model", "model.language_model", ""])
def test_a_model_quantised_in_memory_is_saved_and_loaded(saved, tmp_path, part):
    model, _ = saved
    quantize_experts(model.get_submodule(part), "int4", group=64)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")
    names = packed_weights(model).keys()
    assert packed_weights(again).keys() == names and len(names) == (4 if "language" in part else 12)
    for name, value in model.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name]), name


def test_a_dequantised_model_is_a_plain_one_again(mixtral, tmp_path):
    model = quantize_experts(mixtral[0])
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    wanted = {name: weight.dequantize() for name, weight in packed_weights(again).items()}
    again.dequantize().save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in tensors(tmp_path / "plain")
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").named_parameters())
    assert wanted and all(torch.equal(plain[name], value) for name, value in wanted.items())


def test_registering_twice_is_harmless():
    before = AUTO_QUANTIZER_MAPPING["cumo"], AUTO_QUANTIZATION_CONFIG_MAPPING["cumo"]
    try:
        importlib.reload(quantizer)
        assert (AUTO_QUANTIZER_MAPPING["cumo"], AUTO_QUANTIZATION_CONFIG_MAPPING["cumo"]) == before
    finally:
        for name, value in zip(("CumoQuantizer", "CumoQuantizationConfig"), before, strict=True):
            setattr(quantizer, name, value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "q4"}, "format must be one of"),
        ({"group": 48}, "group must be 32 or 64 or 128 or 256 in nf4, got 48"),
        ({"format": "mxfp4", "group": 64}, "group must be 32 in mxfp4, got 64"),
        ({"symmetric": False}, "symmetric must be True in nf4"),
        (
            {"scale_dtype": "int8"},
            "scale_dtype must be one of ('float32', 'bfloat16', 'float16'), got 'int8'",
        ),
        ({"format": "mxfp4", "scale_dtype": "float32"}, "scale_dtype must be uint8 in mxfp4"),
        ({"whole": None}, "whole must be a list of names, got None"),
        ({"whole": 5}, "whole must be a list of names, got 5"),
        ({"whole": "vision_tower"}, "whole must be a list of names, got 'vision_tower'"),
        ({"bits": 4}, "quantization_config has unknown keys: bits"),
        ({"quant_method": "gptq"}, "quant_method must be 'cumo', got 'gptq'"),
    ],
)
def test_a_wrong_config_is_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        CumoQuantizationConfig(**options)


def test_the_config_comes_back_from_its_dict():
    config = CumoQuantizationConfig("int4", 64, False, torch.bfloat16, ["vision_tower"])
    again = AutoQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is CumoQuantizationConfig and again.to_dict() == config.to_dict()
    assert again.packing == {
        "format": "int4", "group": 64, "symmetric": False, "scale_dtype": torch.bfloat16
    }  # fmt: skip


UP = "model.language_model.layers.1.mlp.experts.gate_up_proj"
DAMAGES = {  # what is done to the tensors of a file -> part of the message
    "no scales": (lambda t: t.pop(f"{UP}_scales"), f"{UP}_scales is missing in"),
    "no weights": (lambda t: t.pop(f"{UP}_packed"), f"{UP}_packed is missing in"),
    "transposed scales": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].transpose(1, 2).contiguous()}),
        "scales must be (4, 256, K / group), got (4, 1, 256): they are transposed",
    ),
    "another group": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].repeat(1, 1, 2)}),
        f"{UP}_scales of .* must be of groups of 64, got 32",
    ),
    "another shape": (
        lambda t: t.update({f"{UP}_packed": t[f"{UP}_packed"][:, :, :16].contiguous()}),
        rf"{UP}_packed of .* must be \(4, 256, 32\), got \(4, 256, 16\)",
    ),
    "another dtype": (
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].to(torch.int32)}),
        "scales must be float32 or bfloat16 or float16 in nf4",
    ),
    "zeros": (
        lambda t: t.update({f"{UP}_zeros": torch.zeros_like(t[f"{UP}_packed"])}),
        f"{UP}_zeros is in .* whose quantization_config says symmetric",
    ),
    "plain": (
        lambda t: t.update({UP: torch.zeros(4, 256, 64)}) or t.pop(f"{UP}_packed"),
        f"{UP}_packed is missing in .* which has the weight unquantised",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_before_a_weight_is_read(saved, tmp_path, monkeypatch, damage):
    change, words = DAMAGES[damage]
    quantize_experts(saved[0]).save_pretrained(tmp_path / "packed")
    found = tensors(tmp_path / "packed")
    change(found)
    save_file(found, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(
        quantizer.CumoQuantizer, "get_weight_conversions", lambda self: pytest.fail("too late")
    )
    words = words if ".*" in words else re.escape(words)
    with pytest.raises(ValueError, match=words):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")


def test_sizes_and_models_that_do_not_fit_are_named(tiny_model, tmp_path):
    model = tiny_model(text="mixtral")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.up_proj must have rows of a multiple of 64 weights"):
        CumoForConditionalGeneration.from_pretrained(tmp_path, quantization_config=CumoQuantizationConfig())
    dense = tiny_model(vision_experts=1, projector_num_experts=1)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="there is nothing to quantise: the model has no experts"):
        AutoModel.from_pretrained(tmp_path / "dense", quantization_config=CumoQuantizationConfig())
    assert expert_weights(dense) == {}
    with pytest.raises(ValueError, match="device_map must keep packed experts in memory, got disk"):
        AutoModel.from_pretrained(
            tmp_path, quantization_config=CumoQuantizationConfig(group=32), device_map={"": "disk"}
        )


def test_a_model_with_two_quantisers_is_not_saved(saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = CumoForConditionalGeneration.from_pretrained(
        saved[1], dtype=torch.bfloat16, device_map="cpu", quantization_config=options
    )
    quantize_experts(model)
    with pytest.raises(ValueError, match="whose other weights bitsandbytes has quantised cannot be saved"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_model_of_transformers_with_two_quantisers_is_not_saved(mixtral, tmp_path, is_trainable):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        mixtral[1], dtype=torch.bfloat16, device_map="cpu", quantization_config=options
    )
    quantize_experts(model)
    if is_trainable:
        peft.prepare_model_for_kbit_training(model)
    with pytest.raises(ValueError, match="whose other weights bitsandbytes has quantised cannot be saved"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()


def test_more_experts_of_a_model_can_be_quantised_before_it_is_saved(mixtral, tmp_path):
    config = CumoQuantizationConfig(whole=["layers.1"])
    model = AutoModelForCausalLM.from_pretrained(mixtral[1], quantization_config=config)
    assert len(packed_weights(model)) == 2
    quantize_experts(model, compress_statistics=False).save_pretrained(tmp_path / "all")
    assert len(packed_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "all"))) == 4


@pytest.mark.parametrize("name", ["nonsense", "tower", "lm_head", "experts.down"])
def test_a_whole_part_without_experts_is_named(saved, tmp_path, name):
    config = CumoQuantizationConfig(whole=["vision_tower", name])
    with pytest.raises(
        ValueError, match=f"whole must name weights of experts.* got '{name}', which fits none"
    ):
        AutoModelForImageTextToText.from_pretrained(saved[1], quantization_config=config)
    quantize_experts(saved[0]).save_pretrained(tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["whole"] = [name]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"got '{name}', which fits none of 12"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "packed")


def test_experts_of_another_class_are_named(tmp_path):
    sizes = {**SMALL, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**sizes))
    with pytest.raises(ValueError, match="has experts of a class that is not supported: Llama4TextExperts"):
        quantize_experts(model)
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="class that is not supported: Llama4TextExperts; experts are all"):
        quantize_checkpoint(tmp_path / "llama", tmp_path / "out", progress=False)


def test_experts_of_two_formats_are_not_saved(saved, tmp_path):
    model, _ = saved
    quantize_experts(model.model.vision_tower, "nf4")
    quantize_experts(model.model.language_model, "mxfp4")
    with pytest.raises(ValueError, match="experts must have one format to be saved, got mxfp4, nf4"):
        model.save_pretrained(tmp_path / "both")


def test_a_quantised_model_can_be_moved_and_cast(saved):
    model = quantize_experts(saved[0])
    before = {name: weight.packed.clone() for name, weight in packed_weights(model).items()}
    model.to("cpu", torch.float32)
    after = packed_weights(model)
    assert all(
        isinstance(weight, PackedWeight) and weight.dtype == torch.float32 for weight in after.values()
    )
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].packed, value) for name, value in before.items())
