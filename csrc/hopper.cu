// Grouped GEMM (CUDA, sm_90a): the same functions as grouped_gemm.cu, for 16-bit operands that TMA can address.
//
// A persistent block of three warpgroups. The first is the producer. It loads operands: the weight by TMA, rows of x by
// TMA or, if gathered, by cp.async of all its threads, which hand a stage over when their copies have arrived (kLag
// stages later, so that copies overlap). The other two are consumers: they multiply with wgmma from shared memory,
// release stages, and run the epilogue (epilogue.cuh) while the producer loads the next tile. They share wide tiles,
// 128 x 256 x 64 in four stages (64 rows each). They alternate on narrow tiles, 128 x 128 x 64 in six, so that one runs
// its epilogue while the other multiplies. Forward, plan.h chooses; grad_hidden, which has the longest epilogue, is
// narrow. Wide tiles of a short last round are split into halves for two blocks; each sum keeps its terms and order.
// There is a full and an empty mbarrier per stage, and when alternating one per group. A wait tells phases apart only by
// parity, so no group may wait for a stage before the other has seen all earlier stages arrive. No cluster.
#include "hopper.h"

#include "epilogue.cuh"
#include "hopper_tiles.cuh"

namespace cumo {

constexpr int kAheadBytes = 16384;  // of one prefetch

// Fields that the host adds to a Gemm.
struct Walk {
  int tiles_n, splits;
  bool cuts;          // tiles.h, whole_tiles
  bool halves_apart;  // map_w is of plain rows: a gated tile has 64 of the gate, then 64 of the up half
  int64_t ahead;      // bytes of the weight to prefetch into L2 before earlier kernels end, or 0
  int64_t share;      // share of one block

