"""make gpu's script, tried without a GPU: budget, order, what is on disk after a cut, reasons to skip."""

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Step


def python(code: str, name="step", **options) -> Step:
    options.setdefault("cap", 60)
    return Step(name, (sys.executable, "-c", code), **options)


def run(steps, tmp_path, budget=600.0):
    return gpu.run(steps, budget, tmp_path, "# head")


def test_each_step_has_its_verdict_and_last_words(tmp_path):
    steps = [
        python("print('hello'); print('all well')", "good"),
        python("print('oh'); raise SystemExit(3)", "bad"),
        python("", "absent", why_not=lambda: "no such thing here"),
        Step("nowhere", ("/does/not/exist",), 5),
    ]
    good, bad, absent, nowhere = run(steps, tmp_path)
    assert (good.verdict, good.remark) == ("ok", "all well")
    assert (bad.verdict, bad.remark) == ("FAILED (3)", "oh")
    assert (absent.verdict, absent.remark) == ("skipped", "no such thing here")
    assert nowhere.verdict == "FAILED (127)"
    assert "hello\nall well\n" in (tmp_path / "log.txt").read_text()
    assert "| bad | FAILED (3) |" in (tmp_path / "summary.md").read_text()


def test_a_step_that_hangs_is_ended_with_all_its_processes(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(6); open({str(mark)!r}, 'w')"
    code = (
        "import subprocess, sys, time\n"
        "print('begun', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(100)"
    )
    begin = time.monotonic()
    (outcome,) = run([python(code, cap=3)], tmp_path)
    assert outcome.verdict == "out of time" and outcome.remark == "begun"
    assert time.monotonic() - begin < 30
    time.sleep(max(0, 8 - (time.monotonic() - begin)))
    assert not mark.exists()


def test_when_the_budget_is_spent_only_the_last_step_runs(tmp_path):
    steps = [
        python("import time; time.sleep(60)", "long"),
        python("print('x')", "late"),
        python("print('report')", "report", always=True),
    ]
    long, late, report = run(steps, tmp_path, budget=4)
    assert long.verdict == "out of time" and long.seconds < 20
    assert (late.verdict, late.remark) == ("skipped", "the budget is spent")
    assert (report.verdict, report.remark) == ("ok", "report")


def test_what_is_known_is_on_disk_before_the_next_step(tmp_path):
    summary, log = tmp_path / "summary.md", tmp_path / "log.txt"
    look = (
        f"print(open({str(summary)!r}).read().count('| first | ok |'), 'words' in open({str(log)!r}).read())"
    )
    _, second = run([python("print('words')", "first"), python(look, "second")], tmp_path)
    assert second.remark == "1 True"
    with tarfile.open(tmp_path / "results.tgz") as tar:
        assert "cumo_kernels/configs/nvidia_h100.json" in tar.getnames()
    assert not list(tmp_path.glob(".*"))


def test_a_required_step_must_have_run_to_its_end(tmp_path):
    steps = [
        python("", "fine", must_pass=True),
        python("raise SystemExit(3)", "wrong", must_pass=True),
        python("raise SystemExit(3)", "not required"),
        python("", "no tool", must_pass=True, why_not=lambda: "no such tool"),
        python("import time; time.sleep(60)", "slow", must_pass=True, cap=1),
    ]
    outcomes = run(steps, tmp_path)
    names = lambda device: [o.name for o in gpu.unproven(outcomes, steps, device)]
    assert names("cuda") == ["wrong", "no tool", "slow"]
    assert names("cpu") == ["wrong", "slow"]


def test_every_gpu_step_says_on_a_cpu_why_it_is_skipped(tmp_path):
    steps = {step.name: step for step in gpu.plan("cpu", tmp_path)}
    assert [name for name, step in steps.items() if step.why_not() == "torch sees no CUDA device"] == [
        "compile", "gpu tests", "memcheck", "racecheck", "tune", "tune more", "all gpu tests", "full bench",
    ]  # fmt: skip
    assert steps["report"].always and list(steps)[-1] == "report"
    if not torch.cuda.is_available():
        assert gpu.main([]) == 1


def test_a_benchmark_is_told_how_much_time_it_has(tmp_path):
    """Else it is ended in the middle, and what it did not come to is nowhere."""
    code = "import sys; print(sys.argv[1:])"
    words = lambda cap, **more: run([python(code, cap=cap, **more)], tmp_path, gpu.BUDGET)[0].remark
    assert words(60, budget=math.inf) == "['--budget', '40']" and words(60) == "[]"
    (outcome,) = run([python(code, cap=600, budget=math.inf)], tmp_path, budget=90)
    left = int(outcome.remark.split("'")[3])
    assert 50 <= left <= 60  # two thirds of 90 less the reserve of that budget
    for step in gpu.plan("cpu", tmp_path):
        if "benchmarks" in step.command:
            *_, option, seconds = step.told(step.cap)
            assert option == "--budget" and "--budget" not in step.command
            assert float(seconds) == {"first bench": 60, "bench": 240, "full bench": 540}[step.name]
            assert float(step.told(10)[-1]) < 10


def test_the_extension_is_built_for_this_gpu_or_the_step_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0;12.0+PTX")  # a container's
    build = lambda capability: next(s for s in gpu.plan("cuda", tmp_path, capability) if s.name == "build")
    assert build((9, 0)).environment == {"CUMO_BUILD": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    assert build((10, 0)).environment["TORCH_CUDA_ARCH_LIST"] == "10.0"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize("carries", [True, False])
def test_make_gpu_installs_nothing_where_all_is_there(tmp_path, carries):
    """A python that says whether it has torch, triton, transformers and pytest."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {carries}\n")
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(gpu.ROOT / name, tmp_path)
    environment = {name: text for name, text in os.environ.items() if name != "VENV"}
    make = lambda *words: subprocess.run(
        ["make", "-n", f"PYTHON={python}", *words], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    assert (f"{python} -m benchmarks.gpu" in make("gpu")) == carries
    assert ("pip install" in make("gpu")) == (not carries)
    assert "pip install" in make("gpu", "VENV=.venv") and "pip install" in make("lint")


# transformers asks which of these are installed, and must get an answer
BARE = """
import runpy, sys
from importlib.machinery import PathFinder

absent = {"PIL", "accelerate", "bitsandbytes", "hypothesis", "matplotlib", "ninja", "peft", "psutil",
          "pybind11", "pytest_timeout", "rich", "sentencepiece", "tensorboard", "xdist"}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)


sys.meta_path = [Finder if found is PathFinder else found for found in sys.meta_path]
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bare_machine_has_every_gpu_test_and_every_benchmark_of_a_layer():
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    start = lambda code: subprocess.run(
        [sys.executable, "-c", BARE + code], cwd=gpu.ROOT, env=environment, capture_output=True, text=True
    )
    words = ["pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu", "tests/kernels"]
    done = start(f"sys.argv = {words!r}\nrunpy.run_module('pytest', run_name='__main__')")
    assert done.returncode == 0 and " error" not in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "tests/kernels/test_gpu.py" in done.stdout
    done = start(
        "from benchmarks import plot\n"
        "from benchmarks.__main__ import FILES, load\n"
        "print([name for name in FILES if isinstance(load(name), str)], plot.plt)"
    )
    # whole models need pillow, as transformers' image processors do; that is then a stated gap
    assert done.stdout.strip() == "['model'] None", done.stdout + done.stderr
    assert "bench_model: left out: No module named 'PIL'" in done.stderr


def test_two_parts_are_the_whole_and_one_proves():
    steps = gpu.plan("cpu", Path("out"))
    prove, measure = (gpu.part_of(steps, part) for part in ("prove", "measure"))
    assert {s.name for s in prove} | {s.name for s in measure} == {s.name for s in steps}
    assert {s.name for s in steps if s.must_pass} <= {s.name for s in prove}
    assert {s.name for s in prove} & {s.name for s in measure} == {"build", "choose", "report"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_steps_run_on_a_cpu(tmp_path, capsys):
    wanted = ["machine", "verify", "memcheck", "report"]
    only = [word for name in wanted for word in ("--only", name)]
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--budget", "600", *only]) == 0
    summary = (tmp_path / "summary.md").read_text()
    assert [line.split("|")[1].strip() for line in summary.splitlines()[4:]] == wanted
    assert "| memcheck | skipped | 0 | torch sees no CUDA device |" in summary
    assert json.loads((tmp_path / "verify.json").read_text())["failed"] == 0
    assert "no GPU was measured" in capsys.readouterr().out
