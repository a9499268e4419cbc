"""benchmarks.choose: from rows of a GPU run to the table that the automatic choice uses."""

import json
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import choose, record
from benchmarks.__main__ import FILES, load
from benchmarks.cases.shapes import SHAPES
from cumo_kernels import dispatch, explain
from cumo_kernels.tiles import hardware, measured


def row(**changes) -> record.Row:
    kinds = {field.name: field.type for field in fields(record.Row)}
    plain = {name: "" if kind is str else 0 for name, kind in kinds.items()}
    clip = SHAPES["clip-image"]
    known = {
        "run": "1", "op": "expert_mlp", "mode": "both", "shape": clip.name, "tokens": clip.T,
        "sizes": clip.sizes, "pattern": "uniform", "dtype": "bf16", "timer": "eager",
        "machine": "nvidia_h100",
    }  # fmt: skip
    return record.Row(**{**plain, **known, **changes})


def both(triton: float, cuda: float, **changes) -> list[record.Row]:
    return [
        row(variant="cumo/triton", ms_p50=triton, **changes),
        row(variant="cumo/cuda", ms_p50=cuda, **changes),
    ]


@pytest.fixture
def chosen(tmp_path):
    """Runs the command on `rows` -> the table it wrote."""

    def run(rows):
        record.append(rows, tmp_path / "results")
        words = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "measured.json")]
        assert choose.main(words) == 0
        path = tmp_path / "measured.json"
        return json.loads(path.read_text()) if path.exists() else None

    return run


def test_a_gpu_run_fills_the_table_and_the_choice_follows(chosen, monkeypatch):
    table = chosen(
        both(0.9, 0.8) + both(0.3, 0.4, mode="forward") + both(0.2, 0.1, op="route", dtype="fp32")
        + both(0.02, 0.01, op="permute_combine", mode="forward")
    )  # fmt: skip
    found = {(e["op"], e["mode"]): e for e in table["nvidia_h100"]}
    ms = {"triton": 0.9, "cuda": 0.8}
    assert found["expert_mlp", "both"] == {
        "op": "expert_mlp", "mode": "both", "dtype": "bfloat16", "shape": [5770, 1024], "ms": ms,
    }  # fmt: skip
    assert found["combine", "forward"]["shape"] == [11540, 1024]
    assert set(found) == {
        ("expert_mlp", "both"), ("expert_mlp", "forward"), ("route", "both"), ("permute", "forward"),
        ("combine", "forward"), ("sort_by_expert", "forward"),
    }  # fmt: skip
    able = tuple(replace(b, refuse=lambda *_: None, needs_proof=False) for b in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", able)
    monkeypatch.setattr(measured, "TABLE", table)
    measured.forget()
    x = torch.empty(5000, 1024, dtype=torch.bfloat16)
    with hardware.assume(hardware.find("nvidia_h100")):
        assert dispatch.choose("expert_mlp", x, with_backward=True) == "cuda"
        assert "cuda       chosen: measured on nvidia_h100 at 5770 x 1024" in explain("expert_mlp", x)
        assert dispatch.choose("expert_mlp", x) == "triton"
    with hardware.assume(hardware.find("nvidia_a100")):
        assert dispatch.choose("expert_mlp", x) == "triton"
        assert "triton     chosen: nothing is measured for this" in explain("expert_mlp", x)
    measured.forget()


def test_only_comparable_times_count(chosen):
    alone = [row(variant="cumo/triton", ms_p50=1.0), row(variant="cumo/cuda", ms_p50=0.5, run="2")]
    others = both(1, 2, machine="cpu_x_1t") + both(1, 2, timer="graph") + both(1, 2, mode="backward")
    others += both(1, 2, op="model") + both(1, 2, pattern="skewed") + [row(variant="dense", ms_p50=1.0)]
    assert chosen(alone + others) is None


def test_the_last_run_counts_and_other_gpus_stay(chosen, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text('{"nvidia_a100": [{"op": "route"}], "nvidia_h100": [{"op": "gone"}]}')
    table = chosen(both(0.5, 0.6, run="2") + both(0.9, 0.8, run="1"))
    assert [e["ms"] for e in table["nvidia_h100"]] == [{"triton": 0.5, "cuda": 0.6}]
    assert table["nvidia_a100"] == [{"op": "route"}]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["measured.json"]


def test_on_a_cpu_torch_and_the_reference_are_compared(chosen, monkeypatch):
    times = {"torch": 2.0, "reference": 1.0}
    rows = [
        row(variant=f"cumo/{name}", ms_p50=ms, machine="cpu_intel_x_1t", timer="cpu", dtype="fp32")
        for name, ms in times.items()
    ]
    table = chosen(rows)
    assert [entry["ms"] for entry in table["cpu"]] == [times]
    monkeypatch.setattr(measured, "TABLE", table)
    measured.forget()
    x = torch.empty(5000, 1024)
    assert dispatch.choose("expert_mlp", x, with_backward=True) == "reference"
    assert (
        "reference  chosen: measured on CPUs at 5770 x 1024 float32 with backward: torch 2 ms, reference 1 ms"
        in explain("expert_mlp", x)
    )
    assert dispatch.choose("expert_mlp", x) == "torch"
    assert (
        dispatch.choose("expert_mlp", x.bfloat16(), with_backward=True) == "torch"
    )  # not timed: the first of the list
    measured.forget()


def test_nothing_measured_writes_nothing(chosen, capsys):
    assert chosen([row(variant="dense", ms_p50=1.0)]) is None
    assert "no case with triton and cuda both timed" in capsys.readouterr().out


def test_every_benchmark_of_an_op_is_known():
    ops = {file.OP for file in map(load, FILES)}
    assert set(choose.OPS) <= ops
    assert {op for shapes in choose.OPS.values() for op in shapes} <= set(dispatch.OPS)
