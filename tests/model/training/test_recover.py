"""Tests of training in real processes: killed at random, stopped by a signal, with a full disk, two ranks."""

import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from cumo_model.training.recipe import load_recipe
from cumo_model.training.recover import Interrupted, StopRequests, _finite, last_sound
from cumo_model.training.run_folder import checkpoints, step_of
from cumo_model.training.trainer import build_trainer, run_recipe
from tests.model.training.small_runs import write_recipe
from tests.model.training.toy_stage import build_toy, toy_recipe
from tests.processes import Forked, finish, kill
from tests.rounding import assert_close_after

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

# For runs that add in another order: fp64, and an epsilon of the size of the gradients. At 1e-8, Adam moves a
# weight whose gradient is nearly 0 by the sign of its rounding error. Norms and losses are computed in fp32
# in every model, so results derived from them may differ by one step of fp32, which is two roundings.
CLOSELY = {"model__dtype": "float64", "trainer__adam_epsilon": 1e-3}
STEP = 2
LOGGED = STEP + 3 + 3  # a logged loss is also a sum over four micro-batches: three additions in each run


def start(recipe: Path, ranks: int = 1) -> Forked:
    out = recipe.with_suffix(f".{time.monotonic_ns()}.txt")
    train = ["-m", "cumo_model", "train", "--config", str(recipe)]
    return Forked(train, out, ranks)


def torchrun(recipe: Path) -> subprocess.Popen:
    """Start a run on two processes with torchrun, as a user does."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    train = ["-m", "cumo_model", "train", "--config", str(recipe)]
    return as_a_user([sys.executable, *launch, "--max-restarts=0", *train])


def as_a_user(command: list[str] | str) -> subprocess.Popen:
    """Start a program, or a line of a shell, in the root of the tree and a session of its own."""
    return subprocess.Popen(
        command,
        shell=isinstance(command, str),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def losses(run: Path) -> list[tuple]:
    entries = json.loads((run / "model" / "trainer_state.json").read_text())["log_history"]
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e]


def same_result(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def reached(run: Path, step: int) -> bool:
    return any(int(path.name.split("-")[1]) >= step for path in checkpoints(run))


def wait_for(condition, process: subprocess.Popen | Forked, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("processes, every", [(1, 4), (2, 5)])
def test_killed_runs_have_bitwise_the_same_result(folder, processes, every):
    """SIGKILL for a run and its child processes, at random times after the first and the second checkpoint.

    An epoch has three steps, so these checkpoints are inside the second epoch and inside a later one. With
    dropout the result depends on the random state.
    """
    steps = {"trainer__max_steps": 12, "trainer__save_steps": every, "data__grouping": "modality_length"}
    if processes == 2:
        steps |= {"trainer__per_device_train_batch_size": 1, "model__text_experts": 0}
    config = folder / "start" / "config.json"
    content = json.loads(config.read_text())
    content["text_config"]["attention_dropout"] = 0.2
    config.write_text(json.dumps(content))
    finish(start(write_recipe(folder, "whole", **steps), processes))
    recipe, dice, kills = write_recipe(folder, "killed", **steps), random.Random(7), 0
    for goal in (every, 2 * every):
        process = start(recipe, processes)
        wait_for(lambda: reached(folder / "killed", goal), process)  # noqa: B023
        time.sleep(dice.random() * 0.3)
        if process.poll() is None:
            kill(process)
            kills += 1
        process.communicate()
    assert kills, "the run ended before it could be killed"
    finish(start(recipe, processes))
    same_result(folder / "whole", folder / "killed")
    assert not (folder / "killed" / ".saving").exists()
    assert len(checkpoints(folder / "killed")) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_saves_and_the_same_command_resumes(folder):
    steps = {"trainer__max_steps": 40, "trainer__save_steps": 8}
    finish(start(write_recipe(folder, "whole", **steps)))
    recipe = write_recipe(folder, "asked", **steps)
    process = start(recipe)
    wait_for(lambda: reached(folder / "asked", 8), process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "progress is saved" in out, out[-2000:]
    finish(start(recipe))
    same_result(folder / "whole", folder / "asked")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_to_a_whole_group_saves_too(folder):
    """`timeout` and batch systems send the signal to the group, so data loading workers receive it too."""
    loaders = {"trainer__dataloader_num_workers": 2, "trainer__dataloader_persistent_workers": True}
    process = start(write_recipe(folder, "asked", trainer__max_steps=5000, trainer__save_steps=5, **loaders))
    wait_for(lambda: reached(folder / "asked", 5), process)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "progress is saved" in out, out[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_process_resumes_a_run_of_two(folder):
    """As elastic torchrun does if a node fails: same global batches, so losses differ by rounding only."""
    steps = {"trainer__max_steps": 8, "model__text_experts": 0, "trainer__per_device_train_batch_size": 1}
    steps |= CLOSELY
    finish(start(write_recipe(folder, "two", **steps, trainer__save_total_limit=9), 2))
    recipe, run = write_recipe(folder, "one", **steps), folder / "one"
    run.mkdir()
    shutil.copytree(folder / "two" / "checkpoint-4", run / "checkpoint-4")
    finish(start(recipe))
    assert [entry[0] for entry in losses(run)] == list(range(1, 9))
    assert_close_after(LOGGED, losses(run), losses(folder / "two"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_to_torchrun_stops_all_workers_at_one_step(folder):
    options = {"trainer__max_steps": 5000, "trainer__save_steps": 5, "model__text_experts": 0}
    run = folder / "asked"
    process = torchrun(write_recipe(folder, "asked", trainer__per_device_train_batch_size=1, **options))
    wait_for(lambda: reached(run, 5), process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    (step,) = re.findall(r"stopped at step (\d+), progress is saved", out)  # the first worker reports it
    last = checkpoints(run)[-1]
    assert last.name == f"checkpoint-{step}", out[-2000:]
    assert {path.name for path in last.glob("window_*")} == {"window_0_of_2.pt", "window_1_of_2.pt"}


class SpoilAt(TrainerCallback):
    """Set a weight to NaN after this step, as a bad batch would do."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("nan")


