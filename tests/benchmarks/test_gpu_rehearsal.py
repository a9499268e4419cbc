"""make gpu ARGS=--rehearse in full, and with planted faults in kernels: checks the summary."""

import json
import os
import re
import tarfile
import time
from dataclasses import replace

import pytest

from benchmarks.gpu import __main__ as gate
from benchmarks.gpu.engine import Step
from benchmarks.gpu.plan import PARTS, Place, plan
from cumo_kernels import dispatch
from cumo_kernels.verification import cases

# one fault for one op of the interpreted Triton backend, in every process of the gate
PLANTED = """
import importlib.abc, importlib.machinery, os, sys, time

HURT = {"permute": "hang", "activate": "abort", "combine": "wrong", "route": "lost"}
broken = []


def plant(dispatch):
    plain = dispatch.implementation

    def implementation(backend, op):
        run = plain(backend, op)
        fault = HURT.get(op) if backend == "triton" else None
        return run if fault is None else lambda *args, **options: act(fault, run, *args, **options)

    dispatch.implementation = implementation


def act(fault, run, *args, **options):
    if fault == "hang":
        time.sleep(600)
    if fault == "abort":
        os.abort()
    if fault == "lost":
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    out = run(*args, **options)
    scale = lambda t: t * 1.25 if t.is_floating_point() else t
    return tuple(map(scale, out)) if isinstance(out, tuple) else scale(out)


def lose(verify):
    verify.is_lost = lambda device: bool(broken)


class Finder(importlib.abc.MetaPathFinder):
    after = {"cumo_kernels.dispatch": plant, "cumo_kernels.verification.verify": lose}

    def find_spec(self, name, path=None, target=None):
        if name not in self.after:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def changed(module):
            execute(module)
            self.after[name](module)

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Finder())
"""
# the text in the summary after "FAILED triton: "
REASONS = {
    "permute": r"its process ended, exit code 1: Timeout \(0:00:25\)! in sitecustomize.py:\d+ act; ",
    "activate": r"its process ended, signal SIGABRT: ",
    "combine": r"output 0 is off",
    "route": r"RuntimeError: CUDA error: an illegal memory access was encountered",
}


def has_cuda(op: str) -> bool:
    return dispatch.MODULES.get(op) != "adapted"


