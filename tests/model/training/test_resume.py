"""Tests of resuming: damaged checkpoints, another start model, a chain of stages killed between two stages.

One test fills the disk while other processes wait in a collective.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cumo_model.__main__ import main
from cumo_model.checkpoints.folders import fingerprint
from cumo_model.training.recipe import load_recipe
from cumo_model.training.recover import Interrupted, damage, last_sound
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.trainer import run_recipe
from tests.model.training.small_runs import write_recipe
from tests.model.training.test_recover import StopAt, losses, same_result, start, wait_for
from tests.processes import Forked, finish, kill

WORKER = Path(__file__).with_name("full_disk_worker.py")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def blank(path: Path) -> None:
    """Fill a file with zeros, as a file system may do with unwritten data after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(folder):
    """The result equals that of an undisturbed run; the unreadable checkpoint is not used and not deleted."""
    whole = run_recipe(load_recipe(write_recipe(folder, "whole", trainer__save_total_limit=9)))
    recipe = load_recipe(write_recipe(folder, "cut", trainer__save_total_limit=9))
    steps = [path.name for path in checkpoints(whole.parent)]
    assert steps == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for name in steps[:2]:
        shutil.copytree(whole.parent / name, folder / "cut" / name)
    cut(folder / "cut" / "checkpoint-4" / "model.safetensors")
    wanted = r"checkpoint-4 cannot be read \(model.safetensors has .* bytes .*resumes from checkpoint-2"
    with pytest.warns(UserWarning, match=wanted):
        run_recipe(recipe)
    same_result(whole.parent, folder / "cut")
    assert [path.name for path in checkpoints(folder / "cut")] == steps
    assert (folder / "cut" / "damaged-checkpoint-4").is_dir()


def longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


DAMAGES = [
    (cut, "model.safetensors", "model.safetensors has"),
    (longer, "optimizer.pt", "optimizer.pt has"),
    (blank, "rng_state.pth", "rng_state.pth is not what torch.save writes"),
    (cut, "optimizer.pt", "optimizer.pt has"),
    (blank, "model.safetensors", "model.safetensors: "),
    (blank, "optimizer.pt", "optimizer.pt is not what torch.save writes"),
    (blank, "trainer_state.json", "trainer_state.json is damaged"),
    (Path.unlink, "optimizer.pt", "optimizer.pt is missing"),
    (Path.unlink, "trainer_state.json", "trainer_state.json does not exist"),
]


