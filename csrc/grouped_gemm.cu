// Grouped GEMM (CUDA, sm_80 and later): rows of expert e times the weight of expert e.
//
//   out[p] = act(x[p] @ weight[e]^T + bias[e])     x (S, K)   weight (E, N, K)   out (S, N)
//   h[p] = g[p] @ down_proj[e]; dz = w h act'(z); weighted = w act(z); dots = <h, act(z)>      (grad_hidden)
//
// With a permutation row p is read from token permutation[p] / top_k, so a gathered copy is never made. Blocks are
// persistent and take every gridDim-th tile (tiles.h); the product is in tile_math.cuh, what follows it in
// epilogue.cuh. On Hopper 16-bit operands that TMA can address go to hopper.cu instead. 2 * S * N * K FLOPs.
// Contract: cumo_kernels/ops/grouped_gemm.py. Truth: cumo_kernels/backends/reference/grouped_gemm.py.
#include "epilogue.cuh"
#include "hopper.h"

namespace cumo {

template <class T, bool kTf32, bool kAlong>
__device__ __forceinline__ void multiply_expert_rows(const Gemm& p, const Tile& tile, bool wide_x, bool wide_w,
                                                     Acc& acc) {
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
    const int source = p.permutation ? p.permutation[row] / p.top_k : row;
    rows[j] = x + source * p.stride_x;
    const WeightColumn column = weight_column(tile.tile_n, kTileCols, piece.outer, p.N, p.gated);
    inside[j] = column.left > 0;
    weights[j] = weight + (inside[j] ? column.index : 0) * p.stride_w;
  }
  multiply_tiles<T, kTf32, true, kAlong>(
      ceil_div(p.K, kDepth<T>), acc,
      [&](int step, unsigned char* a, unsigned char* b) {
        const int begin = step * kDepth<T>;
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

template <class T>
__device__ __forceinline__ void zero_rows(T* out, int64_t begin, int64_t end, int64_t width) {
  for (int64_t i = begin * width + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < end * width;
       i += int64_t{gridDim.x} * blockDim.x)
    out[i] = from_float<T>(0.0f);
}

template <class T, bool kTf32, bool kAlong>
__global__ void __launch_bounds__(kGemmThreads)
    grouped_gemm_kernel(Gemm p, ForwardEnd<T> end, int tiles_n, bool wide_x, bool wide_w) {
  TileWalk walk(p.expert_offsets, p.E, tiles_n, kTileRows);
  Tile tile;
  const Place place;
  for (int number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    Acc acc;
    multiply_expert_rows<T, kTf32, kAlong>(p, tile, wide_x, wide_w, acc);
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = tile.first_row + place.row + m * 16 + h * 8;
        if (row >= tile.end_row) continue;
        if (p.gated) {
          const int col = tile.tile_n * (kTileCols / 2) + place.col / 32 * 16 + place.col % 8;
#pragma unroll
          for (int n = 0; n < 4; n += 2)
            end.finish({acc[m][n][h * 2], acc[m][n][h * 2 + 1]}, {acc[m][n + 1][h * 2], acc[m][n + 1][h * 2 + 1]},
                       tile.expert, row, col + n * 4);
        } else {
          const int col = tile.tile_n * kTileCols + place.col;
#pragma unroll
          for (int n = 0; n < 4; ++n)
            end.finish({acc[m][n][h * 2], acc[m][n][h * 2 + 1]}, {}, tile.expert, row, col + n * 8);
        }
      }
  }
  if (p.zero_tail) {
    const int tail = p.expert_offsets[p.E];
    if (end.out) zero_rows(end.out, tail, p.S, p.N);
    if (end.pre) zero_rows(end.pre, tail, p.S, end.width);
  }
}

template <class T, bool kTf32>
__global__ void __launch_bounds__(kGemmThreads)
    grad_hidden_kernel(Gemm p, HiddenEnd<T> end, const float* topk_weights, float* dots, int tiles_n, bool wide_x,
                       bool wide_w) {
  TileWalk walk(p.expert_offsets, p.E, tiles_n, kTileRows);
  Tile tile;
  const Place place;
  float* partial = shared_memory<float>();  // (128 rows, 4 warps)
  for (int number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    Acc acc;
    multiply_expert_rows<T, kTf32, false>(p, tile, wide_x, wide_w, acc);
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int local = place.row + m * 16 + h * 8, row = tile.first_row + local;
        float dot = 0.0f;
        if (row < tile.end_row) {
          const float weight = topk_weights[p.permutation[row]];
#pragma unroll
          for (int n = 0; n < 4; ++n)
            dot += end.finish({acc[m][n][h * 2], acc[m][n][h * 2 + 1]}, weight, row,
                              tile.tile_n * kTileCols + place.col + n * 8);
        }
        dot += shuffle_xor(dot, 1);
        dot += shuffle_xor(dot, 2);
        if (threadIdx.x % 4 == 0) partial[local * 4 + threadIdx.x / kWarp % 4] = dot;
      }
    sync_block();
    const int row = tile.first_row + static_cast<int>(threadIdx.x);
    if (dots && threadIdx.x < kTileRows && row < tile.end_row) {
      const float* mine = partial + threadIdx.x * 4;
      dots[int64_t{row} * tiles_n + tile.tile_n] = (mine[0] + mine[1]) + (mine[2] + mine[3]);
    }
    sync_block();
  }
}

static bool wide_x(const Gemm& p, int bytes) { return aligned16(p.x, 0, p.stride_x, bytes); }
static bool wide_w(const Gemm& p, int bytes) {
  // across, the up half must begin at a piece too
  return aligned16(p.weight, 0, p.stride_w, bytes) && p.stride_w_e * bytes % 16 == 0 &&
         (p.k_inner || !p.gated || p.N * bytes % 16 == 0);
}
static int64_t blocks(const Device& device, const Gemm& p, int tiles_n) {
  return std::min<int64_t>(2 * device.sms, most_row_tiles(p.S, p.E, kTileRows) * tiles_n);
}

void grouped_gemm(const Device& device, Dtype dtype, const Gemm& p, void* out, void* pre) {
  if (uses_hopper(device, dtype, p)) return hopper_grouped_gemm(device, dtype, p, out, pre);
  const int tiles_n = ceil_div(p.N, p.gated ? kTileCols / 2 : kTileCols);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ForwardEnd<T> end{static_cast<const T*>(p.bias), static_cast<T*>(out), static_cast<T*>(pre), p.N,
                            p.gated ? 2 * p.N : p.N,       p.act,                p.gated,              p.N % 2 == 0};
    const auto run = [&](auto kernel) {
      launch(device, kernel, blocks(device, p, tiles_n), kGemmThreads, kGemmShared, p, end, tiles_n,
             wide_x(p, sizeof(T)), wide_w(p, sizeof(T)));
    };
    if constexpr (sizeof(T) == 4) {
      if (p.tf32) return run(p.k_inner ? grouped_gemm_kernel<T, true, true> : grouped_gemm_kernel<T, true, false>);
    }
    run(p.k_inner ? grouped_gemm_kernel<T, false, true> : grouped_gemm_kernel<T, false, false>);
  });
}

