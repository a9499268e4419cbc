"""Tests of the common part of all stages, on a linear model: stops, kills, history, refused runs."""

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from cumo_model.training import monitor, stage
from cumo_model.training.monitor import ShortProgress
from cumo_model.training.recover import Interrupted, damage
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.stage import read_history, run_stage
from tests.model.training.test_recover import StopAt, reached, wait_for
from tests.model.training.toy_stage import build_toy, toy_recipe
from tests.processes import Forked, finish, kill
from tests.rounding import assert_same_formula

WORKER = Path(__file__).with_name("toy_stage.py")


def result(out: Path) -> tuple[dict, list, float]:
    history = read_history(out / "model")
    kept = ("loss", "learning_rate", "grad_norm", "tokens", "step")
    weights = load_file(out / "model" / "model.safetensors")
    return weights, [history["series"][name] for name in kept], history["tokens"]


def same(one: Path, other: Path) -> None:
    (weights, series, tokens), (again, series_again, tokens_again) = result(one), result(other)
    assert series == series_again and tokens == tokens_again
    assert all(torch.equal(weights[name], again[name]) for name in weights)


class Steps(TrainerCallback):
    """Records the numbers of the steps."""

    def __init__(self):
        self.made = []

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append(state.global_step)


def test_interrupted_at_every_step_equals_undisturbed(tmp_path):
    run_stage(toy_recipe(tmp_path / "whole"), build_toy)
    for stop in range(1, 7):
        recipe, steps = toy_recipe(tmp_path / f"cut{stop}"), Steps()
        with pytest.raises(Interrupted, match=f"stopped at step {stop}, progress is saved"):
            run_stage(recipe, build_toy, [steps, StopAt(stop - 1).callback])
        run_stage(recipe, build_toy, [steps])
        assert steps.made == list(range(1, 8))  # no step is repeated
        same(tmp_path / "whole", tmp_path / f"cut{stop}")
    _, series, tokens = result(tmp_path / "whole")
    assert tokens == 7 * 8 and [len(values) for values in series] == [7] * 5


@pytest.mark.timeout(200)
def test_killed_processes_end_at_the_same_bits(tmp_path):
    """SIGKILL twice, each time after a new checkpoint, at an arbitrary time."""
    start = lambda name, pause: Forked([WORKER, tmp_path / name, pause], tmp_path / f"{name}.txt")
    finish(start("whole", 0))
    killed, seen = tmp_path / "killed", 0
    for _ in range(2):
        process = start("killed", 0.05)
        newest = lambda: max((int(path.name.split("-")[1]) for path in checkpoints(killed)), default=0)
        while newest() <= seen:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.13)
        seen = newest()
        kill(process)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "model").exists()
    finish(start("killed", 0))
    same(tmp_path / "whole", killed)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_stop_request_to_one_process_stops_all_at_one_step(tmp_path):
    """Only the second of two gets the signal; a process that went on alone would wait for it forever."""
    begin = lambda name, pause: Forked([WORKER, tmp_path / name, pause], tmp_path / f"{name}.txt", ranks=2)
    finish(begin("whole", 0))
    process = begin("asked", 0.05)
    wait_for(lambda: reached(tmp_path / "asked", 3), process)
    os.kill(process.ranks[1].pid, signal.SIGTERM)
    out = finish(process, code=1, seconds=60)
    one, other = re.findall(r"stopped at step (\d+), progress is saved", out)
    last = checkpoints(tmp_path / "asked")[-1]
    assert one == other == last.name.removeprefix("checkpoint-")
    assert {path.name for path in last.glob("window_*")} == {"window_0_of_2.pt", "window_1_of_2.pt"}
    finish(begin("asked", 0))
    same(tmp_path / "whole", tmp_path / "asked")
    assert result(tmp_path / "whole")[2] == 40 * 8  # points of both processes


def test_each_process_has_rows_of_its_own(tmp_path, monkeypatch):
    """Two processes share the rows that one process has, none twice."""
    trainer, found = build_toy(toy_recipe(tmp_path), []), {}
    for ranks in ([0], [0, 1]):
        trainer.args.per_device_train_batch_size = 8 // len(ranks)
        world = len(ranks)
        monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self, world=world: world))
        for rank in ranks:
            monkeypatch.setattr(type(trainer.args), "process_index", property(lambda self, rank=rank: rank))
            found[len(ranks), rank] = list(trainer.get_train_dataloader().batch_sampler)[:2]
    for whole, first, second in zip(found[1, 0], found[2, 0], found[2, 1], strict=True):
        assert len(first) == len(second) == 4 and sorted([*first, *second]) == sorted(whole)
        assert len({*first, *second}) == 8


