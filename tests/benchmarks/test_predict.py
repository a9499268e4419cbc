"""Predictions: their arithmetic by hand, the listed regressions, and one GEMM that is compiled."""

import csv
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.cases.shapes import SHAPES
from benchmarks.predictions import cuda_kernels, four_bits, layers, other_ops
from cumo_kernels.tiles import codegen, hardware, problems, tuning
from cumo_kernels.tiles.hardware import KIB
from cumo_kernels.tiles.tuning import Config, Problem

H100 = hardware.find("nvidia_h100")
GEMM = Problem("gemm", torch.bfloat16, 1154, 4096, 1024, 4)
TILE = Config(128, 256, 64, num_warps=8, num_stages=4)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        pytest.param(255, 200 * KIB, 8, 1, id="one-by-shared-memory-and-registers"),
        pytest.param(128, 100 * KIB, 8, 2, id="two-by-both"),
        pytest.param(168, 60 * KIB, 4, 3, id="three-by-either"),
        pytest.param(40, 2 * KIB, 8, 6, id="six-by-registers"),
        pytest.param(16, 0, 1, 32, id="never-more-than-32"),
    ],
)
def test_blocks_per_sm(registers, shared, warps, blocks):
    assert layers.blocks_per_sm(H100, registers, shared, warps) == blocks


def test_tiles_of_one_clip_crop():
    # 288.5 rows per expert fill 3 row tiles of 128; 16 column tiles
    tiles, use = layers.tile_count(GEMM, TILE)
    assert tiles == 4 * 3 * 16 and use == 288.5 / 384
    tiles, use = layers.tile_count(replace(GEMM, kind="weight_grad"), TILE)
    assert tiles == 4 * 16 * 16 and use == 288.5 / 384
    # two tokens use two of four experts
    assert layers.tile_count(replace(GEMM, rows=2), TILE)[0] == 2 * 16


def test_two_blocks_share_the_tensor_cores_of_one_multiprocessor():
    report = codegen.bare(SimpleNamespace(fn=SimpleNamespace(__name__="gemm")), None, H100, {})
    report.registers, report.num_warps = 255, 4
    row = lambda blocks: layers.predict(
        SHAPES["clip-1-crop"],
        "up",
        GEMM,
        replace(TILE, BLOCK_N=128, num_warps=4, PER_SM=blocks),
        report,
        H100,
    )
    # 384 tiles on 132 of them: three for some, either one at a time or two and then one
    assert row(2).waves == 384 / 132 and row(2).wave_use == 384 / 132 / 3
    assert row(2) == row(1)


def test_cost():
    assert layers.cost(GEMM) == (2 * 1154 * 4096 * 1024, 2 * (1154 * 5120 + 4 * 4096 * 1024))
    flops, bytes_ = layers.cost(replace(GEMM, gated=True, rows=1))
    assert flops == 2 * 8192 * 1024 and bytes_ == 2 * (8192 + 1024 + 8192 * 1024)


