// Logits of the gate, for a block of route_kernel or of route_backward_kernel (routing.cu): 32 tokens with a gate.
//
// 16-bit logits are computed by tensor cores, whose operands are loaded from memory directly into registers: every warp
// has a share of the columns for all tokens, with many loads in flight, and the shares are added in the order of the
// warps. fp32 logits are plain sums, a warp per four tokens. In both cases a logit's sum depends on H alone, and the
// logit is rounded to the dtype of x.
#pragma once

#include <cmath>

#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokensPerWarp = 4, kTokensPerBlock = kWarps * kTokensPerWarp;
constexpr int kGateChunk = 8;  // experts whose sums a lane holds at once

// Layout of the shares of gate logits in shared memory: (shares, tokens, columns) for experts 0 ... kColumns - 1.
template <class T, int kLanes>
struct Shares {
  static constexpr int kColumns = kLanes == 8 ? 8 : kMaxFusedExperts, kCount = sizeof(T) == 2 ? kWarps : 1;
  static constexpr int kFloats = kCount * kTokensPerBlock * kColumns;
};

template <class T>
union alignas(16) Pack {
  T item[16 / sizeof(T)];
  uint32_t word[4];
};

// 16 bytes of a row, `whole` and aligned, or zeros from `end` on.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t col, int64_t end, bool whole) {
  constexpr int kVec = 16 / sizeof(T);
  Pack<T> pack;
  if (whole) {
    const auto words = *reinterpret_cast<const Vec<uint32_t, 4>*>(row + col);
#pragma unroll
    for (int i = 0; i < 4; ++i) pack.word[i] = words.item[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.item[i] = col + i < end ? row[col + i] : from_float<T>(0.0f);
  }
  return pack;
}

// The row of the last token for tokens past T.
template <class T>
__device__ __forceinline__ const T* row_of_token(const Route& r, int64_t token) {
  return static_cast<const T*>(r.x) + (token < r.T ? token : r.T - 1) * r.stride_x_t;
}

// This warp's share of the block's logits. A lane's 16 bytes of a row are its operands of two products: the columns are
// the same for tokens and experts, and a sum may take them in any order.
template <class T, int kLanes>
__device__ __forceinline__ void multiply_gate(const Route& r, int64_t block_begin, bool wide, float* shares) {
  using S = Shares<T, kLanes>;
  constexpr int kFragments = S::kColumns / 8, kAtOnce = kFragments == 1 ? 4 : 2, kStep = 32;  // columns of a load
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const T *x[4], *gate[kFragments];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = row_of_token<T>(r, block_begin + i * 8 + g);
#pragma unroll
  for (int n = 0; n < kFragments; ++n)
    gate[n] = static_cast<const T*>(r.gate) + (n * 8 + g < r.E ? n * 8 + g : r.E - 1) * r.stride_gate_e;
  float d[2][kFragments][4] = {};
  const auto load = [&](int64_t col, bool whole, Pack<T>(&a)[4], Pack<T>(&b)[kFragments]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = load_pack(x[i], col, r.H, whole);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) b[n] = load_pack(gate[n], col, r.H, whole);
  };
  const auto multiply = [&](const Pack<T>(&a)[4], const Pack<T>(&b)[kFragments]) {
#pragma unroll
    for (int k = 0; k < 4; k += 2)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kFragments; ++n)
          mma_16<T>(d[m][n],
                    {a[2 * m].word[k], a[2 * m + 1].word[k], a[2 * m].word[k + 1], a[2 * m + 1].word[k + 1]},
                    {b[n].word[k], b[n].word[k + 1]});
  };