def test_no_checkpoint_is_written_with_weights_that_are_not_finite(folder):
    """No log is written before the checkpoint, so only its own check finds it; the run resumes before it."""
    recipe = load_recipe(write_recipe(folder, trainer__logging_steps=100))
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 4: no checkpoint"):
        run_recipe(recipe, [SpoilAt(4)])
    assert [path.name for path in checkpoints(recipe.output_dir)] == ["checkpoint-2"]
    assert run_recipe(recipe).is_dir()


class StopAt:
    """Send SIGTERM at the start of a given step."""

    def __init__(self, step):
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    os.kill(os.getpid(), signal.SIGTERM)

        self.callback = Stop()


def test_a_stop_in_the_middle_of_an_epoch_changes_nothing(folder):
    """In one process: stop after step 2 of an epoch of three, resume, compare; then run the finished folder.

    The stopped run loads its data in two workers.
    """
    workers = {"trainer__dataloader_num_workers": 2}
    whole = run_recipe(load_recipe(write_recipe(folder, "whole")))
    recipe = load_recipe(write_recipe(folder, "cut", trainer__save_steps=100, **workers))
    with pytest.raises(Interrupted, match="stopped at step 2, progress is saved"):
        run_recipe(recipe, [StopAt(1).callback])
    assert [path.name for path in checkpoints(folder / "cut")] == ["checkpoint-2"]
    run_recipe(recipe)
    same_result(whole.parent, folder / "cut")
    stamp = (folder / "cut" / "model").stat().st_mtime_ns
    assert run_recipe(recipe) == folder / "cut" / "model"
    assert (folder / "cut" / "model").stat().st_mtime_ns == stamp


