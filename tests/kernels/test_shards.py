"""verify --workers: a case that kills its process fails alone; the others give the same results."""

import itertools
import json
import math
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity

from cumo_kernels.__main__ import main
from cumo_kernels.verification import cases, packed_cases, shards, verify
from cumo_kernels.verification.cases import Case
from cumo_kernels.verification.shards import Job, Shards, bytes_of, last_output

PLANTED = """
import os, time, torch
from cumo_kernels import dispatch
from cumo_kernels.__main__ import main

plain = dispatch.implementation("reference", "activate")

def faulty(x, name):
    fault = name, str(x.dtype).removeprefix("torch.")
    if fault == ("geglu", "bfloat16"):
        time.sleep(60)
    if fault == ("gelu", "float16"):
        os.abort()
    print("noise of a compiler")
    return plain(x, name) * (1.1 if fault == ("geglu", "float16") else 1)

dispatch._implementations["reference", "activate"] = faulty
raise SystemExit(main())
"""
SPEAKS = """
import json, sys, time
say = lambda **line: print(json.dumps(line), flush=True)
say(ready=True)
for number, line in enumerate(sys.stdin):
    job = json.loads(line)
    say(begin=job["case"])
    reason, lost = act(job["case"], number)
    say(result={**job, "device": "cpu", "failures": [reason] if reason else [], "lost": lost})
    if lost:
        break
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(program): workers run that program."""

    def replace(program):
        path = tmp_path / "planted.py"
        path.write_text(program)
        monkeypatch.setattr(shards, "command", lambda: [sys.executable, str(path)])
        monkeypatch.setenv("PYTHONPATH", str(Path(shards.__file__).parents[2]))

    return replace


def test_a_fault_fails_only_its_case(command, tmp_path, capsys):
    command(PLANTED)
    words = ["--backend", "reference", "--device", "cpu", "--few", "--op", "activate", "--op", "combine"]
    words += ["--workers", "2", "--case-seconds", "2", "--json", str(tmp_path / "v.json")]
    assert main(["verify", *words]) == 1
    report = json.loads((tmp_path / "v.json").read_text())
    found = {row["case"]: row for row in report["results"]}
    every = {
        str(case): (case, family)
        for family, case in cases.all_cases(cases.FEW, tuple(verify.DTYPES), ("activate", "combine"))
    }
    assert len(report["results"]) == len(found) == len(every) == 9 and set(found) == set(every)

    def failure(activation, dtype):
        case = Case("activate", T=57, I=34, activation=activation, layout="strided", dtype=dtype)
        return " ".join(found[str(case)]["failures"])

    assert "Timeout (0:00:02)! in " in failure("geglu", "bf16") and "in faulty" in failure("geglu", "bf16")
    assert "exit code 1" in failure("geglu", "bf16")
    assert "its process ended, signal SIGABRT: " in failure("gelu", "fp16")
    assert failure("geglu", "fp16").startswith("output 0 is off")
    assert report["failed"] == 3
    for text, row in found.items():
        if not row["failures"]:
            case, family = every[text]
            assert row == asdict(verify.check(case, "reference", "cpu", family))
    assert "3 of 9 cases FAILED" in capsys.readouterr().out


@pytest.fixture
def shard(command):
    """shard(program, workers, **) -> (Shards, its results); jobs of a reference that computes nothing."""

    def make(program="", workers=1, case_seconds=60.0, stop=math.inf):
        command(program)
        results = []
        return Shards("cpu", workers, case_seconds, stop, results.append, lambda line: None), results

    return make


JOBS = [Job("reference", "plain", Case("activate", T=T)) for T in (1, 2, 3)]


def test_a_process_that_does_not_start_is_tried_three_times(shard):
    many, results = shard("raise SystemExit('no such library')", workers=2)
    missing = many.run(JOBS)
    assert [row["case"] for row in results] == [str(JOBS[0].case)]
    assert results[0]["failures"] == ["no process for reference starts, exit code 1: no such library"]
    assert missing == ["2 cases of reference: no process for it starts"]
    assert verify.Result(**results[0]).device == "cpu"


def test_a_worker_whose_watchdog_fails_is_killed(shard, monkeypatch):
    monkeypatch.setattr(shards, "GRACE", 0.3)
    many, results = shard("import time\nact = lambda *_: time.sleep(60)" + SPEAKS, case_seconds=0.2)
    assert many.run(JOBS[:2]) == []
    assert [row["failures"] for row in results] == [
        ["its process ended, killed after its time: no output"]
    ] * 2


