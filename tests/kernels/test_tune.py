"""tune: what it times, in which order, what it saves; tested without a GPU, in a rehearsal."""

import json
import math
import os
import subprocess
import sys
import warnings
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from cumo_kernels.__main__ import main
from cumo_kernels.extension import ROOT
from cumo_kernels.tiles import problems, tune, tuning
from cumo_kernels.tiles.candidates import listed
from cumo_kernels.tiles.hardware import GPUS, find
from cumo_kernels.tiles.tuning import Config, Entry, Problem

BF16 = torch.bfloat16
PROBLEM = Problem("gemm", BF16, 9216, 4096, 1024, 4, gathered=True)
TILES = [Config(64, 64, 64, 4, stages) for stages in (2, 3, 4)]
FILES = [gpu for gpu in GPUS if (tuning.CONFIGS / f"{gpu.name}.json").exists()]


@pytest.fixture(autouse=True)
def fresh_caches():
    tuning.forget()
    yield
    tuning.forget()


def clock(monkeypatch, times):
    """A launch with a config takes the milliseconds given in `times`, or raises the exception there."""

    def measure(run):
        return run()

    def launch(config):
        found = times[config]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(tune, "measure_on_cpu", measure)
    return launch


def test_the_fastest_is_taken_and_configs_that_raise_are_skipped(monkeypatch, capsys):
    split = replace(TILES[1], SPLITS=4)
    launch = clock(monkeypatch, {TILES[0]: 3.0, split: 2.0, TILES[2]: RuntimeError("no such tile\nmore")})
    done = Future()
    done.set_exception(RuntimeError("a compiler's failure is not this process's"))
    entry = tune.fastest(PROBLEM, [TILES[0], split, TILES[2]], [done], launch, "cpu")
    assert entry == Entry(PROBLEM, TILES[1], 2.0)  # splits are chosen at every launch
    assert f"{TILES[2]}: RuntimeError: no such tile\n" in capsys.readouterr().out


def test_where_nothing_runs_nothing_is_found(monkeypatch):
    launch = clock(monkeypatch, dict.fromkeys(TILES, ValueError("no")))
    assert tune.fastest(PROBLEM, TILES, [], launch, "cpu").ms == math.inf


def test_every_gemm_once_and_training_sizes_first():
    found = tune.chosen(problems.SHAPES, BF16)
    every = {
        p
        for shape, (*_, tokens) in problems.SHAPES.items()
        for t in tokens
        for p in problems.layer_problems(shape, t, BF16)
    }
    assert len(found) == len(set(found)) and set(found) == every
    layer = list(dict.fromkeys(problems.layer_problems("clip", 4616, BF16)))
    assert found[: len(layer)] == layer
    first = dict.fromkeys(
        p for shape in problems.SHAPES for p in problems.layer_problems(shape, tune.ORDER[shape][0], BF16)
    )
    assert found[: len(first)] == list(first)
    assert {
        shape: set(tokens) <= set(problems.SHAPES[shape][-1]) for shape, tokens in tune.ORDER.items()
    } == (dict.fromkeys(problems.SHAPES, True))
    one = tune.chosen(["mlp"], BF16)
    assert set(one) < set(found) and one[0] == next(problems.layer_problems("mlp", 2304, BF16))


@pytest.mark.parametrize("gpu", FILES, ids=lambda gpu: gpu.name)
def test_candidates_can_run_and_begin_with_the_current_choice(gpu):
    assert find("nvidia_h100") in FILES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in problems.DTYPES.values():
            for problem in tune.chosen(problems.SHAPES, dtype, gpu.has_tma):
                found = list(listed(problem, gpu))
                assert all(tuning.refuse(config, problem, gpu) is None for config in found)
                assert found[0] == tuning.get_config(problem, gpu)
                assert len(found) == len(set(found))
                # fp32 tiles are twice as large, and few of the bf16 candidates fit
                assert len(found) >= (3 if dtype == BF16 and gpu.has_tma else 1), (problem, found)
                assert all(c.SPLITS == tuning.splits(problem, c, gpu) for c in found)


def test_another_folder_does_not_change_ours(tmp_path):
    before = {path: path.read_bytes() for path in tuning.CONFIGS.iterdir()}
    path = tuning.save("nvidia_h100", [Entry(PROBLEM, TILES[0], 0.5)], "a note", tmp_path / "new")
    assert path == tmp_path / "new" / "nvidia_h100.json"
    assert tuning.read(path) == (Entry(PROBLEM, TILES[0], 0.5),)
    assert {path: path.read_bytes() for path in tuning.CONFIGS.iterdir()} == before


def test_a_rehearsal_writes_a_file(tmp_path):
    before = {path: path.read_bytes() for path in tuning.CONFIGS.iterdir()}
    words = ["--few", "--device", "cpu", "--workers", "1", "--configs", str(tmp_path / "configs")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cumo_kernels", "tune", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "configs" / "interpreter.json"
    assert done.stdout.endswith(f"tune: 1 of 1 GEMMs, written to {path}\n")
    (entry,) = tuning.read(path)
    assert entry.problem == tune.TINY and math.isfinite(entry.ms)
    assert "a CPU" in json.loads(path.read_text())["note"]
    assert {path: path.read_bytes() for path in tuning.CONFIGS.iterdir()} == before


def test_a_spent_budget_starts_nothing(tmp_path, capsys):
    words = ["--few", "--device", "cpu", "--budget", "-1", "--configs", str(tmp_path)]
    assert main(["tune", *words]) == 1
    assert capsys.readouterr().out == "tune: 0 of 1 GEMMs, 1 left out: --budget was spent\n" and not list(
        tmp_path.iterdir()
    )
