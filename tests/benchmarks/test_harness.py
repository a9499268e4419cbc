"""The harness: no timing without a passed gate, correct rows, pictures only from files."""

import argparse
import csv
import importlib.util
import shutil
import sys
import time
import weakref
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import harness, plot, record, selection, timing
from benchmarks.__main__ import FILES, load
from benchmarks.__main__ import main as bench
from benchmarks.cases import (
    bench_activation,
    bench_experts,
    bench_grouped_gemm,
    bench_layer,
    bench_model,
    bench_overhead,
    bench_permutation,
    bench_routing,
    bench_scaling,
    shapes,
)
from benchmarks.cases.shapes import SHAPES, Shape
from benchmarks.harness import Case, Workload
from benchmarks.peers import table
from cumo_kernels import dispatch
from cumo_kernels.__main__ import main as front_door

pytest.importorskip("matplotlib")

SMALL = Shape("small", 24, 32, 48, 32, 4, 2, "quick_gelu", True, groups=2)
HERE = {"cumo-original", "torch-grouped_mm", "transformers-grouped_mm", "transformers-batched_mm"}
GATED = replace(SMALL, name="small-gated", activation="swiglu", bias=False, O=16)


def measured(file, shape=SMALL, dtype="fp32", **options):
    lines = []
    case = Case(shape, dtype, modes=options.pop("modes", ("forward", "both")))
    rows, gaps = harness.measure(
        file.OP, file.setup, case, "cpu", "run", seconds=0, log=lines.append, wanted=["reference"], **options
    )
    assert all(gap.variant in "\n".join(lines) for gap in gaps)
    return rows, "\n".join(lines)


@pytest.mark.parametrize("shape", [SMALL, GATED], ids=lambda shape: shape.name)
@pytest.mark.parametrize(
    "file",
    [
        bench_experts,
        bench_layer,
        bench_overhead,
        bench_grouped_gemm,
        bench_routing,
        bench_permutation,
        bench_activation,
        bench_scaling,
    ],
    ids=lambda file: file.__name__.removeprefix("benchmarks."),
)
def test_every_file_measures_and_nothing_is_refused(file, shape):
    rows, log = measured(file, shape)
    assert "the gate refuses" not in log and "cannot run" not in log
    variants = {row.variant for row in rows}
    assert {row.mode for row in rows if row.variant == "cumo/reference"} == {"forward", "both"}
    assert len(variants) >= 2  # a variant to compare with
    for row in rows:
        assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80 and row.rounds >= 3
        assert (
            row.timer in ("cpu", "wall")
            and row.floor_ms is None
            and row.commit
            and row.torch == torch.__version__
        )
        assert (row.variant == "dense") == (row.error is None)


def test_whole_models_run_with_the_originals_loop():
    tower = bench_model.cases("cpu", False)[0].shape
    workload = bench_model.setup(tower, torch.float32, "cpu", "uniform")
    verdict = harness.gate({"loop": workload.peers["cumo-original"]}, workload, "cpu")["loop"]
    assert (verdict.refusal, verdict.backward_refusal) == (None, None) and verdict.error < 2
    assert set(workload.peers) | set(workload.gaps) == {peer.name for peer in table.PEERS}


def test_whole_models_have_the_sizes_of_their_rows():
    cpu = {case.shape.name: case.shape for case in bench_model.cases("cpu", False)}
    assert (cpu["clip-tower"].T, cpu["clip-tower"].sizes) == (65, "H256 I1024 O256 E4 K2")
    gpu = {case.shape.name: case for case in bench_model.cases("cuda", False)}
    tower = gpu["clip-tower"]
    assert (tower.shape.T, tower.shape.sizes) == (5770, "H1024 I4096 O1024 E4 K2")
    layers = lambda name: tuple(
        part.num_hidden_layers
        for size in [bench_model.config_of(bench_model.SIZES["cuda"][name])]
        for part in (size.vision_config, size.text_config)
    )
    assert layers("clip-tower")[0] == 24
    for name in ("cumo-step", "cumo-generate"):
        vision, text = layers(name)
        note = bench_model.SIZES["cuda"][name].note
        assert note == f"{vision} of 24 tower layers, {text} of 32 text layers"
        assert gpu[name].shape.sizes == "H4096 I14336 O4096 E1 K1" and gpu[name].shape.T == 128 + 576
        assert layers(gpu[name].gate_shape.name) < (vision, text)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    plain = dispatch.implementation("reference", "expert_mlp")

    def wrong(*args):
        out, *rest = plain(*args)
        return (out * 1.01, *rest)

    monkeypatch.setitem(dispatch._implementations, ("reference", "expert_mlp"), wrong)
    rows, log = measured(bench_experts)
    assert "cumo/reference: NOT TIMED (all): the gate refuses it: output 0 is off" in log
    assert {row.variant for row in rows} == {"dense"} | HERE


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    plain = dispatch.implementation("reference", "expert_mlp_backward")
    monkeypatch.setitem(
        dispatch._implementations,
        ("reference", "expert_mlp_backward"),
        lambda *args: tuple(g * 1.01 for g in plain(*args)),
    )
    rows, log = measured(bench_experts)
    assert "cumo/reference: NOT TIMED (backward): the gate refuses it: gradient" in log
    assert {row.mode for row in rows if row.variant == "cumo/reference"} == {"forward"}