#pragma unroll 1
  for (int64_t first = warp * kAtOnce * kStep; first < r.H; first += kWarps * kAtOnce * kStep) {
    if (wide && first + kAtOnce * kStep <= r.H) {
      Pack<T> a[kAtOnce][4], b[kAtOnce][kFragments];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) load(first + s * kStep + t * 8, true, a[s], b[s]);
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) multiply(a[s], b[s]);
    } else {
#pragma unroll 1
      for (int s = 0; s < kAtOnce; ++s) {
        Pack<T> a[4], b[kFragments];
        load(first + s * kStep + t * 8, false, a, b);
        multiply(a, b);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        shares[(warp * kTokensPerBlock + i * 8 + g) * S::kColumns + n * 8 + 2 * t + j] = d[i / 2][n][i % 2 * 2 + j];
}

// The logits of the warp's four tokens.
template <class T, int kLanes>
__device__ __forceinline__ void sum_gate(const Route& r, int64_t block_begin, bool wide, float* shares) {
  constexpr int kVec = 16 / sizeof(T);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T *rows[kTokensPerWarp], *gate = static_cast<const T*>(r.gate);
  for (int t = 0; t < kTokensPerWarp; ++t)
    rows[t] = row_of_token<T>(r, block_begin + warp * kTokensPerWarp + t);
  for (int first = 0; first < r.E; first += kGateChunk) {
    float sums[kTokensPerWarp][kGateChunk] = {};
#pragma unroll 1
    for (int64_t col = lane * kVec; col < r.H; col += kWarp * kVec) {
      const bool whole = wide && col + kVec <= r.H;
      Pack<T> x[kTokensPerWarp], w[kGateChunk];
#pragma unroll
      for (int t = 0; t < kTokensPerWarp; ++t) x[t] = load_pack(rows[t], col, r.H, whole);
#pragma unroll
      for (int e = 0; e < kGateChunk; ++e)
        w[e] = load_pack(gate + (first + e < r.E ? first + e : r.E - 1) * r.stride_gate_e, col, r.H, whole);
#pragma unroll
      for (int e = 0; e < kGateChunk; ++e)
#pragma unroll
        for (int t = 0; t < kTokensPerWarp; ++t)
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[t][e] += to_float(x[t].item[i]) * to_float(w[e].item[i]);
    }
#pragma unroll
    for (int e = 0; e < kGateChunk; ++e)
#pragma unroll
      for (int t = 0; t < kTokensPerWarp; ++t) {
        const float sum = sum_of_warp(sums[t][e]);
        if (lane == 0) shares[(warp * kTokensPerWarp + t) * Shares<T, kLanes>::kColumns + first + e] = sum;
      }
  }
}

// Computes what load_logits adds up; called by all threads of a block.
template <class T, int kLanes, int kPerLane>
__device__ __forceinline__ void share_logits(const Route& r, int64_t block_begin, bool wide, float* shares) {
  if constexpr (kLanes * kPerLane <= kMaxFusedExperts) {
    if (r.gate == nullptr) return;
    if constexpr (sizeof(T) == 2) {
      multiply_gate<T, kLanes>(r, block_begin, wide, shares);
    } else {
      sum_gate<T, kLanes>(r, block_begin, wide, shares);
    }
    sync_block();
  }
}

// A token's logits; its lane l of kLanes holds experts l, l + kLanes, ...; -inf past E.
template <class T, int kLanes, int kPerLane>
__device__ __forceinline__ void load_logits(const Route& r, int64_t block_begin, int local, const float* shares,
                                            float (&logits)[kPerLane]) {
  using S = Shares<T, kLanes>;
  const T* row = row_of_token<T>(r, block_begin + local);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = threadIdx.x % kLanes + i * kLanes;
    logits[i] = -INFINITY;
    if (expert >= r.E) continue;
    if (r.gate == nullptr) {
      logits[i] = to_float(row[expert]);
      continue;
    }
    float sum = 0.0f;
#pragma unroll
    for (int share = 0; share < S::kCount; ++share)
      sum += shares[(share * kTokensPerBlock + local) * S::kColumns + expert];
    logits[i] = rounded<T>(sum);
  }
}

}  // namespace cumo
