// Shared by the Hopper GEMMs: the ring of stages, and the multiplication of its stages.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"
#include "tensor_map.cuh"

namespace cumo {

#if defined(CUMO_SM90A) || defined(CUMO_EMULATE)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;  // not compiled for sm_90a: the portable kernels run on Hopper too
#endif

constexpr int kGroup = 128, kThreads = 3 * kGroup;  // a warpgroup; one producer and two consumers
constexpr int kRows = kPlanRows, kSteps = 64;       // of a tile, and of a stage along the reduction
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;  // per thread; each starts with 168
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);
constexpr int kLag = 2;  // stages whose copies overlap before the first is handed over

template <int kCols>
struct Stages {
  static constexpr int kCount = kCols == 256 ? 4 : 6;
  static constexpr int kABytes = kRows * kRowBytes, kBBytes = kCols * kRowBytes, kBytes = kABytes + kBBytes;
  static constexpr int kPatches = kCount * kBytes, kBarriers = kPatches + 8 * kPatchBytes;
  static constexpr int kShared = kBarriers + (2 * kCount + 2) * 8;  // full, empty, and the turns
  static_assert(kShared <= 227 * 1024 && kLag < kCount - 1);
};

// Current stage of the ring and number of rounds, over all tiles of a block.
template <int kCount>
struct Turn {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kCount) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void skip(int stages) {
    stage += stages;
    phase ^= stage / kCount & 1;
    stage %= kCount;
  }
};

// A producer thread has started copying a stage: the stage of kLag stages ago has arrived and is handed over.
template <int kCount>
__device__ __forceinline__ void hand_over(Barrier* full, Turn<kCount>& landed, int& under_way) {
  cp_async_commit();
  if (under_way < kLag) {
    ++under_way;
    return;
  }
  cp_async_wait<kLag>();
  fence_async();
  arrive(&full[landed.stage]);
  landed.next();
}

template <int kCount>
__device__ __forceinline__ void hand_over_rest(Barrier* full, Turn<kCount>& landed, int under_way) {
  cp_async_wait<0>();
  fence_async();
  for (; under_way > 0; --under_way, landed.next()) arrive(&full[landed.stage]);
}

// d[m] (64, kN) = rows of A times the first kN columns of B over `steps` stages: with kM = 1 this warpgroup's half of the
// 128 rows, with kM = 2 both. seen(step, a) may read a stage's A; issued() is called when no further stage is waited
// for.
template <class T, int kCols, int kN, bool kAcrossA, bool kAcrossB, int kM, class Seen, class Issued>
__device__ __forceinline__ void multiply_stages(int steps, unsigned char* shared, Barrier* full, Barrier* empty,
                                                Turn<Stages<kCols>::kCount>& turn, float (&d)[kM][kCols / 2],
                                                Seen seen, Issued issued) {
  using S = Stages<kCols>;
  // 64 rows along the reduction and a chunk of 64 columns across it are both this many bytes
  constexpr int kChunk = kSteps * kRowBytes;
  const int first = kM == 1 ? (threadIdx.x / kGroup - 1) * kChunk : 0;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) d[m][i] = 0.0f;
  int last = -1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for(&full[turn.stage], turn.phase);
    unsigned char* stage = shared + turn.stage * S::kBytes;
    // the address is the lowest field of a descriptor, in units of 16 bytes
    const uint64_t a = matrix_descriptor(shared_address(stage) + first, kAcrossA ? kChunk : 0);
    const uint64_t b = matrix_descriptor(shared_address(stage + S::kABytes), kAcrossB ? kChunk : 0);
#pragma unroll
    for (int m = 0; m < kM; ++m) pin(d[m]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; k += 16)
#pragma unroll
      for (int m = 0; m < kM; ++m)
        wgmma<T, kN, kAcrossA, kAcrossB>(reinterpret_cast<float(&)[kN / 2]>(d[m]),
                                         a + (m * kChunk + k * (kAcrossA ? kRowBytes : 2)) / 16,
                                         b + k * (kAcrossB ? kRowBytes : 2) / 16);
    wgmma_commit();
    seen(step, stage);
    wgmma_wait<T, kN, 1>();
    // the previous multiplication has finished with its stage
    if (last >= 0 && threadIdx.x % kWarp == 0) arrive(&empty[last]);
    last = turn.stage;
    turn.next();
  }
  issued();
  wgmma_wait<T, kN, 0>();
#pragma unroll
  for (int m = 0; m < kM; ++m) pin(d[m]);
  if (last >= 0 && threadIdx.x % kWarp == 0) arrive(&empty[last]);
}

// Position of eight columns of a tile in B when its halves are apart: 64 of the gate alternate with 64 of the up half.
constexpr int apart(int eight) { return eight / 16 * 16 + eight % 2 * 8 + eight % 16 / 2; }

// The warp's 16 rows of each d[m] in patches of 32 columns, `patches` of them in a row: finish(m, first column), one copy
// of its code for all.
template <int kCols, int kM, class Finish>
__device__ __forceinline__ void for_each_patch(const float (&d)[kM][kCols / 2], float* patch, int patches,
                                               bool halves_apart, Finish finish) {
  constexpr int kPerRow = kCols / kPatchCols;
#pragma unroll 1
  for (int c = 0; c < (kM - 1) * kPerRow + patches; ++c) {
#pragma unroll
    for (int other = 0; other < kM * kPerRow; ++other)  // registers must not be indexed by c
      if (c == other)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int eight = other % kPerRow * 4 + n;
          const float* in_turns = d[other / kPerRow] + eight * 4;
          const float* sums = d[other / kPerRow] + apart(eight) * 4;
          if (!halves_apart) {
            lay_down(patch, n, in_turns[0], in_turns[1], in_turns[2], in_turns[3]);
          } else {
            lay_down(patch, n, sums[0], sums[1], sums[2], sums[3]);
          }
        }
    sync_warp();
    finish(c / kPerRow, c % kPerRow * kPatchCols);
    sync_warp();
  }
}

template <class F>
void with_16_bit_type(Dtype dtype, F f) {
  return dtype == Dtype::fp16 ? f(static_cast<half_t*>(nullptr)) : f(static_cast<bf16_t*>(nullptr));
}

}  // namespace cumo