def test_a_peer_that_raises_or_is_wrong_has_no_row():
    def setup(shape, dtype, device, pattern):
        x = torch.randn(100)

        def broken(x):
            raise RuntimeError("no such kernel")

        return Workload(
            run=torch.sin,
            reference=torch.sin,
            inputs=(x,),
            peers={"broken": broken, "liar": torch.cos, "blind": lambda x: torch.sin(x).detach()},
            forward_only={"blind": "it has no backward"},
        )

    lines = []
    rows, gaps = harness.measure("t", setup, Case(SMALL, "fp32"), "cpu", "r", 0, ["reference"], lines.append)
    reasons = {gap.variant: (gap.mode, gap.reason) for gap in gaps}
    assert reasons["broken"] == ("all", "the gate refuses it: RuntimeError: no such kernel")
    assert reasons["liar"][1].startswith("the gate refuses it: output 0 is off")
    assert reasons["blind"] == ("backward", "the gate refuses it: it has no backward")
    assert {row.variant for row in rows} == {"cumo/reference", "blind"}
    assert {row.mode for row in rows if row.variant == "blind"} == {"forward"}


def test_a_peer_that_fits_only_at_the_gates_size_is_a_gap():
    def setup(shape, dtype, device, pattern):
        large = shape == SMALL
        x, sine = torch.randn(100), {"sine": torch.sin}
        return Workload(
            torch.sin, torch.sin, (x,), peers={} if large else sine, gaps={"sine": "no room"} if large else {}
        )

    case = Case(SMALL, "fp32", modes=("forward",), gate_shape=replace(SMALL, T=12))
    rows, gaps = harness.measure("t", setup, case, "cpu", "r", 0, ["reference"], lambda line: None)
    assert [(gap.variant, gap.mode, gap.reason) for gap in gaps] == [("sine", "all", "no room")]
    assert {row.variant for row in rows} == {"cumo/reference"}


def test_saved_bytes_are_those_of_the_memory_plan():
    workload = bench_experts.setup(SMALL, torch.float32, "cpu", "uniform")
    plan = harness.saved_bytes(workload.run, workload.inputs)
    integers = 4 * (2 * SMALL.slots + SMALL.E + 1)  # permutation, its inverse, offsets
    assert plan == 4 * SMALL.slots * SMALL.I + integers
    assert harness.saved_bytes(workload.peers["cumo-original"], workload.inputs) > 2 * plan


def test_only_a_backward_alone_keeps_a_graph():
    class Noted(torch.autograd.Function):
        alive = 0

        @staticmethod
        def forward(ctx, x):
            Noted.alive += 1
            ctx.mark = weakref.finalize(ctx, lambda: setattr(Noted, "alive", Noted.alive - 1))
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(3)
    steps = harness.steps_of(Noted.apply, (x,), ("forward", "both"))
    steps["both"]()
    assert Noted.alive == 0
    assert harness.steps_of(Noted.apply, (x,), ("backward",))["backward"]()[0].shape == x.shape
    steps = harness.steps_of(Noted.apply, (x,), ("backward",))
    assert Noted.alive == 1
    del steps


def test_gate_shape_shrinks_only_what_is_too_large():
    assert harness.gate_shape(SMALL, "cpu") == SMALL
    assert harness.gate_shape(SHAPES["clip-1-crop"], "cpu") == SHAPES["clip-1-crop"]
    for shape in SHAPES.values():
        small = harness.gate_shape(shape, "cpu")
        assert small.T <= shape.T and small.I <= shape.I and small.T % small.groups == 0
        assert (small.H, small.E, small.K) == (shape.H, shape.E, shape.K)
    assert harness.gate_shape(SHAPES["mixtral-train"], "cpu").I < 14336