def test_a_stop_in_the_last_step_is_too_late(tmp_path):
    """The run is finished, and signals have their former effect again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_stage(toy_recipe(tmp_path / "run"), build_toy, [StopAt(6).callback]).is_dir()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Weights(TrainerCallback):
    """Keeps the weights before each step and at the end, as vectors."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.found.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())

    on_train_end = on_step_begin


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_gradients_are_clipped_before_the_step(tmp_path, limit):
    """With plain SGD the length of a step is the rate times the norm of what is left of the gradient."""
    weights = Weights()
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": limit}
    done = run_stage(toy_recipe(tmp_path / "run", max_steps=2, **options), build_toy, [weights])
    norms = read_history(done)["series"]["grad_norm"]
    assert min(norms) > 1e-3
    steps = [float((b - a).norm()) for a, b in itertools.pairwise(weights.found)]
    left = [norm * limit / (norm + 1e-6) if limit else norm for norm in norms]  # torch adds 1e-6
    assert_same_formula(steps, [0.05 * norm for norm in left])


def test_a_checkpoint_gets_its_name_when_it_is_complete(tmp_path):
    """It is written elsewhere and moved at once; older ones are deleted only afterwards."""
    trainer = build_toy(toy_recipe(tmp_path / "run", max_steps=6, save_steps=2, save_total_limit=1), [])
    real, seen = trainer._publish, []
    names = lambda: [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]

    def publish(written, final):
        seen.append(sorted(names()))
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
            p.name for p in written.iterdir()
        }
        real(written, final)
        assert names() == [final.name] and damage(final) is None

    trainer._publish = publish
    trainer.train()
    assert seen == [[".saving"], [".saving", "checkpoint-2"], [".saving", "checkpoint-4"]]


def test_the_loader_has_the_options_of_the_recipe(tmp_path):
    options = {"num_workers": 2, "prefetch_factor": 3, "persistent_workers": True}
    given = {f"dataloader_{name}": value for name, value in options.items()}
    recipe = toy_recipe(tmp_path / "run", **given, dataloader_multiprocessing_context="spawn")
    loader = build_toy(recipe, []).get_train_dataloader()
    assert {name: getattr(loader, name) for name in options} == options
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.worker_init_fn is stage._ignore_stop_signals  # a worker must not end before the step
    sampler = loader.batch_sampler
    batches = [list(sampler)]
    loader.set_epoch(1)
    batches.append(list(sampler))
    assert batches[0] != batches[1] and [len(batch) for batch in batches[0]] == [8, 8, 8]


def test_logged_time_is_that_of_the_steps_of_all_calls(tmp_path, monkeypatch):
    """The clock advances by one second per step and by one hour between two calls."""
    clock = SimpleNamespace(seconds=1.0)
    clocks = {"monotonic": lambda: clock.seconds, "process_time": lambda: 2 * clock.seconds}
    monkeypatch.setattr(monitor, "time", SimpleNamespace(**clocks))

    class Tick(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.seconds += 1.0

    # each log covers two steps; one log has a step before the stop and a step after it
    recipe = toy_recipe(tmp_path / "run", logging_steps=2, max_steps=8)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        run_stage(recipe, build_toy, [Tick(), StopAt(2).callback])
    clock.seconds += 3600.0
    run_stage(recipe, build_toy, [Tick()])
    history = read_history(tmp_path / "run" / "model")
    assert history["series"]["wall_seconds"] == [2.0] * 4 and history["series"]["cpu_seconds"] == [4.0] * 4
    assert (history["steps"], history["wall_seconds"], history["cpu_seconds"]) == (8, 8.0, 16.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.linear.bias.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="the loss became nan at step 3"):
        run_stage(toy_recipe(tmp_path / "run"), build_toy, [Spoil()])
    assert not (tmp_path / "run" / "model").exists()


def test_a_finished_stage_is_not_changed_and_another_one_is_refused(tmp_path):
    done = run_stage(toy_recipe(tmp_path / "run"), build_toy)
    stamp = (done / "trainer_state.json").stat().st_mtime_ns
    steps = Steps()
    assert run_stage(toy_recipe(tmp_path / "run"), build_toy, [steps]) == done and not steps.made
    with pytest.raises(
        ValueError,
        match=r"run is a run with another trainer\.seed \(was 3, is 4\): choose another output_dir",
    ):
        run_stage(toy_recipe(tmp_path / "run", seed=4), build_toy)
    assert (done / "trainer_state.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in done.iterdir()) == [
        "model.safetensors",
        "recipe.json",
        "trainer_state.json",
    ]


def test_a_given_progress_bar_replaces_the_default(tmp_path):
    recipe = toy_recipe(tmp_path / "run", disable_tqdm=False)
    for given in ([], [ShortProgress("mine", 1)]):
        found = build_toy(recipe, given).callback_handler.callbacks
        bars = [callback for callback in found if isinstance(callback, ShortProgress)]
        assert len(bars) == 1 and (not given or bars == given)
        names = [type(callback).__name__ for callback in found]
        assert "PrinterCallback" not in names and "ProgressCallback" not in names


def test_a_history_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a finished run: it has no trainer_state\.json"):
        read_history(tmp_path)
    for content in ("{", "[]", "{}", json.dumps({"log_history": [{"loss": 1}], "global_step": 1})):
        (tmp_path / "trainer_state.json").write_text(content)
        with pytest.raises(ValueError, match=r"trainer_state\.json (is damaged|must hold an object)"):
            read_history(tmp_path)
