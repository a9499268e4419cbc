// The k-grouped form of the grouped GEMM (CUDA, sm_80 and later): the gradient of the weights, ragged in the reduction.
//
//   out[e] = sum over the rows p of expert e of grad[p]^T x[p]      grad (S, N)   x (S, K)   out (E, N, K)
//   bias[e] = sum of grad[p], each times its row's weight            (E, N)
//
// Either operand may be gathered by the permutation. One tile of out per turn of a persistent block; the whole reduction
// of a tile is one block's, in row order, so results repeat. Rows past an expert's end enter as zeros, and an expert
// without rows gives exact zeros. The bias comes from the tiles of the first columns of x, out of the stages that the
// product reads anyway. On Hopper 16-bit operands go to hopper_weight_grad.cu. 2 * S * N * K FLOPs.
// Contract: cumo_kernels/ops/grouped_gemm.py. Truth: cumo_kernels/backends/reference/grouped_gemm.py.
#include "hopper.h"
#include "tile_math.cuh"

namespace cumo {

template <class T, bool kTf32>
__global__ void __launch_bounds__(kGemmThreads, 1)
    weight_grad_kernel(WeightGrad p, T* out, T* bias, int tiles_n, int tiles_k, bool wide_grad, bool wide_x) {
  const T* grad = static_cast<const T*>(p.grad);
  const T* x = static_cast<const T*>(p.x);
  const WarpPlace warp;
  const int lane = threadIdx.x % kWarp;
  const int tiles = p.E * tiles_n * tiles_k;
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const int expert = number / (tiles_n * tiles_k), local = number % (tiles_n * tiles_k);
    const int first_n = local / tiles_k * kTileRows, first_k = local % tiles_k * kTileCols;
    const int begin = p.expert_offsets[expert], end = p.expert_offsets[expert + 1];
    const bool sums_bias = bias != nullptr && first_k == 0 && threadIdx.x < kTileRows;
    float bias_sum = 0.0f;
    Acc acc;
    multiply_tiles<T, kTf32, false, false>(
        ceil_div(end - begin, kDepth<T>), acc,
        [&](int step, unsigned char* a, unsigned char* b) {
#pragma unroll
          for (int j = 0; j < kPieces; ++j) {
            const AcrossPiece<T> piece(j);
            const int row = begin + step * kDepth<T> + piece.k;
            const bool inside = row < end;
            const int token = inside && p.permutation ? p.permutation[row] / p.top_k : 0;
            const int grad_row = !inside ? 0 : p.permutation && p.gather_grad ? token : row;
            const int x_row = !inside ? 0 : p.permutation && !p.gather_grad ? token : row;
            const int n = first_n + piece.outer, k = first_k + piece.outer;
            const int at = offset_across(piece.k, piece.outer * sizeof(T), kDepth<T>);
            load_piece(a + at, grad + grad_row * p.stride_grad + n, inside ? p.N - n : 0, wide_grad);
            load_piece(b + at, x + x_row * p.stride_x + k, inside ? p.K - k : 0, wide_x);
          }
        },
        [&](int step, const unsigned char* a, const unsigned char*) {
          if (!sums_bias) return;
          const int first = begin + step * kDepth<T>;
          for (int k = 0; k < kDepth<T> && first + k < end; ++k) {
            const float value = to_float(*reinterpret_cast<const T*>(element<T, false>(a, threadIdx.x, k)));
            bias_sum += p.row_weights ? p.row_weights[p.permutation[first + k]] * value : value;
          }
        });
    const bool paired = p.K % 2 == 0;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = first_n + warp.row + lane / 4 + m * 16 + h * 8;
        if (n >= p.N) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int k = first_k + warp.col + lane % 4 * 2 + i * 8;
          if (k < p.K)
            store_pair(out + (int64_t{expert} * p.N + n) * p.K + k, acc[m][i][h * 2], acc[m][i][h * 2 + 1], p.K - k,
                       paired);
        }
      }
    if (sums_bias && first_n + static_cast<int>(threadIdx.x) < p.N)
      bias[int64_t{expert} * p.N + first_n + threadIdx.x] = from_float<T>(bias_sum);
  }
}

void grouped_gemm_weight_grad(const Device& device, Dtype dtype, const WeightGrad& p, void* out, void* bias) {
  if (uses_hopper(device, dtype, p)) return hopper_weight_grad(device, dtype, p, out, bias);
  const int tiles_n = ceil_div(p.N, kTileRows), tiles_k = ceil_div(p.K, kTileCols);
  const int64_t blocks = std::min<int64_t>(2 * device.sms, int64_t{p.E} * tiles_n * tiles_k);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto kernel) {
      launch(device, kernel, blocks, kGemmThreads, kGemmShared, p, static_cast<T*>(out), static_cast<T*>(bias), tiles_n,
             tiles_k, aligned16(p.grad, 0, p.stride_grad, sizeof(T)), aligned16(p.x, 0, p.stride_x, sizeof(T)));
    };
    if constexpr (sizeof(T) == 4) {
      if (p.tf32) return run(weight_grad_kernel<T, true>);
    }
    run(weight_grad_kernel<T, false>);
  });
}

}  // namespace cumo
