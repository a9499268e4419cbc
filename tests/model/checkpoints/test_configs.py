"""Wrong values in config.json are named by file and key; pickled code is refused in our own words."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from cumo_model import convert
from cumo_model.__main__ import main
from cumo_model.checkpoints.configs import REAL, WHOLE, read_checked
from cumo_model.checkpoints.shards import read_bin, read_tensors
from cumo_model.demo.tokenizer import train_tokenizer
from tests.model import original

WRONG = ("big", None, [], {}, -1, 0, 10**12, 1.5, True, float("nan"))
TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 512}  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A released checkpoint, ours, and parts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["what is it?", "a red apple"] * 20, 320)
    monkeypatch.setattr(original, "VOCAB", len(tokenizer))
    original.write(tmp_path / "theirs", shards=1)
    tokenizer.save_pretrained("theirs")
    convert("theirs", "ours", progress=False)
    clip = {key: value for key, value in original.CLIP_CONFIG.items() if key != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**clip)).save_pretrained("clip")
    MistralForCausalLM(MistralConfig(**TEXT)).save_pretrained("text")
    tokenizer.save_pretrained("text")
    return tmp_path


def paths(values, above=()):
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict) and not above:
            yield from paths(value, (key,))


def changed(values, path, wrong):
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    return values


CASES = {
    "theirs": "convert theirs new",
    "ours": "convert ours new",
    "clip": "upcycle --vision clip --text text --out new",
    "text": "upcycle --vision clip --text text --out new",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("folder", CASES)
@pytest.mark.filterwarnings("ignore")
def test_no_value_of_any_key_is_a_traceback(folders, folder, capsys):
    file = folders / folder / "config.json"
    values = json.loads(file.read_text())
    for path in paths(values):
        for wrong in WRONG:
            file.write_text(json.dumps(changed(values, path, wrong)))
            shutil.rmtree("new", ignore_errors=True)
            capsys.readouterr()
            assert main(CASES[folder].split()) in (0, 1), (path, wrong)


KEYS = {  # folder -> keys, each with a value that must be named
    "theirs": {"hidden_size": "big", "num_hidden_layers": 10**12, "hidden_act": "none", "torch_dtype": 1.5,
               "num_experts": -1, "rope_theta": "x", "mm_vision_tower": [], "eos_token_id": [],
               "sliding_window": 0, "vocab_size": True, "rms_norm_eps": float("nan")},
    "ours": {"scales": "big", "projector_num_experts": [], "text_config.hidden_act": 3,
             "vision_config.patch_size": 0, "text_config.num_attention_heads": -2},
    "clip": {"hidden_size": None, "hidden_act": "none", "num_attention_heads": "big", "image_size": {}},
    "text": {"hidden_size": "big", "num_hidden_layers": 0.5, "pad_token_id": 10**6, "dtype": "float99"},
}  # fmt: skip


@pytest.mark.parametrize("folder", KEYS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_value_is_named_by_file_and_key(folders, folder, capsys):
    file = folders / folder / "config.json"
    values = json.loads(file.read_text())
    commands = [CASES[folder]]
    if folder in ("theirs", "ours"):
        commands += [
            f"chat --checkpoint {folder} --question what",
            f"upcycle --checkpoint {folder} --out new",
        ]
    for key, wrong in KEYS[folder].items():
        file.write_text(json.dumps(changed(values, key.split("."), wrong)))
        for command in commands:
            capsys.readouterr()
            assert main(command.split()) == 1, (key, command)
            said = capsys.readouterr().err
            assert said.startswith("cumo: ") and said.count("\n") == 1, said
            assert f"{folder}/config.json" in said and key.rpartition(".")[2] in said, said


@pytest.mark.parametrize("text", ["{", "[]", "", '{"max_new_tokens": "x"}'])
def test_a_wrong_generation_config_is_named_by_every_command(folders, text, capsys):
    for folder in ("ours", "theirs", "text"):
        file = folders / folder / "generation_config.json"
        file.write_text(text)
        commands = [CASES[folder]]
        if folder != "text":
            commands += [
                f"chat --checkpoint {folder} --question what",
                f"upcycle --checkpoint {folder} --out new",
            ]
        for command in commands:
            capsys.readouterr()
            assert main(command.split()) == 1, command
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{folder}/generation_config.json" in said, said
            assert "max_new_tokens" in said or ":" not in text, said


def test_the_key_to_blame_is_that_without_which_it_can_be_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "x", "a": 1, "b": {"c": 2, "d": 3}}))

    def read(values):
        return 1 / (values.get("b", {}).get("d") != 3)

    with pytest.raises(ValueError, match=r"config.json: b\.d cannot be used, got 3: division by zero$"):
        read_checked(file, read)
    with pytest.raises(ValueError, match=r"config.json: division by zero$"):
        read_checked(file, lambda values: 1 / 0)


@pytest.mark.parametrize("key", [*WHOLE, *REAL])
@pytest.mark.parametrize("within", ["", "text_config"])
def test_the_ends_of_a_range_are_in_it(tmp_path, key, within):
    least, most = (WHOLE | REAL)[key]
    file, step = tmp_path / "config.json", 1 if key in WHOLE else 1e-3
    for value, is_right in ((least, True), (most, True), (least - step, False), (most * 2 + step, False)):
        file.write_text(json.dumps({within: {key: value}} if within else {key: value}))
        if is_right:
            assert read_checked(file, lambda values: 7) == 7
            continue
        with pytest.raises(ValueError, match=f"{within}.?{key} must be a (whole )?number from"):
            read_checked(file, lambda values: 7)


def test_every_id_of_several_is_checked(tmp_path):
    file = tmp_path / "config.json"
    for value in ([1, 2], -1, 0, 2**31 - 1):
        file.write_text(json.dumps({"eos_token_id": value}))
        assert read_checked(file, lambda values: values)["eos_token_id"] == value
    for value in ([1, -2], [1, "2"], [], -2, 2**31, True):
        file.write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match="eos_token_id must be the id of a token"):
            read_checked(file, lambda values: values)


class Code:
    pass


def test_a_pickle_is_refused_without_the_advice_to_run_it(folders, capsys):
    torch.save({"mm_projector.0.weight": Code()}, "bad.bin")
    torch.save(Code(), "theirs/pytorch_model.bin")
    (folders / "theirs/model-00001-of-00001.safetensors").unlink()
    (folders / "theirs/model.safetensors.index.json").unlink()
    parts = "upcycle --vision clip --text text --out new"
    for command in (f"{parts} --projector bad.bin", f"{parts} --clip bad.bin", "convert theirs new"):
        assert main(command.split()) == 1
        said = capsys.readouterr().err
        assert "is refused: it holds more than tensors" in said and "as .safetensors" in said, said
        assert "weights_only" not in said and said.count("\n") == 1, said


def test_a_language_model_that_is_pickled_code_is_refused_in_the_same_words(folders, capsys):
    (folders / "text/model.safetensors").unlink()
    torch.save(Code(), "text/pytorch_model.bin")
    assert main("upcycle --vision clip --text text --out new".split()) == 1
    said = capsys.readouterr().err
    assert "is refused" in said and "weights_only" not in said and said.count("\n") == 1, said


def test_a_plain_pickle_is_refused_without_a_warning_of_torch(tmp_path, recwarn):
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": Code()}, protocol=4))
    with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
        read_bin(tmp_path / "plain.bin")
    assert not recwarn.list


def test_tensors_are_read_from_safetensors_and_from_old_pickles(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], tensors["a"])
    assert torch.equal(read_bin(tmp_path / "old.bin")["a"], tensors["a"])


def test_what_is_refused_from_configs_loads_no_weights(folders, capsys):
    """The files of the weights are empty."""
    for name in ("clip", "text"):
        (folders / name / "model.safetensors").write_bytes(b"")
    parts = "upcycle --vision clip --text text --out new"
    assert main([*parts.split(), "--top-k", "9"]) == 1
    assert "top_k must be between 1 and the 4 experts, got 9" in capsys.readouterr().err
    assert main("upcycle --checkpoint ours --vision-experts 4 --out new".split()) == 1
    assert "vision_experts must be 0 for a place that has experts already" in capsys.readouterr().err


def test_a_missing_tokenizer_is_said_and_can_be_given(folders, capsys):
    tokenizer = folders / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "text" / name).rename(tokenizer / name)
    parts = "upcycle --vision clip --text text"
    assert main(f"{parts} --out silent".split()) == 0
    assert "'text' has no tokenizer, so no processor is written: give --tokenizer" in capsys.readouterr().out
    assert main(f"{parts} --tokenizer tokenizer --out talking".split()) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    assert main("chat --checkpoint talking --question what --max-new-tokens 2".split()) == 0
    assert main("convert silent copied".split()) == 0
    assert "'silent' has no tokenizer, so that the copy has no tokenizer" in capsys.readouterr().out
    for folder in ("silent", "clip", "text"):
        assert main(f"chat --checkpoint {folder} --question what".split()) == 1
        assert "has no tokenizer" in capsys.readouterr().err
    (folders / "silent/processor_config.json").write_text("{}")
    assert main("chat --checkpoint silent --question what".split()) == 1
    assert "has no tokenizer" in capsys.readouterr().err
