// The gradient of a bias, computed with that of its weight: sums of the 128 columns of grad of a stage in shared memory.
#pragma once

#include "launch.cuh"
#include "tiles.h"

namespace cumo {

// One of eight warps, 16 columns. A stage is kRowBytes / sizeof(T) rows, stored across the reduction, with zeros where
// there is no row. 16-bit values are summed by the tensor cores, times a column of ones: on the FMA units every value
// would need a conversion and an addition, a fifth of the issue slots of a stage of the product.
template <class T>
struct BiasSum {
  static constexpr int kDepth = kRowBytes / sizeof(T);
  const int lane, column;
  float sum[4] = {};

  __device__ __forceinline__ explicit BiasSum(int warp) : lane(threadIdx.x % kWarp), column(warp * 16) {}

  __device__ __forceinline__ void add(const unsigned char* stage) {
    if constexpr (sizeof(T) == 2) {
      constexpr uint32_t kOnes = std::is_same_v<T, half_t> ? 0x3c003c00 : 0x3f803f80;
      const uint32_t ones[2] = {kOnes, kOnes};
      // matrices of 8 rows x 8 columns: two side by side, two below, transposed by the load
      const int at = offset_across(lane / 16 * 8 + lane % 8, (column + lane / 8 % 2 * 8) * 2, kDepth);
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t numbers[4];
        ldmatrix_trans(numbers, stage + at + k * kRowBytes);
        mma_16<T>(sum, numbers, ones);
      }
    } else {
      const int at = offset_across(lane / 4, (column + lane % 4 * 4) * 4, kDepth);
#pragma unroll
      for (int k = 0; k < kDepth; k += 8) {
        const auto run = *reinterpret_cast<const Vec<float, 4>*>(stage + at + k * kRowBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += run.item[i];
      }
    }
  }

  // store(column of the 128, its sum), once for each of the warp's 16.
  template <class Store>
  __device__ __forceinline__ void finish(Store store) {
    if constexpr (sizeof(T) == 2) {
      if (lane % 4) return;  // four lanes have the same sums
      store(column + lane / 4, sum[0]);
      store(column + lane / 4 + 8, sum[2]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int lanes = 4; lanes < kWarp; lanes *= 2) sum[i] += shuffle_xor(sum[i], lanes);
        if (lane < 4) store(column + lane * 4 + i, sum[i]);
      }
    }
  }
};

}  // namespace cumo