def test_flops_are_those_of_the_spec():
    for name, flops in (  # cumo_spec.md section 6
        ("clip-1-crop", 19.4e9),
        ("clip-image", 194e9),
        ("clip-batch4", 774e9),
        ("connector-4", 232e9),
        ("mixtral-prefill", 493e9),
        ("mixtral-train", 5.77e12),
    ):
        assert float(f"{SHAPES[name].gemm_flops:.3g}") == flops


@pytest.mark.parametrize("file", [bench_experts, bench_grouped_gemm], ids=["layer", "gemm"])
def test_the_floor_counts_the_weights_of_experts_with_rows(file):
    even, two = (
        file.setup(SMALL, torch.float32, "cpu", pattern).bytes for pattern in ("uniform", "one_expert")
    )
    weights = SMALL.weights if file is bench_experts else SMALL.E * SMALL.width * SMALL.H
    assert even - two == 4 * weights // 2  # top-2: half of the four experts


def test_variants_are_timed_alternately():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleave(steps, timing.CpuClock(), 0, least=3)
    assert order[:3] == list("abc")  # warm-up
    assert order[3:] == list("abc" + "bca" + "cab")
    assert all(t.rounds == 3 for t in times.values())


def test_one_thread_is_timed_by_processor_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    clock = timing.CpuClock()
    assert clock.name == "cpu" and clock.time(lambda: time.sleep(0.2)) < 100
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    clock = timing.CpuClock()
    assert clock.name == "wall" and clock.time(lambda: time.sleep(0.2)) >= 200


def test_predictions_are_marked_and_shown_with_measurements(tmp_path):
    folder = tmp_path / "predicted"
    folder.mkdir()
    line = "nvidia_h100,clip-1-crop,bf16,{},{},0.01,0.8,{},{}"
    gemms = [
        line.format(*row, "gemm 4096x1024")
        for row in (("up", 0.012, 0), ("down", 0.013, 8), ("grad of x", 0.02, 0))
    ]
    gemms += [line.format(op, ms, 0, "2 kernels, k") for op, ms in (("route", 0.002), ("combine", 0.001))]
    head = "gpu,shape,dtype,gemm,ms,floor_ms,share_of_floor,stack,size"
    (folder / "nvidia_h100_bf16.csv").write_text("\n".join([head, *gemms]))
    row = a_row(machine="nvidia_h100", op="expert_mlp", shape="clip-1-crop", dtype="bf16", ms_p50=0.05)
    row = replace(row, variant="cumo/triton")
    faster = replace(row, variant="cumo/cuda", ms_p50=0.01)  # the prediction is for Triton's kernels
    text = "\n".join(plot.predictions(folder, [row, faster]))
    assert "Predicted for nvidia_h100, bf16: not measured" in text
    assert "| clip-1-crop | 0.025 | 80% | 0.045 | 67% |" in text
    assert "| 0.003 | 1 of 5 | 0.05 ms (2.00x), not yet |" in text


def a_row(**changes) -> record.Row:
    rows, _ = measured(bench_activation, modes=("forward",))
    return replace(rows[0], **changes)


def test_rows_survive_the_file(tmp_path):
    row = a_row(machine="m", op="o")
    record.append([row], tmp_path)
    record.append([replace(row, ms_p50=2.5, floor_ms=None, gate="a, b")], tmp_path)
    first, second = record.read(tmp_path)
    assert second.ms_p50 == 2.5 and second.gate == "a, b" and second.floor_ms is None
    assert replace(first, ms_p50=0, ms_p20=0, ms_p80=0, gb_per_s=0, error=0, gradient_error=0) == replace(
        row, ms_p50=0, ms_p20=0, ms_p80=0, gb_per_s=0, error=0, gradient_error=0
    )
    assert record.latest([first, second]) == [second]
    with (tmp_path / "m" / "o.csv").open() as file:
        assert next(csv.reader(file)) == [field.name for field in fields(record.Row)]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["o.csv"]


def test_a_file_with_other_columns_is_not_touched(tmp_path):
    row = a_row(machine="m", op="o")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "o.csv").write_text("run,op,speed\n1,2,3\n")
    with pytest.raises(ValueError, match=r"must have the columns run,op,variant,.*, got run,op,speed"):
        record.append([row], tmp_path)
    assert (tmp_path / "m" / "o.csv").read_text() == "run,op,speed\n1,2,3\n"


