// The product of two operand tiles in shared memory, shared by the portable GEMMs of csrc/ (sm_80 and later).
//
// A block of 256 threads computes 128 x 128: two rows of four warps, 64 x 32 each. Operands come in stages of 128 bytes
// along the reduction (64 steps of 16-bit elements, 32 of fp32), loaded by cp.async three stages deep. 16-bit elements
// use mma.m16n8k16, fp32 uses mma.m16n8k8.tf32 or, as IEEE fp32, plain FMA in the same fragment layout, so that
// epilogues are the same. Layout of a tile: tiles.h.
#pragma once

#include "launch.cuh"
#include "tiles.h"

namespace cumo {

constexpr int kGemmThreads = 256;
constexpr int kTileRows = 128, kTileCols = 128;
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kGemmStages = 3;
constexpr int kGemmShared = kGemmStages * 2 * kTileBytes;
constexpr int kGemmPerSm = 1;  // blocks per multiprocessor: their threads have more than 128 registers

// Accumulators of a thread: [16-row fragment][8-column fragment][element].
using Acc = float[4][4][4];

struct WarpPlace {  // position of a warp's 64 x 32 sums in the tile
  int row, col;

  __device__ __forceinline__ WarpPlace() : row(threadIdx.x / kWarp / 4 * 64), col(threadIdx.x / kWarp % 4 * 32) {}
};

template <class T>
constexpr int kDepth = kRowBytes / sizeof(T);  // reduction steps of a stage

// A 16-byte piece of a row, zero past `valid` elements.
template <class T>
__device__ __forceinline__ void load_piece(unsigned char* target, const T* source, int64_t valid, bool wide) {
  constexpr int kVec = 16 / sizeof(T);
  const int count = valid < 0 ? 0 : valid < kVec ? static_cast<int>(valid) : kVec;
  if (wide) {
    cp_async16(target, source, count * static_cast<int>(sizeof(T)));
  } else {
    Vec<T, kVec> piece;
    for (int i = 0; i < kVec; ++i) piece.item[i] = i < count ? source[i] : from_float<T>(0.0f);
    *reinterpret_cast<Vec<T, kVec>*>(target) = piece;
  }
}

// Which pieces a thread loads: four of each operand.
constexpr int kPieces = kTileBytes / 16 / kGemmThreads;

struct AlongPiece {
  int outer, byte;
  __device__ __forceinline__ explicit AlongPiece(int j)
      : outer(threadIdx.x / 8 + j * (kGemmThreads / 8)), byte(threadIdx.x % 8 * 16) {}
};

template <class T>
struct AcrossPiece {
  static constexpr int kPerRow = kTileCols * sizeof(T) / 16;
  int k, outer;
  __device__ __forceinline__ explicit AcrossPiece(int j)
      : k(threadIdx.x / kPerRow + j * (kGemmThreads / kPerRow)), outer(threadIdx.x % kPerRow * (16 / sizeof(T))) {}
};

template <class T, bool kAlong>
__device__ __forceinline__ const unsigned char* element(const unsigned char* tile, int outer, int k) {
  constexpr int kSize = sizeof(T);
  return tile + (kAlong ? offset_along(outer, k * kSize) : offset_across(k, outer * kSize, kDepth<T>));
}

template <bool kAlong>
__device__ __forceinline__ float fp32_at(const unsigned char* tile, int outer, int k) {
  return *reinterpret_cast<const float*>(element<float, kAlong>(tile, outer, k));
}

// acc += a b over one stage; a (128 rows, depth), b (128 columns, depth).
template <class T, bool kTf32, bool kAAlong, bool kBAlong>
__device__ __forceinline__ void multiply_stage(const unsigned char* a, const unsigned char* b, Acc& acc) {
  const int lane = threadIdx.x % kWarp;
  const auto [row, col] = WarpPlace();
  if constexpr (sizeof(T) == 2) {
    // lane 8 i + r addresses row r of the 8 x 8 matrix i; i counts rows first for A, steps first for B
    const int i = lane / 8, r = lane % 8;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t fa[4][4], fb[4][2];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        if constexpr (kAAlong) {
          ldmatrix(fa[m], element<T, true>(a, row + m * 16 + i % 2 * 8 + r, k + i / 2 * 8));
        } else {
          ldmatrix_trans(fa[m], element<T, false>(a, row + m * 16 + i % 2 * 8, k + i / 2 * 8 + r));
        }
      }
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        uint32_t both[4];
        if constexpr (kBAlong) {
          ldmatrix(both, element<T, true>(b, col + n * 8 + i / 2 * 8 + r, k + i % 2 * 8));
        } else {
          ldmatrix_trans(both, element<T, false>(b, col + n * 8 + i / 2 * 8, k + i % 2 * 8 + r));
        }
        fb[n][0] = both[0], fb[n][1] = both[1], fb[n + 1][0] = both[2], fb[n + 1][1] = both[3];
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_16<T>(acc[m][n], fa[m], fb[n]);
    }
  } else if constexpr (kTf32) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 8) {
      uint32_t fa[4][4], fb[4][2];
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          fa[m][i] = to_tf32(fp32_at<kAAlong>(a, row + m * 16 + g + i % 2 * 8, k + t + i / 2 * 4));
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) fb[n][i] = to_tf32(fp32_at<kBAlong>(b, col + n * 8 + g, k + t + i * 4));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_tf32(acc[m][n], fa[m], fb[n]);
    }
  } else {
    const int g = lane / 4, t = lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < kDepth<T>; k += 4) {
      float fb[4][2][4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int s = 0; s < 4; ++s) fb[n][i][s] = fp32_at<kBAlong>(b, col + n * 8 + t + i, k + s);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float fa[4];
#pragma unroll
          for (int s = 0; s < 4; ++s) fa[s] = fp32_at<kAAlong>(a, row + m * 16 + g + h * 8, k + s);
#pragma unroll
          for (int s = 0; s < 4; ++s)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i) acc[m][n][h * 2 + i] += fa[s] * fb[n][i][s];
        }
    }
  }
}

