// Grouped GEMM (CUDA, sm_80 and later): rows of expert e times the weight of expert e.
//
//   out[p] = act(x[p] @ weight[e]^T + bias[e])     x (S, K)   weight (E, N, K)   out (S, N)
//   h[p] = g[p] @ down_proj[e]; dz = w h act'(z); weighted = w act(z); dots = <h, act(z)>      (grad_hidden)
//
// A gathered row p is read directly from token permutation[p] / top_k. Blocks are persistent and run every gridDim-th
// tile (tiles.h); the product is in tile_math.cuh, the epilogue in epilogue.cuh. On Hopper, 16-bit operands that TMA can
// address are handled by hopper.cu instead. 2 * S * N * K FLOPs.
// Contract: cumo_kernels/ops/grouped_gemm.py. Reference: cumo_kernels/backends/reference/grouped_gemm.py.
#include "epilogue.cuh"
#include "hopper.h"
#include "tile_math.cuh"

namespace cumo {

template <class T, bool kTf32, bool kAlong>
__device__ __forceinline__ void multiply_expert_rows(const Gemm& p, const Tile& tile, int splits, bool wide_x,
                                                     bool wide_w, Acc& acc) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight) + tile.expert * p.stride_w_e;
  const T* rows[kPieces];
  const T* weights[kPieces];  // along: a row of the weight each
  bool inside[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const AlongPiece piece(j);
    // rows past the expert's end are computed from its last row and never stored
    const int row = tile.first_row + piece.outer < tile.end_row ? tile.first_row + piece.outer : tile.end_row - 1;
    const int source = p.gathered ? p.permutation[row] / p.top_k : row;
    rows[j] = x + source * p.stride_x;
    const WeightColumn column = weight_column(tile.tile_n, kTileCols, piece.outer, p.N, p.gated);
    inside[j] = column.left > 0;
    weights[j] = weight + (inside[j] ? column.index : 0) * p.stride_w;
  }
  const Steps steps = steps_of_split(ceil_div(p.K, kDepth<T>), tile.split, splits);
  multiply_tiles<T, kTf32, true, kAlong>(
      steps.end - steps.begin, acc,
      [&](int step, unsigned char* a, unsigned char* b) {
        const int begin = (steps.begin + step) * kDepth<T>;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          const AlongPiece piece(j);
          const int k = begin + piece.byte / static_cast<int>(sizeof(T));
          load_piece(a + offset_along(piece.outer, piece.byte), rows[j] + k, p.K - k, wide_x);
          if constexpr (kAlong) {
            load_piece(b + offset_along(piece.outer, piece.byte), weights[j] + k, inside[j] ? p.K - k : 0, wide_w);
          } else {
            const AcrossPiece<T> across(j);
            const WeightColumn column = weight_column(tile.tile_n, kTileCols, across.outer, p.N, p.gated);
            load_piece(b + offset_across(across.k, across.outer * sizeof(T), kDepth<T>),
                       weight + (begin + across.k) * p.stride_w + column.index, begin + across.k < p.K ? column.left : 0,
                       wide_w);
          }
        }
      },
      [](int, const unsigned char*, const unsigned char*) {});
}

// The warp's four patches of 16 rows, one after the other, through its part of shared memory.
template <class Finish>
__device__ __forceinline__ void for_each_patch(const Acc& acc, Finish finish) {
  float* patch = shared_memory<float>() + threadIdx.x / kWarp * (kPatchBytes / 4);
#pragma unroll 1
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int other = 0; other < 4; ++other)  // m is not a constant: registers must not be indexed by it
      if (m == other)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          lay_down(patch, n, acc[other][n][0], acc[other][n][1], acc[other][n][2], acc[other][n][3]);
    sync_warp();
    finish(patch, m);
    sync_warp();
  }
}