def test_the_report_is_made_only_from_files(tmp_path):
    rows = measured(bench_experts)[0] + measured(bench_layer)[0]
    rows += [replace(row, op="scaling", shape="over-tokens", tokens=n) for row in rows for n in (24, 48)]
    record.append(rows, tmp_path / "results")
    path = plot.report(tmp_path / "results")
    text = path.read_text()
    assert "Not yet measured on a GPU" in text and "cumo/reference" in text
    folder = tmp_path / "results" / rows[0].machine
    for name in plot.PICTURES:
        assert f"({folder.relative_to(tmp_path)}/{name})" in text
        picture = plot.plt.imread(folder / name)
        assert picture.shape[0] > 100 and picture.std() > 0.01  # not one colour
    ours = next(
        r for r in rows if r.op == "expert_mlp" and r.variant == "cumo/reference" and r.mode == "both"
    )
    assert plot.milliseconds(ours.ms_p50) in text
    assert not list(tmp_path.rglob(".*")) and not list(tmp_path.rglob("tmp*"))


def test_a_machine_without_matplotlib_gets_the_tables(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("plot_bare", plot.__file__)
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    record.append(measured(bench_activation, modes=("forward",))[0], tmp_path / "results")
    text = bare.report(tmp_path / "results").read_text()
    assert "matplotlib is not installed here" in text and "cumo/reference" in text
    assert not list(tmp_path.rglob("*.png"))


def test_an_empty_report_states_it(tmp_path):
    text = plot.report(tmp_path / "results").read_text()
    assert "Not yet measured on a GPU" in text and "Nothing has been measured yet" in text


def test_speedups_are_relative_to_the_loop_of_the_same_case():
    rows, _ = measured(bench_experts, modes=("forward",))
    times = {"cumo/reference": 2.0, "cumo-original": 6.0, "torch-grouped_mm": 3.0, "dense": 1.0}
    rows = [replace(row, ms_p50=times[row.variant]) for row in rows if row.variant in times]
    ((_, found),) = plot.speedups(rows).items()
    assert found == {"cumo/reference": 3, "cumo-original": 1, "torch-grouped_mm": 2, "dense": 6}
    # rows of another run or clock were not timed alternately with the loop
    text = "\n".join(plot.table(rows))
    assert "2 ms, 3.00x" in text and "cumo-original 3.00x, torch-grouped_mm 1.50x" in text
    for other in ({"run": "another"}, {"timer": "graph"}):
        apart = [replace(row, **other) if row.variant == "cumo/reference" else row for row in rows]
        ((_, found),) = plot.speedups(apart).items()
        assert "cumo/reference" not in found and "dense" in found
        assert "2 ms, 3.00x" not in (text := "\n".join(plot.table(apart))) and "3 ms, 2.00x" in text
    assert "forward, CUDA graph" in text
    faster = replace(rows[0], variant="cumo/reference", ms_p50=0.5, timer="graph")
    eager = [replace(row, timer="eager") for row in rows]
    assert next(iter(plot.speedups([*eager, faster]).values()))["cumo/reference"] == 3


def test_every_op_has_its_roofline(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure) or path)
    rows = [
        a_row(op="expert_mlp", machine="nvidia_h100", tflops=300.0, gb_per_s=900.0),
        a_row(op="activate", machine="nvidia_h100", tflops=None, gb_per_s=2000.0),
    ]
    assert plot.plot_roofline(rows, tmp_path / "r.png") is not None
    seen = [(axis.get_title(), axis.get_ylabel()) for axis in figures[0].axes if axis.get_visible()]
    assert seen == [("expert layer", "TFLOP/s"), ("activation", "GB/s")]
    roofs = [max(axis.lines[0].get_ydata()) for axis in figures[0].axes[:2]]
    assert roofs[0] <= 989 and roofs[1] == 3350


def test_the_committed_report_matches_the_committed_rows(monkeypatch, tmp_path):
    """`python -m benchmarks.plot` regenerates it; the pictures are not compared."""
    folder = record.RESULTS.parent
    for name in ("results", "predictions/predicted"):
        shutil.copytree(folder / name, tmp_path / name)
    there = lambda rows, path: path if path.exists() else None
    monkeypatch.setattr(plot, "PICTURES", dict.fromkeys(plot.PICTURES, there))
    assert plot.report(tmp_path / "results").read_text() == (folder / "REPORT.md").read_text()


def test_the_report_names_every_version_it_has_rows_of(tmp_path):
    row = a_row(machine="m")
    record.append(
        [row, replace(row, variant="b", torch="9.9", commit="abc", date="2001-01-01")], tmp_path / "results"
    )
    line = next(
        line for line in plot.report(tmp_path / "results").read_text().splitlines() if "; torch " in line
    )
    assert f"torch {row.torch}, 9.9" in line and f"{row.commit}, abc" in line and "2001-01-01" in line


