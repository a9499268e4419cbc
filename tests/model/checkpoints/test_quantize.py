"""The command quantize: every layout, what it reports, what it refuses, and how much memory it needs."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GptOssConfig,
    GraniteMoeHybridConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights

from cumo_model import CumoQuantizationConfig, convert, quantize_checkpoint
from cumo_model.__main__ import main
from cumo_model.checkpoints.quantize_checkpoint import REPORT
from cumo_model.checkpoints.upcycle_checkpoint import upcycle_checkpoint
from cumo_model.model.quantizer import expert_weights, packed_weights
from tests.model.test_quantizer import SIZES, SMALL, assert_same_files, tensors
from tests.model.training.small_runs import write_model

WAYS = {
    "nf4": {},
    "fp4": {"format": "fp4", "scale_dtype": "bfloat16"},
    "mxfp4": {"format": "mxfp4"},
    "int4": {"format": "int4", "group": 32, "symmetric": False},
}
OTHERS = {
    "mixtral": MixtralConfig(**SMALL),
    "qwen": Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=128),
    "gpt-oss": GptOssConfig(**SMALL, layer_types=["full_attention"] * 2),
}
KINDS = {"image": AutoModelForImageTextToText, "text": AutoModelForCausalLM}


@pytest.fixture
def cumo(tiny_config, tmp_path):
    """The folder of a CuMo with experts in all places, in bf16, and its processor."""
    experts = {"text": "mixtral", "vision_experts": 4, "projector_num_experts": 4}
    folder = write_model(tmp_path, tiny_config, vision=SIZES, text_options=SIZES, **experts)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def other(tmp_path):
    """Factory: the folder of a model of transformers, in bf16."""

    def make(name):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[name]).bfloat16()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "norm" not in key:
                    value.normal_(std=0.1)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["cumo", "original"])
def test_files_are_those_that_loading_quantised_and_saving_writes(cumo, tmp_path, layout, way):
    folder = cumo
    if layout == "original":
        folder = convert(cumo, tmp_path / "released", progress=False)
    report = quantize_checkpoint(folder, tmp_path / "out", **WAYS[way], progress=False)
    config = CumoQuantizationConfig(**WAYS[way])
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    mine, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "saved")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert len(packed_weights(again)) == 12 and again.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "again")
    if layout == "cumo":
        assert_same_files(tmp_path / "again", tmp_path / "saved")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "tokenizer.json", "processor_config.json", REPORT}
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    before = AutoModelForImageTextToText.from_pretrained(folder)
    whole = dict(before.named_parameters())
    assert {row["name"] for row in report["experts"]} == packed_weights(again).keys()
    for row in report["experts"]:
        weight, packed = whole[row["name"]].double(), packed_weights(again)[row["name"]]
        error = (packed.dequantize(torch.float64) - weight).norm() / weight.norm()
        assert row["error"] == pytest.approx(error.item(), rel=1e-6)  # sums in another order
        assert 0.02 < row["error"] < 0.2
        assert row["bytes_before"] == whole[row["name"]].nbytes and row["bytes_after"] == packed.nbytes
    sizes = [
        sum(t.nbytes for t in found.values()) for found in (load_file(f"{folder}/model.safetensors"), mine)
    ]
    assert [report["bytes_before"], report["bytes_after"]] == sizes


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("way", WAYS)
def test_models_of_transformers(other, tmp_path, name, way):
    folder = other(name)
    quantize_checkpoint(folder, tmp_path / "out", **WAYS[way], progress=False, shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="cumo")
    again.save_pretrained(tmp_path / "again")
    config = CumoQuantizationConfig(**WAYS[way])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "again", tmp_path / "saved")
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    found = tensors(tmp_path / "again")
    assert written.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in written.items())


def test_a_table_is_printed(other, tmp_path, capsys):
    assert main(["quantize", str(other("mixtral")), "--bits", "mxfp4", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^experts in mxfp4 +relative error \(up, down\) +before +after$", out, re.M)
    row = r"^model.layers.1.mlp.experts +\d+\.\d\d%, \d+\.\d\d% +0.20 MB +0.05 MB$"
    assert re.search(row, out, re.M) and re.search(r"^the whole model +0.47 MB +0.18 MB$", out, re.M)
    assert "before from_pretrained: import cumo_model" in out
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'out'}"


def test_other_tensors_and_files_are_copied_as_they_are(cumo, tmp_path):
    (cumo / "notes").mkdir()
    (cumo / "notes" / "read.me").write_text("mine")
    quantize_checkpoint(cumo, tmp_path / "out", progress=False)
    before, after = tensors(cumo), tensors(tmp_path / "out")
    kept = [name for name in before if not name.endswith(("experts.up_proj", "gate_up_proj", "down_proj"))]
    assert any("gate.weight" in name for name in kept) and any("bias" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert (tmp_path / "out" / "notes" / "read.me").read_text() == "mine"
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (cumo, tmp_path / "out"))
    assert new.pop("quantization_config") == CumoQuantizationConfig(group=64).to_dict() and new == old


def test_a_quantised_folder_chats_but_is_not_served_converted_or_upcycled(cumo, tmp_path, capsys):
    quantize_checkpoint(cumo, tmp_path / "out", progress=False)
    capsys.readouterr()
    asked = ["--question", "what colour?", "--max-new-tokens", "3", "--template", "mistral_instruct"]
    assert main(["chat", str(tmp_path / "out"), *asked]) == 0
    assert capsys.readouterr().out.strip()
    for words, told in (
        (["serve", tmp_path / "out"], "vLLM does not read CuMo's quantised weights"),
        (["convert", tmp_path / "out", tmp_path / "x"], "has experts in four bits, which are not converted"),
        (
            ["quantize", tmp_path / "out", "--out", tmp_path / "x"],
            "is quantised already: its experts are nf4",
        ),
        (["chat", tmp_path / "out", *asked, "--load-4bit"], "whose experts are quantised already, got 4"),
    ):
        assert main([str(word) for word in words]) == 1
        err = capsys.readouterr().err
        assert told in err and err.startswith("cumo: ") and err.count("\n") == 1, err
    with pytest.raises(ValueError, match="has experts in four bits: upcycle, then quantize"):
        upcycle_checkpoint(tmp_path / "x", tmp_path / "out", text_experts=4)
    assert not (tmp_path / "x").exists()


def _lose(name):
    return lambda found: found.pop(name)


W1 = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
DAMAGES = {
    "missing": (_lose(W1.format(2)), r"\.mlp\.experts\.gate_up_proj of .*w1.weight of expert 2 is missing"),
    "shape": (
        lambda t: t.update({W1.format(1): torch.zeros(64, 128).bfloat16()}),
        r"experts.1.w1.weight must be \(128, 64\), as config.json says, got \(64, 128\)",
    ),
    "dtype": (
        lambda t: t.update({W1.format(1): torch.zeros(128, 64)}),
        "must have one dtype to be experts of one tensor, got torch.bfloat16 and torch.float32",
    ),
    "attention": (
        _lose("model.layers.1.self_attn.q_proj.weight"),
        "does not match its config.json: model.layers.1.self_attn.q_proj.weight is missing",
    ),
    "integers": (
        lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if ".experts." in k}),
        "must be of a float dtype, got torch.int8",
    ),
    "infinite": (
        lambda t: t[W1.format(3)].fill_(float("inf")),
        "gate_up_proj of expert 3: weight must be finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_and_nothing_is_left(other, tmp_path, damage):
    folder, (change, words) = other("mixtral"), DAMAGES[damage]
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(folder, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mixtral"]


@pytest.mark.parametrize(
    "values, options, words",
    [
        ({}, {"group": 128}, r"gate_up_proj must have rows of a multiple of 128 weights, the group, got 64"),
        (
            {},
            {"format": "int4"},
            r"gate_up_proj must have rows of a multiple of 128 weights, the group, got 64",
        ),
        ({}, {"format": "q4"}, "format must be one of"),
        ({}, {"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
        (
            {"model_type": "strange"},
            {},
            "must be of a CuMo or a model of transformers, got model_type 'strange'",
        ),
        ({"architectures": None}, {}, "and architectures \\[\\]"),
        ({"architectures": 5}, {}, "architectures of .* must be a list of names, got 5"),
        ({"architectures": ["AutoTokenizer"]}, {}, "and architectures \\['AutoTokenizer'\\]"),
        ({"model_type": ["foo"]}, {}, "must be of a CuMo .* got model_type \\['foo'\\]"),
        ({"dtype": "float99"}, {}, "config.json: dtype must be a dtype of torch, got 'float99'"),
        ({}, {"symmetric": False}, r"symmetric \(--asymmetric\) must be left out for nf4"),
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "quant_method of .* got 'gptq'"),
        ({"quantization_config": {"load_in_4bit": True}}, {}, "quant_method of .* got None"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(other, tmp_path, values, options, words):
    folder = other("mixtral")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(folder, tmp_path / "out", progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["mixtral"]


OWN = {  # models whose config.json, as transformers saves it, has values that are wrong in a CuMo's
    "sliding_window": Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    "time_step_limit": GraniteMoeHybridConfig(**SMALL, layer_types=["attention"] * 2),
    "tie_word_embeddings": MixtralConfig(**SMALL, tie_word_embeddings=True),
}


@pytest.mark.parametrize("key", OWN)
def test_config_files_of_other_models_are_read_as_transformers_does(tmp_path, key):
    model = AutoModelForCausalLM.from_config(OWN[key]).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "out", progress=False)
    old, new = (json.loads((tmp_path / name / "config.json").read_text())[key] for name in ("plain", "out"))
    assert new == old
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert packed_weights(again).keys() == expert_weights(model).keys()


def test_the_result_is_not_inside_its_source(other, tmp_path):
    folder = other("mixtral")
    before = sorted(folder.iterdir())
    (tmp_path / "link").symlink_to(folder)
    for out in (folder / "q", folder / "deep" / "er" / "q", tmp_path / "link" / "q"):
        with pytest.raises(ValueError, match="out must be outside the source folder"):
            quantize_checkpoint(folder, out, progress=False)
    assert sorted(folder.iterdir()) == before


def test_folders_that_cannot_be_quantised_are_named(tiny_model, other, tmp_path):
    tiny_model(vision_experts=1, projector_num_experts=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match="has no experts in stacked weights; experts are all that is quantised"
    ):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"source must be a folder of a model, got .*nowhere"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full exists already"):
        quantize_checkpoint(other("mixtral"), tmp_path / "full", progress=False)


MEASURED = """
import sys
from cumo_model import quantize_checkpoint
def peak():
    (row,) = [row for row in open("/proc/self/status") if row.startswith("VmHWM")]
    return int(row.split()[1]) * 1024
quantize_checkpoint(sys.argv[1], sys.argv[2], progress=False, shard_bytes=1)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of the imports too
before = peak()
quantize_checkpoint(sys.argv[3], sys.argv[4], progress=False, shard_bytes=1)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_is_less_than_that_of_one_layers_experts(other, tmp_path):
    """What is rounded needs several copies in fp32, so that it must be a part of one expert."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 32, "num_hidden_layers": 1}
    config = MixtralConfig(**SMALL | sizes)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for weight in model.parameters():
        weight.data = torch.linspace(-1, 1, weight.numel()).view(weight.shape).bfloat16()
    model.save_pretrained(tmp_path / "large")
    del model
    small = other("mixtral")
    words = [str(path) for path in (small, tmp_path / "a", tmp_path / "large", tmp_path / "b")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=True
    )
    layer = 32 * 3 * 1024 * 512 * 2
    assert 0 < int(done.stdout) < layer, (int(done.stdout), layer)
