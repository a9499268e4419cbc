"""Benchmarks of experts in 4 bits and of LoRA: their gates, their peers, and the table of memory."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import harness, lora
from benchmarks.cases import bench_lora, bench_packed
from benchmarks.cases.shapes import SHAPES, tiny
from benchmarks.harness import Case
from benchmarks.peers import packed
from cumo_kernels import dispatch
from cumo_kernels.packing.formats import FORMATS
from cumo_kernels.testing import make_routing

TINY = tiny(SHAPES["mixtral-decode16"])


def measured(file, modes=("forward", "both")):
    lines = []
    case = Case(TINY, "fp32", modes=modes)
    rows, gaps = harness.measure(
        file.OP, file.setup, case, "cpu", "run", seconds=0, log=lines.append, wanted=["reference"]
    )
    return rows, gaps, "\n".join(lines)


def test_every_format_is_gated_and_timed():
    rows, gaps, log = measured(bench_packed)
    assert "(all): the gate refuses" not in log and "cannot run" not in log
    variants = {row.variant for row in rows}
    assert {"cumo/reference", "torch (plain)"} | {
        f"torch ({name})" for name in FORMATS if name != "nf4"
    } <= variants
    peers = {"bitsandbytes", "grouped-nf4-gemm"}
    assert peers <= variants | {gap.variant for gap in gaps}
    assert all(row.gate == "run at H128 I128 O128 E4 K2, without biases" for row in rows)
    saved = {row.variant: row.saved_bytes for row in rows if row.mode == "both"}
    assert saved["cumo/reference"] == saved["torch (int4)"] == saved["torch (plain)"]  # no weights
    if "bitsandbytes" in saved:  # it keeps both dequantised weights
        whole = 4 * 4 * 3 * 128 * 128
        assert saved["bitsandbytes"] == saved["cumo/reference"] + whole


def test_the_weights_are_the_same_in_every_format():
    plain, formats = bench_packed.weights((2, 16, 256), torch.float32, "cpu")
    assert plain.unique().numel() > 4
    for name, weight in formats.items():
        assert torch.equal(weight.dequantize(), plain), name


def test_wrong_packed_products_are_not_timed(monkeypatch):
    plain = dispatch.implementation("reference", "adapted_expert_mlp")

    def wrong(*args):
        out, *rest = plain(*args)
        return (out * 1.01, *rest)

    monkeypatch.setitem(dispatch._implementations, ("reference", "adapted_expert_mlp"), wrong)
    for file in (bench_packed, bench_lora):
        rows, _, log = measured(file, ("forward",))
        assert "cumo/reference: NOT TIMED (all): the gate refuses it" in log
        assert "cumo/reference" not in {row.variant for row in rows} and rows


def test_adapters_are_gated_and_keep_no_weights():
    rows, _, log = measured(bench_lora)
    assert "the gate refuses" not in log
    saved = {row.variant: row.saved_bytes for row in rows if row.mode == "both"}
    assert saved["cumo/reference"] < saved["torch (peft's sum)"]


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    shape = bench_packed.fitting(TINY)
    routing = make_routing("uniform", shape.T, shape.E, shape.K, "cpu")
    up, down = (
        bench_packed.weights(size, torch.float32, "cpu")[1]["nf4"]
        for size in ((shape.E, shape.width, shape.H), (shape.E, shape.O, shape.I))
    )
    monkeypatch.setattr(packed, "_missing", lambda module: f"{module} cannot be imported")
    layers, _, gaps = packed.available(shape, routing, up, down, torch.float32)
    assert layers == {} and gaps == {
        "bitsandbytes": "bitsandbytes.functional cannot be imported",
        "grouped-nf4-gemm": "cpu_grouped cannot be imported",
    }
    monkeypatch.setattr(packed, "_missing", lambda module: None)
    layers, _, gaps = packed.available(replace(shape, bias=True), routing, up, down, torch.float32)
    assert gaps["grouped-nf4-gemm"] == "it has no biases"


def test_the_table_of_memory_is_behind_its_check(capsys, monkeypatch):
    words = ["--hidden", "64", "--intermediate", "96", "--rank", "4", "--tokens", "32"]
    assert lora.main(words) == 0
    text = capsys.readouterr().out
    assert "measured on a CPU" in text and "| factors: W x + B (A x) |" in text
    assert json.loads(text.splitlines()[2].split("; ", 1)[1])["torch"] == torch.__version__
    kept, calls = lora.step, []

    def wrong(*args):
        calls.append(args)
        return tuple(t * len(calls) for t in kept(*args))

    monkeypatch.setattr(lora, "step", wrong)
    with pytest.raises(SystemExit, match=r"the two ways differ by .* in fp64: nothing is reported"):
        lora.main(words)
    assert capsys.readouterr().out == ""
