"""Plant faults one at a time and check that a kernel test fails for each.

    python -m tests.mutate [--only WORD] [--write FILE]

Each fault is one replacement in a copy of the tree. The tests of the affected stem then run: for the Triton
backend in Triton's interpreter, for csrc/ in emulation, for the reference directly. A fault that no test
detects shows a missing test.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = (
    "csrc", "cumo_kernels", "tests/kernels", "tests/conftest.py", "tests/programs.py", "tests/rounding.py",
    "pyproject.toml",
)  # fmt: skip
TIMEOUT_S = 1800  # a fault may make a loop endless, which counts as caught
REFERENCE, TRITON = "cumo_kernels/backends/reference/", "cumo_kernels/backends/triton/"
TORCH = "cumo_kernels/backends/torch/"
CUDA, HOPPER = "csrc/", "csrc/hopper"
ALONE = (
    "cute",
    "ptx_tables",
    "launch",
    "pdl",
)  # stems whose tests need neither interpreter nor emulation


@dataclass(frozen=True)
class Fault:
    what: str
    path: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # stems whose tests run
    select: str = ""  # pytest -k, to find the failure faster


FAULTS = (
    # the reference, with which every other backend is compared
    Fault("weights divided by nothing", REFERENCE + "routing.py",
          "weights = weights / weights.sum(-1, keepdim=True)", "pass", "routing"),
    Fault("ties to the highest index", REFERENCE + "routing.py",
          "logits.detach().sort(dim=-1, descending=True, stable=True).indices",
          "logits.detach().flip(-1).sort(dim=-1, descending=True, stable=True).indices.neg().add(num_experts - 1)",
          "routing"),
    Fault("density counts the second choice", REFERENCE + "routing.py",
          "(indices[:, :1] == torch", "(indices[:, -1:] == torch", "routing"),
    Fault("z-loss without the square", REFERENCE + "routing.py",
          "group_mean(lse.square().to(wide)", "group_mean(lse.abs().to(wide)", "routing"),
    Fault("gradient of logsumexp without its factor 2", REFERENCE + "routing.py",
          "(2 * lse * spread_group_grad(", "(lse * spread_group_grad(", "routing"),
    Fault("sort that is not stable inside an expert", REFERENCE + "routing.py",
          "experts, permutation = slots.sort(stable=True)",
          "experts, permutation = slots.flip(0).sort(stable=True); permutation = slots.numel() - 1 - permutation",
          "routing permutation"),
    Fault("combine ignores the last choice", REFERENCE + "permutation.py",
          "for k in range(top_k):", "for k in range(max(top_k - 1, 1)):", "permutation"),
    Fault("tanh for erf", "cumo_kernels/activations.py",
          'Activation("gelu", torch.nn.functional.gelu, torch.ops.aten.gelu_backward)',
          'Activation("gelu", _gelu_tanh, _gelu_tanh_backward)', "activation"),
    Fault("quick_gelu with 1.7", "cumo_kernels/activations.py",
          "QUICK_GELU_ALPHA = 1.702", "QUICK_GELU_ALPHA = 1.7", "activation"),
    Fault("bias of the next expert", REFERENCE + "grouped_gemm.py",
          "_rows(x[a:b], weight[e], None if bias is None else bias[e], out=out[a:b])",
          "_rows(x[a:b], weight[e], None if bias is None else bias[e - 1], out=out[a:b])", "grouped_gemm"),
    Fault("dz without the routing weight", REFERENCE + "experts.py",
          "dz = act.backward(h.mul_(w), z.to(wide))", "dz = act.backward(h, z.to(wide))", "experts"),
    Fault("gradient of the weights without the bias", REFERENCE + "experts.py",
          "            if down_bias is not None:\n                dw = dw +", "            if False:\n                dw = dw +",
          "experts"),
    # routing in Triton
    Fault("offsets that count an expert's slots to its left", TORCH + "routing.py",
          "torch.searchsorted(experts, every, out_int32=True)",
          "torch.searchsorted(experts, every, out_int32=True, right=True)", "routing", "torch-"),
    Fault("a dropped slot adds its row", TORCH + "permutation.py",
          "row.masked_fill_(lost[part, k, None], 0)", "pass", "permutation", "torch-"),
    Fault("a dropped slot keeps its row", TORCH + "permutation.py",
          "rows if lost is None else rows.masked_fill_(", "rows if True else rows.masked_fill_(",
          "permutation", "torch-"),
    Fault("dz without the routing weight (torch)", TORCH + "experts.py",
          "act.backward(h_wide.mul_(w[part]), ", "act.backward(h_wide, ", "experts", "torch-"),
    Fault("gradient of the routing weights without down_bias", TORCH + "experts.py",
          "dw[part] += torch.linalg.vecdot(", "dw[part] += 0 * torch.linalg.vecdot(", "experts", "torch-"),
    Fault("bias of the next expert without host reads", TORCH + "rows.py",
          "torch.searchsorted(expert_offsets[1:-1].contiguous(), rows, right=True)",
          "torch.searchsorted(expert_offsets[1:-1].contiguous(), rows + 1, right=True)", "host_sync", "torch-"),
    Fault("rows of the padding multiplied", TORCH + "grouped_gemm.py",
          "return pad(operand, (0, missing[1], 0, missing[0]))",
          "return pad(operand, (0, missing[1], 0, missing[0]), value=1.0)", "grouped_gemm", "torch-"),
    Fault("gradient of an expert without rows not written", TORCH + "grouped_gemm.py",
          "pre.masked_fill_(past[:, None], 0)", "pass", "grouped_gemm", "torch-"),
    Fault("tie to the highest index", TRITON + "routing.py",
          "choice = tl.min(tl.where(keys == best[:, None], experts[None, :], BLOCK_E), 1)",
          "choice = tl.max(tl.where(keys == best[:, None], experts[None, :], -1), 1)", "routing", "ties"),
    Fault("NaN ranked by its bits", TRITON + "logits.py",
          "return tl.where(values != values, 0x7FFFFFFF, keys)", "return keys", "routing", "maximum"),
    Fault("-0 below 0", TRITON + "logits.py",
          "bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)",
          "bits = values.to(tl.int32, bitcast=True)", "routing", "zeros"),
    Fault("the original's ties to the lowest index", REFERENCE + "routing.py",
          "indices = probs.detach().topk(top_k).indices",
          "indices = probs.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]",
          "routing", "compat"),
    Fault("logsumexp in fp32 under compat", REFERENCE + "routing.py",
          "(logits if compat else logits.to(wide)).logsumexp(-1)", "logits.to(wide).logsumexp(-1)",
          "routing", "compat"),
    Fault("gate logits not rounded", TRITON + "logits.py",
          "logits = narrow(logits, x_ptr.dtype.element_ty).to(tl.float32)", "logits = logits", "routing", "gate"),
    Fault("sums of the last tile left out", TRITON + "routing.py",
          "row_mask = tiles <= last_tile", "row_mask = tiles < tl.maximum(last_tile, first_tile + 1)", "routing",
          "ragged"),
    Fault("a group closed by the program before its last", TRITON + "routing.py",
          "if arrived == last_tile - first_tile:", "if arrived == tl.maximum(last_tile - first_tile - 1, 0):",
          "routing", "ragged"),
    Fault("group found one token late", TRITON + "routing.py",
          "group = count_below(group_offsets_ptr, tokens + 1, G + 1, steps) - 1",
          "group = count_below(group_offsets_ptr, tokens, G + 1, steps) - 1", "routing", "ragged"),
    Fault("empty group at the end never written", TRITON + "routing.py",
          "g_end = tl.where(tile == num_tiles - 1, G, g_end)", "g_end = g_end", "routing", "ragged"),
    Fault("weights of backward not renormalised", TRITON + "routing.py",
          "(dweights - along[:, None]) / kept[:, None]", "dweights / kept[:, None]", "routing"),
    Fault("sums of the gate's gradient start from uninitialised memory", TRITON + "routing.py",
          "mask=only_if(tile != pid, gate_mask), other=0.0)", "mask=gate_mask, other=0.0)", "routing", "gate"),
    Fault("offsets without the counts before this program", TRITON + "sorting.py",
          "free = ends - counts + before", "free = ends - counts", "routing", "sort"),
    Fault("dropped slots keep a position", TRITON + "sorting.py",
          "tl.store(inverse_ptr + slots, tl.where(kept, position, -1), mask=mask)",
          "tl.store(inverse_ptr + slots, position, mask=mask)", "routing", "sort"),
    # permutation and activation in Triton
    Fault("dropped rows copied", TRITON + "permutation.py",
          "kept = mask & (tl.load(inverse_ptr + slots, mask=mask, other=-1) >= 0)", "kept = mask",
          "permutation", "dropped"),
    Fault("dropped rows read", TRITON + "permutation.py",
          "        kept = positions >= 0\n        row_ptrs", "        kept = mask\n        row_ptrs",
          "permutation", "dropped"),
    Fault("rows of dropped slots not cleared in backward", TRITON + "permutation.py",
          "dropped = mask & (tl.load(inverse_ptr + owners, mask=mask, other=0) < 0)", "dropped = mask & (slots < 0)",
          "permutation", "dropped"),
    Fault("no column mask", TRITON + "permutation.py",
          "    x = tl.load(x_ptr + tokens[:, None] * stride_x_t + cols[None, :], mask=kept[:, None] & in_row, other=0.0)\n"
          "    tl.store(out_ptr + positions.to(tl.int64)[:, None] * H + cols[None, :], x, mask=mask[:, None] & in_row)",
          "    x = tl.load(x_ptr + tokens[:, None] * stride_x_t + cols[None, :], mask=kept[:, None], other=0.0)\n"
          "    tl.store(out_ptr + positions.to(tl.int64)[:, None] * H + cols[None, :], x, mask=mask[:, None])",
          "permutation", "odd"),
    Fault("combine in the dtype of the rows", TRITON + "permutation.py",
          "            acc += weight[:, None] * row\n",
          "            acc = (acc + weight[:, None] * row).to(out_ptr.dtype.element_ty).to(tl.float32)\n",
          "permutation", "combine"),
    Fault("tanh for erf", TRITON + "common.py",
          'if NAME == "quick_gelu":', 'if NAME == "gelu":\n'
          "        s, ds = sigmoid_and_grad(SQRT_8_OVER_PI * (z + GELU_CUBIC * z * z * z))\n"
          "        return z * s, s + z * ds * SQRT_8_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * z * z)\n"
          '    elif NAME == "quick_gelu":', "activation", "gelu"),
    Fault("quick_gelu with 1.7", TRITON + "common.py",
          "QUICK_GELU_ALPHA: tl.constexpr = tl.constexpr(1.702)",
          "QUICK_GELU_ALPHA: tl.constexpr = tl.constexpr(1.7)", "activation", "quick"),
    Fault("gate and up exchanged in backward", TRITON + "activation.py",
          "tl.store(dx_ptrs + I, narrow(grad * value, DTYPE), mask=mask)",
          "tl.store(dx_ptrs + I, narrow(grad * slope, DTYPE), mask=mask)", "activation", "glu"),
    # grouped GEMM in Triton
    Fault("row tile found one too far", TRITON + "tiles.py",
          "return expert, end, begin + tile_m * BLOCK_M, tile_n, split",
          "return expert, end, begin + tile_m * BLOCK_M + (tile_m > 0).to(tl.int32), tile_n, split", "grouped_gemm", "several"),
    Fault("weight of the next expert at an expert's end", TRITON + "tiles.py",
          "earlier = tile_ends <= tile", "earlier = tile_ends <= tile + 1", "grouped_gemm", "odd"),
    Fault("sum runs past K", TRITON + "tiles.py",
          "tile = tl.load(ptrs, mask=cols[None, :] < K, other=0.0)", "tile = tl.load(ptrs)", "grouped_gemm", "odd"),
    Fault("last split left out", TRITON + "tiles.py",
          "mask = (rows < R)[:, None] & (cols < N)[None, :]", "mask = (rows < R - 1)[:, None] & (cols < N)[None, :]",
          "tuning", "any_tile"),
    Fault("bias added by every split", TRITON + "grouped_gemm.py",
          "mask=only_if(with_bias, cols < N), other=0.0)", "mask=cols < N, other=0.0)", "tuning", "any_tile"),
    Fault("bias of the first expert for all", TRITON + "grouped_gemm.py",
          "bias_row = bias_ptr + expert * width", "bias_row = bias_ptr", "grouped_gemm", "gather"),
    Fault("bias dropped in the up half", TRITON + "grouped_gemm.py",
          "acc_up += bias_up.to(tl.float32)[None, :]", "acc_up += 0.0 * bias_up.to(tl.float32)[None, :]",
          "grouped_gemm", "gather"),
    Fault("pre-activation after the activation", TRITON + "grouped_gemm.py",
          "                acc = act(acc, ACTIVATION)\n            if GATED",
          "                acc = act(act(acc, ACTIVATION), ACTIVATION)\n            if GATED", "grouped_gemm", "gather"),
    Fault("rows past the expert's end stored", TRITON + "grouped_gemm.py",
          "mask = (rows < rows_left) & (cols < N)[None, :]",
          "mask = (rows < rows_left + 1) & (cols < N)[None, :]", "grouped_gemm", "odd"),
    Fault("gather without top_k", TRITON + "grouped_gemm.py",
          "source = tl.load(permutation_ptr + source) // TOP_K", "source = tl.load(permutation_ptr + source)",
          "grouped_gemm", "gather"),
    Fault("tail rows not cleared", TRITON + "grouped_gemm.py",
          "    if ZERO_TAIL:\n", "    if ZERO_TAIL and False:\n", "grouped_gemm", "tail"),
    Fault("ragged last block without a mask", TRITON + "weight_grad.py",
          "inside = (tl.arange(0, BLOCK_M) < rows_left)[:, None]",
          "inside = (tl.arange(0, BLOCK_M) < rows_left + BLOCK_M)[:, None]", "grouped_gemm", "odd"),
    Fault("last whole block of rows left out", TRITON + "weight_grad.py",
          "for row in tl.range(begin, whole, BLOCK_M):", "for row in tl.range(begin, whole - BLOCK_M, BLOCK_M):",
          "grouped_gemm", "several or skewed"),
    Fault("bias gradient without the routing weight", TRITON + "bias_grad.py",
          "acc += weights[:, None] * grad.to(tl.float32)", "acc += grad.to(tl.float32)", "experts", "odd"),
    Fault("bias gradient without the last part's rows", TRITON + "bias_grad.py",
          "last = tl.minimum(first + share, end)", "last = tl.minimum(first + share - 1, end)", "experts", "parts"),
    Fault("sorted rows gathered once more", TRITON + "grad_hidden.py",
          "if not SORTED:", "if True:", "experts", "sorted"),
    Fault("splits of rows overlap", TRITON + "weight_grad.py",
          "begin = tl.minimum(begin + split * share, end)", "begin = tl.minimum(begin + split * (share - BLOCK_M), end)",
          "tuning", "any_tile"),
    # the expert layer in Triton
    Fault("dz without the routing weight", TRITON + "grad_hidden.py",
          "weighted_h = h * weights[:, None]", "weighted_h = h * 1.0", "experts", "odd"),
    Fault("<h, a> multiplied by the weight", TRITON + "grad_hidden.py",
          "dots += tl.sum(h * a, 1)", "dots += tl.sum(weighted_h * a, 1)", "experts", "odd"),
    Fault("weighted activation without its weight", TRITON + "grad_hidden.py",
          "weighted = narrow(weights[:, None] * a, weighted_ptr.dtype.element_ty)",
          "weighted = narrow(a, weighted_ptr.dtype.element_ty)", "experts", "odd"),
    Fault("gate's slope without the up half", TRITON + "grad_hidden.py",
          "slope = slope * up", "slope = slope", "experts", "glu"),
    Fault("gradient of the weights without the bias", TRITON + "experts.py",
          "total += tl.sum(acc, 1)", "total += 0.0 * tl.sum(acc, 1)", "experts", "odd"),
    Fault("bias of the expert before at its first row", TRITON + "experts.py",
          "(ends[None, :] <= positions[:, None])", "(ends[None, :] < positions[:, None])", "experts", "odd"),
    Fault("plan \"all\" without the weight", TRITON + "experts.py",
          "narrow(weights[:, None] * value, out_ptr.dtype.element_ty)", "narrow(value, out_ptr.dtype.element_ty)",
          "experts", "all"),
    Fault("plan \"x\" recomputes without the bias", TRITON + "experts.py",
          "x_rows, up_proj, expert_offsets, up_bias, x_gather, top_k, activation,\n            keep_out=False",
          "x_rows, up_proj, expert_offsets, None, x_gather, top_k, activation,\n            keep_out=False", "experts", "-x"),
    Fault("combine of splits drops the weight", TRITON + "experts.py",
          "mask=position >= 0, other=0.0)\n        total", "mask=position >= 0, other=0.0) * 0 + 1\n        total",
          "tuning", "any_tile_gives_the_same_layer"),
    # launches of Triton
    Fault("alignment not in the key of a launch", TRITON + "launch.py",
          "return value.dtype, value.data_ptr() & 15 == 0", "return value.dtype, True", "launch"),
    Fault("a descriptor's dtype not in the key", TRITON + "launch.py",
          "return value.base.dtype, *value.block_shape", "return tuple(value.block_shape)", "launch"),
    Fault("integers of any width one kind", TRITON + "launch.py",
          "if -(2**31) <= value < 2**31:", "if True:", "launch"),
    Fault("a capture's mode not restored", TRITON + "capture.py",
          "    finally:\n        _swap(mode)", "    finally:\n        pass", "launch"),
    Fault("a new kernel in a capture loaded by its launch", TRITON + "launch.py",
          "compiled._init_handles()", "pass", "launch"),
    Fault("fp16's dH in pairs, which spill", "cumo_kernels/tiles/tuning.py",
          "paired = problem.dtype == torch.bfloat16 and", "paired =", "tuning"),
    Fault("a kernel that starts early and does not wait", TRITON + "common.py",
          "            cuda.gdc_wait()\n", "", "pdl"),
    # CUDA
    Fault("consumers wait out of turn", HOPPER + ".cu",
          "if (kTakeTurns) wait_for(&free_for[me], phase);", "", "cuda_plan", "several"),
    Fault("fragments of a narrow tile exchanged", HOPPER + ".cu",
          "finish_patch(end, patch, tile, first_row + m * 64, first_col, cols);",
          "finish_patch(end, patch, tile, first_row + (1 - m) * 64, first_col, cols);", "cuda_plan", "several"),
    Fault("a stage released before its product is complete", HOPPER + "_tiles.cuh",
          "wgmma_wait<T, kN, 1>();", "", "grouped_gemm", "long"),
    Fault("rows of the next expert in a ragged stage", HOPPER + "_weight_grad.cu",
          "const bool whole = row + kSteps <= tile.end", "const bool whole = row <= tile.end", "grouped_gemm", "several"),
    Fault("bias in every part", CUDA + "epilogue.cuh",
          "if (bias && tile.split == 0)", "if (bias)", "cuda_plan", "split_rows"),
    Fault("rows past the expert's end stored", CUDA + "epilogue.cuh",
          "if (row >= tile.end_row) continue;", "if (row > tile.end_row) continue;", "grouped_gemm", "odd"),
    Fault("splits overlap", CUDA + "tiles.h",
          "begin = split * share, end = begin + share;", "begin = split * (share - 1), end = begin + share;",
          "cuda_plan", "split_rows"),
    Fault("last part left out", CUDA + "sums.cu",
          "part < count; ++part", "part < count - (count > 1); ++part", "cuda_plan", "split_rows"),
    Fault("combine takes one part", CUDA + "permutation.cu",
          "row[j] = added.part ? row[j] + value : value;", "row[j] = value;", "cuda_plan", "combine"),
    Fault("counters not cleared", CUDA + "routing.cu",
          "clear(device, arrivals, int64_t{4} * r.G);", "", "routing", "fp32"),
    Fault("a share of the logits left out", CUDA + "gate_logits.cuh",
          "share < S::kCount; ++share", "share < S::kCount - (S::kCount > 1); ++share", "cuda_plan", "share"),
    Fault("groups without tokens not written", CUDA + "routing.cu",
          "if (r.group_offsets == nullptr || blockIdx.x > 0) return;", "return;", "routing", "ragged"),
    Fault("blocks ignore earlier blocks", CUDA + "sorting.cu",
          "total[bin] += before[bin];", "", "cuda_plan", "sorting"),
    Fault("dropped slots overwrite each other", CUDA + "sorting.cu",
          "offset + static_cast<int>(begin) - earlier", "offset + static_cast<int>(begin)", "cuda_plan", "sorting"),
    Fault("TF32 never used", CUDA + "grouped_gemm.cu",
          "if (p.tf32) return run(p.k_inner", "if (false) return run(p.k_inner", "cuda_plan", "tf32"),
    Fault("a bias gradient that no tile sums", CUDA + "tiles.h",
          "return column == (number - column) / blocks % tiles_k;",
          "return column == (number - column) / blocks % tiles_k && column == 0;", "cuda_plan", "several_tiles"),
    Fault("all biases summed by the same blocks", CUDA + "tiles.h",
          "return column == (number - column) / blocks % tiles_k;", "return column == 0;", "cuda", "share_of_the_biases"),
    Fault("every block prefetches the first share", HOPPER + ".cu",
          "const int64_t begin = blockIdx.x * how.share,", "const int64_t begin = 0,", "cuda_plan", "dependent"),
    Fault("apart halves ignored in half a tile", HOPPER + ".cu",
          "cols / kPatchCols, how.halves_apart, [&]", "cols / kPatchCols, how.halves_apart && !tile.halved, [&]",
          "cuda_plan", "halves"),
    Fault("a quarter of a stage not in the bias gradient", CUDA + "bias_sum.cuh",
          "for (int k = 0; k < kDepth; k += 16)", "for (int k = 0; k < kDepth - 16; k += 16)", "cuda_plan", "several_tiles"),
    Fault("columns of a bias gradient exchanged", CUDA + "bias_sum.cuh",
          "store(column + lane / 4, sum[0]);", "store(column + lane / 4, sum[2]);", "cuda_plan", "several_tiles"),
    Fault("fp32 rows of other lanes not in the bias gradient", CUDA + "bias_sum.cuh",
          "for (int lanes = 4; lanes < kWarp; lanes *= 2)", "for (int lanes = 8; lanes < kWarp; lanes *= 2)",
          "grouped_gemm", "fp32"),
    Fault("bias gradient without the routing weight", CUDA + "bias_grad.cu",
          "sum[j] += weight[i] * to_float(value[i].item[j]);", "sum[j] += to_float(value[i].item[j]);", "cuda_plan", "parts"),
    Fault("parts of a bias gradient overlap", CUDA + "bias_grad.cu",
          "last = first + share < end ? first + share : end;", "last = first + share < end ? first + share + 1 : end;",
          "cuda_plan", "parts"),
    Fault("weights of tokens, not of slots, in the bias gradient", CUDA + "bias_grad.cu",
          "weight[i] = weights[slot[i]];", "weight[i] = weights[slot[i] / top_k];", "cuda_plan", "parts"),
    Fault("both halves of a tile are the left one", CUDA + "tiles.h",
          "2 * tile.tile_n + half % 2;", "2 * tile.tile_n;", "cuda_plan", "halves"),
    Fault("more halves than blocks", CUDA + "tiles.h",
          "2 * last <= blocks ? tiles - last : tiles;", "last < blocks ? tiles - last : tiles;", "cuda", "last_round"),
    Fault("a half's columns of a whole tile finished", HOPPER + ".cu",
          "const int cols = tile.halved ? kCols / 2 : kCols;", "const int cols = kCols;", "cuda_plan", "halves"),
    Fault("a half tile waits for the bytes of a whole one", HOPPER + ".cu",
          "+ narrow * kPlanNarrow * kRowBytes);", "+ (kCols / kPlanNarrow) * kPlanNarrow * kRowBytes);", "cuda_plan", "halves"),
    Fault("the up half in place of the gate", HOPPER + ".cu",
          "p.N + tile_n * (kPlanNarrow / 2), expert);", "tile_n * (kPlanNarrow / 2), expert);", "cuda_plan", "ascend"),
    Fault("halves that are apart read alternately", HOPPER + "_tiles.cuh",
          "return eight / 16 * 16 + eight % 2 * 8 + eight % 16 / 2;", "return eight;", "cuda_plan", "ascend"),
    Fault("more of the weight prefetched than exists", HOPPER + ".cu",
          "const int64_t bytes = p.E * rows * width * 2;", "const int64_t bytes = p.E * rows * width * 256;", "cuda_plan",
          "dependent"),
    Fault("a descriptor without its swizzle", HOPPER + ".cuh",
          "uint64_t{1} << 62;  // 128-byte swizzle", "uint64_t{2} << 62;", "cute", "descriptors"),
    Fault("a descriptor's chunks half as far apart", HOPPER + ".cuh",
          "uint64_t(chunk_stride >> 4) << 16", "uint64_t(chunk_stride >> 5) << 16", "cute", "descriptors"),
    Fault("another swizzle passed to the driver", CUDA + "tensor_map.cuh",
          "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B", "cute", "map"),
    Fault("a box with half the rows of the weight", HOPPER + ".cu",
          "{1, p.stride_w, p.stride_w_e}, {kSteps, kPlanNarrow, 1})", "{1, p.stride_w, p.stride_w_e}, {kSteps, 64, 1})",
          "cuda_plan", "halves"),
    Fault("cp.async that does not zero the rest", CUDA + "platform.cuh",
          "std::memset(static_cast<char*>(target) + bytes, 0, 16 - bytes);", "", "ptx_tables", "cp_async"),
    Fault("an mbarrier whose phase ends with bytes in flight", HOPPER + ".cuh",
          "if (pending == 0 && bytes_and_phase / 2 == 0) {", "if (pending == 0) {", "ptx_tables", "mbarrier"),
    Fault("sums in rows of other warps", HOPPER + ".cuh",
          "const int row = thread / 32 * 16 + thread % 32 / 4", "const int row = (thread / 32 ^ 1) * 16 + thread % 32 / 4",
          "ptx_tables", "wgmma"),
    Fault("a kernel that does not wait for earlier ones", CUDA + "permutation.cu",
          "K, unsigned chunks, T* out) {\n  begin_kernel();\n  using V", "K, unsigned chunks, T* out) {\n  using V",
          "permutation"),
)  # fmt: skip


def notice(fault: Fault, tree: Path) -> tuple[bool, str]:
    """-> whether a test failed, and which one or why."""
    path = tree / fault.path
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.what}: occurs {text.count(fault.old)} times in {fault.path}: {fault.old!r}")
    environment = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    select = "not triton"
    if fault.tests in ALONE:
        select = "test"
    elif fault.path.startswith(TRITON):
        environment["TRITON_INTERPRET"], select = "1", "triton"
    elif fault.path.startswith(CUDA):
        environment["CUMO_EMULATE"], select = "1", "cuda"
        environment["CUMO_EMULATE_CAPABILITY"] = "90" if fault.path.startswith(HOPPER) else "80"
    if fault.select:
        select = f"({fault.select}) and {select}"
    files = [f"tests/kernels/test_{stem}.py" for stem in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not sweep and not large", "-k", select, *files]
    path.write_text(text.replace(fault.old, fault.new))
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return True, "endless loop"
    finally:
        path.write_text(text)
    if done.returncode < 0:
        return True, "the interpreter crashes"
    if done.returncode not in (0, 1):  # 2 to 5: pytest ran no test
        raise SystemExit(f"{fault.what}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = re.search(r"^FAILED \S*?::(\S+)", done.stdout, re.M)
    if done.returncode and not failed:  # a failing fixture, for example a compile timeout, proves nothing
        raise SystemExit(f"{fault.what}: no test failed, pytest ended with:\n{done.stdout[-4000:]}")
    return done.returncode == 1, failed[1] if failed else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--only", default="", help="only faults with this word in their name, file or tests")
    parser.add_argument("--write", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source, target = ROOT / name, tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            elif source.exists():
                shutil.copy(source, target)
        for fault in FAULTS:
            if args.only not in f"{fault.what} {fault.path} {fault.tests}":
                continue
            start = time.monotonic()
            noticed, by = notice(fault, tree)
            missed += not noticed
            where = fault.path.removeprefix("cumo_kernels/").removeprefix("backends/")
            rows.append(f"| {fault.what} | {where} | {'caught' if noticed else 'MISSED'} | {by} |")
            print(f"{rows[-1]} {time.monotonic() - start:.0f} s", flush=True)
    summary = f"{len(rows) - missed} of {len(rows)} faults caught"
    print(summary)
    if args.write:
        head = ["# Faults planted by `python -m tests.mutate`", "", f"{summary}.", ""]
        table = ["| fault | file | verdict | first test to fail |", "|---|---|---|---|", *rows]
        args.write.write_text("\n".join([*head, *table, ""]))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
