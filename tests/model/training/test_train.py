"""Training: stages as data, what is frozen, and runs killed at any moment."""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch
from PIL import Image
from torch import nn

from cumo_model import CumoForConditionalGeneration, upcycle
from cumo_model.data import ConversationDataset
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.processor import build_processor
from cumo_model.training.train import (
    PARTS,
    Interrupted,
    Schedule,
    Stage,
    fit,
    read_history,
    sample_indices,
    train,
)
from tests.processes import Forked, finish, kill
from tests.rounding import assert_close_after

STAGE = Stage("sft", tuple(PARTS), "mistral_instruct", Schedule(6, 4, 1e-3), 0.1, 0.01)


@pytest.fixture
def conversations(tmp_path):
    """Eight pictures of plain colours, and a question about each."""
    colours = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
    records = []
    for colour in colours:
        Image.new("RGB", (12, 12), colour).save(tmp_path / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": colour}]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    path = tmp_path / "colours.json"
    path.write_text(json.dumps(records))
    tokenizer = train_tokenizer([f"what colour? {colour}" for colour in colours], 300)
    processor = build_processor(tokenizer, 12, 4)
    return path, processor


def make_dataset(conversations, template="mistral_instruct"):
    path, processor = conversations
    return ConversationDataset(path, path.parent, processor, template)


@pytest.fixture
def make_model(tiny_config, conversations):
    def make(**options):
        tokenizer = conversations[1].tokenizer
        torch.manual_seed(0)
        return CumoForConditionalGeneration(
            tiny_config(
                text_options={"vocab_size": len(tokenizer)},
                image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                scales=(1,),
                **options,
            )
        )

    return make


def test_a_stage_names_what_it_trains():
    with pytest.raises(ValueError, match=r"trains must name some of .*, got \('gate',\)"):
        Stage("x", ("gate",), "plain", Schedule(1, 1, 1.0))


def test_learning_rate_warms_up_and_decays():
    schedule = Schedule(100, 1, 2.0, warmup_ratio=0.1)
    rates = [schedule.learning_rate_at(step) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and rates[10] == 2.0
    assert rates[55] == 1.0 and rates[100] == 0
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_every_epoch_sees_every_sample_once():
    drawn = [i for step in range(14) for i in sample_indices(step, 5, 7, seed=3)]
    epochs = [drawn[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_stage_trains_what_it_names_and_nothing_else(make_model, conversations, tmp_path):
    model = make_model(vision_experts=1, projector_num_experts=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stage = Stage("pretrain", ("projector",), "plain", Schedule(3, 4, 1e-2))
    train(model, stage, make_dataset(conversations, "plain"), tmp_path / "out", conversations[1])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("model.multi_modal_projector.")}
    assert all(p.requires_grad for p in model.parameters())


def test_losses_are_on_or_off_by_stage_and_named(make_model, conversations, tmp_path):
    dataset, processor = make_dataset(conversations), conversations[1]
    off = Stage("sft", tuple(PARTS), "mistral_instruct", Schedule(2, 4, 1e-3))
    train(make_model(), off, dataset, tmp_path / "off", processor)
    train(make_model(), STAGE, dataset, tmp_path / "on", processor)
    off, on = (read_history(tmp_path / name)["series"] for name in ("off", "on"))
    names = {"loss", "language", "clip_balance", "clip_z", "mlp_balance", "mlp_z", "tokens"}
    assert set(on) == set(off) == names
    assert off["loss"] == off["language"]
    balance, z = on["clip_balance"][0] + on["mlp_balance"][0], on["clip_z"][0] + on["mlp_z"][0]
    # four coefficients, as many products and as many sums of them, none larger than the loss
    assert_close_after(12, on["loss"][0], on["language"][0] + 0.1 * balance + 0.01 * z)


def test_checkpoint_reloads_to_the_same_logits(make_model, conversations, tmp_path):
    dense = make_model(vision_experts=1, projector_num_experts=1)
    model = upcycle(dense, 4, 4, 4)
    dataset = make_dataset(conversations)
    model = train(model, STAGE, dataset, tmp_path / "moe", conversations[1])
    again = CumoForConditionalGeneration.from_pretrained(tmp_path / "moe", use_safetensors=True).eval()
    batch = dataset.batch([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert not list(tmp_path.glob("*.progress.*")) and not list(tmp_path.glob(".moe*"))


def test_a_finished_stage_is_loaded_and_another_one_refused(make_model, conversations, tmp_path):
    dataset, processor = make_dataset(conversations), conversations[1]
    done = train(make_model(), STAGE, dataset, tmp_path / "out", processor)
    stamp = (tmp_path / "out" / "history.json").stat().st_mtime_ns
    loaded = train(make_model(), STAGE, dataset, tmp_path / "out", processor)
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"out belongs to a run with another seed: choose another folder"):
        train(make_model(), STAGE, dataset, tmp_path / "out", processor, seed=1)
    assert (tmp_path / "out" / "history.json").stat().st_mtime_ns == stamp


def test_a_stage_goes_on_from_the_one_before_in_memory_or_from_disk(make_model, conversations, tmp_path):
    dataset, processor = make_dataset(conversations), conversations[1]
    first, second = (dataclasses.replace(STAGE, name=name) for name in ("first", "second"))
    model = train(make_model(), first, dataset, tmp_path / "first", processor)
    done = train(model, second, dataset, tmp_path / "second", processor)
    # a process of its own, killed in the second stage and started again, finds the first on disk
    loaded = train(make_model(), first, dataset, tmp_path / "first", processor)
    again = train(loaded, second, dataset, tmp_path / "second", processor)
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), again.parameters(), strict=True))
    loaded.config.vision_config.num_experts_per_tok += 1
    with pytest.raises(ValueError, match="belongs to a run with another model"):
        train(loaded, second, dataset, tmp_path / "second", processor)


def toy(steps, stop_after=None):
    """A regression whose loss_at asks to stop, as Ctrl-C would, after some calls."""
    torch.manual_seed(0)
    model, calls = nn.Linear(4, 3), []

    def loss_at(step):
        calls.append(step)
        if stop_after is not None and len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x[:, :3]).square().mean(), {}, 8

    return model, loss_at, Schedule(steps, 8, 0.05), calls


def test_interrupted_at_every_step_equals_undisturbed(tmp_path):
    model, loss_at, schedule, _ = toy(7)
    history = fit(model, loss_at, schedule, tmp_path / "a.safetensors", {})
    for stop_after in range(1, 7):
        path = tmp_path / f"{stop_after}.safetensors"
        first, stopping, _, calls = toy(7, stop_after)
        with pytest.raises(Interrupted, match=f"stopped at step {stop_after} of 7"):
            fit(first, stopping, schedule, path, {})
        second, rest, _, more_calls = toy(7)
        resumed = fit(second, rest, schedule, path, {})
        assert calls + more_calls == list(range(7))  # nothing is done twice
        assert resumed["series"] == history["series"]
        assert torch.equal(second.weight, model.weight) and torch.equal(second.bias, model.bias)


def test_damaged_or_foreign_progress_is_refused_and_kept(tmp_path):
    path = tmp_path / "p.safetensors"
    model, loss_at, schedule, _ = toy(5, stop_after=2)
    with pytest.raises(Interrupted):
        fit(model, loss_at, schedule, path, {"seed": 0})
    whole = path.read_bytes()
    model, loss_at, schedule, _ = toy(5)
    with pytest.raises(ValueError, match=r"p.safetensors belongs to a run with another seed"):
        fit(model, loss_at, schedule, path, {"seed": 1})
    for broken in (whole[:100], whole[:-5], b""):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"p.safetensors is damaged \(.*delete it"):
            fit(model, loss_at, schedule, path, {"seed": 0})
        assert path.read_bytes() == broken


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, _, schedule, _ = toy(5)
    loss_at = lambda step: (model.weight.sum() * (float("nan") if step == 2 else 1), {}, 1)
    with pytest.raises(FloatingPointError, match=r"the loss became nan at step 3"):
        fit(model, loss_at, schedule, tmp_path / "p.safetensors", {})


