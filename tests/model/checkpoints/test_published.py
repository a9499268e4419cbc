"""Experts that others have published in four bits keep their bits: compressed-tensors INT4, gpt-oss MXFP4."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cumo_model import quantize_checkpoint
from cumo_model.__main__ import main
from cumo_model.model.quantizer import packed_weights
from tests.model.checkpoints.test_quantize import OTHERS
from tests.model.test_quantizer import tensors

WAYS = {  # arguments of compressed-tensors -> name
    "symmetric": {"symmetric": True, "strategy": "group", "group_size": 32},
    "zeros": {"symmetric": False, "strategy": "group", "group_size": 32},
    "channel": {"symmetric": False, "strategy": "channel"},
}
PLAIN = ("lm_head", "embed", "gate.weight")  # parts of names of weights that are not compressed


def write(folder, config, found):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_model(tmp_path, name):
    """(config, tensors) of a small model in bf16, as its `save_pretrained` writes them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[name]).bfloat16()
    for key, value in model.named_parameters():
        if "norm" not in key:
            value.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "plain")
    return json.loads((tmp_path / "plain" / "config.json").read_text()), tensors(tmp_path / "plain")


def compress(
    tmp_path, name="mixtral", way="zeros", dense_bits=8, ignored=("lm_head", "embed", "gate.weight")
):
    """A checkpoint of compressed-tensors, and the same one that it has decompressed."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packed
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    config, plain = plain_model(tmp_path, name)
    groups = {
        "experts": ("re:.*experts.*", QuantizationArgs(num_bits=4, type="int", **WAYS[way])),
        "others": ("Linear", QuantizationArgs(num_bits=dense_bits, type="int", symmetric=True,
                                              strategy="group", group_size=16)),
    }  # fmt: skip
    found, whole = {}, {}
    for key, weight in plain.items():
        if weight.ndim != 2 or any(part in key for part in PLAIN):
            found[key] = whole[key] = weight
            continue
        target, args = groups["experts" if "experts" in key else "others"]
        scheme = QuantizationScheme(targets=[target], weights=args)
        group = args.group_size or weight.shape[1]
        blocks = weight.float().unflatten(1, (-1, group))
        top = 2 ** (args.num_bits - 1)
        parts = {"weight": weight}
        if args.symmetric:
            parts["weight_scale"] = (blocks.abs().amax(-1) / (top - 0.5)).bfloat16()
        else:
            low, high = blocks.amin(-1), blocks.amax(-1)
            parts["weight_scale"] = ((high - low) / (2 * top - 1)).bfloat16()
            zeros = (-low / parts["weight_scale"].float()).round() - top
            parts["weight_zero_point"] = zeros.clamp(-top, top - 1).to(torch.int8)
        small = Packed.compress(parts, scheme)
        found |= {f"{key.removesuffix('weight')}{part}": value.contiguous() for part, value in small.items()}
        whole[key] = Packed.decompress(small, scheme)["weight"]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            name: {"targets": [target], "weights": json.loads(args.model_dump_json())}
            for name, (target, args) in groups.items()
        },
    }
    folder = write(tmp_path / "published", config, found)
    del config["quantization_config"]
    return folder, write(tmp_path / "whole", config, whole)


def assert_same_weights(folder, whole):
    """A quantised folder has the weights of a plain model, bit for bit, some of them packed."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="cumo")
    found, wanted = dict(model.named_parameters()), dict(whole.named_parameters())
    assert found.keys() == wanted.keys() and len(packed_weights(model)) == 4
    for name, value in wanted.items():
        mine = found[name].dequantize() if name in packed_weights(model) else found[name]
        assert mine.dtype == value.dtype and torch.equal(mine, value), name
    return model


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dense_bits", [4, 8])
def test_compressed_tensors_keep_their_bits(tmp_path, name, way, dense_bits):
    folder, whole = compress(tmp_path, name, way, dense_bits)
    report = quantize_checkpoint(folder, tmp_path / "out", progress=False)
    model = assert_same_weights(tmp_path / "out", AutoModelForCausalLM.from_pretrained(whole))
    weight = model.model.layers[0].mlp.experts.down_proj
    assert weight.format == "int4" and (weight.zeros is None) == (way == "symmetric")
    assert weight.group == (128 if way == "channel" else 32)  # repeated for groups that kernels can read
    assert {row["error"] for row in report["experts"]} == {None}
    assert len(report["dequantised"]) == 2 * 4 and all("self_attn" in key for key in report["dequantised"])
    model.save_pretrained(tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == tensors(tmp_path / "out").keys()


def test_the_logits_are_those_that_transformers_computes_with_compressed_tensors(tmp_path):
    folder, _ = compress(tmp_path, way="symmetric", dense_bits=4)
    theirs = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="cumo")
    quantize_checkpoint(folder, tmp_path / "out", progress=False)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="cumo")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


