// The k-grouped form of the grouped GEMM (CUDA, sm_80 and later): the gradient of the weights, a reduction over rows.
//
//   out[e] = sum over the rows p of expert e of grad[p]^T x[p]      grad (S, N)   x (S, K)   out (E, N, K)
//   bias[e] = sum of grad[p]                                          (E, N)
//
// Either operand may be gathered by the permutation. A persistent block computes one tile of out at a time, summed in
// row order; where tiles alone would not fill the chip, an expert's rows are split, and the parts added in order
// (sums.cu), so results repeat. Rows past an expert's end count as zeros, and an expert without rows gives exact zeros.
// The bias is summed from the stages that the product reads anyway (bias_sum.cuh); alone, or of weighted rows, in
// bias_grad.cu. On Hopper, 16-bit operands are handled by hopper_weight_grad.cu. 2 * S * N * K FLOPs.
// Contract: cumo_kernels/ops/grouped_gemm.py. Reference: cumo_kernels/backends/reference/grouped_gemm.py.
#include "bias_sum.cuh"
#include "hopper.h"
#include "tile_math.cuh"

namespace cumo {

template <class T, bool kTf32>
__global__ void __launch_bounds__(kGemmThreads, 1)
    weight_grad_kernel(WeightGrad p, void* out, void* bias, int tiles_n, int tiles_k, int splits, bool wide_grad,
                       bool wide_x) {
  begin_kernel();
  const T* grad = static_cast<const T*>(p.grad);
  const T* x = static_cast<const T*>(p.x);
  const WarpPlace warp;
  const int lane = threadIdx.x % kWarp;
  const int tiles = p.E * splits * tiles_n * tiles_k;
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const GradTile<kTileCols> tile(p.expert_offsets, number, tiles_n, tiles_k, splits, kDepth<T>);
    const int first_n = tile.first_n, first_k = tile.first_k, begin = tile.begin, end = tile.end;
    const int64_t slab = tile.slab(p.E);
    const bool with_bias = bias != nullptr && sums_bias(number, tiles_k, gridDim.x);
    BiasSum<T> sums(threadIdx.x / kWarp);
    Acc acc;
    multiply_tiles<T, kTf32, false, false>(
        ceil_div(end - begin, kDepth<T>), acc,
        [&](int step, unsigned char* a, unsigned char* b) {
#pragma unroll
          for (int j = 0; j < kPieces; ++j) {
            const AcrossPiece<T> piece(j);
            const int row = begin + step * kDepth<T> + piece.k;
            const bool inside = row < end;
            const int token = inside && p.gathered != Gathered::none ? p.permutation[row] / p.top_k : 0;
            const int grad_row = !inside ? 0 : p.gathered == Gathered::grad ? token : row;
            const int x_row = !inside ? 0 : p.gathered == Gathered::x ? token : row;
            const int n = first_n + piece.outer, k = first_k + piece.outer;
            const int at = offset_across(piece.k, piece.outer * sizeof(T), kDepth<T>);
            load_piece(a + at, grad + grad_row * p.stride_grad + n, inside ? p.N - n : 0, wide_grad);
            load_piece(b + at, x + x_row * p.stride_x + k, inside ? p.K - k : 0, wide_x);
          }
        },
        [&](int, const unsigned char* a, const unsigned char*) {
          if (with_bias) sums.add(a);
        });
    const bool paired = p.K % 2 == 0;
    const auto store = [&](auto* target) {
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
              store_pair(target + (slab * p.N + n) * p.K + k, acc[m][i][h * 2], acc[m][i][h * 2 + 1], p.K - k, paired);
          }
        }
    };
    if (splits > 1) {
      store(static_cast<float*>(out));
    } else {
      store(static_cast<T*>(out));
    }
    if (with_bias)
      sums.finish([&](int column, float sum) {
        if (first_n + column < p.N) store_one<T>(bias, slab * p.N + first_n + column, sum, splits > 1);
      });
  }
}

Plan plan_weight_grad(const Device& device, Dtype dtype, const WeightGrad& p) {
  const bool hopper = uses_hopper(device, dtype, p);
  return plan_weight_grad(hopper, p.S, p.E, p.N, p.K, kRowBytes / bytes_of(dtype),
                          device.sms * (hopper ? 1 : kGemmPerSm));
}

void grouped_gemm_weight_grad(const Device& device, Dtype dtype, const WeightGrad& p, const Plan& plan, void* out,
                              void* bias) {
  if (plan.hopper) return hopper_weight_grad(device, dtype, p, plan, out, bias);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto kernel) {
      launch(device, kernel, plan.blocks, kGemmThreads, kGemmShared, p, out, bias, plan.tiles_n,
             plan.tiles_k, plan.splits, aligned16(p.grad, 0, p.stride_grad, sizeof(T)),
             aligned16(p.x, 0, p.stride_x, sizeof(T)));
    };
    if constexpr (sizeof(T) == 4) {
      if (p.tf32) return run(weight_grad_kernel<T, true>);
    }
    run(weight_grad_kernel<T, false>);
  });
}

}  // namespace cumo
