"""Expert load and patch maps compared with their definitions; the command on checkpoints with any scales."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cumo_model.__main__ import main
from cumo_model.analysis.experts import (
    _as_seen,
    _batches,
    expert_load,
    kinds_of,
    load_entropy,
    patch_experts,
    specialisation,
)
from cumo_model.checkpoints.assemble import assemble
from cumo_model.data.streamed import StreamedConversations
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing import build_processor
from cumo_model.training.monitor import Monitor, gradient_norms, layer_facts
from cumo_model.training.recipe import load_recipe
from cumo_model.training.start import start_model
from tests.model.training.small_runs import write_data, write_model, write_recipe
from tests.rounding import assert_close_after, assert_same_formula


def test_a_patch_map_is_what_the_gate_chose(tiny_model):
    """Two scales: the map of scale 3 joins nine tiles, each of which is routed separately."""
    model = tiny_model(scales=(1, 3)).eval()
    pixels = torch.randn(1, 3, 12, 12)
    found = patch_experts(model, pixels)
    assert {key[0] for key in found} == {"clip", "mlp"}
    shapes = {scale: tuple(found["clip", 0, scale].shape) for scale in (1, 3)}
    assert shapes == {1: (3, 3), 3: (9, 9)} and found["mlp", 0, 1].shape == (3, 3)
    large = torch.nn.functional.interpolate(pixels, size=(36, 36), mode="bicubic")
    tower = model.model.vision_tower
    for i, j in ((0, 0), (1, 2)):
        tile = large[:, :, 12 * i : 12 * i + 12, 12 * j : 12 * j + 12]
        layer = tower.encoder.layers[0]
        x = tower.pre_layrnorm(tower.embeddings(tile))
        x = layer.layer_norm2(x + layer.self_attn(layer.layer_norm1(x))[0])
        chosen = layer.mlp.gate(x)[0, 1:].argmax(-1).view(3, 3)
        assert torch.equal(found["clip", 0, 3][3 * i : 3 * i + 3, 3 * j : 3 * j + 3].long(), chosen)


def test_load_counts_slots_without_padding(tiny_model, tiny_batch):
    model = tiny_model(text="mixtral")
    batch = tiny_batch()
    batch["attention_mask"][1, 15:] = 0
    short = {"input_ids": batch["input_ids"][1:, :15], "pixel_values": batch["pixel_values"][1:]}
    short["attention_mask"] = torch.ones_like(short["input_ids"])
    first = {name: value[:1] for name, value in batch.items()}
    load = expert_load(model, [("all", batch)])
    apart = expert_load(model, [("all", first), ("all", short)])
    assert load.keys() == {"clip", "mlp", "llm"}
    for place, kinds in load.items():
        assert kinds["all"] == apart[place]["all"]
        for shares in kinds["all"]:
            assert_close_after(1, sum(shares), 1)  # each share is rounded once to fp32, the sum is fp64


@pytest.mark.parametrize("training", [True, False])
def test_load_is_measured_in_evaluation_mode(tiny_model, tiny_batch, training):
    """Without dropout; the mode is restored."""
    model, seen = tiny_model().train(training), []
    model.model.vision_tower.register_forward_hook(lambda module, *_: seen.append(module.training))
    expert_load(model, [("all", tiny_batch())])
    assert seen == [False] and model.training == training
    patch_experts(model, tiny_batch()["pixel_values"][:1])
    assert seen == [False, False] and not model.training


def test_specialisation_is_none_when_alike_and_one_when_apart():
    assert specialisation({"a": [[0.5, 0.5]], "b": [[0.5, 0.5]]}) == 0
    assert specialisation({"a": [[1.0, 0.0]], "b": [[0.0, 1.0]]}) == 1
    assert specialisation({"a": [[1.0, 0.0], [0.5, 0.5]], "b": [[0.5, 0.5], [0.5, 0.5]]}) == 0.25
    assert specialisation({"a": [[1.0, 0.0]]}) == 0
    # distances of the three pairs: 1, 1/2 and 1/2 in the first layer, none in the second
    three = {"a": [[1.0, 0.0], [0.5, 0.5]], "b": [[0.0, 1.0], [0.5, 0.5]], "c": [[0.5, 0.5], [0.5, 0.5]]}
    assert_close_after(1, specialisation(three), 1 / 3)  # the sums are exact, the division rounds once


def test_load_is_by_kind_and_layer_in_the_order_of_the_layers(tiny_model, tiny_batch):
    """Half of kind "b" is padding; each share is counted from what the gates chose in evaluation mode."""
    model, first, second = tiny_model(text="mixtral"), tiny_batch(), tiny_batch()
    second["attention_mask"][:, 12:] = 0
    for training in (True, False):
        load = expert_load(model.train(training), [("a", first), ("b", second), ("a", second)])
        assert model.training == training
    names = {"clip": "vision_tower.encoder.layers.{}.mlp", "llm": "language_model.layers.{}.mlp"}
    assert {place: list(kinds) for place, kinds in load.items()} == {key: ["a", "b"] for key in load}
    assert {place: len(kinds["a"]) for place, kinds in load.items()} == {"clip": 2, "mlp": 1, "llm": 2}
    for place, name in names.items():
        for layer in range(len(load[place]["a"])):
            chosen = {}
            gate = model.model.get_submodule(name.format(layer)).gate
            for batch in (first, second):
                logits = []
                handle = gate.register_forward_hook(lambda m, a, out, logits=logits: logits.append(out))
                with torch.no_grad():
                    model.eval()(**batch)
                handle.remove()
                top = logits[0].flatten(0, -2).topk(2).indices
                real = batch["attention_mask"].flatten().bool() if place == "llm" else slice(None)
                chosen[id(batch)] = top[real].flatten().bincount(minlength=4)
            wanted = {"a": chosen[id(first)] + chosen[id(second)], "b": chosen[id(second)]}
            for kind, count in wanted.items():
                assert load[place][kind][layer] == (count / count.sum()).tolist(), (place, layer, kind)


def test_kinds_are_files_or_values_of_a_field_with_a_limit_for_each(tmp_path, tiny_config):
    write_model(tmp_path, tiny_config)
    _, processor = assemble(tmp_path / "start")
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "red"}]
    for name, kinds in (("one", [3, "x", 3, "x", 3]), ("two", ["x", 3])):
        records = [{"id": i, "kind": kind, "conversations": turns} for i, kind in enumerate(kinds)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    dataset = StreamedConversations(files, [str(tmp_path)], processor, "mistral_instruct")
    assert kinds_of(dataset, None, None) == {"one": [0, 1, 2, 3, 4], "two": [5, 6]}
    assert kinds_of(dataset, "kind", None) == {"3": [0, 2, 4, 6], "x": [1, 3, 5]}
    assert kinds_of(dataset, "kind", 2) == {"3": [0, 2], "x": [1, 3]}
    assert kinds_of(dataset, None, 1) == {"one": [0], "two": [5]}
    sizes = [
        (kind, len(batch["input_ids"])) for kind, batch in _batches(dataset, {"a": [0, 1, 2], "b": [3]}, 2)
    ]
    assert sizes == [("a", 2), ("a", 1), ("b", 1)]


def test_load_entropy_is_one_for_uniform_shares_of_any_number_of_experts():
    """The logarithm of the number of experts is the unit; kinds are averaged first, then layers."""
    for experts in (2, 3, 4, 8):
        # log and entr have an error of an ulp each; with at most 7 additions and a division
        assert_close_after(11, load_entropy({"a": [[1 / experts] * experts]}), 1)
    assert load_entropy({"a": [[0, 0, 1.0]]}) == 0
    assert_close_after(11, load_entropy({"a": [[0.5, 0.5, 0, 0]]}), 0.5)
    # two kinds that use one expert each use both together; the second layer is collapsed
    load = {"a": [[1.0, 0], [1.0, 0]], "b": [[0, 1.0], [1.0, 0]]}
    assert_close_after(11, load_entropy(load), 0.5)
    three = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert_close_after(11, load_entropy({"a": [[1.0, 0]], "b": [[0.5, 0.5]]}), three)


def test_the_command_draws_any_checkpoint(tmp_path, tiny_config, capsys):
    data = write_data(tmp_path)
    write_model(tmp_path, tiny_config, scales=(1, 3))
    recipe = load_recipe(write_recipe(tmp_path))
    model, processor = start_model(recipe.model, recipe.data)
    processor.chat_template = "{{ messages[0]['content'] }}"  # none that has a name: --template is needed
    for part in (model, processor):
        part.save_pretrained(tmp_path / "moe")
    arguments = ["experts", "--data", str(data), "--images", str(tmp_path), "--template", "mistral_instruct"]
    picture = ["--picture", str(tmp_path / "red.png"), "--limit", "6", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--checkpoint", str(tmp_path / "moe"), *picture]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"load.json", "load.png", "patches-red.png"}
    found = json.loads((tmp_path / "out" / "load.json").read_text())
    assert found["records"] == {"colours": 6} and found["load"].keys() == {"clip", "mlp", "llm"}
    assert main([*arguments, "--checkpoint", str(tmp_path / "start"), "--out", str(tmp_path / "o2")]) == 1
    assert "has no experts" in capsys.readouterr().err
    by = [*arguments, "--checkpoint", str(tmp_path / "moe"), "--out", str(tmp_path / "o3"), "--by", "image"]
    assert main(by) == 1
    assert "by must be a field of every record, got 'image'" in capsys.readouterr().err


def test_layer_facts():
    even = layer_facts([5, 5, 5, 5], 20)
    # two logarithms with an error of at most one ulp each, three additions, one division
    assert_close_after(8, even.pop("load_entropy"), 1, torch.float64)
    assert even == {"max_load": 0.25, "zero_experts": 0, "dropped": 0}
    one = layer_facts([8, 0, 0, 0], 32)
    assert one == {"load_entropy": 0, "max_load": 1, "zero_experts": 3, "dropped": 0.75}


@pytest.mark.usefixtures("fp64")
def test_the_monitor_reads_what_the_model_did(tiny_model, tiny_batch):
    """Loss terms, load, and the entropy of each gate's softmax compared with the formula."""
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    monitor, logits = Monitor(model), []
    model.model.multi_modal_projector.mlp.gate.register_forward_hook(lambda m, a, out: logits.append(out))
    with monitor.watching(batch, training=True):
        output = model(**batch, use_cache=False)
    monitor.add_losses(output.loss_parts)
    output.loss.backward()
    norms = gradient_norms(model)
    found = monitor.read()
    for name, value in output.loss_parts.items():
        assert found[name] == value.item()
    probs = logits[0].softmax(-1)
    entropy = -(probs * probs.log()).sum(-1).mean().item() / torch.log(torch.tensor(4.0)).item()
    assert_same_formula(found["mlp_router_entropy"], entropy)
    chosen = logits[0].topk(2).indices.flatten().bincount(minlength=4)
    shares = [found[f"experts/mlp.00/load_{e}"] for e in range(4)]
    assert shares == (chosen / chosen.sum()).tolist()
    assert_same_formula(found["experts/mlp.00/balance"], output.loss_parts["mlp_balance"])
    wanted = sum(
        p.grad.pow(2).sum() for n, p in model.named_parameters() if "vision" in n and p.grad is not None
    )
    assert_same_formula(norms["grad_norm_vision"], wanted.sqrt())
    assert "language" not in monitor.read()