template <class T, bool kTf32, bool kAlong>
__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_kernel(Gemm p, ForwardEnd<T> end, int tiles_n, int splits, bool wide_x, bool wide_w) {
  begin_kernel();
  TileWalk walk(p.expert_offsets, p.E, tiles_n, kTileRows, splits);
  Tile tile;
  const WarpPlace place;
  for (int number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    Acc acc;
    multiply_expert_rows<T, kTf32, kAlong>(p, tile, splits, wide_x, wide_w, acc);
    for_each_patch(acc, [&](const float* patch, int m) {
      finish_patch(end, patch, tile, tile.first_row + place.row + m * 16, place.col, kTileCols);
    });
    sync_block();
  }
  zero_tail(end, p, splits, threadIdx.x, kGemmThreads);
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kGemmThreads, 1)
    grad_hidden_kernel(Gemm p, HiddenEnd<T> end, int tiles_n, bool wide_x, bool wide_w) {
  begin_kernel();
  TileWalk walk(p.expert_offsets, p.E, tiles_n, kTileRows, 1);
  Tile tile;
  const WarpPlace place;
  float* partial = shared_memory<float>() + 8 * (kPatchBytes / 4);  // (128 rows, 4 warps)
  for (int number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    Acc acc;
    multiply_expert_rows<T, kTf32, false>(p, tile, 1, wide_x, wide_w, acc);
    for_each_patch(acc, [&](const float* patch, int m) {
      float dots[2] = {};
      finish_patch(end, patch, tile, tile.first_row + place.row + m * 16, place.col, kTileCols, dots);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        dots[i] += shuffle_xor(dots[i], 1);
        dots[i] += shuffle_xor(dots[i], 2);
        const int lane = threadIdx.x % kWarp;
        if (lane % 4 == 0) partial[(place.row + m * 16 + lane / 4 + 8 * i) * 4 + place.col / kPatchCols] = dots[i];
      }
    });
    sync_block();
    const int row = tile.first_row + static_cast<int>(threadIdx.x);
    if (end.dots && threadIdx.x < kTileRows && row < tile.end_row) {
      const float* mine = partial + threadIdx.x * 4;
      end.dots[int64_t{row} * tiles_n + tile.tile_n] = (mine[0] + mine[1]) + (mine[2] + mine[3]);
    }
    sync_block();
  }
}

static bool wide_x(const Gemm& p, int bytes) { return aligned16(p.x, 0, p.stride_x, bytes); }
static bool wide_w(const Gemm& p, int bytes) {
  // stored across the reduction, the up half must begin at a piece too
  return aligned16(p.weight, 0, p.stride_w, bytes) && p.stride_w_e * bytes % 16 == 0 &&
         (p.k_inner || !p.gated || p.N * bytes % 16 == 0);
}

std::vector<int> gemm_shared_bytes() {
  std::vector<int> found{kGemmShared};
  for (const int bytes : hopper_shared_bytes()) found.push_back(bytes);
  return found;
}

Plan plan_gemm(const Device& device, Dtype dtype, const Gemm& p) {
  const bool hopper = uses_hopper(device, dtype, p);
  return plan_rows(hopper, p.S, p.E, p.N, p.gated, p.K / (kRowBytes / bytes_of(dtype)),
                   device.sms * (hopper ? 1 : kGemmPerSm), p.can_split, !p.can_split, p.steady);
}

void grouped_gemm(const Device& device, Dtype dtype, const Gemm& p, const Plan& plan, void* out, void* pre,
                  float* parts) {
  if (plan.hopper) return hopper_grouped_gemm(device, dtype, p, plan, out, pre, parts);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto end = forward_end<T>(p, out, pre, parts);
    const auto run = [&](auto kernel) {
      launch(device, kernel, plan.blocks, kGemmThreads, kGemmShared, p, end, plan.tiles_n, plan.splits,
             wide_x(p, sizeof(T)), wide_w(p, sizeof(T)));
    };
    if constexpr (sizeof(T) == 4) {
      if (p.tf32) return run(p.k_inner ? grouped_gemm_kernel<T, true, true> : grouped_gemm_kernel<T, true, false>);
    }
    run(p.k_inner ? grouped_gemm_kernel<T, false, true> : grouped_gemm_kernel<T, false, false>);
  });
}

// The product is as wide as one half of a gated z: for its operands it is a plain GEMM.
static Gemm plain(Gemm p) {
  p.gated = false;
  return p;
}

int grad_hidden_tiles(const Device& device, Dtype dtype, const Gemm& p) {
  return ceil_div(p.N, uses_hopper(device, dtype, plain(p)) ? kHopperHiddenCols : kTileCols);
}

void grad_hidden(const Device& device, Dtype dtype, const Gemm& p, const float* topk_weights, const void* z, void* dz,
                 void* weighted, float* dots) {
  const Gemm product = plain(p);
  if (uses_hopper(device, dtype, product))
    return hopper_grad_hidden(device, dtype, p, topk_weights, z, dz, weighted, dots);
  const int tiles_n = grad_hidden_tiles(device, dtype, p);
  const int64_t blocks = std::min<int64_t>(kGemmPerSm * device.sms, most_row_tiles(p.S, p.E, kTileRows) * tiles_n);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto end = hidden_end<T>(p, topk_weights, z, dz, weighted, dots);
    const auto run = [&](auto kernel) {
      launch(device, kernel, blocks, kGemmThreads, kGemmShared, product, end, tiles_n,
             wide_x(product, sizeof(T)), wide_w(product, sizeof(T)));
    };
    if constexpr (sizeof(T) == 4) {
      if (p.tf32) return run(grad_hidden_kernel<T, true>);
    }
    run(grad_hidden_kernel<T, false>);
  });
}

}  // namespace cumo