def test_every_peer_is_there_or_has_a_reason():
    runnable, gaps = table.available(SMALL, torch.float32, "cpu")
    names = {peer.name for peer in table.PEERS}
    assert {"quack", "sonic-moe", "liger", "scattermoe", "triton_kernels", "moe-ops"} < names
    assert {"transformer-engine", "liger-cute", "dist-moe", "lightmoe"} < names
    assert {peer.name for peer in runnable} | set(gaps) == names and all(gaps.values())
    assert {peer.name for peer in runnable} == HERE


@pytest.mark.parametrize("file", [bench_experts, bench_layer], ids=["experts", "layer"])
def test_every_peer_of_a_layer_has_a_row_or_a_gap(file):
    case = Case(SMALL, "fp32", modes=("forward",))
    rows, gaps = harness.measure(file.OP, file.setup, case, "cpu", "run", 0, ["reference"], lambda line: None)
    timed, stated = {row.variant for row in rows}, [gap.variant for gap in gaps]
    assert len(stated) == len(set(stated)) and not timed & set(stated)
    assert {peer.name for peer in table.PEERS} <= timed | set(stated)
    assert all(gap.reason and gap.mode == "all" for gap in gaps)


def test_every_stem_has_a_file_and_every_file_cases():
    for file in map(load, FILES):
        for device in ("cpu", "cuda"):
            few, full = file.cases(device, False), file.cases(device, True)
            assert few and len(full) >= len(few)
            assert all(case.shape.T % case.shape.groups == 0 for case in full)
    assert {name for names in (shapes.FIRST | shapes.REST).values() for name in names} <= set(SHAPES)
    assert len(shapes.chosen("cuda", True)) == len(SHAPES) - 1  # all but the one cut for the CPU


@pytest.mark.slow
def test_bench_from_the_front_door(capfd):
    assert front_door(["bench", "--help"]) == 0
    assert "--budget" in capfd.readouterr().out


def test_bench_without_a_checkout_reports_it(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("cumo_kernels.__main__.ROOT", tmp_path)
    assert front_door(["bench"]) == 1
    assert "part of a checkout" in capfd.readouterr().out


def asked(tmp_path, *words) -> list[record.Row]:
    """Rows of `python -m benchmarks --only experts`, as in a rehearsal of make gpu."""
    fixed = [
        "--only",
        "experts",
        "--device",
        "cpu",
        "--backend",
        "reference",
        "--no-report",
        "--seconds",
        "0",
    ]
    assert bench([*fixed, "--results", str(tmp_path), *words]) == 0
    return record.read(tmp_path)


def test_tiny_reduces_every_timed_shape(tmp_path, monkeypatch):
    seen = []
    setup = bench_experts.setup
    monkeypatch.setattr(
        bench_experts, "setup", lambda shape, *rest: (seen.append(shape), setup(shape, *rest))[1]
    )
    rows = asked(tmp_path, "--tiny", "--shape", "mixtral-train", "--shape", "clip-1-crop", "--dtype", "bf16")
    small = {name: shapes.tiny(SHAPES[name]) for name in ("mixtral-train", "clip-1-crop")}
    assert seen and set(seen) == set(small.values())
    assert {(row.shape, row.tokens, row.sizes, row.dtype) for row in rows} == {
        (name, shape.T, shape.sizes, "bf16") for name, shape in small.items()
    }
    # a case that is requested once is measured once
    assert len({row.variant for row in rows if row.shape == "clip-1-crop" and row.mode == "both"}) == len(
        [row for row in rows if row.shape == "clip-1-crop" and row.mode == "both"]
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_a_tiny_shape_differs_only_in_size(shape):
    small = shapes.tiny(shape)
    assert small.gemm_flops < 1e8 and small.T <= 33 and small.T % small.groups == 0 and small.K <= small.E
    assert (small.name, small.activation, small.bias) == (shape.name, shape.activation, shape.bias)
    assert (small.O == small.H) == (shape.O == shape.H)


def test_a_pattern_replaces_those_of_the_cases(tmp_path):
    words = ["--tiny", "--shape", "mixtral-decode16", "--pattern", "skewed", "--pattern", "one_expert"]
    rows = asked(tmp_path, *words)
    assert {row.pattern for row in rows} == {"skewed", "one_expert"}
    (file,) = [file for file in map(load, FILES) if file.OP == "expert_mlp"]
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    args = parser.parse_args(["--shape", "clip-batch4", "--pattern", "uniform", "--dtype", "bf16"])
    case = Case(SHAPES["clip-batch4"], "bf16", "uniform")
    assert selection.cases_of(file, "cuda", args) == [case]  # as in make gpu
