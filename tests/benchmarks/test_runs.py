"""A whole run: the order of cases, the effect of a fault, and the gaps in the report."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, plot, record, selection, timing
from benchmarks.__main__ import load
from benchmarks.cases import bench_activation
from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.harness import Case
from cumo_kernels.tiles import hardware

SMALL = Shape("small", 24, 32, 48, 32, 4, 2, "quick_gelu", True, groups=2)


def a_row(**changes) -> record.Row:
    kinds = {field.name: field.type for field in fields(record.Row)}
    plain = {name: "" if kind is str else 1 for name, kind in kinds.items()}
    known = {
        "op": "activate", "variant": "cumo/reference", "mode": "forward", "shape": "small", "tokens": 24,
        "sizes": SMALL.sizes, "pattern": "uniform", "dtype": "fp32", "timer": "cpu", "gate": "",
        "machine": "m",
    }  # fmt: skip
    return record.Row(**{**plain, **known, **changes})


def a_gap(row, **changes) -> record.Gap:
    same = {name: getattr(row, name) for name in ("op", "shape", "tokens", "sizes", "pattern", "dtype")}
    return record.Gap(
        **{**same, "variant": "peer", "mode": "all", "reason": "-", "machine": "m", "run": "1", **changes}
    )


def test_a_gap_of_a_case_without_a_forward_is_closed_too():
    row = a_row(variant="peer", mode="both", run="2")
    assert plot.not_timed([a_gap(row)], []) and not plot.not_timed([a_gap(row)], [row])
    assert plot.not_timed([a_gap(row, run="3")], [row])
    assert plot.not_timed([a_gap(row)], [replace(row, variant="another")])


def test_one_size_of_a_sweep_does_not_close_the_gap_of_another(tmp_path):
    row = a_row(variant="peer", op="scaling", shape="over-tokens", run="2", machine="m")
    large = a_gap(row, tokens=500_000, reason="out of memory")
    record.append_gaps([large, a_gap(row, reason="not here")], tmp_path)
    lines = plot.not_timed(record.read_gaps(tmp_path), [row])
    assert lines[1:] == ["- peer: out of memory (scaling over-tokens fp32 T=500000)"]


def test_cases_without_time_are_in_the_report_until_measured():
    row = a_row(run="1")
    late = a_gap(row, variant="all", reason=record.NO_TIME, run="2")
    assert plot.not_timed([late, replace(late, shape="b")], [])[1] == (
        f"- every variant: {record.NO_TIME} ({row.op} {row.shape} fp32, {row.op} b fp32)"
    )
    assert plot.not_timed([late], [row]) == []  # an older run has measured it


def test_gaps_are_in_the_report_until_a_later_run_closes_them(tmp_path):
    results = tmp_path / "results"
    row = a_row(machine="m", variant="peer", run="2")
    old = a_gap(row, reason="not here")
    record.append([replace(row, variant="cumo/reference")], results)
    record.append_gaps([old], results)
    assert f"- peer: not here ({row.op} {row.shape} fp32)" in plot.report(results).read_text()
    record.append_gaps([replace(old, shape="other")], results)
    assert "fp32 and 1 more)" in plot.report(results).read_text()
    record.append([row, replace(row, shape="other")], results)
    assert "not here" not in plot.report(results).read_text()


def test_one_broken_case_does_not_affect_the_others(tmp_path, capsys):
    def setup(shape, *rest):
        if shape.T == 1:
            raise MemoryError("too large")
        return bench_activation.setup(shape, *rest)

    broken = types.SimpleNamespace(
        OP="t",
        setup=setup,
        cases=lambda *_: [Case(replace(SMALL, T=t), "fp32", modes=("forward",)) for t in (1, 8)],
    )
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    words = ["--device", "cpu", "--results", str(tmp_path), "--seconds", "0"]
    assert harness.run_all([broken], parser.parse_args(words)) == 1
    assert "1 cases measured" in (out := capsys.readouterr()).out and "1 broke off" in out.out
    (gap,) = record.read_gaps(tmp_path)
    assert (gap.tokens, gap.variant, gap.reason) == (1, "all", "it broke off: MemoryError: too large")
    assert "too large" in out.err and {row.tokens for row in record.read(tmp_path)} == {8}


def test_a_case_that_would_not_end_in_time_is_not_started(monkeypatch, capsys):
    """1e9 FLOPs a second on a CPU: after the first case the large one is skipped, the small one is not."""
    clock, begun = [0.0], []

    def measure(op, setup, case, *rest, **options):
        begun.append((op, case.shape.T))
        clock[0] += case.shape.gemm_flops / 1e9
        return [], []

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    second = int(1e9 // replace(SMALL, T=1).gemm_flops)  # tokens that take about one
    cases = lambda *_: [Case(replace(SMALL, T=t * second), "fp32") for t in (10, 200, 20)]
    files = [types.SimpleNamespace(OP=op, setup=None, cases=cases) for op in ("expert_mlp", "moe_layer", "t")]
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--dry", "--budget", "100"])
    harness.run_all(files, args)
    small, large = 10 * second, 200 * second
    first, (second_of_t, *last) = begun[:3], begun[3:]
    assert first == [("expert_mlp", small), ("moe_layer", small), ("t", small)]  # one case of each file
    assert second_of_t == ("t", large)  # the time of another op is not estimated from the layer's FLOPs
    assert last == [] and "5 skipped: the budget was spent" in capsys.readouterr().out


@pytest.fixture
def files_in_turn():
    """Two files of two and one cases, and the arguments for them."""
    cases = {"a": [Case(replace(SMALL, T=t), "fp32", modes=("forward",)) for t in (2, 4)],
             "b": [Case(replace(SMALL, T=6), "fp32", modes=("forward",))]}  # fmt: skip
    files = [
        types.SimpleNamespace(OP=op, setup=bench_activation.setup, cases=lambda *_, found=found: found)
        for op, found in cases.items()
    ]
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    return files, lambda *words: parser.parse_args(["--device", "cpu", "--seconds", "0", *words])


def test_an_interrupted_run_has_cases_of_each_file(files_in_turn, tmp_path):
    files, words = files_in_turn
    harness.run_all(
        files, words("--results", str(tmp_path), "--budget", "0"), {"model": "No module named 'x'"}
    )
    gaps = [(gap.op, gap.tokens, gap.reason) for gap in record.read_gaps(tmp_path)]
    late = record.NO_TIME
    assert gaps == [("model", 0, "No module named 'x'"), ("a", 2, late), ("b", 6, late), ("a", 4, late)]
    lines = "\n".join(plot.not_timed(record.read_gaps(tmp_path), []))
    assert "- every variant: No module named 'x' (model)" in lines


def test_a_variant_that_breaks_the_device_does_not_affect_the_others(files_in_turn, tmp_path, monkeypatch):
    """The run continues in a new process; here in this one, with the same arguments."""
    files, words = files_in_turn
    broken, again = [], []

    def breaks(x):
        broken.append(len(x))
        raise RuntimeError("an illegal memory access was encountered")

    def setup(*args):
        return replace(bench_activation.setup(*args), peers={"breaks": breaks, "fine": torch.nn.Identity()})

    files[1].setup = setup
    monkeypatch.setattr(harness, "is_lost", lambda device: bool(broken) and not again)
    monkeypatch.setattr(harness, "_restart", lambda extra: again.extend(extra) or sys.exit(99))
    with pytest.raises(SystemExit):
        harness.run_all(files, words("--results", str(tmp_path)))
    assert again[:4] == ["--begin", "1", "--without", "breaks"] and len(record.read(tmp_path)) > 0
    assert harness.run_all(files, words("--results", str(tmp_path), *again)) == 0
    rows = record.read(tmp_path)
    assert len(broken) == 1 and {row.run for row in rows} == {again[again.index("--run") + 1]}
    assert {(row.op, row.tokens) for row in rows} == {("a", 2), ("b", 6), ("a", 4)}
    reasons = [gap.reason for gap in record.read_gaps(tmp_path) if gap.variant == "breaks" and gap.op == "b"]
    assert reasons == ["it broke the device earlier in this run"]
    assert not [gap for gap in record.read_gaps(tmp_path) if "cumo/" in gap.variant]


HANGS = """
import sys, time, types
from dataclasses import replace
import argparse, torch
from benchmarks import harness, selection
from benchmarks.cases import bench_activation
from benchmarks.harness import Case
from benchmarks.cases.shapes import Shape