@pytest.mark.usefixtures("fp64")
def test_the_monitor_does_not_count_padding(tiny_model, tiny_batch):
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    fill, found = {"input_ids": 7, "labels": -100, "attention_mask": 0}, []
    monitor = Monitor(model)
    for size in (0, 30):
        pad = torch.nn.functional.pad
        wide = {key: pad(t, (0, size), value=fill[key]) if key in fill else t for key, t in batch.items()}
        with monitor.watching(wide, training=True):
            output = model(**wide, use_cache=False)
        monitor.add_losses(output.loss_parts)
        log = monitor.read()
        found.append({k: v for k, v in log.items() if "second" not in k and k not in ("memory_gib", "mfu")})
    assert {"llm_load_entropy", "llm_router_entropy", "llm_dropped", "experts/llm.01/z", "llm_z"} <= set(
        found[0]
    )
    assert found[0]["tokens"] == 40 and found[0]["llm_dropped"] == 0
    assert_same_formula(found[1], found[0])


def test_reporters_get_every_layer_and_the_history_does_not(tmp_path, tiny_config):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from cumo_model.training.trainer import run_recipe

    write_data(tmp_path)
    write_model(tmp_path, tiny_config)
    recipe = write_recipe(tmp_path, trainer__max_steps=2, trainer__report_to="tensorboard")
    run_recipe(load_recipe(recipe))
    files = list(tmp_path.rglob("events.out.tfevents*"))
    events = tensorboard.EventAccumulator(str(files[0].parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert any(tag.endswith("experts/llm.01/load_entropy") for tag in tags)
    assert any(tag.endswith("language") for tag in tags)


@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_patches_are_drawn_on_the_picture_as_the_tower_sees_it(ratio):
    """Padded or cropped, not stretched."""
    tokenizer = train_tokenizer(["what is it?"] * 20, 300)
    images = build_processor(tokenizer, 12, 4, image_aspect_ratio=ratio).image_processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8))
    pixels = images(picture, return_tensors="pt")["pixel_values"][0]
    wanted = images(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(_as_seen(pixels, images), wanted.transpose(1, 2, 0))
