"""Clocks and graphs, without a GPU: warm-up, the choice of clock, and failed captures."""

import itertools
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import harness, plot, record, timing
from benchmarks.cases import bench_activation, bench_overhead
from benchmarks.cases.shapes import Shape
from benchmarks.harness import Case
from benchmarks.steps import captured

SMALL = Shape("small", 24, 32, 48, 32, 4, 2, "quick_gelu", True, groups=2)


class Warming:
    """A clock of a machine whose steps get faster, by a tenth each, until they take 1 ms."""

    name, cache = "eager", "cold"

    def __init__(self, slow: float, settling: float = timing.SETTLING):
        self.at, self.took, self.settling = 0.0, slow, settling

    def now(self) -> float:
        return self.at

    def time(self, step) -> float:
        step()
        took, self.took = self.took, max(1.0, self.took * 0.9)
        self.at += took / 1e3
        return took


def test_a_gpu_is_warmed_up_before_it_is_measured():
    clock = Warming(4.0)
    found = timing.interleave({"a": lambda: None, "b": lambda: None}, clock, 0)
    assert found["a"].ms_p20 == found["b"].ms_p80 == 1.0  # not one round at a lower clock
    assert 0 < clock.settling < timing.SETTLING  # the rest is for the next mode
    cold = Warming(4.0, settling=0.0)
    assert timing.interleave({"a": lambda: None}, cold, 0)["a"].ms_p50 > 2


def test_warming_up_ends_where_times_never_settle():
    clock = Warming(1.0)
    plain, turn = clock.time, itertools.count()
    clock.time = lambda step: plain(step) + next(turn) % 2
    timing.interleave({"a": lambda: None}, clock, 0)
    assert timing.SETTLING <= clock.at < timing.SETTLING + 0.01 and clock.settling == 0
    timing.interleave({"a": lambda: None}, clock, 0)
    assert clock.at < timing.SETTLING + 0.02  # per case, not per mode


def test_a_cpu_is_not_warmed_up():
    order = []
    timing.interleave({"a": lambda: order.append("a")}, timing.CpuClock(), 0, least=3)
    assert len(order) == 4


def test_host_time_begins_and_ends_with_an_idle_gpu(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("idle"))
    clock = timing.clock_of("cuda", host=True)
    assert clock.time(lambda: order.append("step")) >= 0
    assert order == ["idle", "step", "idle"] and clock.cache == "warm"
    assert isinstance(timing.clock_of("cpu", host=True), timing.CpuClock)


@pytest.mark.parametrize(
    "file, hosts", [(bench_overhead, [True, False]), (bench_activation, [False])], ids=["overhead", "others"]
)
def test_only_the_overhead_benchmark_measures_host_time(file, hosts, monkeypatch):
    asked = []
    monkeypatch.setattr(timing, "clock_of", lambda device, host: asked.append(host) or timing.CpuClock())
    case = Case(SMALL, "fp32", modes=("forward",))
    rows, _ = harness.measure(file.OP, file.setup, case, "cpu", "1", 0, ["reference"], lambda line: None)
    assert asked == hosts and rows


@pytest.fixture
def no_graphs(monkeypatch):
    """Only `fine` can be captured; the CPU replaces the GPU."""

    def capture(step):
        if step() != "fine":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return step

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(timing, "captured", capture)


def test_a_failed_capture_has_a_reason(no_graphs):
    refused = {}
    found = captured({"fine": lambda: "fine", "waits": lambda: "no"}, refused.__setitem__)
    assert list(found) == ["fine"]
    reason = "it cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    assert refused == {"waits": reason}


def test_a_variant_without_a_graph_is_a_gap_until_it_has_one(no_graphs, monkeypatch, tmp_path):
    """A case timed as on a GPU: wall-clock time replaces events, host time and graphs."""
    clock = types.SimpleNamespace(name="host", cache="warm", settling=0, now=timing.time.perf_counter)
    clock.time = timing.CpuClock.time.__get__(clock)
    graph = types.SimpleNamespace(**{**vars(clock), "name": "eager", "cache": "cold"})
    workload = bench_activation.setup(SMALL, torch.float32, "cpu", "uniform")
    run = {"peer": {"forward": lambda: "no"}, "cumo/triton": {"forward": lambda: "fine"}}
    case, gaps = Case(SMALL, "fp32", modes=("forward",)), []
    monkeypatch.setattr(harness, "floor_ms", lambda *_: None)
    monkeypatch.setattr(harness, "peak_bytes", lambda *_: None)
    keep = lambda variant, mode, reason: gaps.append(
        harness.gap_of("activate", case, variant, mode, reason, "cpu", "1")
    )
    facts = record.machine("cpu") | record.versions() | {"commit": "c"}
    rows = harness._timed(
        "activate", case, "forward", workload, run, {}, {}, "", facts, "cuda", "1", 0, lambda line: None,
        (clock, graph), keep,
    )  # fmt: skip
    assert {(row.variant, row.timer, row.cache) for row in rows} == {
        ("peer", "host", "warm"), ("cumo/triton", "host", "warm"), ("cumo/triton", "graph", "cold")
    }  # fmt: skip
    assert [(gap.variant, gap.mode) for gap in gaps] == [("peer", "forward, CUDA graph")]
    record.append_gaps(gaps, tmp_path)
    lines = "\n".join(plot.not_timed(record.read_gaps(tmp_path), rows))
    assert "- peer, forward, CUDA graph: it cannot be captured: RuntimeError" in lines
    later = replace(rows[0], variant="peer", run="2", timer="graph")
    assert plot.not_timed(gaps, [later]) == [] and plot.not_timed(gaps, [replace(later, timer="host")])
