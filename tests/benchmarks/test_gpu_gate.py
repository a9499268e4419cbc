"""The engine of make gpu, tested without a GPU: verdicts, budget, hangs, and files after an interruption."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import __main__ as gate
from benchmarks.gpu import engine
from benchmarks.gpu.engine import Outcome, Step
from benchmarks.gpu.plan import Place, plan
from cumo_kernels.verification import verified


def python(code: str, name="step", **options) -> Step:
    options.setdefault("cap", 60)
    return Step(name, (sys.executable, "-c", code), **options)


def run(steps, tmp_path, budget=600.0, note=lambda outcomes: None):
    return engine.run(steps, budget, tmp_path / "log.txt", note)


def main(steps, tmp_path, monkeypatch, *words):
    """Run the gate with these steps as its plan -> its exit code."""
    monkeypatch.setattr(gate, "plan", lambda part, place: steps)
    monkeypatch.setattr(gate, "pack", lambda place, before: None)
    return gate.main(["--rehearse", "--out", str(tmp_path), *words])


def test_each_step_has_its_verdict_and_last_line(tmp_path):
    steps = [
        python("print('hello'); print('all well')", "good"),
        python("print('oh'); raise SystemExit(3)", "bad"),
        python("import os; print('so far', flush=True); os.abort()", "aborted"),
        python("", "absent", why_not=lambda: "no such thing here"),
        python("raise SystemExit(3)", "there", done=lambda: "it is there", why_not=lambda: "no compiler"),
        Step("nowhere", ("/does/not/exist",), 5),
    ]
    good, bad, aborted, absent, there, nowhere = run(steps, tmp_path)
    assert (good.verdict, good.remark) == ("ok", "all well")
    assert (bad.verdict, bad.remark) == ("FAILED (3)", "oh")
    assert (aborted.verdict, aborted.remark) == ("FAILED (-6)", "so far")
    assert (absent.verdict, absent.remark) == ("skipped", "no such thing here")
    assert (there.verdict, there.remark) == ("ok", "it is there")
    assert nowhere.verdict == "FAILED (127)" and "/does/not/exist" in nowhere.remark
    assert "hello\nall well\n" in (tmp_path / "log.txt").read_text()


def hangs(mark: Path) -> str:
    """A program with a child; both exceed their time, and the child would then write a file."""
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    return (
        "import subprocess, sys, time\n"
        "sys.stdout.write('begun\\n')\n"  # in one piece: two of these share a log
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    )


def test_a_step_that_hangs_is_killed_with_all_its_processes(tmp_path):
    marks = [tmp_path / name for name in ("command", "parallel", "left")]
    words = tuple((sys.executable, "-c", hangs(mark) + "time.sleep(100)") for mark in marks[:2])
    begin = time.monotonic()
    both, _ = run(
        [Step("both", words[0], 2, parallel=words[1]), python(hangs(marks[2]), "leaves one behind")], tmp_path
    )
    assert both.verdict == "out of time" and both.remark == "begun"
    assert time.monotonic() - begin < 30
    time.sleep(max(0, 8 - (time.monotonic() - begin)))
    assert not [mark for mark in marks if mark.exists()]


def test_a_parallel_command_counts_too(tmp_path):
    parallel = lambda code: (sys.executable, "-c", code)
    long = "import time; time.sleep(2); print('the last')"
    fails, waits, nowhere, mark = run(
        [
            python("print('fine')", "fails", parallel=parallel("raise SystemExit(4)")),
            python("", "waits", parallel=parallel(long)),
            python("import time; time.sleep(30)", "nowhere", parallel=("/does/not/exist",)),
            python("", "goes on"),
        ],
        tmp_path,
    )
    assert fails.verdict == "FAILED (4)"
    assert (waits.verdict, waits.remark) == ("ok", "the last") and waits.seconds >= 2
    assert nowhere.verdict == "FAILED (127)" and nowhere.seconds < 20
    assert mark.verdict == "ok"


def test_when_the_budget_is_spent_only_steps_that_always_run_do(tmp_path):
    steps = [
        python("import time; time.sleep(60)", "long"),
        python("print('x')", "late"),
        python("print('report')", "report", always=True, cap=5),
    ]
    begin = time.monotonic()
    long, late, report = run(steps, tmp_path, budget=9)
    assert long.verdict == "out of time" and 3 <= long.seconds < 9  # of 9 seconds 5 are reserved
    assert (late.verdict, late.remark) == ("skipped", "the budget is spent")
    assert (report.verdict, report.remark) == ("ok", "report")
    assert time.monotonic() - begin < 20


def test_a_command_gets_its_time_limit(tmp_path):
    """Otherwise it would be killed, and the cases that it did not reach would not be listed."""
    step = lambda **more: python("import sys; print(sys.argv[1:])", margin=15, **more)
    words = lambda budget, **more: run([step(**more)], tmp_path, budget)[0].remark
    assert words(600) == "['--budget', '45']"
    assert words(600, cap=10) == "['--budget', '1']"
    assert words(40) in ("['--budget', '25']", "['--budget', '24']")


def test_results_are_on_disk_before_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    summary, log, packed = (tmp_path / name for name in ("summary.md", "log.txt", "results.tgz"))
    tree = Place("cpu", tmp_path).tree
    first = f"import pathlib; p = pathlib.Path({str(tree)!r}) / 'cumo_kernels/tiles/configs/gpu.json'\n"
    first += "p.parent.mkdir(parents=True); p.write_text('{}'); print('words')"
    look = (
        "import tarfile\n"
        f"print(open({str(summary)!r}).read().count('| first | ok |'), 'words' in open({str(log)!r}).read(),"
        f"'cumo_kernels/tiles/configs/gpu.json' in tarfile.open({str(packed)!r}).getnames())"
    )
    monkeypatch.setattr(gate, "plan", lambda part, place: [python(first, "first"), python(look, "second")])
    assert gate.main(["--rehearse", "--out", str(tmp_path)]) == 0
    assert "| second | ok | 0 | 1 True True |" in summary.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "log.txt", "results.tgz"}
    with tarfile.open(packed) as tar:
        assert "cumo_kernels/tiles/configs/gpu.json" in tar.getnames()


def test_a_required_step_must_have_run_to_its_end(tmp_path, monkeypatch, capsys):
    required = {
        "fine": python("", must_pass=True, name="fine"),
        "there": python("", must_pass=True, name="there", done=lambda: "it is there"),
        "wrong": python("print('oh'); raise SystemExit(3)", "wrong", must_pass=True),
        "no tool": python("", "no tool", must_pass=True, why_not=lambda: "no such tool"),
        "slow": python("import time; time.sleep(60)", "slow", must_pass=True, cap=1),
    }
    steps = [*required.values(), python("raise SystemExit(3)", "not required")]
    assert main(steps, tmp_path, monkeypatch) == 1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("required")]
    assert printed == [
        "required, but FAILED (3): wrong (oh)", "required, but skipped: no tool (no such tool)",
        "required, but out of time: slow ()",
    ]  # fmt: skip
    few = [word for name in ("fine", "there", "not required") for word in ("--only", name)]
    assert main(steps, tmp_path, monkeypatch, *few) == 0
    outcomes = [Outcome("fine", "skipped", 0, "the budget is spent")]
    assert engine.unproven(outcomes, steps) == outcomes


def test_results_of_an_earlier_run_are_not_in_the_archive(tmp_path):
    """Unpacked after it, the second part's archive must not undo the first part's."""
    place = Place("cpu", tmp_path / "out")
    held = {"benchmarks/results/gpu/expert_mlp.csv": "first", "cumo_kernels/verification/verified.json": "{}"}
    for name, text in held.items():
        (place.tree / name).parent.mkdir(parents=True, exist_ok=True)
        (place.tree / name).write_text(text)
    before = gate.files(place.tree)
    assert set(before) == set(held)
    new = {"benchmarks/results/gpu/lora_expert_mlp.csv": "new", "cumo_kernels/tiles/measured.json": "{}"}
    for name, text in (new | {"benchmarks/results/gpu/expert_mlp.csv": "first and second"}).items():
        (place.tree / name).parent.mkdir(parents=True, exist_ok=True)
        (place.tree / name).write_text(text)
    gate.pack(place, before)
    with tarfile.open(place.out / "results.tgz") as tar:
        assert set(tar.getnames()) == {*new, "benchmarks/results/gpu/expert_mlp.csv"}


def test_a_lent_machine_makes_no_pictures(monkeypatch, tmp_path):
    names = lambda: [step.name for step in plan("prove", Place("cuda", tmp_path, (9, 0)))]
    monkeypatch.delenv("OUT", raising=False)
    assert names()[-1] == "report"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert names()[-1] == "choose" and "report" not in names()


def test_unknown_steps_and_a_missing_device_are_reported(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main([python("", "one")], tmp_path, monkeypatch, "--only", "two")
    assert "--only must be one of ['one'], got ['two']" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gate.main(["--out", str(tmp_path)]) == 1
        assert "no CUDA device" in capsys.readouterr().out


def test_the_default_folder_is_that_of_a_lent_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "lent"))
    monkeypatch.setattr(gate, "plan", lambda part, place: [python("print('here')", "one")])
    assert gate.main(["--rehearse"]) == 0
    assert "| one | ok |" in (tmp_path / "lent" / "summary.md").read_text()
    assert capsys.readouterr().out.endswith(f"in {tmp_path / 'lent'}\n")
    assert gate.main(["--rehearse", "--out", str(tmp_path / "given")]) == 0
    assert (tmp_path / "given" / "summary.md").exists()


def test_the_budget_is_the_environments_or_the_parts(tmp_path, monkeypatch, capsys):
    steps = [python("", "one", cap=1000)]
    monkeypatch.delenv("BUDGET", raising=False)
    main(steps, tmp_path, monkeypatch)
    assert "part prove+tune, 600 s" in capsys.readouterr().out
    monkeypatch.setenv("BUDGET", "77")
    main(steps, tmp_path, monkeypatch)
    assert "part prove+tune, 77 s" in capsys.readouterr().out
    main(steps, tmp_path, monkeypatch, "--budget", "5")
    assert "== one (at most 5 s)" in capsys.readouterr().out


def test_the_commit_is_known_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    commit = record.commit.__wrapped__
    monkeypatch.delenv("CUMO_COMMIT", raising=False)
    assert commit() == "unknown"
    monkeypatch.setenv("CUMO_COMMIT", "0123abcdef")
    assert commit() == "0123abcdef"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize("carries", [True, False])
def test_make_gpu_installs_nothing_if_everything_is_installed(tmp_path, carries):
    """A stub python that reports whether it has torch, triton, transformers and pytest."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {carries}\n")
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(engine.ROOT / name, tmp_path)
    # without the settings and command-line variables of the make that runs the tests
    ours = lambda name: name in ("VENV", "BUDGET", "CONSTRAINTS", "MFLAGS") or name.startswith("MAKE")
    environment = {name: text for name, text in os.environ.items() if not ours(name)}
    make = lambda *words: subprocess.run(
        ["make", "-n", f"PYTHON={python}", *words], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    assert (f"{python} -m benchmarks.gpu" in make("gpu")) == carries
    assert ("pip install" in make("gpu")) == (not carries)
    assert "pip install" in make("gpu", "VENV=.venv") and "pip install" in make("lint")
    # each part has its own budget, unless another one is set
    assert "BUDGET=" not in make("gpu") and "BUDGET=50 " in make("gpu", "BUDGET=50")


# transformers queries which of these are installed, and needs an answer
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
        [sys.executable, "-c", BARE + code], cwd=engine.ROOT, env=environment, capture_output=True, text=True
    )
    words = ["pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu", "tests/kernels"]
    done = start(f"sys.argv = {words!r}\nrunpy.run_module('pytest', run_name='__main__')")
    assert done.returncode == 0 and " error" not in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "tests/kernels/test_gpu.py" in done.stdout
    done = start(
        "from benchmarks import plot\n"
        "from benchmarks.__main__ import FILES, load\n"
        "import benchmarks.gpu.__main__\n"
        "print([name for name in FILES if isinstance(load(name), str)], plot.plt)"
    )
    # whole models need pillow, as transformers' image processors do; without it they are a gap
    assert done.stdout.strip() == "['model'] None", done.stdout + done.stderr
    assert re.search("bench_model: skipped: .*No module named 'PIL'", done.stderr)