def test_a_stop_between_two_logs_changes_none_of_them(folder):
    """Logged losses are means over all steps since the last log, even if the run stopped in between."""
    names, found = ("step", "loss", "language", "clip_balance", "clip_load_entropy"), []
    options = {"trainer__logging_steps": 3, "trainer__save_steps": 100}
    run_recipe(load_recipe(write_recipe(folder, "whole", **options)))
    recipe = load_recipe(write_recipe(folder, "cut", **options))
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run_recipe(recipe, [StopAt(1).callback])
    run_recipe(recipe)
    for name in ("whole", "cut"):
        path = folder / name / "model" / "trainer_state.json"
        entries = [e for e in json.loads(path.read_text())["log_history"] if "loss" in e]
        found.append([[entry.get(key) for key in names] for entry in entries])
    assert [entry[0] for entry in found[0]] == [3, 6] and found[0] == found[1]


def test_other_data_or_another_order_are_another_run(folder):
    recipe = write_recipe(folder, trainer__max_steps=4)
    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), [StopAt(1).callback])
    with pytest.raises(ValueError, match=r"another trainer\.seed \(was 3, is 4\): choose another output_dir"):
        run_recipe(load_recipe(recipe, ["trainer.seed=4"]))
    more = (folder / "colours.jsonl").read_text()
    (folder / "colours.jsonl").write_text(f"{more}\n{more.splitlines()[0]}")
    with pytest.raises(
        ValueError, match=r"another content of data, another number of records \(was 12, is 13\): choose"
    ):
        run_recipe(load_recipe(recipe))
    (folder / "colours.jsonl").write_text(more)
    assert run_recipe(load_recipe(recipe)).is_dir()
    leftovers = [folder / "run" / name for name in (".start", ".model-work")]
    for left in leftovers:  # folders of a run that was killed just before it deleted them
        left.mkdir()
    run_recipe(load_recipe(recipe))
    assert not any(left.exists() for left in leftovers)