def test_what_is_damaged_is_seen_and_named(folder, capsys):
    """If no checkpoint can be read, the command reports it in one line."""
    recipe = write_recipe(folder, trainer__max_steps=4, trainer__save_steps=2)
    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), [StopAt(2).callback])
    last, kept = checkpoints(folder / "run")[-1], folder / "kept"
    assert damage(last) is None
    shutil.copytree(last, kept)
    for spoil, name, reason in DAMAGES:
        spoil(last / name)
        assert reason in (damage(last) or ""), (spoil, name)
        shutil.rmtree(last)
        shutil.copytree(kept, last)
    for path in checkpoints(folder / "run"):
        cut(path / "model.safetensors")
    assert main(["train", "--config", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert "no checkpoint in" in said and "checkpoint-3: model.safetensors has" in said
    assert "Traceback" not in said and len(checkpoints(folder / "run")) == 2


def test_a_checkpoint_damaged_again_takes_the_place_of_what_was_set_aside(tmp_path):
    for name in ("checkpoint-2", "checkpoint-4/global_step4", "damaged-checkpoint-4/older"):
        (tmp_path / name).mkdir(parents=True)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4" / "global_step4" / "model.safetensors").write_bytes(bytes(20))  # of DeepSpeed
    with pytest.warns(UserWarning, match=r"checkpoint-4 cannot be read .*kept as damaged-checkpoint-4"):
        assert last_sound(tmp_path) == tmp_path / "checkpoint-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]
    assert not (tmp_path / "damaged-checkpoint-4" / "older").exists()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(checkpoint-2: "):
        last_sound(tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize("name", ["optimizer.pt", "window_0_of_1.pt"])
def test_a_checkpoint_with_code_in_it_is_refused_in_our_words(folder, capsys, name):
    recipe = write_recipe(folder, trainer__max_steps=4)
    with pytest.raises(Interrupted):
        run_recipe(load_recipe(recipe), [StopAt(2).callback])
    last = checkpoints(folder / "run")[-1]
    (last / "files.json").unlink()
    torch.save({"state": Path("x")}, last / name)
    capsys.readouterr()
    assert main(["train", "--config", str(recipe)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("cumo: a pickled file is refused, because") and "weights_only" not in said


def test_a_damaged_start_is_one_line(folder, capsys):
    blank(folder / "start" / "model.safetensors")
    assert main(["train", "--config", str(write_recipe(folder))]) == 1
    said = capsys.readouterr().err
    assert "a file of tensors is damaged" in said and "Traceback" not in said


def test_an_earlier_stage_that_was_trained_again_is_noticed(folder):
    """The values of the weights are compared: same size and date are not enough, and a copy is accepted."""
    recipe = load_recipe(write_recipe(folder, trainer__max_steps=4))
    with pytest.raises(Interrupted):
        run_recipe(recipe, [StopAt(1).callback])
    weights, start = folder / "start" / "model.safetensors", folder / "start"
    kept, known, date = load_file(weights), fingerprint(start), weights.stat()
    name = "model.language_model.norm.weight"  # one small tensor of many
    save_file({**kept, name: kept[name] * 1.01}, weights, {"format": "pt"})
    os.utime(weights, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert weights.stat().st_size == date.st_size and fingerprint(start) != known
    with pytest.raises(
        ValueError, match=r"is a run with another content of model.start: choose another output_dir"
    ):
        run_recipe(recipe)
    save_file(kept, weights, {"format": "pt"})
    assert fingerprint(start) == known
    result = run_recipe(recipe)
    shutil.rmtree(start)  # a finished run does not need it
    assert run_recipe(recipe) == result


def chain(folder: Path, name: str) -> list[Path]:
    """The recipes of two stages; the second stage starts from the result of the first."""
    steps = {"trainer__max_steps": 6, "trainer__save_steps": 4}
    dense = {f"model__{place}_experts": 0 for place in ("vision", "projector", "text")}
    one = write_recipe(folder, f"{name}1", stage__trains=["projector"], **dense, **steps)
    return [one, write_recipe(folder, f"{name}2", **steps, model__start=str(folder / f"{name}1" / "model"))]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_chain_of_stages_killed_between_two_stages_has_the_same_result(folder):
    """SIGKILL as soon as the first stage has saved its result; then the same two commands again."""
    for recipe in chain(folder, "whole"):
        finish(start(recipe))
    process = start(chain(folder, "cut")[0])
    wait_for(lambda: (folder / "cut1" / "model").is_dir(), process)
    kill(process)
    process.communicate()
    for recipe in chain(folder, "cut"):
        finish(start(recipe))
    for stage in "12":
        same_result(folder / f"whole{stage}", folder / f"cut{stage}")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_full_disk_on_one_process_does_not_block_the_others(folder):
    """With expert parallelism the first process writes alone; then all gather the optimizer's state."""
    recipe = write_recipe(
        folder,
        trainer__max_steps=4,
        trainer__per_device_train_batch_size=1,
        model__text_experts=0,
        stage__expert_parallel=2,
    )
    out = finish(Forked([WORKER, recipe, "2"], folder / "out.txt", ranks=2))
    assert "NO checkpoint at step 2: the disk is full" in out
    assert [path.name for path in checkpoints(folder / "run")] == ["checkpoint-4"]
    assert len(losses(folder / "run")) == 4
