"""summary.md: failures, times and kernels, the length of the printed part, damaged files."""

import json
from dataclasses import replace

import pytest

from benchmarks import record
from benchmarks.__main__ import FILES, load
from benchmarks.gpu import summary
from benchmarks.gpu.engine import Outcome
from benchmarks.gpu.plan import LAYERS, PARTS, Place, plan
from benchmarks.record import Row
from cumo_kernels.verification.verdicts import Result
from cumo_kernels.verification.verify import _report

HEAD = "# NVIDIA H100 80GB HBM3, torch 2.11.0, commit 0123456789, 2026-11-28 02:31 UTC, part prove, 440 s"
PLAIN = Row(
    run="1", op="expert_mlp", variant="dense", mode="forward", shape="clip-batch4", tokens=23080,
    sizes="H1024 I4096 O1024 E4 K2", pattern="uniform", dtype="bf16", timer="eager", cache="cold", rounds=9,
    ms_p20=1.0, ms_p50=2.0, ms_p80=3.0, tflops=300.0, gb_per_s=900.0, floor_ms=1.0, share_of_floor=0.5,
    ratio_to_dense=1.0, saved_bytes=None, peak_bytes=None, error=None, gradient_error=None, gate="",
    machine="nvidia_h100", device="NVIDIA H100", driver="1", torch="2", triton="3", commit="0", date="d",
)  # fmt: skip
OUTCOMES = [
    Outcome(step.name, "FAILED (1)", 60.0, "some last words | " * 9)
    for part in PARTS
    for step in plan(part, Place("cuda", record.ROOT, (9, 0)))
]


def failed(number: int, device: str = "cuda") -> list[Result]:
    reason = "output 0 is off at most by 5.543e-01, allowed 3.211e-02 (torch itself 7.425e-03); " + "x" * 400
    return [
        Result(f"expert_mlp T={t} dtype=bf16", "triton", device, failures=[reason]) for t in range(number)
    ]


def write(out, outcomes=OUTCOMES, runs=None) -> tuple[str, str]:
    """-> the printed text, and summary.md."""
    shown = summary.write(HEAD, outcomes, out, out / "results", runs)
    assert not list(out.glob(".*"))
    return shown, (out / "summary.md").read_text()


def report(path, results, missing=()) -> None:
    path.write_text(json.dumps(_report(results, list(missing), 0.0)))


def whole_table(results) -> None:
    """Write rows like a GPU run: every layer with every peer, eager and as a graph, in both patterns."""
    variants = ["cumo/triton", "cumo/cuda", "cumo/reference", "dense", "torch-grouped_mm", "cumo-original"]
    variants += ["megablocks-grouped", "sonicmoe", "quack-gemm"]
    record.append(
        [
            replace(PLAIN, shape=shape, pattern=pattern, variant=name, mode=mode, timer=timer)
            for shape in LAYERS for pattern in ("uniform", "skewed") for name in variants
            for mode in ("forward", "both") for timer in ("eager", "graph")
        ],
        results,
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, 5, 300])
@pytest.mark.parametrize("tabled", [False, True], ids=["no times", "all times"])
def test_the_printed_end_is_short_and_keeps_the_important_lines(number, tabled, tmp_path):
    report(tmp_path / "smoke.json", [*failed(number), Result("permute T=1", "cuda", "cuda")])
    layers = [f"expert_mlp {shape} T=23080" for shape in LAYERS]
    lines = [{"kind": "ceilings", "tflops": 650.5, "gb_per_s": 2800.4}]
    lines += [{"kind": "broken", "job": f"layer {i}", "why": "illegal " * 99} for i in range(10)]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tabled:
        whole_table(tmp_path / "results")
    shown, text = write(tmp_path)
    assert len(shown) < summary.MOST + 1 <= 10_800
    for where in (shown, text):
        assert where.startswith(HEAD)
        assert all(f"| {o.name} | FAILED (1) | 60 |" in where for o in OUTCOMES)
        assert f"smoke: {number + 1} cases, {number} failed" in where
        assert "ceilings: 650 TF/s bf16 product, 2800 GB/s copy" in where
        assert ("| case | variant | forward |" in where) == tabled
    # the file has what is not printed, every case with its command
    for result in failed(number):
        assert f"    python -m cumo_kernels verify --backend triton --case '{result.case}'\n" in text
    assert shown.count("--case '") >= min(number, 4)
    assert ("more lines are in summary.md" in shown) == (len(text) > summary.MOST)
    assert (shown == text) == (len(text) <= summary.MOST)
    if tabled:
        assert all(f"| {layer} | cumo/cuda |" in text for layer in layers)
        assert all(f"| {layer} | cumo/cuda |" in shown for layer in layers[:3])