def hang(x):
    time.sleep(60)

def setup(*args):
    return replace(bench_activation.setup(*args), peers={"cumo/hangs": hang, "fine": torch.nn.Identity()})

small = Shape("small", 24, 32, 48, 32, 4, 2, "quick_gelu", True, groups=2)
file = types.SimpleNamespace(OP="t", setup=setup, cases=lambda *_: [Case(small, "fp32", modes=("forward",))])
parser = argparse.ArgumentParser()
harness.add_arguments(parser)
raise SystemExit(harness.run_all([file], parser.parse_args()))
"""


def test_a_variant_that_hangs_does_not_affect_the_others(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    words = ["--device", "cpu", "--results", str(tmp_path), "--seconds", "0", "--variant-seconds", "3"]
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, timeout=50,
        env={**os.environ, "PYTHONPATH": str(record.ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "1 refusals of our own kernels" in done.stdout, done.stderr[-2000:]
    assert {row.variant for row in record.read(tmp_path)} >= {"cumo/reference"}
    (gap,) = [gap for gap in record.read_gaps(tmp_path) if gap.variant == "cumo/hangs"]
    assert record.is_fault(gap) or gap.reason == "it broke the device earlier in this run"


def test_a_failure_in_one_mode_keeps_the_others(monkeypatch):
    plain = timing.interleave
    turns = []

    def interleave(*args):
        turns.append(1)
        if len(turns) == 2:
            raise MemoryError("too large")
        return plain(*args)

    monkeypatch.setattr(timing, "interleave", interleave)
    lines, case = [], Case(SMALL, "fp32", modes=("forward", "both"))
    rows, _ = harness.measure("t", bench_activation.setup, case, "cpu", "1", 0, ["reference"], lines.append)
    log = "\n".join(lines)
    assert {row.mode for row in rows} == {"forward"}
    assert "all: NOT TIMED (both): timing broke off: MemoryError: too large" in log


def test_a_requested_shape_is_measured_with_the_options_of_its_file():
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    args = parser.parse_args(["--shape", "clip-image", "--shape", "mixtral-decode64"])
    route = selection.cases_of(load("routing"), "cuda", args)
    assert {(c.shape.name, c.dtype, c.gate_dtype) for c in route} == {
        (name, dtype, "fp32") for name in args.shape for dtype in ("bf16", "fp32")
    }
    (clip, _) = selection.cases_of(load("layer"), "cpu", args)  # no CPU case has that shape
    assert (clip.shape, clip.dtype, clip.modes) == (SHAPES["clip-image"], "fp32", ("forward", "both"))
    for name in ("model", "scaling", "overhead"):  # they have no such shape
        assert selection.cases_of(load(name), "cuda", args) == []


def test_the_floor_of_the_notes_is_not_the_roofline_of_the_report(tmp_path):
    """Terms: the report uses the data sheet's roofline; the notes state how their floor relates to it."""
    row = a_row(machine="nvidia_h100", timer="eager", share_of_floor=0.5)
    record.append([row], tmp_path / "results")
    shutil.copytree(record.RESULTS.parent / "predictions/predicted", tmp_path / "predictions/predicted")
    text = plot.report(tmp_path / "results").read_text()
    assert "50% of roofline" in text and "| of roofline |" in text and "floor" not in text.lower()
    head = " ".join((record.RESULTS.parent / "NOTES.md").read_text().partition("\n## ")[0].split())
    pattern = (
        r"FLOPs / (\S+) TF/s, bytes / (\S+) TB/s.* (\d+) % and (\d+) % of .*'s (\S+) TF/s and (\S+) TB/s"
    )
    flops, bytes_, share, other, peak, bandwidth = map(float, re.search(pattern, head).groups())
    (h100,) = (gpu for gpu in hardware.GPUS if gpu.name == "nvidia_h100")
    assert (peak, bandwidth * 1000) == (h100.tflops_16, h100.gb_per_s)
    assert share == round(100 * flops / peak) and other == round(100 * bytes_ / bandwidth)