__device__ __forceinline__ void clear(Acc& acc) {
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
}

// acc = a b over `steps` stages: load(step, a, b) loads a stage, seen(step, a, b) may read one that has arrived.
template <class T, bool kTf32, bool kAAlong, bool kBAlong, class Load, class Seen>
__device__ __forceinline__ void multiply_tiles(int steps, Acc& acc, Load load, Seen seen) {
  unsigned char* shared = shared_memory<unsigned char>();
  const auto stage = [&](int step) { return shared + step % kGemmStages * 2 * kTileBytes; };
  clear(acc);
#pragma unroll 1
  for (int step = 0; step < kGemmStages - 1; ++step) {
    if (step < steps) load(step, stage(step), stage(step) + kTileBytes);
    cp_async_commit();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kGemmStages - 2>();
    sync_block();  // this stage is visible to all threads, and all have finished with the one to be overwritten next
    const int ahead = step + kGemmStages - 1;
    if (ahead < steps) load(ahead, stage(ahead), stage(ahead) + kTileBytes);
    cp_async_commit();
    const unsigned char* a = stage(step);
    seen(step, a, a + kTileBytes);
    multiply_stage<T, kTf32, kAAlong, kBAlong>(a, a + kTileBytes, acc);
  }
  sync_block();
}

// Two neighbouring elements of a row, of which `left` are inside; `paired`: rows keep even columns 2-aligned.
template <class T>
__device__ __forceinline__ void store_pair(T* target, float first, float second, int left, bool paired) {
  if (paired && left > 1) {
    *reinterpret_cast<Vec<T, 2>*>(target) = {from_float<T>(first), from_float<T>(second)};
  } else {
    if (left > 0) target[0] = from_float<T>(first);
    if (left > 1) target[1] = from_float<T>(second);
  }
}

}  // namespace cumo
