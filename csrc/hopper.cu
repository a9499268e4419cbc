// Grouped GEMM (CUDA, sm_90a): the same functions as grouped_gemm.cu, for 16-bit operands that TMA can address.
//
// A persistent block of three warpgroups. The first brings operands: the weight by TMA, rows of x by TMA or, gathered,
// by cp.async of all its threads, which hand a stage over once their copies are in (kLag stages later, so that copies
// overlap). The other two multiply with wgmma out of shared memory, give stages back, and finish their sums
// (epilogue.cuh) while the first is ahead in the next tile. Wide tiles, 128 x 256 x 64 in four stages, they share (64
// rows each); narrow ones, 128 x 128 x 64 in six, they take in turns, so that one finishes its sums while the other
// multiplies. Forward plan.h chooses; grad_hidden, which has most to do behind its product, is narrow. A full and an
// empty mbarrier per stage, and for turns one per group: a phase is known by its parity alone, so nobody may wait for a
// stage before the other has seen all earlier ones come. No cluster.
#include "hopper.h"

#include "epilogue.cuh"
#include "hopper_tiles.cuh"

namespace cumo {

template <class T, int kCols, bool kAlong>
__device__ __forceinline__ void produce(const TensorMap& map_x, const TensorMap& map_w, const Gemm& p, int tiles_n,
                                        int splits, unsigned char* shared, Barrier* full, Barrier* empty) {
  using S = Stages<kCols>;
  const int thread = threadIdx.x;
  const bool gathers = p.gathered;
  if (!gathers && thread != 0) return;
  TileWalk walk(p.expert_offsets, p.E, tiles_n, kRows, splits);
  Tile tile;
  Turn<S::kCount> turn, landed;
  int under_way = 0;
  for (int number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    constexpr int kPieces = kRows * 8 / kGroup;
    const T* rows[kPieces];
    if (gathers) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int row = tile.first_row + thread / 8 + j * (kGroup / 8);
        const int slot = p.permutation[row < tile.end_row ? row : tile.end_row - 1];
        rows[j] = static_cast<const T*>(p.x) + slot / p.top_k * p.stride_x;
      }
    }
    const Steps steps = steps_of_split(ceil_div(p.K, kSteps), tile.split, splits);
#pragma unroll 1
    for (int step = steps.begin; step < steps.end; ++step) {
      const int k = step * kSteps;
      unsigned char* a = shared + turn.stage * S::kBytes;
      unsigned char* b = a + S::kABytes;
      wait_for(&empty[turn.stage], turn.phase ^ 1);
      if (thread == 0) {
        arrive_expecting(&full[turn.stage], gathers ? S::kBBytes : S::kBytes);
        if (!gathers) tma_load(a, &map_x, &full[turn.stage], k, tile.first_row, 0);
        if constexpr (!kAlong) {
#pragma unroll
          for (int chunk = 0; chunk < kCols / 64; ++chunk)
            tma_load(b + chunk * kSteps * kRowBytes, &map_w, &full[turn.stage], tile.tile_n * kCols + chunk * 64, k,
                     tile.expert);
        } else if (p.gated) {
          tma_load(b, &map_w, &full[turn.stage], k, 0, 0, tile.tile_n * (kCols / 16), tile.expert);
        } else {
          tma_load(b, &map_w, &full[turn.stage], k, tile.tile_n * kCols, tile.expert);
        }
      }
      if (gathers) {
        const int col = k + thread % 8 * 8, left = p.K - col, bytes = left < 0 ? 0 : left < 8 ? left * 2 : 16;
#pragma unroll
        for (int j = 0; j < kPieces; ++j)
          cp_async16(a + offset_along(thread / 8 + j * (kGroup / 8), thread % 8 * 16), rows[j] + (left > 0 ? col : 0),
                     bytes);
        hand_over(full, landed, under_way);
      }
      turn.next();
    }
  }
  if (gathers) hand_over_rest(full, landed, under_way);
}