WORKER = """
import sys, time, torch
from pathlib import Path
from cumo_model import CumoForConditionalGeneration
from cumo_model.data import ConversationDataset
from cumo_model.training.train import PARTS, Schedule, Stage, train
from transformers import AutoProcessor
torch.set_num_threads(1)
root = Path(sys.argv[1])
processor = AutoProcessor.from_pretrained(root / "start")
model = CumoForConditionalGeneration.from_pretrained(root / "start")
dataset = ConversationDataset(root / "colours.json", root, processor)
stage = Stage("sft", tuple(PARTS), "mistral_instruct", Schedule(40, 4, 1e-3), 0.1, 0.01)
slow = dataset.batch
dataset.batch = lambda indices: time.sleep(float(sys.argv[3])) or slow(indices)
train(model, stage, dataset, root / sys.argv[2], processor, save_every_seconds=0.2)
"""


@pytest.mark.timeout(300)
def test_killed_processes_resume_to_the_same_bits(make_model, conversations, tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    conversations[1].save_pretrained(tmp_path / "start")

    def start(out, pause):
        return Forked(["-c", WORKER, tmp_path, out, pause], tmp_path / "out.txt")

    finish(start("undisturbed", 0))
    progress = tmp_path / "killed.progress.safetensors"
    for _ in range(2):  # each time after a newer save than the last, at no particular moment
        process, seen = start("killed", 0.05), progress.stat().st_mtime_ns if progress.exists() else 0
        while not (progress.exists() and progress.stat().st_mtime_ns > seen):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.13)
        kill(process)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    finish(start("killed", 0))
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("undisturbed", "killed"))
    assert a == b
    assert read_history(tmp_path / "undisturbed")["series"] == read_history(tmp_path / "killed")["series"]
