"""Run all examples of README.md, in order, in a folder that contains the files they use."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM, MixtralConfig
from transformers import MixtralForCausalLM as Mixtral

from cumo_model import CumoForConditionalGeneration
from cumo_model.__main__ import main
from cumo_model.demo.tokenizer import train_tokenizer
from tests.model import original

README = (Path(__file__).parents[2] / "README.md").read_text()
# those recipes need billions of weights; test_trainer.py and test_experts.py run them on small models
README = re.sub(r"^## Train\n.*?(?=^## )", "", README, flags=re.MULTILINE | re.DOTALL)
EXAMPLES = [
    (language, code)
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    if language == "python" or "python -m cumo_model" in code
]
TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 128}  # fmt: skip


def test_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(original, "VOCAB", 320)
    original.write(tmp_path / "checkpoints/CuMo-mistral-7b", std=0.1)
    train_tokenizer(["what is it?", "a red apple"] * 20, 320).save_pretrained("checkpoints/CuMo-mistral-7b")
    Mixtral(MixtralConfig(**TEXT, num_local_experts=4)).save_pretrained("checkpoints/mixtral")
    MistralForCausalLM(MistralConfig(**TEXT)).save_pretrained("checkpoints/mistral")
    CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG)).save_pretrained("checkpoints/clip")
    Image.new("RGB", (30, 20), (200, 30, 30)).save("picture.png")
    names: dict = {}
    assert len(EXAMPLES) >= 6
    for language, code in EXAMPLES:
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
            continue
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["python", "-m", "cumo_model"]:
                assert main(words[3:]) == 0, capsys.readouterr().err
    assert names["out"].shape == (577, 1024)
    assert any(p.requires_grad and "experts" in n for n, p in names["model"].named_parameters())
    assert "A chat between" in capsys.readouterr().out.replace("a chat", "A chat")
    moe = CumoForConditionalGeneration.from_pretrained("checkpoints/moe", dtype=torch.float32)
    assert moe.config.text_config.num_local_experts == 4
