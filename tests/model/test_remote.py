"""Folders that open with trust_remote_code=True in programs that have never imported this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from cumo_model import (
    CumoConfig,
    CumoForConditionalGeneration,
    CumoImageProcessor,
    CumoProcessor,
    CumoVisionModel,
    build_processor,
    convert,
)
from cumo_model.__main__ import main
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.model.llm_moe import CumoMixtralModel
from cumo_model.model.remote import CODE

FRESH = """
import json, sys, traceback
from PIL import Image
if sys.argv[1] == "missing":
    sys.modules["cumo_model"] = None
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
assert not [name for name in sys.modules if name.startswith("cumo_model.")]
folder, more = sys.argv[2], {"trust_remote_code": True}
if sys.argv[1] == "missing":
    AutoConfig.from_pretrained(folder, **more)
elif sys.argv[1] == "pipeline":
    picture = Image.new("RGB", (20, 14), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    pipe = pipeline("image-text-to-text", model=folder, **more)
    said = pipe(text=[{"role": "user", "content": content}], max_new_tokens=6, do_sample=False)
    print(json.dumps(said[0]["generated_text"][-1]["content"]))
    pipe.save_pretrained(sys.argv[3])
else:
    found = globals()[sys.argv[1]].from_pretrained(folder, **more)
    found.save_pretrained(sys.argv[3])
    print(json.dumps(type(found).__name__))
"""
CLASSES = {
    "AutoConfig": "CumoConfig",
    "AutoModel": "CumoModel",
    "AutoModelForImageTextToText": "CumoForConditionalGeneration",
    "AutoProcessor": "CumoProcessor",
    "AutoImageProcessor": "CumoImageProcessor",
}


@pytest.fixture
def parts(tiny_config):
    """A model and its processor."""
    tokenizer = train_tokenizer(["what is it? a red apple"] * 4, 300)
    config = tiny_config(
        text_options={"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    return CumoForConditionalGeneration(config), build_processor(tokenizer, 12, 4)


@pytest.fixture
def folder(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path / "model", remote_code=True)
    return tmp_path / "model"


def fresh(tmp_path, *words) -> subprocess.CompletedProcess:
    """Run FRESH in a new process with an empty cache of modules."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", FRESH, *map(str, words)]
    return subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )


def auto_map(path: Path) -> dict:
    return json.loads(path.read_text()).get("auto_map", {})


