// The gradient of the weights (CUDA, sm_90a): the same function as weight_grad.cu, for aligned 16-bit operands.
//
// Roles, ring and multiplication are those of hopper.cu, with 128 x 256 of out and 64 rows of the layer per stage; both
// operands are stored across the reduction, and wgmma transposes them. cp.async loads a gathered operand, and both in
// the last rows of an expert; it writes zeros for rows of other experts. TMA loads whole stages of the operand in expert
// order. The bias of 128 columns is summed with the product of one of their tiles (bias_sum.cuh).
#include "hopper.h"

#include "bias_sum.cuh"
#include "hopper_tiles.cuh"

namespace cumo {

constexpr int kCols = kPlanWide;
using Ring = Stages<kCols>;

// How the producers share 64 rows of kWidth columns, 16 bytes per thread at a time.
template <int kWidth>
struct Share {
  static constexpr int kPerRow = kWidth / 8, kRowsAtOnce = kGroup / kPerRow, kPerWarp = kWarp / kPerRow;
};

// The tokens of the warp's rows of a stage, one per lane. Done one by one, a load and a division before every copy would
// take longer than the stage's products.
template <int kWidth>
__device__ __forceinline__ int token_of_lane(const int* permutation, int top_k, int first_row, int end) {
  using P = Share<kWidth>;
  const int lane = threadIdx.x % kWarp;
  const int row = first_row + threadIdx.x / kWarp * P::kPerWarp + lane % P::kPerWarp + lane / P::kPerWarp * P::kRowsAtOnce;
  return row < end ? permutation[row] / top_k : 0;
}

// This thread's pieces of an operand; rows past `end` are zeros. Rows are those of the warp's tokens, or contiguous.
template <class T, int kWidth>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const T* source, int64_t stride, bool gathers, int tokens,
                                          int first_row, int end, int first_col, int width) {
  using P = Share<kWidth>;
  const int outer = threadIdx.x % P::kPerRow * 8, left = width - first_col - outer;
  const int bytes = left < 0 ? 0 : left < 8 ? left * 2 : 16;
#pragma unroll 4
  for (int i = 0; i < kSteps / P::kRowsAtOnce; ++i) {
    const int k = threadIdx.x / P::kPerRow + i * P::kRowsAtOnce, row = first_row + k;
    const int token = shuffle(tokens, threadIdx.x % kWarp / P::kPerRow + i * P::kPerWarp);
    const bool inside = row < end && bytes > 0;
    const int64_t from = gathers ? token : row;
    cp_async16(tile + offset_across(k, outer * 2, kSteps), source + (inside ? from * stride + first_col + outer : 0),
               inside ? bytes : 0);
  }
}