def test_programs_of_a_launch_are_counted_for_every_form_of_grid(monkeypatch):
    from triton.runtime.jit import JITFunction

    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **kwargs: seen.append(kwargs))
    kernel = object.__new__(JITFunction)
    kernel.arg_names = ["n", "BLOCK"]
    with other_ops.grids() as programs:
        JITFunction.run(kernel, 100, grid=(3, 4), warmup=False)
        JITFunction.run(kernel, 100, grid=lambda meta: (meta["n"] // meta["BLOCK"], 2), BLOCK=25)
    assert programs == [12, 8] and len(seen) == 2


def test_regressions_are_listed():
    head = "shape,dtype,gemm,tile,stack,ms\n"
    old = head + "a,bf16,up,t1,0,1.0\na,bf16,down,t1,0,1.0\na,bf16,x,t1,0,1.0\nb,bf16,up,t1,0,1.0\n"
    new = head + "a,bf16,up,t2,0,1.2\na,bf16,down,t1,16,0.9\na,bf16,x,t1,0,0.9\n"
    slower, spills, gone = layers.worse(old, new)
    assert "a bf16 up: predicted 1.0 -> 1.2 ms (t1 -> t2)" == slower
    assert spills == "a bf16 down: 0 -> 16 bytes of stack" and gone == "b bf16 up: missing"
    assert layers.worse(old, old) == []


def test_committed_predictions_use_the_current_tiles():
    """Checked without compiling; `python -m benchmarks.predictions` regenerates the files."""
    paths = sorted(layers.FOLDER.glob("*.csv"))
    assert paths
    for path in paths:
        for line in csv.DictReader(path.read_text().splitlines()):
            if line["gemm"] not in layers.GEMMS:
                continue
            shape, dtype = SHAPES[line["shape"]], problems.DTYPES[line["dtype"]]
            has_tma = hardware.find(line["gpu"]).has_tma
            layer = problems.layer_problems(layers.family(shape), shape.T, dtype, has_tma)
            problem = dict(zip(layers.GEMMS, layer, strict=True))[line["gemm"]]
            config = tuning.get_config(problem, hardware.find(line["gpu"]))
            tile = f"m{config.BLOCK_M} n{config.BLOCK_N} k{config.BLOCK_K} "
            assert line["tile"].startswith(tile), f"{path.name}: {line['shape']} {line['gemm']}"


KERNELS = """
template <class T> __global__ void __launch_bounds__(256) scale_kernel(T* x) {
  __shared__ float part[64];
  part[threadIdx.x % 64] = x[0];
  __syncthreads();
  x[threadIdx.x] = x[threadIdx.x] * part[5];
}
template __global__ void scale_kernel<float>(float*);
__global__ void plain_kernel(float* x) { x[threadIdx.x] += 1; }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_the_kernels_of_a_compiled_file_are_listed(tmp_path, capsys, monkeypatch):
    source, binary = tmp_path / "k.cu", tmp_path / "k.o"
    source.write_text(KERNELS)
    subprocess.run(["nvcc", "-arch=sm_90a", "-c", source, "-o", binary], check=True)
    plain, scale = cuda_kernels.survey(binary, layers.blocks_per_sm, layers.instruction_mix)
    assert (plain.kernel, scale.kernel) == ("plain_kernel", "scale_kernel<float>")
    assert (plain.architecture, plain.gpu) == ("sm_90a", "nvidia_h100")
    assert (plain.threads, scale.threads, scale.static_shared, scale.stack) == (1024, 256, 256, 0)
    assert (plain.blocks_per_sm, scale.blocks_per_sm) == (2, 8)  # of 64 warps
    counts = dict(item.split(":") for item in scale.mix.split())
    assert int(counts["global"]) == 3 and int(counts["waiting"]) == 1 and int(counts["tensor"]) == 0
    monkeypatch.setattr(layers, "FOLDER", tmp_path)
    assert layers.main(["--extension", str(binary)]) == 0
    assert layers.main(["--extension", str(binary), "--check"]) == 0
    path = tmp_path / "cuda/extension.csv"
    path.write_text(path.read_text().replace(",256,8,", ",256,9,").replace("plain_kernel", "old_kernel"))
    assert layers.main(["--extension", str(binary), "--check"]) == 1
    out = capsys.readouterr().out
    assert "sm_90a old_kernel: missing" in out
    assert "sm_90a scale_kernel<float>: blocks per sm 9 -> 8" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_layer_compiled_for_an_absent_gpu(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    both = layers.survey(H100, [SHAPES["clip-1-crop"]], "bf16")
    rows, ops = both[:6], {row.gemm: row for row in both[6:]}
    assert [row.gemm for row in rows] == list(layers.GEMMS)
    assert set(ops) == {name for name, *_ in other_ops.ALIGNED.values()} and len(both) == 6 + len(ops)
    combine = ops["combine"]  # rows of two slots read, one written, and an index and a weight for each slot
    moved = 577 * (3 * 1024 * 2 + 2 * 8)
    assert combine.ms == combine.floor_ms == moved / H100.gb_per_s / 1e6
    for row in ops.values():
        assert row.tiles >= 1 and row.registers >= 16 and 0 < row.wave_use <= 1 and "tensor:" in row.mix
    assert combine.waves == combine.tiles / (H100.sms * combine.blocks_per_sm)
    for row in rows:
        assert 32 <= row.registers <= 255 and row.blocks_per_sm >= 1
        assert 0 < row.share_of_floor <= 1 and row.ms >= row.floor_ms > 0
        assert "tensor:0" not in row.mix
    config = tuning.get_config(Problem("gemm", torch.bfloat16, 1280, 4096, 1024, 4, gathered=True), H100)
    assert rows[0].tile.startswith(f"m{config.BLOCK_M} n{config.BLOCK_N}")


def test_four_bits_move_a_quarter_of_the_bytes_of_a_token():
    """By hand: one token of Mixtral hits 2 of 8 experts of 3 * 14336 * 4096 weights."""
    shape = replace(SHAPES["mixtral-decode1"], name="mixtral")
    assert four_bits.experts_hit(shape) == 2
    assert four_bits.bytes_per_weight("nf4") == 0.5 + 4 / 64
    assert four_bits.bytes_per_weight("mxfp4") == 0.5 + 1 / 32
    found = {row.way: row for row in four_bits.survey(H100, shape) if row.tokens == 1}
    rows = 2 * (2 * 4096 + 2 * (3 * 14336 + 4096))  # x, output; z, a and y of two slots
    matrices = 2 * 3 * 14336 * 4096
    assert found["plain"].mib == (rows + 2 * matrices) / 2**20
    assert found["nf4"].mib == (rows + 0.5625 * matrices) / 2**20
    assert {row.bound for row in found.values()} == {"bytes"}
    assert found["nf4"].ms == found["nf4"].mib * 2**20 / H100.gb_per_s / 1e6
    assert found["nf4"].gain == found["plain"].ms / found["nf4"].ms > 3.5
    assert found["lora by peft"].gain == 1 < found["lora"].gain