def test_a_process_that_cannot_be_killed_is_left_behind(shard, monkeypatch):
    """Its pipe stays open, here held by its child."""
    monkeypatch.setattr(shards, "GRACE", 0.1)
    monkeypatch.setattr(shards, "LINGER", 0.3)
    hang = "import subprocess, time\nact = lambda *_: (subprocess.Popen(['sleep', '20']), time.sleep(60))"
    begin = time.monotonic()
    many, results = shard(hang + SPEAKS, case_seconds=0.5)
    assert many.run(JOBS[:1]) == [] and time.monotonic() - begin < 15
    assert results[0]["failures"] == ["its process ended, killed after its time: no output"]


def test_after_a_lost_device_another_process_continues(shard):
    many, results = shard(
        "act = lambda case, _: ('illegal access', True) if 'T=2' in case else ('', False)" + SPEAKS
    )
    assert many.run(JOBS) == []
    assert [(row["case"], row["failures"]) for row in results] == [
        ("activate T=1", []),
        ("activate T=2", ["illegal access"]),
        ("activate T=3", []),
    ]


def test_a_case_out_of_memory_is_repeated_alone(shard):
    """Each process passes its first case, as a process alone on the GPU would."""
    many, results = shard("act = lambda _, number: (number and 'OutOfMemoryError: no', False)" + SPEAKS)
    assert many.run(JOBS) == []
    assert [(row["case"], row["failures"]) for row in results] == [
        ("activate T=1", []),
        ("activate T=2", []),
        ("activate T=3", ["OutOfMemoryError: no"]),
    ]


def test_a_spent_budget_starts_nothing(shard, capsys):
    many, results = shard("raise SystemExit('must not run')", stop=0.0)
    assert many.run(JOBS) == ["3 of 3 cases: --budget was spent"] and results == []
    words = ["--backend", "reference", "--device", "cpu", "--workers", "2", "--budget", "0"]
    assert main(["verify", *words]) == 1
    assert "cases: --budget was spent" in capsys.readouterr().out


def test_a_part_of_the_cases_does_not_pass_as_all(tmp_path, capsys, monkeypatch):
    def survey(args, backends, device, note, log, show):
        case = next(case for _, case in cases.all_cases(cases.TINY, ("fp32",), ("permute",)))
        note(verify.check(case, "reference", device))
        return ["8 of 9 cases: --budget was spent"]

    monkeypatch.setattr(verify, "_survey", survey)
    words = ["verify", "--backend", "reference", "--device", "cpu", "--tiny"]
    for record, code in (([], 0), (["--record", str(tmp_path / "verified.json")], 1)):
        assert main([*words, *record]) == code
        assert "verify: the 1 cases that ended passed, the others did not run" in capsys.readouterr().out


def test_workers_that_end_slowly_end_at_the_same_time(shard):
    many, results = shard("act = lambda *_: ('', False)" + SPEAKS + "\ntime.sleep(2)", workers=4)
    begin = time.monotonic()
    assert many.run([Job("reference", "", Case("activate", T=number)) for number in range(8)]) == []
    assert len(results) == 8 and time.monotonic() - begin < 6


def test_cases_running_when_the_budget_is_spent_are_killed_and_named(shard, monkeypatch):
    monkeypatch.setattr(shards, "WRAP_UP", 0.3)
    slow = "import time\nact = lambda case, _: 'T=2' in case and time.sleep(60) or ('', False)"
    begin = time.monotonic()
    many, results = shard(slow + SPEAKS, stop=begin + 2)
    lines = []
    many.log = lines.append
    assert many.run(JOBS) == [
        "1 of 3 cases: --budget was spent",
        "1 of 3 cases were running when --budget was spent: reference activate T=2",
    ]
    assert [row["case"] for row in results] == ["activate T=1"] and time.monotonic() - begin < 20
    assert lines == ["-> reference activate T=1", "-> reference activate T=2"]