template <int kWidth>
__device__ __forceinline__ void fetch_rows(unsigned char* tile, const TensorMap& map, Barrier* barrier, int first_row,
                                           int first_col) {
#pragma unroll
  for (int chunk = 0; chunk < kWidth / 64; ++chunk)
    tma_load(tile + chunk * kSteps * kRowBytes, &map, barrier, first_col + chunk * 64, first_row, 0);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_weight_grad_kernel(const __grid_constant__ TensorMap map_grad, const __grid_constant__ TensorMap map_x,
                              WeightGrad p, void* out, void* bias, int tiles_n, int tiles_k, int splits, bool wide) {
#if defined(CUMO_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned char* shared = shared_memory<unsigned char>();
  Barrier* full = reinterpret_cast<Barrier*>(shared + Ring::kBarriers);
  Barrier* empty = full + Ring::kCount;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Ring::kCount; ++i) {
      init_barrier(&full[i], 1 + kGroup);
      init_barrier(&empty[i], 2 * kGroup / kWarp);
    }
    fence_barriers();
  }
  begin_kernel();
  sync_block();
  const int tiles = p.E * splits * tiles_n * tiles_k;
  Turn<Ring::kCount> turn;
  if (threadIdx.x < kGroup) {
    fewer_registers<kProducerRegisters>();
    Turn<Ring::kCount> landed;
    int under_way = 0;
    const bool gathers_grad = p.gathered == Gathered::grad, gathers_x = p.gathered == Gathered::x;
    for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
      const GradTile<kCols> tile(p.expert_offsets, number, tiles_n, tiles_k, splits, kSteps);
#pragma unroll 1
      for (int row = tile.begin; row < tile.end; row += kSteps, turn.next()) {
        unsigned char* a = shared + turn.stage * Ring::kBytes;
        unsigned char* b = a + Ring::kABytes;
        const bool whole = row + kSteps <= tile.end, fetch_grad = whole && !gathers_grad, fetch_x = whole && !gathers_x;
        const int tokens = gathers_grad ? token_of_lane<kRows>(p.permutation, p.top_k, row, tile.end)
                           : gathers_x  ? token_of_lane<kCols>(p.permutation, p.top_k, row, tile.end)
                                        : 0;
        wait_for(&empty[turn.stage], turn.phase ^ 1);
        if (threadIdx.x == 0) {
          arrive_expecting(&full[turn.stage], (fetch_grad ? Ring::kABytes : 0) + (fetch_x ? Ring::kBBytes : 0));
          if (fetch_grad) fetch_rows<kRows>(a, map_grad, &full[turn.stage], row, tile.first_n);
          if (fetch_x) fetch_rows<kCols>(b, map_x, &full[turn.stage], row, tile.first_k);
        }
        if (!fetch_grad)
          copy_rows<T, kRows>(a, static_cast<const T*>(p.grad), p.stride_grad, gathers_grad, tokens, row, tile.end,
                              tile.first_n, p.N);
        if (!fetch_x)
          copy_rows<T, kCols>(b, static_cast<const T*>(p.x), p.stride_x, gathers_x, tokens, row, tile.end, tile.first_k,
                              p.K);
        hand_over(full, landed, under_way);
      }
    }
    hand_over_rest(full, landed, under_way);
    return;
  }
  more_registers<kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp - kGroup / kWarp, lane = threadIdx.x % kWarp;
  float* patch = reinterpret_cast<float*>(shared + Ring::kPatches + warp * kPatchBytes);
  for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
    const GradTile<kCols> tile(p.expert_offsets, number, tiles_n, tiles_k, splits, kSteps);
    const bool with_bias = bias != nullptr && sums_bias(number, tiles_k, gridDim.x);
    BiasSum<T> sums(warp);
    float d[1][kCols / 2];
    multiply_stages<T, kCols, kCols, true, true>(
        ceil_div(tile.end - tile.begin, kSteps), shared, full, empty, turn, d,
        [&](int, const unsigned char* a) {
          if (with_bias) sums.add(a);
        },
        [] {});
    if (with_bias)
      sums.finish([&](int column, float sum) {
        if (tile.first_n + column < p.N)
          store_one<T>(bias, tile.slab(p.E) * p.N + tile.first_n + column, sum, splits > 1);
      });
    for_each_patch<kCols>(d, patch, kCols / kPatchCols, false, [&](int, int first_col) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i, n = tile.first_n + warp * kPatchRows + row;
        const int k = tile.first_k + first_col + lane % 4 * kRun;
        if (n >= p.N || k >= p.K) continue;
        float values[kRun];
        load_run(patch + row * kPatchStride + lane % 4 * kRun, kRun, true, values);
        const int64_t at = (tile.slab(p.E) * p.N + n) * p.K + k;
        if (splits > 1) {
          store_run(static_cast<float*>(out) + at, values, p.K - k, wide);
        } else {
          store_run(static_cast<T*>(out) + at, values, p.K - k, wide);
        }
      }
    });
  }
#endif
}

std::vector<int> hopper_shared_bytes() { return {Stages<kPlanWide>::kShared, Stages<kPlanNarrow>::kShared}; }

bool uses_hopper(const Device& device, Dtype dtype, const WeightGrad& p) {
  const auto steps = [](int64_t stride) { return stride > 0 && stride % 8 == 0; };
  return kBuilt && device.capability == 90 && dtype != Dtype::fp32 && p.S > 0 && p.K > 0 && aligned16(p.grad, 0, 0, 2) &&
         aligned16(p.x, 0, 0, 2) && steps(p.stride_grad) && steps(p.stride_x);
}

void hopper_weight_grad(const Device& device, Dtype dtype, const WeightGrad& p, const Plan& plan, void* out,
                        void* bias) {
  // the map of a gathered operand is not used, but it must be valid
  const auto map = [&](const void* base, int width, int64_t stride, bool gathered) {
    const int64_t rows = gathered ? 1 : p.S;
    return describe(base, 3, {width, rows, 1}, {1, stride, stride * rows}, {64, kSteps, 1});
  };
  with_16_bit_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = plan.splits > 1 ? runs_are_wide<float>(out, p.K) : runs_are_wide<T>(out, p.K);
    launch(device, hopper_weight_grad_kernel<T>, plan.blocks, kThreads, Ring::kShared,
           map(p.grad, p.N, p.stride_grad, p.gathered == Gathered::grad),
           map(p.x, p.K, p.stride_x, p.gathered == Gathered::x), p, out, bias, plan.tiles_n,
           plan.tiles_k, plan.splits, wide);
  });
}

}  // namespace cumo
