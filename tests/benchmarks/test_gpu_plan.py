"""The plans of make gpu: they fit their budgets, a rehearsal has every step, all commands parse."""

import argparse
import importlib
import importlib.util
import os
import re
import sys

import pytest

from benchmarks.cases.shapes import SHAPES
from benchmarks.gpu import __main__ as gate
from benchmarks.gpu import engine, kernels, plan
from benchmarks.gpu.engine import ROOT
from benchmarks.gpu.plan import BUDGET, PARTS, Place
from cumo_kernels import extension

# the sizes of a rehearsal represent all sizes
TINY = {
    **{f"layer {shape}": "layer clip-1-crop" for shape in plan.LAYERS},
    **{f"tuned layer {shape}": "tuned layer mixtral-decode1" for shape in plan.LAYERS},
}


@pytest.fixture
def steps(tmp_path):
    """steps(part, device) -> name -> Step"""
    return lambda part, device="cuda": {
        step.name: step
        for step in plan.plan(part, Place(device, tmp_path, (9, 0) if device == "cuda" else None))
    }


@pytest.mark.parametrize("part", PARTS)
def test_expected_times_fit_the_budget(part, steps):
    found = list(steps(part).values())
    # the time of steps that always run is reserved, even if not used
    closing = sum(step.cap - step.expected for step in found if step.always)
    for taken in (False, True):
        seconds = plan.expected(found, taken)
        assert 0.5 * BUDGET[part] < seconds + closing <= BUDGET[part], (part, taken)
    assert all(step.expected <= step.cap for step in found)
    assert (
        sum(BUDGET.values()) <= 13 * 60
    )  # of fifteen minutes, two are for starting and stopping the machine


@pytest.mark.parametrize("part", PARTS)
def test_the_rehearsal_has_every_step(part, steps):
    real, rehearsed = steps(part), steps(part, "cpu")
    assert {TINY.get(name, name) for name in real} <= set(rehearsed)
    # the second part rehearses only what the first compiles
    assert set(rehearsed) - {TINY.get(name, name) for name in real} <= {"compile", "layer mixtral-decode1"}
    for name, step in real.items():
        twin = rehearsed[TINY.get(name, name)]
        assert (twin.must_pass, twin.always, twin.margin) == (step.must_pass, step.always, step.margin)
        if name not in ("take", "build", "compile"):  # a rehearsal takes artefacts twice, with g++ for nvcc
            assert program(twin.command) == program(step.command)


def program(command: tuple[str, ...]) -> tuple[str, ...]:
    """The module and the subcommand that are run, without a wrapping tool."""
    module = command[command.index("-m") + 1 :]
    return module[:2] if module[0] == "cumo_kernels" else module[:1]


