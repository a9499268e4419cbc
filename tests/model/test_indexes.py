"""Index files of checkpoints may name files of their own folder only, whoever reads them."""

import json
import os
import shutil

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
)

from cumo_model import CumoForConditionalGeneration, CumoVisionModel, convert
from cumo_model.checkpoints.assemble import assemble
from cumo_model.model.llm_moe import CumoMixtralModel
from tests.model import original

TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 50}  # fmt: skip
READERS = {
    "auto": AutoModelForImageTextToText.from_pretrained,
    "inner": AutoModel.from_pretrained,
    "ours": CumoForConditionalGeneration.from_pretrained,
    "subfolder": lambda folder: CumoForConditionalGeneration.from_pretrained(
        folder.parent, subfolder=folder.name
    ),
    "assemble": assemble,
    "convert": lambda folder: convert(folder, folder.with_name("converted"), progress=False),
}


def lead_out(folder, how, kind="safetensors"):
    """Move one shard of `folder` out of it and let the index follow; return the words of the error."""
    (index,) = folder.glob(f"*.{kind}.index.json")
    values = json.loads(index.read_text())
    name = sorted(set(values["weight_map"].values()))[0]
    away = folder.parent / "away"
    away.mkdir()
    shutil.move(folder / name, away / name)
    if how == "link":
        (folder / name).symlink_to(away / name)
        return f"{index.name}: '{name}' is a link that leads out of"
    new = f"../away/{name}" if how == "dots" else str(away / name)
    values["weight_map"] = {key: new if file == name else file for key, file in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    return f"{index.name}: '{new}' must be a path inside"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("how", ["dots", "absolute", "link"])
@pytest.mark.parametrize("kind", ["ours", "released", "released, pickled"])
def test_no_reader_follows_an_index_out_of_its_folder(tiny_model, tmp_path, kind, how, reader):
    folder = tmp_path / "start"
    if kind == "ours":
        tiny_model().save_pretrained(folder, max_shard_size="20KB")
    else:
        original.write(folder, pickled="pickled" in kind)
    words = lead_out(folder, how, "bin" if "pickled" in kind else "safetensors")
    with pytest.raises(ValueError) as error:
        READERS[reader](folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    advised = str(error.value).endswith("; copy the file, or make the folder itself the link")
    assert advised == (how == "link")


@pytest.mark.parametrize("part", ["vision", "our vision", "text"])
def test_parts_do_not_follow_an_index_out_of_their_folder(tiny_config, tmp_path, part):
    tower = CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG))
    if part == "our vision":
        tower = CumoVisionModel(tiny_config().vision_config)
    tower.save_pretrained(tmp_path / "vision", max_shard_size="10KB")
    text = MistralForCausalLM(MistralConfig(**TEXT))
    text.save_pretrained(tmp_path / "text", max_shard_size="10KB")
    words = lead_out(tmp_path / part.split()[-1], "dots")
    with pytest.raises(ValueError, match="must be a path inside") as error:
        assemble(vision=tmp_path / "vision", text=tmp_path / "text")
    assert words in str(error.value)
    if part == "our vision":
        with pytest.raises(ValueError, match="must be a path inside"):
            CumoVisionModel.from_pretrained(tmp_path / "vision")


def test_the_mixtral_decoder_does_not_follow_an_index_out_of_its_folder(tiny_config, tmp_path):
    model = CumoMixtralModel(tiny_config("mixtral").text_config)
    model.save_pretrained(tmp_path / "start", max_shard_size="20KB")
    loaded = CumoMixtralModel.from_pretrained(tmp_path / "start").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    words = lead_out(tmp_path / "start", "dots")
    with pytest.raises(ValueError, match="must be a path inside") as error:
        CumoMixtralModel.from_pretrained(tmp_path / "start")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is damaged: "),
        ("[]", "must hold an object, got list"),
        ("{}", "must have a weight_map of tensors and files, got None"),
        ('{"weight_map": []}', r"must have a weight_map of tensors and files, got \[\]"),
        ('{"weight_map": {"a": 5}}', "the file of a must be a name, got 5"),
        ('{"weight_map": {"a": null}}', "the file of a must be a name, got None"),
        ('{"weight_map": {"a": ["b"]}}', r"the file of a must be a name, got \['b'\]"),
        ('{"weight_map": {"a": ""}}', "'' must be a path inside"),
    ],
)
def test_an_index_that_is_none_is_named(tiny_model, tmp_path, content, words):
    tiny_model().save_pretrained(tmp_path / "start", max_shard_size="20KB")
    (tmp_path / "start/model.safetensors.index.json").write_text(content)
    for reader in ("auto", "assemble", "convert"):
        with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json:? {words}"):
            READERS[reader](tmp_path / "start")


def test_the_index_of_a_variant_is_checked_too(tiny_model, tmp_path):
    """Such as model.safetensors.index.fp16.json, which transformers reads with variant="fp16"."""
    folder = tmp_path / "start"
    tiny_model().save_pretrained(folder, max_shard_size="20KB", variant="fp16")
    (index,) = folder.glob("*.index.fp16.json")
    values = json.loads(index.read_text())
    values["weight_map"] = dict.fromkeys(values["weight_map"], "../away.safetensors")
    index.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"index\.fp16\.json: '\.\./away\.safetensors' must be a path inside"
    ):
        CumoForConditionalGeneration.from_pretrained(folder, variant="fp16")


def test_weights_that_config_json_names_lie_in_the_folder(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    os.rename(tmp_path / "start/model.safetensors", tmp_path / "away.safetensors")
    (tmp_path / "start/mine.safetensors").symlink_to(tmp_path / "away.safetensors")
    path = tmp_path / "start/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "mine.safetensors"}))
    with pytest.raises(ValueError, match=r"config\.json: 'mine\.safetensors' is a link that leads out"):
        CumoForConditionalGeneration.from_pretrained(tmp_path / "start")


def test_the_cache_of_the_hub_links_to_its_blobs(tiny_model, tmp_path):
    model = tiny_model()
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f", tmp_path / "models--a--b/blobs"
    model.save_pretrained(snapshot, max_shard_size="20KB")
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    loaded = CumoForConditionalGeneration.from_pretrained(snapshot).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    convert(snapshot, tmp_path / "theirs", progress=False)
    loaded = assemble(tmp_path / "theirs")[0].state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