def test_a_run_killed_after_its_last_step_makes_no_further_step(folder):
    """Killed between the last checkpoint, which is in the middle of an epoch, and the result."""
    five = {"trainer__max_steps": 5}
    run_recipe(load_recipe(write_recipe(folder, "whole", **five)))
    recipe = load_recipe(write_recipe(folder, "cut", **five))
    shutil.copytree(folder / "whole" / "checkpoint-5", folder / "cut" / "checkpoint-5")
    run_recipe(recipe)
    assert [entry[0] for entry in losses(folder / "cut")] == [1, 2, 3, 4, 5]
    same_result(folder / "whole", folder / "cut")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(folder, capsys):
    """A limit of the file size makes writes fail, as on a full disk; older checkpoints stay complete."""
    recipe = load_recipe(write_recipe(folder, trainer__max_steps=6, trainer__save_steps=2))
    trainer = build_trainer(recipe)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real, seen = trainer._save_checkpoint, []

    def save(model, trial):
        full = trainer.state.global_step == 4
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            real(model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        seen.append((trainer.state.global_step, trainer.save_failed))

    trainer._save_checkpoint = save
    trainer.train()
    said = capsys.readouterr().err
    assert re.findall("NO checkpoint at step 4: the disk is full: .+", said) and said.count("NO check") == 1
    assert [step for step, failed in seen if failed] == [4] and trainer.state.global_step == 6
    names = [path.name for path in checkpoints(recipe.output_dir)]
    assert names == ["checkpoint-2", "checkpoint-6"]
    assert not (Path(recipe.output_dir) / ".saving").exists()


def test_a_checkpoint_that_would_not_fit_is_not_started(folder, monkeypatch, capsys):
    recipe = load_recipe(write_recipe(folder, trainer__max_steps=4, trainer__save_steps=2))
    trainer = build_trainer(recipe)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    trainer.train()
    assert "NO checkpoint at step 4: the disk is full: 10 bytes are free" in capsys.readouterr().err
    assert [path.name for path in checkpoints(recipe.output_dir)] == ["checkpoint-2"]


def test_a_checkpoint_needs_the_room_of_the_last_one_and_older_ones_go(tmp_path, monkeypatch):
    """Files in folders count too, for example those of DeepSpeed; a limit of 0 keeps all, as no limit."""
    trainer = build_toy(toy_recipe(tmp_path), [])
    assert trainer._room_problem(tmp_path) is None
    for step, size in ((2, 7), (4, 50), (6, 100)):
        (tmp_path / f"checkpoint-{step}" / "sub").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        (tmp_path / f"checkpoint-{step}" / "sub" / "weights").write_bytes(bytes(size))
    usage = shutil.disk_usage(tmp_path)
    for free, problem in ((102, None), (101, "101 bytes are free in .* a checkpoint takes 102$")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        found = trainer._room_problem(tmp_path)
        assert re.search(problem, found) if problem else found is None
    for limit, kept in ((None, [2, 4, 6]), (0, [2, 4, 6]), (3, [2, 4, 6]), (2, [4, 6]), (1, [6])):
        trainer.args.save_total_limit = limit
        trainer._keep_last(tmp_path)
        assert [step_of(path) for path in checkpoints(tmp_path)] == kept


def test_a_disk_that_is_full_when_a_checkpoint_gets_its_name_costs_that_checkpoint(tmp_path, capsys):
    """Other errors, and those outside checkpoints, end the run."""
    trainer = build_toy(toy_recipe(tmp_path, max_steps=5, save_steps=2), [])
    real, reasons = trainer._publish, [OSError(errno.ENOSPC, "No space left on device")]

    def publish(written, final):
        if reasons:
            raise reasons.pop()
        real(written, final)

    trainer._publish = publish
    trainer.train()
    assert re.findall("NO checkpoint at step 2: the disk is full: .*No space", capsys.readouterr().err)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert trainer.save_failed is None and not (tmp_path / ".saving").exists()
    with pytest.raises(OSError, match="No space"), trainer._room_may_end():
        raise OSError(errno.ENOSPC, "No space left on device")
    reasons.append(OSError(errno.EIO, "Input/output error"))
    shutil.rmtree(tmp_path / "checkpoint-5")
    with pytest.raises(OSError, match="Input/output"):
        trainer._save_checkpoint(trainer.model, None)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    reasons.append(OSError(errno.EIO, "Input/output error"))
    trainer._save_checkpoint(trainer.model, None)  # a checkpoint is written once
    assert len(reasons) == 1


def test_an_incomplete_checkpoint_is_not_counted(folder):
    (folder / "run" / "checkpoint-7").mkdir(parents=True)
    (folder / "run" / "checkpoint-7" / "model.safetensors").write_bytes(b"half")
    assert checkpoints(folder / "run") == []
    run_recipe(load_recipe(write_recipe(folder, trainer__max_steps=7, trainer__save_steps=7)))
    assert [path.name for path in checkpoints(folder / "run")] == ["checkpoint-7"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """Of numbers, not of text; other folders are none, and neither is one without the Trainer's state."""
    for name in (
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-20-old",
        "damaged-checkpoint-30",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-300").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [9, 20, 100]
    assert last_sound(tmp_path) == tmp_path / "checkpoint-100" and last_sound(tmp_path / "none") is None


def test_weights_are_finite_unless_one_of_them_is_not():
    good, empty = torch.tensor([1.0, -3e38]), torch.empty(0)
    for bad in (math.nan, math.inf, -math.inf):
        assert not _finite([good, torch.tensor([[0.0, bad]]), empty])
    assert (
        _finite([good, empty, torch.tensor(2.0, dtype=torch.bfloat16)]) and _finite([empty]) and _finite([])
    )


def test_signals_at_once_are_one_request_and_a_later_one_stops(monkeypatch):
    """A killed launcher has several threads, and Linux sends its workers a SIGTERM for each."""
    before, stop = signal.signal(signal.SIGTERM, signal.default_int_handler), StopRequests()
    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        stop.on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGINT) == stop._note
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        monkeypatch.setattr("cumo_model.training.recover.SAME_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ctrl_c)
