"""The demo's examiner, pictures and settings; `make demo ARGS=--quick` runs the whole of it in CI."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cumo_model import CumoForConditionalGeneration
from cumo_model.conversation import tokenize_prompt
from cumo_model.demo.evaluate import Examiner
from cumo_model.demo.plots import plot_losses
from cumo_model.demo.settings import Settings, quick
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.experts import load_entropy, patch_experts
from cumo_model.plots import plot_expert_load, plot_patches
from cumo_model.processing import build_processor
from cumo_model.train import PARTS

WORDS = ["red", "green", "blue", "dark red"]


@pytest.fixture
def examiner(tiny_config, tmp_path):
    """Three pictures, each asked for its name with four choices and for its kind."""
    records = []
    for i, name in enumerate(("red", "green", "dark red")):
        Image.new("RGB", (12, 12), (60 * i, 90, 10)).save(tmp_path / f"{i}.png")
        for kind in ("name", "kind"):
            turns = [{"from": "human", "value": f"<image>\nwhat {kind}?"}, {"from": "gpt", "value": name}]
            record = {"id": i, "image": f"{i}.png", "conversations": turns, "kind": kind, "answer": name}
            records.append(record | {"choices": WORDS})
    (tmp_path / "test.json").write_text(json.dumps(records))
    tokenizer = train_tokenizer([f"what name? {' '.join(WORDS)} what kind?"] * 4, 300)
    config = tiny_config(
        text_options={"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        scales=(1,),
    )
    model = CumoForConditionalGeneration(config)
    processor = build_processor(tokenizer, 12, 4)
    return Examiner(model, processor, tmp_path / "test.json", "mistral_instruct")


def test_choice_is_the_likeliest_answer(examiner):
    """Against the likelihood worked out token by token, one sequence at a time."""
    picked = examiner.choices("choices")
    assert picked.keys() == set(range(6))
    tokenizer, model = examiner.tokenizer, examiner.model
    for row, choice in picked.items():
        scores = []
        for word in WORDS:
            turns = examiner.dataset.records[row]["conversations"][:1]
            ids = tokenize_prompt(turns, tokenizer, "mistral_instruct", 9).tolist()
            start, total = len(ids), 0.0
            ids += tokenizer(f" {word} </s>", add_special_tokens=False)["input_ids"]
            pixels = examiner.dataset[row]["pixel_values"][None]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
            for position in range(start, len(ids)):
                total += float(logits[position - 1].log_softmax(-1)[ids[position]])
            scores.append(total)
        assert choice == scores.index(max(scores))


def test_exact_match_counts_equal_answers_only(examiner, monkeypatch):
    said = {0: "red", 1: "redd", 2: "green", 3: "green", 4: "dark", 5: "dark red"}
    monkeypatch.setattr(examiner, "answers", lambda: said)
    monkeypatch.setattr(examiner, "choices", lambda field: {0: 0, 2: 0, 4: 3} if field == "choices" else {})
    scores = examiner.scores()
    assert scores["exact"] == {"name": [2, 3], "kind": [2, 3]}
    assert scores["choice"] == {"name": [2, 3]}


def test_answers_in_a_padded_batch_equal_single_ones(examiner):
    together = examiner.answers()
    for row in examiner.rows:
        alone = Examiner.__new__(Examiner)
        alone.__dict__ = {**examiner.__dict__, "rows": [row]}
        assert alone.answers()[row] == together[row]


def test_expert_load_is_a_share_per_layer_and_ignores_padding(examiner):
    load = examiner.expert_load()
    assert load.keys() == {"clip", "mlp"} and load["clip"].keys() == {"name", "kind"}
    assert (
        len(load["clip"]["name"]) == 2 and len(load["mlp"]["kind"]) == 1
    )  # the last tower layer does not run
    for kinds in load.values():
        for layers in kinds.values():
            assert all(math.isclose(sum(shares), 1, rel_tol=1e-6) and len(shares) == 4 for shares in layers)


def test_load_entropy():
    assert load_entropy({"a": [[0.25] * 4], "b": [[0.25] * 4]}) == pytest.approx(1)
    assert load_entropy({"a": [[1.0, 0, 0, 0]]}) == 0
    assert load_entropy({"a": [[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]}) == pytest.approx(0.25)


def test_pictures_are_drawn(examiner, tmp_path):
    history = {
        "series": {"loss": [3.0, 2.0, 1.0], "language": [3.0, 2.0, 1.0], "clip_balance": [1.0, 1.1, 1.0]}
    }
    plot_losses({"stage": history}, tmp_path / "losses.png")
    plot_expert_load(examiner.expert_load(), tmp_path / "load.png")
    pixels = examiner.dataset[0]["pixel_values"][None]
    experts = {key: value.numpy() for key, value in patch_experts(examiner.model, pixels).items()}
    assert {value.shape for value in experts.values()} == {(3, 3)}
    plot_patches(np.zeros((12, 12, 3), np.uint8), experts, tmp_path / "patches.png")
    for name in ("losses", "load", "patches"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 300 and len(np.unique(image.convert("L"))) > 5


def test_settings_are_three_stages_and_a_twin_of_equal_compute():
    settings = quick(Settings())
    assert [settings.stage(name).trains for name in ("pretrain", "pft", "sft")] == [
        ("projector",),
        tuple(PARTS),
        tuple(PARTS),
    ]
    assert (
        settings.stage("sft").balance_loss_coef == 0.1 and settings.stage("sft_plain").balance_loss_coef == 0
    )
    assert settings.stage("sft_plain", 1.5).schedule.steps == round(1.5 * settings.sft.steps)