// The warp's 16 rows of every 64 from first_row on.
template <int kCols, int kM, class T>
__device__ __forceinline__ void finish_tile(const ForwardEnd<T>& end, const float (&d)[kM][kCols / 2], float* patch,
                                            const Tile& tile, int first_row, int) {
  for_each_patch<kCols>(d, patch, [&](int m, int first_col) {
    finish_patch(end, patch, tile, first_row + m * 64, first_col, kCols);
  });
}

template <int kCols, int kM, class T>
__device__ __forceinline__ void finish_tile(const HiddenEnd<T>& end, const float (&d)[kM][kCols / 2], float* patch,
                                            const Tile& tile, int first_row, int tiles_n) {
  float dots[2];
  for_each_patch<kCols>(d, patch, [&](int m, int first_col) {
    if (first_col == 0) dots[0] = dots[1] = 0.0f;
    finish_patch(end, patch, tile, first_row + m * 64, first_col, kCols, dots);
    if (first_col < kCols - kPatchCols) return;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dots[i] += shuffle_xor(dots[i], 1);
      dots[i] += shuffle_xor(dots[i], 2);
      const int row = first_row + m * 64 + lane / 4 + 8 * i;
      if (end.dots && lane % 4 == 0 && row < tile.end_row) end.dots[int64_t{row} * tiles_n + tile.tile_n] = dots[i];
    }
  });
}

template <class T>
__device__ __forceinline__ void zero_tail(const HiddenEnd<T>&, const Gemm&, int, int, int) {}

template <class T, int kCols, bool kAlong, class End>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_kernel(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, Gemm p, End end,
                  int tiles_n, int splits) {
#if defined(CUMO_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Stages<kCols>;
  constexpr bool kTakeTurns = kCols == kPlanNarrow;
  constexpr int kM = kTakeTurns ? 2 : 1;
  unsigned char* shared = shared_memory<unsigned char>();
  Barrier* full = reinterpret_cast<Barrier*>(shared + S::kBarriers);
  Barrier* empty = full + S::kCount;
  Barrier* free_for = empty + S::kCount;  // of each consumer: the other has issued its product
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) init_barrier(&free_for[i], kGroup / kWarp);
    for (int i = 0; i < S::kCount; ++i) {
      init_barrier(&full[i], p.gathered ? 1 + kGroup : 1);
      init_barrier(&empty[i], (kTakeTurns ? 1 : 2) * kGroup / kWarp);
    }
    fence_barriers();
  }
  sync_block();
  if (threadIdx.x < kGroup) {
    fewer_registers<56>();
    produce<T, kCols, kAlong>(map_x, map_w, p, tiles_n, splits, shared, full, empty);
    return;
  }
  more_registers<224>();
  const int warp = threadIdx.x / kWarp - kGroup / kWarp;
  float* patch = reinterpret_cast<float*>(shared + S::kPatches + warp * kPatchBytes);
  TileWalk walk(p.expert_offsets, p.E, tiles_n, kRows, splits);
  Tile tile;
  Turn<S::kCount> turn;
  const int me = warp / (kGroup / kWarp);
  bool others = kTakeTurns && me == 1;
  int phase = me ^ 1;  // the first group need not wait for the first tile
  for (int number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    const Steps part = steps_of_split(ceil_div(p.K, kSteps), tile.split, splits);
    const int steps = part.end - part.begin;
    if (others) {
      turn.skip(steps);
    } else {
      float d[kM][kCols / 2];
      if (kTakeTurns) wait_for(&free_for[me], phase);
      multiply_stages<T, kCols, false, !kAlong>(
          steps, shared, full, empty, turn, d, [](int, const unsigned char*) {},
          [&] {
            if (kTakeTurns && threadIdx.x % kWarp == 0) arrive(&free_for[me ^ 1]);
          });
      phase ^= 1;
      finish_tile<kCols>(end, d, patch, tile, tile.first_row + (kTakeTurns ? warp % 4 : warp) * 16, tiles_n);
    }
    if (kTakeTurns) others = !others;
  }
  zero_tail(end, p, splits, threadIdx.x - kGroup, kThreads - kGroup);