def codes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("auto", CLASSES)
def test_each_class_opens_in_a_program_that_does_not_know_it(folder, tmp_path, auto):
    """And what it saves has no copies of this package's source files."""
    done = fresh(tmp_path, auto, folder, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == CLASSES[auto]
    assert codes(tmp_path / "again") == ["cumo_remote.py"]


@pytest.mark.slow
def test_a_pipeline_gives_the_answer_of_the_model(folder, tmp_path):
    done = fresh(tmp_path, "pipeline", folder, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    from PIL import Image

    content = [
        {"type": "image", "image": Image.new("RGB", (20, 14), "red")},
        {"type": "text", "text": "what?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.strip() == processor.decode(ids, skip_special_tokens=True).strip()
    done = fresh(tmp_path, "pipeline", tmp_path / "again", tmp_path / "last")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == said, done.stderr
    assert codes(tmp_path / "again") == codes(tmp_path / "last") == ["cumo_remote.py"]


def test_a_program_without_the_package_is_told_what_to_install(folder, tmp_path):
    done = fresh(tmp_path, "missing", folder)
    told = (
        "ImportError: this checkpoint needs the package cumo, which is not installed here: pip install cumo"
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == told


def test_nothing_is_written_unless_asked(parts, tmp_path):
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    assert not codes(tmp_path / "model")
    assert "auto_map" not in (tmp_path / "model/config.json").read_text()
    assert "auto_map" not in (tmp_path / "model/processor_config.json").read_text()
    model, processor = parts
    for part in parts:  # asking for one folder asks for no other
        part.save_pretrained(tmp_path / "asked", remote_code=True)
    assert not hasattr(model.config, "auto_map") and not hasattr(processor, "auto_map")
    assert not hasattr(processor.image_processor, "auto_map")


def test_a_loaded_folder_is_saved_as_it_was(folder, tmp_path):
    """Also where the package is imported, with shards, and after the call that transformers makes."""
    for cls in (CumoConfig, CumoForConditionalGeneration, CumoProcessor, CumoImageProcessor):
        cls.register_for_auto_class()
        assert cls._auto_class is None
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    again, without = tmp_path / "again", tmp_path / "without"
    model.save_pretrained(again, max_shard_size="100KB")
    processor.save_pretrained(again)
    assert codes(again) == ["cumo_remote.py"] and (again / "cumo_remote.py").read_text() == CODE
    assert auto_map(again / "config.json") == auto_map(folder / "config.json") != {}
    assert (again / "processor_config.json").read_bytes() == (folder / "processor_config.json").read_bytes()
    assert len(list(again.glob("*.safetensors"))) > 1
    for part in (model, processor):
        part.save_pretrained(without, remote_code=False)
    assert not codes(without) and not auto_map(without / "config.json")
    assert "auto_map" not in (without / "processor_config.json").read_text()


def test_entries_of_others_and_of_a_repository(folder, tmp_path):
    """transformers puts the repository before the names in what it has read from the hub."""
    config = CumoConfig.from_pretrained(folder)
    config.auto_map = {name: f"owner/name--{value}" for name, value in config.auto_map.items()}
    config.auto_map["AutoThing"] = "other.Thing"
    config.save_pretrained(tmp_path / "again")
    expected = auto_map(folder / "config.json") | {"AutoThing": "other.Thing"}
    assert auto_map(tmp_path / "again/config.json") == expected
    config.save_pretrained(tmp_path / "without", remote_code=False)
    assert auto_map(tmp_path / "without/config.json") == {"AutoThing": "other.Thing"}
    assert not codes(tmp_path / "without")


def test_a_class_of_another_package_is_registered_as_in_transformers():
    other = type("Other", (CumoForConditionalGeneration,), {"__module__": "elsewhere"})
    other.register_for_auto_class("AutoModel")
    assert other._auto_class == "AutoModel" and CumoForConditionalGeneration._auto_class is None


def test_a_tower_opens_and_a_decoder_cannot(parts, tmp_path):
    tower = parts[0].model.vision_tower
    assert isinstance(tower, CumoVisionModel)
    tower.save_pretrained(tmp_path / "tower", remote_code=True)
    assert auto_map(tmp_path / "tower/config.json") == {
        "AutoConfig": "cumo_remote.CumoVisionConfig",
        "AutoModel": "cumo_remote.CumoVisionModel",
    }
    assert type(AutoModel.from_pretrained(tmp_path / "tower", trust_remote_code=True)) is CumoVisionModel
    from transformers import MixtralConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder = CumoMixtralModel(MixtralConfig(vocab_size=9, num_key_value_heads=1, **sizes))
    with pytest.raises(ValueError, match="remote_code must be False for a MixtralConfig, got True"):
        decoder.save_pretrained(tmp_path / "decoder", remote_code=True)
    decoder.save_pretrained(tmp_path / "decoder")
    assert not codes(tmp_path / "decoder")


@pytest.mark.slow
def test_convert_adds_it_and_keeps_it_both_ways(parts, tmp_path, capsys):
    for part in parts:
        part.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "theirs", progress=False)
    assert main(["convert", *map(str, (tmp_path / "theirs", tmp_path / "new")), "--remote-code"]) == 0
    for auto in ("AutoModelForImageTextToText", "AutoProcessor"):
        done = fresh(tmp_path, auto, tmp_path / "new", tmp_path / "again")
        assert done.returncode == 0 and CLASSES[auto] in done.stdout, done.stderr
    first, new = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "new"))
    assert first.keys() == new.keys() and all(torch.equal(first[name], new[name]) for name in first)
    convert(tmp_path / "new", tmp_path / "back", progress=False)
    convert(tmp_path / "back", tmp_path / "last", progress=False)
    for name in ("config.json", "processor_config.json", "cumo_remote.py"):
        assert (tmp_path / "last" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    convert(tmp_path / "own", tmp_path / "same", remote_code=True, progress=False)
    assert (tmp_path / "same/config.json").read_bytes() == (tmp_path / "new/config.json").read_bytes()
    with pytest.raises(ValueError, match="layout must be 'cumo' with remote_code, got 'original'"):
        convert(tmp_path / "own", tmp_path / "none", "original", remote_code=True)
    words = [
        "convert",
        str(tmp_path / "own"),
        str(tmp_path / "none"),
        "--remote-code",
        "--layout",
        "original",
    ]
    assert main(words) == 1 and "--layout must be cumo with --remote-code" in capsys.readouterr().err