int grad_hidden_tiles(const Device& device, Dtype dtype, const Gemm& p) {
  return ceil_div(p.N, uses_hopper(device, dtype, p) ? kHopperHiddenCols : kTileCols);
}

void grad_hidden(const Device& device, Dtype dtype, const Gemm& p, const float* topk_weights, const void* z, void* dz,
                 void* weighted, float* dots) {
  if (uses_hopper(device, dtype, p)) return hopper_grad_hidden(device, dtype, p, topk_weights, z, dz, weighted, dots);
  // the product is as wide as one half of a gated z: to its operands it is a plain GEMM
  Gemm plain = p;
  plain.gated = false;
  const int tiles_n = grad_hidden_tiles(device, dtype, p);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const HiddenEnd<T> end{static_cast<const T*>(z), static_cast<T*>(dz), static_cast<T*>(weighted), p.N, p.act, p.gated,
                           p.N % 2 == 0};
    const auto run = [&](auto kernel) {
      launch(device, kernel, blocks(device, p, tiles_n), kGemmThreads, kGemmShared, plain, end, topk_weights, dots,
             tiles_n, wide_x(plain, sizeof(T)), wide_w(plain, sizeof(T)));
    };
    if constexpr (sizeof(T) == 4) {
      if (p.tf32) return run(grad_hidden_kernel<T, true>);
    }
    run(grad_hidden_kernel<T, false>);
  });
}

}  // namespace cumo
