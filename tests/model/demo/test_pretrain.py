"""Tests of stage 0 of the demo: its losses, the content of its batches, and its trainers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, MistralForCausalLM

from cumo_model.data import ConversationDataset
from cumo_model.demo import stages
from cumo_model.demo.folder import Run
from cumo_model.demo.pretrain import Contrast, Lines, Pairs
from cumo_model.demo.processes import claim
from cumo_model.demo.settings import Settings
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.training.stage import read_history
from tests.model.training.small_runs import COLOURS, write_data, write_model
from tests.rounding import assert_same_formula


@pytest.fixture
def run(tmp_path, tiny_config):
    """The folder of a demo with its data: plain colours, and a line of text about each."""
    settings = Settings(
        image_size=12, patch_size=4, vision_width=32, vision_layers=2, text_width=64, quick=True
    )
    claim(tmp_path / "run", settings)
    data = tmp_path / "run" / "data"
    data.mkdir()
    records = [json.loads(line) for line in write_data(data, text_rows=0).read_text().splitlines()]
    (data / "stage1_caption.json").write_text(json.dumps(records))
    about = [{"image": f"{name}.png", "name": name, "keywords": ["colour"]} for name in COLOURS]
    (data / "contrastive.json").write_text(json.dumps(about))
    (data / "text.txt").write_text("\n".join(f"{name} is a colour" for name in COLOURS))
    processor = AutoProcessor.from_pretrained(write_model(tmp_path, tiny_config))
    processor.tokenizer.save_pretrained(data / "tokenizer")
    return Run(tmp_path / "run")


def test_two_pictures_of_one_concept_are_not_negative_examples(run):
    """Compared with a direct implementation of the formula; pictures 0 and 2 are of the same concept."""
    torch.manual_seed(0)
    model = Contrast(CumoVisionModel(run.settings.vision_config()), 50).double()
    pixels, words = torch.randn(3, 3, 12, 12).double(), torch.tensor([[3, 4], [5, 0], [3, 4]])
    loss = model(pixels, words, torch.tensor([0, 1, 0]))["loss"]
    seen = model.norm(model.tower(pixels).last_hidden_state.mean(1))
    read = model.words(words)
    unit = lambda rows: rows / rows.norm(dim=-1, keepdim=True)
    logits = model.scale.exp() * unit(seen) @ unit(read).T
    total = 0.0
    for row in range(3):
        others = [column for column in range(3) if column == row or 1 in (row, column)]
        total += logits[row, others].logsumexp(0) - logits[row, row]
        total += logits[others, row].logsumexp(0) - logits[row, row]
    assert_same_formula(loss, total / 6)


@pytest.mark.usefixtures("fp64")
def test_a_line_is_predicted_from_its_second_token_on(run):
    """The Trainer's mean over labels is then the mean over predicted tokens."""
    lines = Lines(run.data / "text.txt", run.tokenizer)
    batch = lines.collate([lines[0], lines[3]])
    assert batch["labels"][:, 0].tolist() == [-100, -100] and batch["input_ids"][:, 0].tolist() == [1, 1]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert int(kept.sum()) == len(lines.ids[0]) + len(lines.ids[3]) - 2
    model = MistralForCausalLM(run.settings.text_config(run.tokenizer)).double()
    options = {"use_cache": False, "num_items_in_batch": int(kept.sum())}
    output = model(**batch, **options)
    logits, targets = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    assert_same_formula(output.loss, torch.nn.functional.cross_entropy(logits, targets))


def test_pairs_are_pictures_with_their_own_words(run):
    pictures = ConversationDataset(run.data / "stage1_caption.json", run.data, run.processor, "plain")
    pairs = Pairs(pictures, run.data / "contrastive.json", run.tokenizer)
    batch = pairs.collate([pairs[3], pairs[0]])
    assert batch["names"].tolist() == [3, 0]
    assert torch.equal(
        batch["pixel_values"], torch.cat([pictures[3]["pixel_values"], pictures[0]["pixel_values"]])
    )
    words = [run.tokenizer.decode(row[row != 0]).split() for row in batch["words"]]
    assert words == [[COLOURS[3], "colour"], [COLOURS[0], "colour"]]


def test_stage_0_leaves_a_tower_and_a_language_model_that_have_learned(run):
    stages.vision(run)
    stages.text(run)
    tower = CumoVisionModel.from_pretrained(run.result("vision"), use_safetensors=True)
    language = MistralForCausalLM.from_pretrained(run.result("text"), use_safetensors=True)
    assert tower.config.hidden_size == 32 and language.config.hidden_size == 64
    assert not any(name.startswith("words") for name in load_file(run.result("vision") / "model.safetensors"))
    for name, tokens in (("vision", 20 * 64 * 9), ("text", None)):
        history = read_history(run.result(name))
        losses = history["series"]["loss"]
        assert history["steps"] == len(losses) and losses[-1] < losses[0]
        assert tokens is None or history["tokens"] == tokens