  // Number of the first tile that is split; must be called by whole warps.
  __device__ __forceinline__ int whole(const Gemm& p) const {
    if (!cuts) return 0x7fffffff;
    int row_tiles = 0;
    for (int e = threadIdx.x % kWarp; e < p.E; e += kWarp)
      row_tiles += ceil_div(p.expert_offsets[e + 1] - p.expert_offsets[e], kRows);
    return whole_tiles(sum_of_warp(row_tiles) * tiles_n * splits, gridDim.x);
  }
};

// The 128 columns of the weight from tile_n * 128 on, one stage.
template <bool kAlong>
__device__ __forceinline__ void fetch_weight(unsigned char* b, const TensorMap& map, Barrier* full, const Gemm& p,
                                             bool halves_apart, int tile_n, int k, int expert) {
  constexpr int kBytes = kPlanNarrow * kRowBytes;
  if constexpr (!kAlong) {
#pragma unroll
    for (int chunk = 0; chunk < kPlanNarrow / 64; ++chunk)
      tma_load(b + chunk * kSteps * kRowBytes, &map, full, tile_n * kPlanNarrow + chunk * 64, k, expert);
  } else if (!p.gated) {
    tma_load(b, &map, full, k, tile_n * kPlanNarrow, expert);
  } else if (!halves_apart) {
    tma_load(b, &map, full, k, 0, 0, tile_n * (kPlanNarrow / 16), expert);
  } else {
    tma_load(b, &map, full, k, tile_n * (kPlanNarrow / 2), expert);
    tma_load(b + kBytes / 2, &map, full, k, p.N + tile_n * (kPlanNarrow / 2), expert);
  }
}

template <class T, int kCols, bool kAlong>
__device__ __forceinline__ void produce(const TensorMap& map_x, const TensorMap& map_w, const Gemm& p, const Walk& how,
                                        unsigned char* shared, Barrier* full, Barrier* empty) {
  using S = Stages<kCols>;
  const int thread = threadIdx.x;
  const bool gathers = p.gathered;
  const int whole = how.whole(p);
  if (!gathers && thread != 0) return;
  TileWalk walk(p.expert_offsets, p.E, how.tiles_n, kRows, how.splits);
  Tile tile;
  Turn<S::kCount> turn, landed;
  int under_way = 0;
  for (int number = blockIdx.x; walk.find(number, whole, tile); number += gridDim.x) {
    const int narrow = kCols == kPlanNarrow || tile.halved ? 1 : kCols / kPlanNarrow;  // tiles of 128 columns in this one
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
    const Steps steps = steps_of_split(ceil_div(p.K, kSteps), tile.split, how.splits);
#pragma unroll 1
    for (int step = steps.begin; step < steps.end; ++step) {
      const int k = step * kSteps;
      unsigned char* a = shared + turn.stage * S::kBytes;
      unsigned char* b = a + S::kABytes;
      wait_for(&empty[turn.stage], turn.phase ^ 1);
      if (thread == 0) {
        arrive_expecting(&full[turn.stage], (gathers ? 0 : S::kABytes) + narrow * kPlanNarrow * kRowBytes);
        if (!gathers) tma_load(a, &map_x, &full[turn.stage], k, tile.first_row, 0);
#pragma unroll 1
        for (int i = 0; i < narrow; ++i)
          fetch_weight<kAlong>(b + i * kPlanNarrow * kRowBytes, map_w, &full[turn.stage], p, how.halves_apart,
                               tile.tile_n * narrow + i, k, tile.expert);
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
                                            const Tile& tile, int first_row, const Walk& how) {
  const int cols = tile.halved ? kCols / 2 : kCols;
  for_each_patch<kCols>(d, patch, cols / kPatchCols, how.halves_apart, [&](int m, int first_col) {
    finish_patch(end, patch, tile, first_row + m * 64, first_col, cols);
  });
}

template <int kCols, int kM, class T>
__device__ __forceinline__ void finish_tile(const HiddenEnd<T>& end, const float (&d)[kM][kCols / 2], float* patch,
                                            const Tile& tile, int first_row, const Walk& how) {
  float dots[2];
  for_each_patch<kCols>(d, patch, kCols / kPatchCols, false, [&](int m, int first_col) {
    if (first_col == 0) dots[0] = dots[1] = 0.0f;
    finish_patch(end, patch, tile, first_row + m * 64, first_col, kCols, dots);
    if (first_col < kCols - kPatchCols) return;
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      dots[i] += shuffle_xor(dots[i], 1);
      dots[i] += shuffle_xor(dots[i], 2);
      const int row = first_row + m * 64 + lane / 4 + 8 * i;
      if (end.dots && lane % 4 == 0 && row < tile.end_row) end.dots[int64_t{row} * how.tiles_n + tile.tile_n] = dots[i];
    }
  });
}

template <class T>
__device__ __forceinline__ void zero_tail(const HiddenEnd<T>&, const Gemm&, int, int, int) {}

// Prefetches this block's share of the weight into L2 while earlier kernels run, which would also write it through L2.
__device__ __forceinline__ void fetch_ahead(const Gemm& p, const Walk& how) {
  const int64_t begin = blockIdx.x * how.share, end = begin + how.share < how.ahead ? begin + how.share : how.ahead;
  for (int64_t at = begin; at < end; at += kAheadBytes)
    prefetch_l2(static_cast<const char*>(p.weight) + at, static_cast<int>(end - at < kAheadBytes ? end - at : kAheadBytes));
}

template <class T, int kCols, bool kAlong, class End>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_kernel(const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w, Gemm p, End end,
                  Walk how) {
#if defined(CUMO_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Stages<kCols>;
  constexpr bool kTakeTurns = kCols == kPlanNarrow;
  constexpr int kM = kTakeTurns ? 2 : 1;
  unsigned char* shared = shared_memory<unsigned char>();
  Barrier* full = reinterpret_cast<Barrier*>(shared + S::kBarriers);
  Barrier* empty = full + S::kCount;
  Barrier* free_for = empty + S::kCount;  // one per consumer: the other has issued its product
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) init_barrier(&free_for[i], kGroup / kWarp);
    for (int i = 0; i < S::kCount; ++i) {
      init_barrier(&full[i], p.gathered ? 1 + kGroup : 1);
      init_barrier(&empty[i], (kTakeTurns ? 1 : 2) * kGroup / kWarp);
    }
    fence_barriers();
  }
  let_next_kernel_start();
  if (threadIdx.x == kGroup) fetch_ahead(p, how);
  wait_for_earlier_kernels();
  sync_block();
  if (threadIdx.x < kGroup) {
    fewer_registers<kProducerRegisters>();
    produce<T, kCols, kAlong>(map_x, map_w, p, how, shared, full, empty);
    return;
  }
  more_registers<kConsumerRegisters>();
  const int warp = threadIdx.x / kWarp - kGroup / kWarp;
  float* patch = reinterpret_cast<float*>(shared + S::kPatches + warp * kPatchBytes);
  const int whole = how.whole(p);
  TileWalk walk(p.expert_offsets, p.E, how.tiles_n, kRows, how.splits);
  Tile tile;
  Turn<S::kCount> turn;
  const int me = warp / (kGroup / kWarp);
  bool others = kTakeTurns && me == 1;
  int phase = me ^ 1;  // the first group need not wait for the first tile
  for (int number = blockIdx.x; walk.find(number, whole, tile); number += gridDim.x) {
    const Steps part = steps_of_split(ceil_div(p.K, kSteps), tile.split, how.splits);
    const int steps = part.end - part.begin;
    if (others) {
      turn.skip(steps);
    } else {
      float d[kM][kCols / 2];
      if (kTakeTurns) wait_for(&free_for[me], phase);
      const auto look = [](int, const unsigned char*) {};
      if (!kTakeTurns && tile.halved) {
        multiply_stages<T, kCols, kPlanNarrow, false, !kAlong>(steps, shared, full, empty, turn, d, look, [] {});
      } else {
        multiply_stages<T, kCols, kCols, false, !kAlong>(steps, shared, full, empty, turn, d, look, [&] {
          if (kTakeTurns && threadIdx.x % kWarp == 0) arrive(&free_for[me ^ 1]);
        });
      }
      phase ^= 1;
      finish_tile<kCols>(end, d, patch, tile, tile.first_row + (kTakeTurns ? warp % 4 : warp) * 16, how);
    }
    if (kTakeTurns) others = !others;
  }
  zero_tail(end, p, how.splits, threadIdx.x - kGroup, kThreads - kGroup);
#endif
}

static TensorMap describe_x(const Gemm& p) {
  // gathered rows do not use the map, but it must be valid
  const int64_t rows = p.gathered ? 1 : p.S;
  return describe(p.x, 3, {p.K, rows, 1}, {1, p.stride_x, p.stride_x * rows}, {kSteps, kRows, 1});
}

// Boxes of 128 columns, or of 64 if stored across. -> whether the halves of a gated weight stay apart
static bool describe_weight(const Gemm& p, TensorMap& map) {
  if (!p.k_inner || !p.gated) {
    map = p.k_inner ? describe(p.weight, 3, {p.K, p.N, p.E}, {1, p.stride_w, p.stride_w_e}, {kSteps, kPlanNarrow, 1})
                    : describe(p.weight, 3, {p.N, p.K, p.E}, {1, p.stride_w, p.stride_w_e}, {64, kSteps, 1});
    return false;
  }
  // eight rows of the gate alternate with eight of the up half (tiles.h, weight_column); the driver's manual requires
  // ascending strides, which these are not, and not every driver accepts them
  if (!try_describe(map, p.weight, 5, {p.K, 8, 2, p.N / 8, p.E},
                    {1, p.stride_w, p.N * p.stride_w, 8 * p.stride_w, p.stride_w_e}, {kSteps, 8, 2, kPlanNarrow / 16, 1}))
    return false;
  map = describe(p.weight, 3, {p.K, 2 * int64_t{p.N}, p.E}, {1, p.stride_w, p.stride_w_e}, {kSteps, kPlanNarrow / 2, 1});
  return true;
}

bool uses_hopper(const Device& device, Dtype dtype, const Gemm& p) {
  const auto steps = [](int64_t stride) { return stride > 0 && stride % 8 == 0; };
  return kBuilt && device.capability == 90 && dtype != Dtype::fp32 && p.K > 0 && aligned16(p.x, 0, 0, 2) &&
         aligned16(p.weight, 0, 0, 2) && steps(p.stride_x) && steps(p.stride_w) && steps(p.stride_w_e) &&
         (!p.gated || (p.k_inner && p.N % 8 == 0));
}

// All of a weight in one piece that fits in L2, if there are so many rows that most likely every expert has some: which
// experts have rows is known only when the earlier kernels have ended.
static int64_t bytes_ahead(const Device& device, const Gemm& p) {
  constexpr int kRowsOfExpert = 8;
  const int64_t rows = p.k_inner ? (p.gated ? 2 : 1) * int64_t{p.N} : p.K, width = p.k_inner ? p.K : p.N;
  const int64_t bytes = p.E * rows * width * 2;
  const bool whole = p.stride_w == width && p.stride_w_e == rows * width && bytes % 16 == 0;
  return device.overlap && whole && bytes <= device.l2_bytes / 4 * 3 && p.S >= kRowsOfExpert * int64_t{p.E} ? bytes : 0;
}

template <int kCols, class Kernel, class End>
static void run(const Device& device, Kernel kernel, const Gemm& p, const End& end, const Plan& plan) {
  TensorMap map_w;
  const bool halves_apart = describe_weight(p, map_w);
  const int64_t ahead = bytes_ahead(device, p), share = ceil_div(ahead, plan.blocks * 16) * 16;
  launch(device, kernel, plan.blocks, kThreads, Stages<kCols>::kShared, describe_x(p), map_w, p, end,
         Walk{plan.tiles_n, plan.splits, plan.cuts, halves_apart, ahead, share});
}

template <class T, int kCols>
static void run_forward(const Device& device, const Gemm& p, const Plan& plan, const ForwardEnd<T>& end) {
  run<kCols>(device,
             p.k_inner ? hopper_kernel<T, kCols, true, ForwardEnd<T>> : hopper_kernel<T, kCols, false, ForwardEnd<T>>, p,
             end, plan);
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
    Plan plan{true, kHopperHiddenCols, ceil_div(p.N, kHopperHiddenCols), 1, 1, 0};
    plan.blocks = std::min<int64_t>(device.sms, most_row_tiles(p.S, p.E, kRows) * plan.tiles_n);
    run<kHopperHiddenCols>(device, hopper_kernel<T, kHopperHiddenCols, false, HiddenEnd<T>>, plain,
                           hidden_end<T>(p, topk_weights, z, dz, weighted, dots), plan);
  });
}

}  // namespace cumo