#endif
}

static TensorMap describe_x(const Gemm& p) {
  // gathered rows never go through the map, but it must be one
  const int64_t rows = p.gathered ? 1 : p.S;
  return describe(p.x, 3, {p.K, rows, 1}, {1, p.stride_x, p.stride_x * rows}, {kSteps, kRows, 1});
}

static TensorMap describe_weight(const Gemm& p, int cols) {
  if (!p.k_inner) return describe(p.weight, 3, {p.N, p.K, p.E}, {1, p.stride_w, p.stride_w_e}, {64, kSteps, 1});
  if (!p.gated) return describe(p.weight, 3, {p.K, p.N, p.E}, {1, p.stride_w, p.stride_w_e}, {kSteps, cols, 1});
  // eight rows of the gate, eight of the up half, in turns: tiles.h, weight_column
  return describe(p.weight, 5, {p.K, 8, 2, p.N / 8, p.E},
                  {1, p.stride_w, p.N * p.stride_w, 8 * p.stride_w, p.stride_w_e}, {kSteps, 8, 2, cols / 16, 1});
}

bool uses_hopper(const Device& device, Dtype dtype, const Gemm& p) {
  const auto steps = [](int64_t stride) { return stride > 0 && stride % 8 == 0; };
  return kBuilt && device.capability == 90 && dtype != Dtype::fp32 && p.K > 0 && aligned16(p.x, 0, 0, 2) &&
         aligned16(p.weight, 0, 0, 2) && steps(p.stride_x) && steps(p.stride_w) && steps(p.stride_w_e) &&
         (!p.gated || (p.k_inner && p.N % 8 == 0));
}

template <int kCols, class Kernel, class End>
static void run(const Device& device, Kernel kernel, const Gemm& p, const End& end, int tiles_n, int splits,
                int64_t blocks) {
  launch(device, kernel, blocks, kThreads, Stages<kCols>::kShared, describe_x(p), describe_weight(p, kCols), p, end,
         tiles_n, splits);
}

template <class T, int kCols>
static void run_forward(const Device& device, const Gemm& p, const Plan& plan, const ForwardEnd<T>& end) {
  run<kCols>(device,
             p.k_inner ? hopper_kernel<T, kCols, true, ForwardEnd<T>> : hopper_kernel<T, kCols, false, ForwardEnd<T>>, p,
             end, plan.tiles_n, plan.splits, plan.blocks);
}

void hopper_grouped_gemm(const Device& device, Dtype dtype, const Gemm& p, const Plan& plan, void* out, void* pre,
                         float* parts) {
  with_16_bit_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto end = forward_end<T>(p, out, pre, parts);
    if (plan.tile_cols == kPlanWide) {
      run_forward<T, kPlanWide>(device, p, plan, end);
    } else {
      run_forward<T, kPlanNarrow>(device, p, plan, end);
    }
  });
}

void hopper_grad_hidden(const Device& device, Dtype dtype, const Gemm& p, const float* topk_weights, const void* z,
                        void* dz, void* weighted, float* dots) {
  with_16_bit_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Gemm plain = p;  // the product is as wide as one half of a gated z
    plain.gated = false;
    const int tiles_n = ceil_div(p.N, kHopperHiddenCols);
    run<kHopperHiddenCols>(device, hopper_kernel<T, kHopperHiddenCols, false, HiddenEnd<T>>, plain,
                           hidden_end<T>(p, topk_weights, z, dz, weighted, dots), tiles_n, 1,
                           std::min<int64_t>(device.sms, most_row_tiles(p.S, p.E, kRows) * tiles_n));
  });
}

}  // namespace cumo