def test_a_failure_is_named_once_with_the_command_that_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("CUMO_EMULATE", "CUMO_EMULATE_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    (result,) = failed(1, "cpu")
    stack = (
        'its process ended: Timeout! in File "/a/b/gemm.py", line 7 in launch; File "/c/ops.py", line 1 in f'
    )
    hang = replace(result, case="route T=3", failures=[stack])
    report(tmp_path / "smoke.json", [result])
    report(
        tmp_path / "verify.json", [hang, result],
        ["the rest: this run has not ended", "5 of 9 cases: --budget was spent", "cuda: it is not built"],
    )  # fmt: skip
    lines = summary.failures(tmp_path)
    assert lines[:2] == ["smoke: 1 cases, 1 failed", "verify: 2 cases, 2 failed"]
    assert lines[2:4] == [
        "verify: not checked: the rest: this run has not ended",
        "verify: not checked: 5 of 9 cases: --budget was spent",
    ]
    assert len(lines) == 8
    assert lines[5::2] == [f"    {result.command}", f"    {hang.command}"]
    assert "TRITON_INTERPRET=1 python -m cumo_kernels verify --backend triton --device cpu" in lines[5]
    assert "in gemm.py:7 launch; ops.py:1 f" in lines[6]


def test_a_refused_variant_of_ours_is_a_failure_with_its_command(tmp_path):
    gap = record.Gap(
        "expert_mlp", "cumo/triton", "all", "clip-batch4", 23080, "H1024", "skewed", "bf16",
        "the gate refuses it: output 0 is off", "nvidia_h100", "7",
    )  # fmt: skip
    others = [
        replace(gap, variant="cumo/cuda", reason="cumo/cuda broke the device: an illegal address"),
        replace(gap, variant="some-peer"),
        replace(gap, shape="connector-4", reason="no time was left for it"),
        replace(gap, shape="clip-image", run="6"),
    ]
    record.append_gaps([gap, *others], tmp_path / "results")
    assert record.runs(tmp_path / "results") == {"6", "7"}
    _, text = write(tmp_path, runs={"7"})
    assert (
        text.count("FAILED bench") == 2 and "FAILED bench cumo/cuda all: cumo/cuda broke the device" in text
    )
    assert "FAILED bench cumo/triton all: the gate refuses it: output 0 is off" in text
    command = "--only experts --shape clip-batch4 --pattern skewed --dtype bf16 --backend triton"
    assert f"    python -m benchmarks {command}" in text


def test_every_benchmark_has_its_file_and_our_variants_are_known():
    found = {load(name).OP: name for name in FILES if hasattr(load(name), "OP")}
    assert summary.FILES == {op: found[op] for op in summary.FILES}
    assert {"packed_expert_mlp", "lora_expert_mlp", "scored_route"} <= set(summary.FILES)
    ours = ("cumo/triton+pdl", "triton (int4)", "cuda", "torch (nf4)")
    assert all(map(record.is_ours, ours))
    assert not any(map(record.is_ours, ("torch-grouped_mm", "dense", "bitsandbytes (nf4)", "peft on triton")))


def test_times_are_ratios_within_a_case_and_of_graphs_if_measured(tmp_path):
    row = lambda variant, ms, **more: replace(PLAIN, variant=variant, ms_p50=ms, **more)
    record.append(
        [
            row("dense", 2.0), row("dense", 1.0, timer="graph"), row("dense", 4.0, mode="both"),
            row("cumo/cuda", 4.0, timer="graph", tflops=123.4, share_of_floor=0.25),
            row("cumo/cuda", 9.0), row("cumo/cuda", 16.0, mode="both", tflops=77.0),
            row("torch-grouped_mm", 6.0, share_of_floor=None, tflops=None),
            row("cumo/cuda", 5.0, pattern="skewed"), row("cumo/cuda", 7.0, dtype="fp32"),
            row("cumo/cuda", 8.0, op="moe_layer"), row("cumo/cuda", 3.0, op="route"),
            row("cumo/triton", 3.0, run="0"),
        ],
        tmp_path,
    )  # fmt: skip
    found = summary.times(tmp_path, {"1"})[4:]
    assert found == [
        "| expert_mlp clip-batch4 T=23080 | cumo/cuda | 4 | 123 | 25% | 0.25 | 1.50 | 16 | 77 | 0.25 |",
        "|  | dense | 1 | 300 | 50% | 1.00 | 6.00 | 4 | 300 | 1.00 |",
        "|  | torch-grouped_mm | 6 | 0 | - | 0.17 | 1.00 | - | - | - |",
        "| expert_mlp clip-batch4 T=23080 skewed | cumo/cuda | 5 | 300 | 50% | - | - | - | - | - |",
        "| expert_mlp clip-batch4 T=23080 fp32 | cumo/cuda | 7 | 300 | 50% | - | - | - | - | - |",
        "| moe_layer clip-batch4 T=23080 | cumo/cuda | 8 | 300 | 50% | - | - | - | - | - |",
    ]
    assert "cumo/triton" in "\n".join(summary.times(tmp_path, None))
    assert summary.times(tmp_path / "nowhere", None) == []


def test_kernels_are_listed_by_their_short_names(tmp_path):
    us = {f"void cumo::gemm_{i}<Tile<64>>(int)": [100.0 - i, 1.0] for i in range(7)}
    row = {"kind": "kernels", "layer": "clip-batch4", "backend": "cuda",
           "us": {"forward": {}, "both": us}, "host_us": {"forward": 12.3, "both": 45.6}}  # fmt: skip
    (tmp_path / "kernels.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:50] + "\n[]\n")
    assert summary.kernels(tmp_path) == [
        "us of clip-batch4 cuda: gemm_0 100, gemm_1 99, gemm_2 98, gemm_3 97, gemm_4 96; host 12/46",
        'kernels: a damaged line: {"kind": "kernels", "layer": "clip-batch',
        "kernels: a damaged line: []",
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"results": 3}', '{"results": [{}], "not_checked": []}', "\xff"]
)
def test_damaged_files_are_not_an_error(text, tmp_path):
    for name in ("smoke.json", "verify.json", "kernels.jsonl"):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    shown, whole = write(tmp_path, [Outcome("smoke", "FAILED (-9)", 3.0, "")])
    assert shown == whole and "| smoke | FAILED (-9) | 3 |  |" in whole and "cases" not in whole
