"""Tests of the common part of all stages, on a linear model: stops, kills, history, refused runs."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from cumo_model.training import monitor
from cumo_model.training.monitor import ShortProgress
from cumo_model.training.recover import Interrupted
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.stage import read_history, run_stage
from tests.model.training.test_recover import StopAt
from tests.model.training.toy_stage import build_toy, toy_recipe
from tests.processes import Forked, finish, kill

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
