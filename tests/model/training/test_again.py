"""A folder of a run that is used again: repaired, finished, extended, shortened, or in use."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest

from cumo_model.__main__ import main
from cumo_model.training import lock
from cumo_model.training.again import check_resumed, fields_of, is_complete
from cumo_model.training.arguments import default_here
from cumo_model.training.lock import HOLDER_FILE, locked
from cumo_model.training.recipe import Recipe, load_recipe
from cumo_model.training.recover import Interrupted
from cumo_model.training.run_folder import checkpoints, finished_step
from cumo_model.training.stage import StageTrainer, run_stage
from cumo_model.training.trainer import run_recipe
from tests.model.training.small_runs import write_recipe
from tests.model.training.test_recover import StopAt, same_result
from tests.model.training.toy_stage import build_toy, toy_recipe
from tests.processes import Forked

CONSTANT = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "save_steps": 2}


def train(recipe: Path, *overrides: str) -> int:
    return main(["train", "--config", str(recipe), *overrides])


def run(out: Path, **trainer) -> Path:
    return run_stage(toy_recipe(out, **trainer), build_toy)


def test_a_failed_first_start_leaves_the_folder_free(folder, capsys):
    """Recipe, start model and data are all repaired after a start that failed late."""
    recipe = write_recipe(folder, data__max_length=40, trainer__max_steps=2)
    data = folder / "colours.jsonl"
    good = data.read_text()
    data.write_text(good + '\n{"id": 1, "conversations": [{"from": "dog", "value": "woof"}]}')
    assert train(recipe) == 1
    assert (folder / "run" / "recipe.json").is_file() and "dog" in capsys.readouterr().err
    data.write_text(good)
    assert train(recipe, "data.max_length=60", "stage.learning_rate=2e-3", "trainer.seed=4") == 0
    assert "trained: " in capsys.readouterr().out
    # from the first checkpoint on it counts, and the message names the key and both values
    assert train(recipe, "data.max_length=60", "stage.learning_rate=1e-3", "trainer.seed=4") == 1
    said = capsys.readouterr().err
    assert "another stage.learning_rate (was 0.002, is 0.001)" in said and said.count("\n") == 1


def test_a_finished_run_says_so_and_refuses_what_it_is_not(folder, capsys):
    recipe = write_recipe(folder, trainer__max_steps=2)
    assert train(recipe) == 0
    assert capsys.readouterr().out == f"trained: {folder / 'run' / 'model'}\n"
    assert train(recipe) == 0
    assert capsys.readouterr().out == f"already finished at step 2: {folder / 'run' / 'model'}\n"
    refused = {
        "trainer.max_steps=1": "max_steps must be at least 2, as .* is already finished at step 2, got 1",
        "trainer.max_steps=60": "max_steps must be left as it was, .* step 2, and the learning rate of",
        "trainer.weight_decay=0.1": r"at step 2, with another trainer.weight_decay \(was 0.0, is 0.1\)",
        "stage.batch_size=2": r"another stage.batch_size \(was 4, is 2\)",
    }
    for override, message in refused.items():
        with pytest.raises(ValueError, match=message):
            run_recipe(load_recipe(recipe, [override]))
        assert train(recipe, override) == 1
    data = folder / "colours.jsonl"
    data.write_text(data.read_text() + "\n")
    with pytest.raises(ValueError, match=r"another bytes of colours.jsonl \(was \d+, is \d+\)"):
        run_recipe(load_recipe(recipe))
    data.unlink()
    shutil.rmtree(folder / "start")
    capsys.readouterr()
    assert train(recipe) == 0 and "already finished at step 2" in capsys.readouterr().out  # it needs neither


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "inverse_sqrt"])
def test_an_extended_run_is_the_same_as_one_run(tmp_path, kind):
    options = CONSTANT | {"lr_scheduler_type": kind}
    run(tmp_path / "whole", **options, max_steps=9)
    first = run(tmp_path / "run", **options, max_steps=4)
    assert finished_step(tmp_path / "run") == 4
    before = (first / "model.safetensors").read_bytes()
    assert run(tmp_path / "run", **options, max_steps=9) == first
    assert finished_step(tmp_path / "run") == 9
    same_result(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "model-at-step-4" / "model.safetensors").read_bytes() == before


def test_an_extension_can_be_stopped_and_goes_on(tmp_path):
    run(tmp_path / "whole", **CONSTANT, max_steps=9)
    run(tmp_path / "run", **CONSTANT, max_steps=4)
    recipe = toy_recipe(tmp_path / "run", **CONSTANT, max_steps=9)
    with pytest.raises(Interrupted, match="stopped at step 7, progress is saved"):
        run_stage(recipe, build_toy, [StopAt(6).callback])
    assert finished_step(tmp_path / "run") == 4
    run_stage(recipe, build_toy)
    same_result(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "first, then",
    [
        ({"num_train_epochs": 1}, {"num_train_epochs": 2}),
        ({"max_steps": 3}, {"num_train_epochs": 2}),
        ({"num_train_epochs": 1}, {"max_steps": 6}),
    ],
)
def test_epochs_are_extended_too(tmp_path, first, then):
    """An epoch has three steps."""
    usual = {"max_steps": -1}
    run(tmp_path / "whole", **{**CONSTANT, **usual, "num_train_epochs": 2})
    run(tmp_path / "run", **{**CONSTANT, **usual, **first})
    run(tmp_path / "run", **{**CONSTANT, **usual, **then})
    assert finished_step(tmp_path / "run") == 6
    same_result(tmp_path / "whole", tmp_path / "run")


WITH_END = [
    {"lr_scheduler_type": "cosine"},
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5},
    {},  # transformers' default is linear
]


@pytest.mark.parametrize("options", WITH_END)
def test_what_would_not_be_one_run_is_not_extended(tmp_path, options):
    done = run(tmp_path / "run", **options, max_steps=3)
    stamp = done.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"max_steps must be left as it was, .*model.start="):
        run(tmp_path / "run", **options, max_steps=6)
    assert done.stat().st_mtime_ns == stamp


def test_a_result_without_checkpoints_is_not_extended(tmp_path):
    run(tmp_path / "run", **CONSTANT, max_steps=3)
    for path in checkpoints(tmp_path / "run"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="has no checkpoint to go on from"):
        run(tmp_path / "run", **CONSTANT, max_steps=6)


@pytest.mark.parametrize("shorter", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_stopped_run_is_not_finished_by_fewer_steps(tmp_path, shorter):
    """An epoch has three steps."""
    with pytest.raises(Interrupted, match="stopped at step 5"):
        run_stage(toy_recipe(tmp_path / "run", max_steps=7), build_toy, [StopAt(4).callback])
    with pytest.raises(ValueError, match=r"must be at least 5|gives 3 steps, .* is at step 5"):
        run(tmp_path / "run", **shorter)
    assert not (tmp_path / "run" / "model").exists()
    run(tmp_path / "run", max_steps=7)
    run(tmp_path / "whole", max_steps=7)
    same_result(tmp_path / "whole", tmp_path / "run")


def test_what_changes_in_a_run_that_goes_on_is_told(tmp_path, recwarn):
    with pytest.raises(Interrupted):
        run_stage(toy_recipe(tmp_path / "run"), build_toy, [StopAt(2).callback])
    told = r"goes on from step 3 with another trainer.weight_decay \(was 0.0, is 0.1\): its"
    with pytest.warns(UserWarning, match=told), pytest.raises(Interrupted):
        run_stage(toy_recipe(tmp_path / "run", weight_decay=0.1), build_toy, [StopAt(3).callback])
    with pytest.warns(UserWarning, match=r"another trainer.max_steps \(was 7, is 6\)"):
        run(tmp_path / "run", weight_decay=0.1, max_steps=6)  # the linear schedule depends on it
    assert finished_step(tmp_path / "run") == 6


CHANGES = {  # what changes the result of a run, with a value that is not the default
    "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 3,
    "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "max_grad_norm": 0.5,
    "optim": "sgd", "optim_args": "a=1", "optim_target_modules": ["x"], "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_changes_the_result_is_noticed_and_its_default_is_not(tmp_path, name):
    """In a finished run, and in one that goes on; steps, places and what is logged may change."""
    record = lambda fields: (tmp_path / "model" / "recipe.json").write_text(json.dumps({"trainer": fields}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "trainer_state.json").write_text('{"global_step": 5}')
    changed = Recipe(str(tmp_path), trainer={name: CHANGES[name], "max_steps": 5})
    same = Recipe(str(tmp_path), trainer={name: default_here(name), "max_steps": 5, "logging_steps": 7})
    record({"max_steps": 5})
    assert is_complete(tmp_path, same)
    with pytest.raises(ValueError, match=rf"with another trainer\.{name} \(was .*, is .*\): choose another"):
        is_complete(tmp_path, changed)
    record({"max_steps": 5, name: CHANGES[name]})
    assert is_complete(tmp_path, changed)
    with pytest.raises(ValueError, match=rf"with another trainer\.{name} \(was .*, is .*\): choose another"):
        is_complete(tmp_path, same)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.warns(UserWarning, match=rf"from step 2 with another trainer\.{name} \("):
        check_resumed(tmp_path, changed, fields_of({"max_steps": 5}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_resumed(tmp_path, changed, fields_of(changed.trainer))


def test_a_moved_run_goes_on_and_another_place_is_another_run(folder, tmp_path_factory):
    recipe = write_recipe(folder, trainer__max_steps=4)
    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), [StopAt(1).callback])
    record = folder / "run" / "start.json"  # as earlier versions wrote it
    (digest,) = json.loads(record.read_text()).values()
    record.write_text(json.dumps({f"content of {folder / 'start'}": digest}))
    away = tmp_path_factory.mktemp("away") / "all"
    copy = shutil.copytree(folder, away.with_name("copy"))
    moved = recipe.read_text().replace(str(folder), str(copy))
    recipe.write_text(moved)
    with pytest.raises(ValueError, match=r"another data\.files .*, another data\.images .*, another mod"):
        run_recipe(load_recipe(recipe))  # the old place exists too
    os.rename(folder, away)
    (away / "run.yaml").write_text(moved.replace(str(copy), str(away)))
    result = run_recipe(load_recipe(away / "run.yaml"))
    assert finished_step(away / "run") == 4
    back = tmp_path_factory.mktemp("back") / "all"
    os.rename(away, back)
    (back / "run.yaml").write_text(moved.replace(str(copy), str(back)))
    assert run_recipe(load_recipe(back / "run.yaml")) == back / "run" / "model" != result


HOLD = """
import sys, time
from cumo_model.training.lock import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def holder(out: Path, *before: str) -> subprocess.Popen:
    process = subprocess.Popen([*before, sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match=rf"in use by process {process.pid} on \S+, since 20\d\d-"):
            run(tmp_path / "run")
        assert not checkpoints(tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    run(tmp_path / "run")  # a killed process holds nothing
    assert not (tmp_path / "run" / HOLDER_FILE).exists()


LATE = """
import fcntl, sys, time
from pathlib import Path
run = Path(sys.argv[1])
run.mkdir()
file = open(run / ".lock", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(0.4)
if sys.argv[2] == "names":
    (run / ".running.json").write_text('{"pid": 77, "host": "here", "since": "now"}')
    time.sleep(60)
"""


@pytest.mark.parametrize("then", ["names", "ends"])
def test_a_holder_that_has_not_yet_written_its_name_is_waited_for(tmp_path, then):
    """Between its lock and its name, and between the end of its name and that of its lock."""
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", LATE, out, then], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="process 77") if then == "names" else nullcontext(), locked(out):
            assert then == "ends"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_of_two_commands_at_once_one_trains(folder):
    recipe = write_recipe(folder, trainer__max_steps=40)
    command = ["-m", "cumo_model", "train", "--config", str(recipe)]
    both = [Forked(command, folder / f"{name}.txt") for name in "ab"]
    said = [process.communicate(timeout=100)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], said
    assert "run is in use by process" in said[codes.index(1)] and "trained: " in said[codes.index(0)]


def test_one_process_does_not_take_its_own_lock_twice(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()}, which is this one"):
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_process_forked_for_data_does_not_keep_the_lock(tmp_path):
    """As a data loading worker that outlives a killed run."""
    child = None
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        process = holder(tmp_path)
        process.kill()
        process.wait()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_holder_on_another_machine_is_watched(tmp_path, monkeypatch):
    """Where locks do not reach other machines: one that runs is not disturbed, a silent one is replaced."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "SILENT", 1.0)
    elsewhere = {"pid": 7, "host": "node9", "machine": "another", "since": "2026-01-01 00:00:00 +0000"}
    path = tmp_path / HOLDER_FILE
    path.write_text(json.dumps(elsewhere))
    beats = subprocess.Popen(["sh", "-c", f"while true; do touch {path}; sleep 0.05; done"])
    try:
        with pytest.raises(ValueError, match="in use by process 7 on node9, since 2026"), locked(tmp_path):
            pass
    finally:
        beats.kill()
        beats.wait()
    assert json.loads(path.read_text())["pid"] == 7
    with locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        stamp = path.stat().st_mtime_ns
        end = time.monotonic() + 20
        while path.stat().st_mtime_ns == stamp and time.monotonic() < end:
            time.sleep(0.05)
        assert path.stat().st_mtime_ns != stamp  # it counts too
    assert not path.exists()


def test_without_locks_of_the_file_system_the_count_tells(tmp_path, monkeypatch):
    def unsupported(*given):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    process = holder(tmp_path)
    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    monkeypatch.setattr(lock, "SILENT", 3 * lock.BEAT)
    try:
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on"), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_at_the_end_is_one_line(tmp_path, monkeypatch):
    before, real = resource.getrlimit(resource.RLIMIT_FSIZE), StageTrainer.save_result

    def full(self, path, recipe):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            real(self, path, recipe)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(StageTrainer, "save_result", full)
    with pytest.raises(OSError, match=r"NOT saved, the disk is full \(.*\); there is a checkpoint of step 7"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert run(tmp_path / "run").is_dir()