def test_saved_and_peak_memory_are_plotted(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure) or path)
    kib = lambda n: n * 24 * 1024  # of 24 tokens
    ours = a_row(op="expert_mlp", mode="both", saved_bytes=kib(3), peak_bytes=kib(8))
    dense = replace(ours, variant="dense", saved_bytes=None, peak_bytes=kib(5))  # not measured
    assert plot.plot_memory([ours, dense], tmp_path / "memory.png") is not None
    kept, peak = figures[0].axes
    heights = lambda axis: [bar.get_height() for bar in axis.patches]
    assert (heights(kept), heights(peak)) == ([3], [8, 5])
    assert "kept" in kept.get_title() and "peak" in peak.get_title()
    on_a_cpu = [replace(row, peak_bytes=None) for row in (ours, dense)]
    assert plot.plot_memory(on_a_cpu, tmp_path / "memory.png") is not None
    assert [heights(axis) for axis in figures[1].axes] == [[3]]
    assert [text.get_text() for text in figures[1].legends[0].texts] == ["cumo/reference"]
    assert plot.plot_memory([on_a_cpu[1]], tmp_path / "memory.png") is None


@pytest.mark.parametrize("number", [1, 10, 11, 20, 21, 45])
def test_every_picture_has_a_colour_for_each_of_any_number_of_variants(number, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure) or path)
    names = [plot.BASE, *(f"peer-{n}" for n in range(number - 1))]
    layer, scaling = (
        [a_row(op=op, shape=shape, mode="both", variant=name) for name in names]
        for op, shape in (("expert_mlp", "small"), ("scaling", "over-tokens"))
    )
    for draw in (plot.plot_speedups, plot.plot_roofline, plot.plot_memory):
        draw(layer, tmp_path / "picture.png")
        assert len({handle.get_facecolor() for handle in figures[-1].legends[0].get_patches()}) == number
    plot.plot_scaling(scaling, tmp_path / "picture.png")
    assert len({tuple(line.get_color()) for line in figures[-1].axes[0].lines}) == number
    plot.plt.close("all")


def test_each_reason_is_printed_once_with_a_count():
    case = Case(SMALL, "fp32")
    gap = lambda variant, mode, reason: harness.gap_of("t", case, variant, mode, reason, "cpu", "1")
    gaps = [
        gap("a", "all", "no GPU"),
        gap("b", "all", "no GPU"),
        gap("a", "all", "no GPU"),
        gap("a", "both", "x"),
    ]
    assert record.reasons(gaps) == ["NOT TIMED (3x): no GPU (a, b)", "NOT TIMED (1x): x (a both)"]


def test_a_plain_run_writes_only_where_git_ignores():
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    assert parser.parse_args([]).results == record.LOCAL
    assert parser.parse_args(["--save"]).results == record.RESULTS
    assert parser.parse_args(["--results", "there"]).results == Path("there")
    written = [record.LOCAL / "m" / "t.csv", record.LOCAL.parent / "REPORT.md"]
    ignored = subprocess.run(
        ["git", "check-ignore", *written], cwd=record.ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == list(map(str, written))