def test_large_cases_wait_for_each_other(shard):
    many, _ = shard(workers=4)
    large, small = Case("expert_mlp", T=64, H=512, I=512, O=512), Case("expert_mlp", T=64)
    many.room = 1.5 * bytes_of(large)
    assert bytes_of(large) > many.room / many.workers > bytes_of(small)
    many.left = [Job("reference", "", case) for case in (small, large, large, small)]
    for _ in range(4):
        worker = types.SimpleNamespace(backend="reference", job=None)
        worker.take = lambda job, worker=worker: setattr(worker, "job", job)
        many.running.append(worker)
        many._assign(worker, over=False)
    # one large case starts at once; the other waits, and small ones overtake it
    assert [w.job and w.job.case for w in many.running] == [large, small, small, None]
    many.running.pop(0)
    many._assign(many.running[-1], over=False)
    assert many.running[-1].job.case == large and many.left == []
    many.running = []  # no workers to stop


def test_every_backend_gets_its_share_of_processes(shard):
    many, _ = shard(workers=3)
    many.left = [Job(name, "", Case("route")) for name in ("triton",) * 8 + ("cuda",) * 3]
    for _ in range(3):
        many.running.append(types.SimpleNamespace(backend=many._wanted(), job=None))
    assert [w.backend for w in many.running] == ["triton", "triton", "cuda"]


def test_the_large_families_fit_a_gpu_one_at_a_time(monkeypatch):
    gpu = types.SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    room = shards.room(16, "cuda")
    sizes = [bytes_of(case) for _, case in cases.survey("cuda", False, ("bf16",), cases.OPS)]
    assert 10 << 30 < max(sizes) < room < 80 << 30
    assert sum(size * 16 < room for size in sizes) > 0.9 * len(sizes)


ONE = {"T": 1, "H": 256, "I": 256, "O": 256, "E": 8, "activation": "swiglu"}
WIDE = {"T": 16, "H": 256, "I": 256, "O": 256, "E": 8, "activation": "swiglu"}
LONG = {"T": 512, "H": 64, "I": 64, "O": 64}


@pytest.mark.parametrize("op", cases.OPS)
def test_memory_is_estimated_from_above(op):
    """Compared with the largest sum of allocations and releases that torch's profiler records."""
    packings = [{}]
    if op in packed_cases.OPS:
        packings = [
            {"weights": "nf4", "rank": 0},
            {"weights": "int4z", "rank": 16},
            {"weights": "plain", "rank": 33},
        ]
    many = {"T": 512, "H": 128, "E": 64, "K": 8, "I": 32, "O": 32}
    for size in (ONE, WIDE, LONG, many):
        for case in {cases.used(Case(op, **size, **packing, dtype="bf16")) for packing in packings}:
            with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
                result = verify.check(case, "torch", "cpu")
            assert result.repeats  # all checks were made
            events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            events.sort(key=lambda event: event.start_ns())
            peak = max(itertools.accumulate(event.nbytes() for event in events))
            assert peak - 2**18 <= bytes_of(case) <= 8 * peak, case  # small tensors are not counted


def test_important_cases_come_first_on_a_gpu():
    todo = cases.survey("cuda", False, ("fp32", "bf16"), cases.OPS)
    ranks = [
        (case.dtype != "bf16", name not in cases.ALIGNED, case.op not in cases.PLAIN) for name, case in todo
    ]
    assert ranks == sorted(ranks) and len(set(ranks)) == 8
    few = {family for family, _ in cases.survey("cuda", True, ("bf16",), cases.OPS)}
    assert few == {*cases.ALIGNED, *cases.FEW}
    families = {family for family, _ in todo}
    assert set(cases.GPU_FAMILIES) <= families and set(cases.FAMILIES) <= families
    on_cpu = cases.survey("cpu", False, ("fp32", "bf16"), cases.OPS)
    assert not {family for family, _ in on_cpu} & set(cases.GPU_FAMILIES)
    assert {case for _, case in on_cpu} <= {case for _, case in todo}


def test_last_words():
    assert last_output("") == "no output"
    assert last_output("a\n\nb\n") == "a | b"
    stack = "x\nTimeout (0:00:02)!\nThread 0x1 (most recent call first):\n  File a, line 1 in wait\n\n"
    stack += "Thread 0x2 (most recent call first):\n  File b, line 2 in kernel\n  File c, line 3 in check\n"
    assert last_output(stack) == "Timeout (0:00:02)! in File b, line 2 in kernel; File c, line 3 in check"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--workers", "2", "--fuzz", "1"], "--workers must go with all families, got --fuzz"),
        (["--workers", "2", "--case", "permute"], "--workers must go with all families, got --case"),
        (["--case-seconds", "-1"], "--case-seconds must be at least 0, got -1"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    assert main(["verify", "--device", "cpu", "--backend", "reference", *words]) == 2
    assert message in capsys.readouterr().err