class Understood(Exception):
    pass


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("part", PARTS)
def test_every_command_is_understood(part, device, steps, monkeypatch):
    plain = argparse.ArgumentParser.parse_args

    def parse(self, words=None, namespace=None):
        plain(self, words, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for step in steps(part, device).values():
        assert step.command[0] == sys.executable or step.name == "memcheck"
        for command in filter(None, (step.words(60), step.parallel)):
            if "-m" not in command:
                assert command[1] == "-c" or (ROOT / command[1]).exists()
                continue
            module, *words = command[command.index("-m") + 1 :]
            if importlib.util.find_spec(f"{module}.__main__" if module.count(".") < 1 else module):
                module = f"{module}.__main__" if module.count(".") < 1 else module
            monkeypatch.setattr(sys, "argv", [module, *words])
            with pytest.raises(Understood):
                main = importlib.import_module(module).main
                main(words) if main.__code__.co_argcount else main()


def test_layers_and_shapes_are_those_of_the_benchmarks(steps):
    assert set(plan.LAYERS) | set(plan.TINY) | set(kernels.LAYERS) <= set(SHAPES)
    for part in PARTS:
        for name, step in steps(part).items():
            if "layer " in name:
                assert step.command[step.command.index("--shape") + 1] == name.split()[-1]


def test_the_extension_is_built_for_this_gpu_or_the_step_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0;12.0+PTX")  # set by a container
    build = lambda capability: next(
        step for step in plan.plan("prove", Place("cuda", tmp_path, capability)) if step.name == "build"
    )
    assert build((9, 0)).environment == {"CUMO_BUILD": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    assert build((10, 0)).environment["TORCH_CUDA_ARCH_LIST"] == "10.0"
    assert build((9, 0)).must_pass
    # a step's setting overrides the container's
    step = engine.Step(
        "look", (sys.executable, "-c", "import os; print(os.environ['TORCH_CUDA_ARCH_LIST'])"), 9
    )
    (outcome,) = engine.run(
        [engine.Step(**{**vars(step), "environment": build((9, 0)).environment})],
        60, tmp_path / "log.txt", lambda outcomes: None,
    )  # fmt: skip
    assert outcome.remark == "9.0a"


@pytest.mark.parametrize("case", ["built", "taken", "nothing", "no compiler"])
def test_existing_artefacts_are_not_built_again(case, tmp_path, monkeypatch):
    """In the order of the engine; a required step with nothing to do has passed."""
    place = Place("cuda", tmp_path, (9, 0), artifacts=tmp_path / "artifacts")
    found = {step.name: step for step in plan.plan("prove", place)}
    monkeypatch.setattr(plan, "_is_built", lambda capability: case in ("built", "taken"))
    monkeypatch.setattr(plan, "find_tool", lambda name: None if case == "no compiler" else name)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert found["take"].why_not() == "make gpu-artifacts has not made them"
    if case == "taken":
        place.artifacts.mkdir()
        (place.artifacts / "taken").touch()
        assert found["take"].why_not() is None
    said = [
        question() for name in ("build", "compile") for question in (found[name].done, found[name].why_not)
    ]
    assert said[0] == ("it is built" if case in ("built", "taken") else None)
    no_nvcc = "no nvcc on PATH, in /usr/local/cuda or under CUDA_HOME"
    assert said[1] == (no_nvcc if case == "no compiler" else None)
    assert said[2] == {"taken": "they were taken", "nothing": "compiled with the build"}.get(case)
    assert found["build"].parallel == found["compile"].command


@pytest.mark.parametrize(
    ("built", "fits"),
    [
        ("9.0a", True),
        ("8.0;9.0a;10.0;12.0+PTX", True),
        ("8.0;9.0", False),
        ("12.0+PTX", False),
        (None, False),
    ],
)
def test_a_build_for_another_gpu_is_repeated(built, fits, monkeypatch):
    monkeypatch.setattr(plan, "_architectures", lambda: built)
    assert plan._is_built((9, 0)) == fits


def test_an_extension_that_cannot_be_loaded_is_none(tmp_path, monkeypatch):
    package = tmp_path / "cumo_kernels"
    package.mkdir()
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (package / "__init__.py").touch()
    for code, found in (
        ("raise ImportError('another torch')", None),
        ("architectures = '9.0a'", None),  # of another csrc/
        (f"architectures = '9.0a'\nsource = {extension.hash_of_sources()!r}", "9.0a"),
    ):
        (package / "_C.py").write_text(code)
        assert plan._architectures() == found


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine.Path, "glob", lambda self, pattern: iter(()))
    (memcheck,) = (s for s in plan.plan("prove", Place("cuda", tmp_path, (9, 0))) if s.name == "memcheck")
    (outcome,) = engine.run([memcheck], 60, tmp_path / "log.txt", lambda outcomes: None)
    assert (outcome.verdict, outcome.remark) == ("skipped", "compute-sanitizer is not installed")


def test_both_plans_are_printed(capsys):
    assert gate.main(["--list"]) == 0
    text = capsys.readouterr().out
    for part in PARTS:
        assert f"part {part}, {BUDGET[part]:.0f} s:" in text
    for first in ("smoke", "self-check"):
        assert text.count(f" s  {first}: 30 s, at most 90, required") == 1
    assert len(re.findall(r"s  end; \d+ s with what make gpu-artifacts made", text)) == 2


@pytest.mark.parametrize("part", PARTS)
def test_files_are_few_and_not_in_subfolders(part, steps, tmp_path):
    """At most eight files of the folder come back from the GPU machine."""
    written = {"summary.md", "log.txt", "results.tgz"}
    for step in steps(part).values():
        for word in step.command:
            if word.startswith(str(tmp_path)):
                name = os.path.relpath(word, tmp_path)
                assert os.sep not in name
                written.add(name)
    assert len(written) <= 8 and ("smoke.json" in written) == (part == "prove")