@pytest.fixture
def alone(monkeypatch):
    """Clear this process's switches, as on a user's machine."""
    for name in ("TRITON_INTERPRET", "CUMO_EMULATE", "CUMO_EMULATE_CAPABILITY", "CUMO_BACKEND", "BUDGET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.sweep  # each kind of fault by itself: tests/kernels/test_shards.py, test_gpu_gate.py
@pytest.mark.timeout(400)
def test_planted_faults_are_named_and_fail_only_their_cases(tmp_path, monkeypatch, capsys, alone):
    assert set(REASONS) < set(dispatch.OPS)
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # a missing step fails alone, too
    nowhere = Step("nowhere", ("/does/not/exist",), 5)
    # on a shared machine a correct expert_mlp takes as long as the hang
    ops = [op for op in cases.OPS if op != "expert_mlp"]
    fewer = lambda step: replace(step, command=(*step.command, *(w for op in ops for w in ("--op", op))))
    changed = lambda step: fewer(step) if step.name == "smoke" else step
    monkeypatch.setattr(gate, "plan", lambda part, place: [nowhere, *map(changed, plan(part, place))])
    out = tmp_path / "out"
    words = ["--only", "nowhere", "--only", "build", "--only", "smoke", "--case-seconds", "25"]
    code = gate.main(["--rehearse", "--out", str(out), *words])
    summary, printed = (out / "summary.md").read_text(), capsys.readouterr().out
    assert code == 1, summary
    assert "| nowhere | FAILED (127) | 0 |" in summary
    assert "| smoke | FAILED (1) |" in summary and "required, but FAILED (1): smoke" in printed

    every = {str(case): case.op for _, case in cases.survey("cpu", True, ("bf16",), ops, tiny=True)}
    assert sorted(every.values()) == sorted(ops)
    by_cuda = [op for op in ops if has_cuda(op)]
    assert f"smoke: {len(by_cuda) + 2 * len(ops)} cases, 4 failed" in summary
    lines = summary.splitlines()
    failed = [(line, lines[at + 1]) for at, line in enumerate(lines) if line.startswith("FAILED ")]
    assert len(failed) == 4
    for line, command in failed:
        switches = "TRITON_INTERPRET=1 CUMO_EMULATE=1 CUMO_EMULATE_CAPABILITY=90"
        verify = "python -m cumo_kernels verify --backend triton --device cpu"
        case = re.fullmatch(f"    {switches} {verify} --case '(.*)'", command)[1]
        op = every.pop(case)
        assert re.match(f"FAILED triton: {REASONS[op]}", line), line
        assert line in printed and command in printed
    assert set(every.values()) == set(ops) - set(REASONS)

    report = json.loads((out / "smoke.json").read_text())
    green = [(row["backend"], row["case"].split()[0]) for row in report["results"] if not row["failures"]]
    assert sorted(green) == sorted(
        [
            *(("cuda", op) for op in by_cuda),
            *(("torch", op) for op in ops),
            *(("triton", op) for op in every.values()),
        ]
    )
    assert not report["not_checked"] or not [line for line in report["not_checked"] if "case" in line]


@pytest.mark.sweep  # its steps one by one: test_gpu_plan.py, test_gpu_gate.py
@pytest.mark.timeout(900)
def test_the_whole_plan_runs_on_a_cpu(tmp_path, capsys, alone):
    place = Place("cpu", tmp_path)
    names = list(dict.fromkeys(step.name for part in PARTS for step in plan(part, place)))
    begin = time.monotonic()
    code = gate.main(["--rehearse", "--out", str(tmp_path)])
    seconds, summary = time.monotonic() - begin, (tmp_path / "summary.md").read_text()
    with capsys.disabled():
        print(f"\nthe rehearsal took {seconds:.0f} s\n{summary}")
    assert code == 0
    table = re.findall(
        r"^\| ([^|]+) \| (ok|FAILED [^|]*|out of time|skipped) \| \d+ \| ([^|]*) \|$", summary, re.M
    )
    assert sorted(name for name, *_ in table) == sorted(names)
    assert [row for row in table if row[1] != "ok"] == []
    assert table[-1][0] == "report" and table[-2][0] == "choose"
    by_triton = len(cases.OPS)
    by_cuda = sum(map(has_cuda, cases.OPS))
    assert f"smoke: {by_cuda + 2 * by_triton} cases, 0 failed" in summary
    assert f"verify: {by_cuda + by_triton} cases, 0 failed" in summary
    for variant in ("cumo/cuda", "cumo/triton", "dense", "torch-grouped_mm"):
        assert f" | {variant} | " in summary
    # every launch finds the packed kernels
    assert re.search(r"\| take \| ok \| \d+ \| .*: 0 kernels compiled, 0 built", summary)
    assert "us of mixtral-decode1 triton: " in summary and "us of mixtral-decode1 cuda: " in summary
    assert len(summary) < 10_800

    files = {"summary.md", "log.txt", "results.tgz", "smoke.json", "verify.json", "kernels.jsonl"}
    files |= {"self_check.json", "self_check.lock"}
    assert {path.name for path in tmp_path.iterdir()} == files
    with tarfile.open(tmp_path / "results.tgz") as tar:
        packed = tar.getnames()
    assert {"benchmarks/REPORT.md", "cumo_kernels/tiles/configs/interpreter.json"} <= set(packed)
    assert (
        "cumo_kernels/tiles/measured.json" in packed and "cumo_kernels/verification/verified.json" in packed
    )
    assert [name for name in packed if re.fullmatch(r"benchmarks/results/cpu_\w+/expert_mlp\.csv", name)]
    assert os.environ.get("TRITON_INTERPRET") is None  # switches of steps do not leak