def write_gpt_oss(tmp_path):
    config, found = plain_model(tmp_path, "gpt-oss")
    for name in [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = found.pop(name).shape
        random = lambda low, high, *shape: torch.randint(low, high, shape, dtype=torch.uint8)
        found[f"{name}_blocks"] = random(0, 256, experts, rows, width // 32, 16)
        found[f"{name}_scales"] = random(110, 128, experts, rows, width // 32)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write(tmp_path / "published", config, found)


def test_gpt_oss_keeps_its_bits(tmp_path, capsys):
    folder = write_gpt_oss(tmp_path)
    assert main(["quantize", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"^model.layers.1.mlp.experts +kept, kept ", capsys.readouterr().out, re.M)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    model = assert_same_weights(tmp_path / "out", theirs)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    parts = [load_file(folder / "model.safetensors")[f"{name}_{part}"] for part in ("blocks", "scales")]
    weight = model.get_parameter(name)
    assert weight.is_transposed and torch.equal(weight.dequantize(), convert_moe_packed_tensors(*parts))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"format": "nf4"},
            r"format \(--bits\) must be int4 or left out for .*, whose experts are int4",
        ),
        (
            {"format": "int4", "group": 128},
            r"group \(--group\) must be left out for .*, whose groups are of 32 weights, got 128",
        ),
        ({"format": "int4", "symmetric": False}, r"symmetric \(--asymmetric\) must be left out for"),
        ({"symmetric": False}, r"symmetric \(--asymmetric\) must be left out for .*, whose experts are int4"),
        ({"scale_dtype": "float32"}, "scale_dtype must be left out for"),
    ],
)
def test_published_bits_are_not_rounded_again(tmp_path, options, words):
    folder, _ = compress(tmp_path)
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(folder, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


W = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def changed(name, change):
    return lambda found, _: found.update({name: change(found[name]).contiguous()})


def group_of(config):
    return config["quantization_config"]["config_groups"]["experts"]


DAMAGES = {  # what is done to (tensors, config) -> message
    "no scales": (lambda t, _: t.pop(f"{W}_scale"), f"{W}_scale is missing in .*, which has {W}_packed"),
    "no zeros": (lambda t, _: t.pop(f"{W}_zero_point"), f"{W}_zero_point is missing in"),
    "no shape": (lambda t, _: t.pop(f"{W}_shape"), f"{W}_shape is missing in"),
    "no weight": (lambda t, _: t.pop(f"{W}_packed"), f"{W}_packed is missing in .*, which has {W}_"),
    "no expert": (
        lambda t, _: [t.pop(f"{W}_{p}") for p in ("packed", "scale", "zero_point", "shape")],
        "w3.weight of expert 2 is missing",
    ),
    "transposed scales": (
        changed(f"{W}_scale", torch.t),
        rf"{W}_scale must be \(128, 2\), got \(2, 128\): it is transposed",
    ),
    "transposed zeros": (changed(f"{W}_zero_point", torch.t), rf"{W}_zero_point must be \(16, 2\), got"),
    "wrong group": (
        lambda _, c: group_of(c)["weights"].update(group_size=64),
        r"weight_scale must be \(128, 1\), got \(128, 2\) for groups of 64",
    ),
    "odd group": (
        lambda _, c: group_of(c)["weights"].update(group_size=48),
        "weight_packed must have rows of a multiple of group_size 48, got 64",
    ),
    "packed shape": (
        changed(f"{W}_packed", lambda v: v[:, :4]),
        rf"{W}_packed must be \(128, 8\) torch.int32, got \(128, 4\)",
    ),
    "stored shape": (changed(f"{W}_shape", lambda v: v * 2), rf"{W}_packed must be \(256, 16\) torch.int32"),
    "symmetric": (
        lambda _, c: group_of(c)["weights"].update(symmetric=True),
        "weight_zero_point is there, but .* says that it is symmetric",
    ),
    "order": (
        lambda t, _: t.update({f"{W}_g_idx": torch.zeros(64, dtype=torch.int32)}),
        f"{W}_g_idx is not known",
    ),
    "float": (lambda _, c: group_of(c)["weights"].update(type="float"), "4 or 8 bits, got float of 4 bits"),
    "bits": (lambda _, c: group_of(c)["weights"].update(num_bits=3), "4 or 8 bits, got int of 3 bits"),
    "eight bits": (
        lambda _, c: group_of(c)["weights"].update(num_bits=8),
        r"weight_packed must be \(\d+, \d+\) torch.int32",
    ),
    "format": (
        lambda _, c: c["quantization_config"].update(format="marlin-24"),
        "format of experts in .* must be 'pack-quantized', got 'marlin-24'",
    ),
    "activations": (
        lambda _, c: group_of(c).update(input_activations={"num_bits": 8}),
        "must quantise weights only, got activations too",
    ),
    "no groups": (
        lambda _, c: c["quantization_config"].update(config_groups={}),
        "config_groups of .* must name how weights are quantised",
    ),
    "no scheme": (
        lambda _, c: c["quantization_config"].update(config_groups={"experts": group_of(c)})
        or group_of(c).update(targets=["re:.*w1.*"]),
        "weight_packed is in no group of",
    ),
    "strategy": (
        lambda _, c: group_of(c)["weights"].update(strategy="tensor"),
        "must be group or channel, got 'tensor'",
    ),
    "dense": (
        lambda t, _: t.update({f"{Q}_shape": torch.tensor([32, 128])}),
        rf"{Q}_packed must be \(32, 32\) torch.int32",
    ),
    "weights": (lambda _, c: group_of(c).update(weights=[1]), r"weights of experts in .* object, got \[1\]"),
    "group": (
        lambda _, c: c["quantization_config"].update(config_groups={"a": [1]}),
        r"a of config_groups in .* must be an object, got \[1\]",
    ),
    "pattern": (
        lambda _, c: group_of(c).update(targets=["re:(("]),
        r"targets of experts in .* must be names or patterns, got 're:\(\('",
    ),
    "targets": (
        lambda _, c: group_of(c).update(targets=[1]),
        r"targets of experts in .* must be a list of names, got \[1\]",
    ),
    "sparsity": (
        lambda _, c: c["quantization_config"].update(sparsity_config="x"),
        "sparsity_config of .* must be dense, got 'x'",
    ),
    "scale": (
        lambda t, _: t[f"{W}_scale"][3].fill_(float("nan")), f"{W}_scale must be finite, got nan or inf"
    ),
    "dense scale": (
        lambda t, _: t[f"{Q}_scale"][3].fill_(float("inf")), f"{Q}_scale must be finite, got nan or inf"
    ),
    "cache": (
        lambda _, c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme of .* must be empty",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_in_compressed_tensors_is_named_before_anything_is_read(tmp_path, damage):
    folder, _ = compress(tmp_path)
    change, words = DAMAGES[damage]
    found, config = tensors(folder), json.loads((folder / "config.json").read_text())
    change(found, config)
    write(tmp_path / "damaged", config, found)
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(tmp_path / "damaged", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


BLOCKS = "model.layers.0.mlp.experts.down_proj"
MX_DAMAGES = {
    "no scales": (lambda t: t.pop(f"{BLOCKS}_scales"), f"{BLOCKS}_scales is missing in"),
    "no blocks": (lambda t: t.pop(f"{BLOCKS}_blocks"), f"{BLOCKS} is missing"),
    "transposed scales": (
        lambda t: t.update({f"{BLOCKS}_scales": t[f"{BLOCKS}_scales"].transpose(1, 2).contiguous()}),
        r"scales must be \(4, 64, 4\), got \(4, 4, 64\): they are transposed",
    ),
    "blocks": (
        lambda t: t.update({f"{BLOCKS}_blocks": t[f"{BLOCKS}_blocks"][:, :, :2].contiguous()}),
        rf"{BLOCKS}_blocks must be \(4, 64, 4, 16\), as config.json says, got \(4, 64, 2, 16\)",
    ),
    "plain": (
        lambda t: (
            t.update({BLOCKS: torch.zeros(4, 128, 64)})
            or [t.pop(f"{BLOCKS}_{part}") for part in ("blocks", "scales")]
        ),
        f"{BLOCKS} must be quantised, as config.json says of experts, got plain weights",
    ),
    "scale": (
        lambda t: t[f"{BLOCKS}_scales"][2, 3].fill_(255),
        f"{BLOCKS}_scales must be exponents below 255, which is NaN, got 255",
    ),
    "bias": (lambda t: t.pop(f"{BLOCKS}_bias"), f"config.json: {BLOCKS}_bias is missing"),
    "elsewhere": (
        lambda t: t.update({"x_blocks": torch.zeros(1), "x_scales": torch.zeros(1)}),
        "x_blocks of .* is no weight of experts",
    ),
}


@pytest.mark.parametrize("damage", MX_DAMAGES)
def test_what_is_wrong_in_gpt_oss_is_named(tmp_path, damage):
    folder, (change, words) = write_gpt_oss(tmp_path), MX_DAMAGES[damage]
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
