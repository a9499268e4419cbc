"""What is logged: norms by part, means over micro-batches and layers, rates, and sums over processes."""

import math
from types import SimpleNamespace

import pytest
import torch

from cumo_model.training import monitor as monitoring
from cumo_model.training.monitor import Monitor, MonitorCallback, gradient_norms
from tests.rounding import assert_same_formula


@pytest.mark.usefixtures("fp64")
def test_norms_of_the_parts_add_up_to_that_of_all_gradients(tiny_model, tiny_batch):
    """The head is of the language model; gates are of all three places and counted in their parts too."""
    model = tiny_model(text="mixtral").train()
    model(**tiny_batch()).loss.backward()
    norm = lambda *marks: math.sqrt(
        sum(
            float(p.grad.pow(2).sum())
            for n, p in model.named_parameters()
            if p.grad is not None and any(mark in n for mark in marks)
        )
    )
    found = gradient_norms(model)
    assert_same_formula(
        found,
        {
            "grad_norm_vision": norm("vision_tower"),
            "grad_norm_projector": norm("multi_modal_projector"),
            "grad_norm_language": norm("language_model", "lm_head"),
            "grad_norm_gates": norm("gate.weight"),
        },
    )
    assert norm("lm_head") > 0 and norm("gate.weight") > 0
    for parameter in model.model.vision_tower.parameters():
        parameter.grad = None
    assert "grad_norm_vision" not in gradient_norms(model)


def test_parts_of_the_loss_are_means_weighted_by_the_labels_of_the_micro_batches():
    """A part that a micro-batch does not have, such as those of the tower, is a mean over the others."""
    monitor = Monitor(torch.nn.Linear(1, 1), ())
    part = lambda **values: {name: torch.tensor(value) for name, value in values.items()}
    monitor.add_losses(part(language=2.0, clip_z=5.0), 0.25)
    monitor.add_losses(part(language=4.0), torch.tensor(0.75))
    found = monitor.read()
    assert (found["language"], found["clip_z"]) == (0.25 * 2 + 0.75 * 4, 5.0)
    monitor.add_losses(part(language=1.0))
    assert monitor.read()["language"] == 1.0


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(seconds=10.0, cpu=3.0)
    clocks = {"monotonic": lambda: clock.seconds, "process_time": lambda: clock.cpu}
    monkeypatch.setattr(monitoring, "time", SimpleNamespace(**clocks))
    return clock


def test_rates_are_per_second_since_the_last_log(tiny_model, tiny_batch, clock):
    """Tokens without padding, pictures, and FLOPs of the trained parts, padding included."""
    model, batch = tiny_model().train(), tiny_batch()
    monitor = Monitor(model, ("projector",))
    batch["attention_mask"][1, 15:] = 0
    for seconds in (4.0, 2.0):
        for _ in range(2):
            with monitor.watching(batch, training=True):
                pass
            with monitor.watching(batch, training=False):
                pass
        clock.seconds, clock.cpu = clock.seconds + seconds, clock.cpu + 3.0
        found = monitor.read()
        assert (found["tokens"], found["wall_seconds"], found["cpu_seconds"]) == (70, seconds, 3.0)
        assert found["tokens_per_second"] == 70 / seconds and found["images_per_second"] == 4 / seconds
        flops = 2 * monitoring.step_flops(model.config, ("projector",), 40, 20, 40, 2)
        assert found["tflops_per_second"] == flops / seconds / 1e12


def test_sums_go_on_from_those_of_a_checkpoint(tiny_model, tiny_batch, clock):
    """The next log after a resume has all that it would have had, but for the time in between."""
    model, batch = tiny_model().train(), tiny_batch()
    stopped, resumed = Monitor(model), Monitor(model)
    with stopped.watching(batch, training=True):
        stopped.add_losses(model(**batch).loss_parts, 0.5)
    clock.seconds, clock.cpu = 14.0, 5.0
    state = stopped.state_dict()
    clock.seconds, clock.cpu = 16.0, 6.0
    wanted = stopped.read()
    assert (wanted["wall_seconds"], wanted["cpu_seconds"]) == (6.0, 3.0)
    assert all(wanted[name] > 0 for name in ("tflops_per_second", "images_per_second", "language", "clip_z"))
    clock.seconds, clock.cpu = 1000.0, 100.0
    resumed.load_state_dict(state)
    clock.seconds, clock.cpu = 1002.0, 101.0
    found = resumed.read()
    for measured in (found, wanted):
        measured.pop("memory_gib")
    assert found == wanted


def test_the_share_of_the_peak_is_that_of_all_gpus(clock, monkeypatch):
    """Two GPUs of 100 TFLOPS, which together made 60 TFLOP in two seconds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(monitoring.hardware, "gpu_of", lambda device: SimpleNamespace(tflops_16=100.0))
    monkeypatch.setattr(monitoring.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(monitoring.dist, "get_world_size", lambda: 2)
    found = Monitor(torch.nn.Linear(1, 1), ())._speed(10, 4, 60e12, 2.0)
    assert (found["mfu"], found["memory_gib"], found["tokens_per_second"]) == (30 / 200, 3.0, 5.0)


@pytest.mark.usefixtures("fp64")
def test_metrics_of_a_place_are_means_over_layers_and_calls(tiny_model, tiny_batch):
    """Two calls of three layers of the tower; loads of both calls count together."""
    model, batch = tiny_model().train(), tiny_batch()
    monitor = Monitor(model)
    for scale in (1.0, 3.0):
        other = {**batch, "pixel_values": batch["pixel_values"] * scale}
        with monitor.watching(other, training=True):
            model(**other)
    found = monitor.read()
    names = [f"experts/clip.{layer:02}" for layer in range(3)]
    assert set(monitor.layers) == {"clip.00", "clip.01", "clip.02", "mlp.00"}
    for key in ("load_entropy", "router_entropy", "max_load", "zero_experts", "dropped"):
        assert found[f"clip_{key}"] == sum(found[f"{name}/{key}"] for name in names) / 3
    for name in names:
        loads = [found[f"{name}/load_{expert}"] for expert in range(4)]
        assert_same_formula(sum(loads), 1.0)
        assert found[f"{name}/max_load"] == max(loads)


def test_norms_are_those_of_the_logged_step_and_details_go_to_reporters_once(tiny_model, tiny_batch):
    model = tiny_model().train()
    callback = MonitorCallback(Monitor(model))
    seen = []
    for step in range(6):
        model.zero_grad()
        (model(**tiny_batch()).loss * (step + 1)).backward()
        state = SimpleNamespace(logging_steps=3, global_step=step)
        callback.on_pre_optimizer_step(None, state, None, model=model)
        seen.append((callback.norms, gradient_norms(model)))
    assert [norms for norms, _ in seen] == [{}, {}, *[seen[2][1]] * 3, seen[5][1]]
    callback.monitor._add("mlp.00", "calls", 1)
    found = callback.metrics()
    assert found["grad_norm_gates"] == seen[5][1]["grad_norm_gates"] and not any(
        "/" in name for name in found
    )
    logs = {}
    callback.on_log(None, None, None, logs=logs)
    assert "experts/mlp.00/load_entropy" in logs
    again = {}
    callback.on_log(None, None, None, logs=again)
    assert again == {}
