// Epilogues of a GEMM, shared by the portable and the Hopper kernels.
//
// A warp writes 16 rows x 32 columns of sums to shared memory and reads them back as runs of eight columns of a row,
// which are loaded and stored 16 bytes at a time, by one copy of the code for all fragments of a thread.
#pragma once

#include "activations.cuh"
#include "launch.cuh"
#include "tiles.h"

namespace cumo {

constexpr int kRun = 8;                                  // columns one lane finishes at once
constexpr int kPatchRows = 16, kPatchCols = 32;
constexpr int kPatchStride = kPatchCols + 4;             // floats; the extra four spread rows over the banks
constexpr int kPatchBytes = kPatchRows * kPatchStride * 4;  // of one warp

// A thread's share of a patch in the layout of mma's accumulators, four fragments of eight columns.
__device__ __forceinline__ void lay_down(float* patch, int fragment, float s0, float s1, float s2, float s3) {
  const int lane = threadIdx.x % kWarp;
  float* at = patch + lane / 4 * kPatchStride + fragment * 8 + lane % 4 * 2;
  *reinterpret_cast<Vec<float, 2>*>(at) = {s0, s1};
  *reinterpret_cast<Vec<float, 2>*>(at + 8 * kPatchStride) = {s2, s3};
}

template <class T>
__device__ __forceinline__ void load_run(const T* source, int left, bool wide, float (&out)[kRun]) {
  if (wide && left >= kRun) {
    const auto run = *reinterpret_cast<const Vec<T, kRun>*>(source);
#pragma unroll
    for (int i = 0; i < kRun; ++i) out[i] = to_float(run.item[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) out[i] = i < left ? to_float(source[i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_run(T* target, const float (&values)[kRun], int left, bool wide) {
  if (wide && left >= kRun) {
    Vec<T, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.item[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vec<T, kRun>*>(target) = run;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i < left) target[i] = from_float<T>(values[i]);
  }
}

// Whether runs at multiples of `width` elements from `pointer` (or null) can be moved as one.
template <class T>
bool runs_are_wide(const void* pointer, int64_t width) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T, kRun>) == 0 && width % kRun == 0;
}

// z = sum + bias rounded to T; out = act(z), or act(gate) * up.
template <class T>
struct ForwardEnd {
  const T* bias;  // (E, width) or null
  T* out;         // (S, N) or null
  T* pre;         // (S, width) or null: z
  float* parts;   // (splits, S, N) or null: written instead: sums of a part of the reduction
  int64_t S;
  int N, width;   // width is N, or 2N if gated
  Act activation;
  bool gated, wide;

  // The bias is added to the first part.
  __device__ __forceinline__ void finish_part(const float* patch, const Tile& tile, int64_t row, int col) const {
    const int left = N - col;
    if (left <= 0) return;
    float values[kRun];
    load_run(patch, kRun, true, values);
    if (bias && tile.split == 0) {
      float b[kRun];
      load_run(bias + int64_t{tile.expert} * N + col, left, wide, b);
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] += b[i];
    }
    store_run(parts + (tile.split * S + row) * N + col, values, left, wide);
  }

  __device__ __forceinline__ void finish_half(float (&sums)[kRun], int64_t expert, int64_t row, int col, int left) const {
    if (bias) {
      float b[kRun];
      load_run(bias + expert * width + col, left, wide, b);
#pragma unroll
      for (int i = 0; i < kRun; ++i) sums[i] += b[i];
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) sums[i] = rounded<T>(sums[i]);
    if (pre) store_run(pre + row * width + col, sums, left, wide);
  }

  // Columns col ... col + 7 of `out`.
  __device__ __forceinline__ void finish(const float* patch, int64_t expert, int64_t row, int col) const {
    const int left = N - col;
    if (left <= 0) return;
    float values[kRun];
    load_run(patch, kRun, true, values);
    finish_half(values, expert, row, col, left);
    if (activation.kind != ActKind::none) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = act(values[i], activation);
    }
    if (gated) {
      float up[kRun];
      load_run(patch + kRun, kRun, true, up);
      finish_half(up, expert, row, N + col, left);
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] *= up_and_grad(up[i], activation).value;
    }
    if (out) store_run(out + row * N + col, values, left, wide);
  }
};

// h = the sums; dz = w h act'(z), weighted = w act(z), and <h, act(z)> of the run for the caller to add up.
template <class T>
struct HiddenEnd {
  const float* topk_weights;  // (S,) by slot
  const int* permutation;     // (S,)
  const T* z;                 // (S, N), or (S, 2N) if gated
  T* dz;                      // like z, or null
  T* weighted;                // (S, N) or null
  float* dots;                // (S, tiles_n) or null
  int N;
  Act activation;
  bool gated, wide;

  __device__ __forceinline__ float finish(const float* patch, int64_t row, int col) const {
    const int left = N - col;
    if (left <= 0) return 0.0f;
    const float weight = topk_weights[permutation[row]];
    const int64_t at = row * (gated ? 2 * N : N) + col;
    float h[kRun], a[kRun], slope[kRun], dot = 0.0f;
    load_run(patch, kRun, true, h);
    load_run(z + at, left, wide, a);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const ActAndGrad both = act_and_grad(a[i], activation);
      a[i] = both.value, slope[i] = both.slope;
    }
    if (gated) {
      float up[kRun], through[kRun];
      load_run(z + at + N, left, wide, up);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const ActAndGrad linear = up_and_grad(up[i], activation);
        through[i] = linear.slope == 0.0f ? 0.0f : weight * h[i] * a[i];
        a[i] *= linear.value, slope[i] *= linear.value;
      }
      if (dz) store_run(dz + at + N, through, left, wide);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      dot += i < left ? h[i] * a[i] : 0.0f;
      slope[i] *= weight * h[i];
      a[i] *= weight;
    }
    if (dz) store_run(dz + at, slope, left, wide);
    if (weighted) store_run(weighted + row * N + col, a, left, wide);
    return dot;
  }
};

// Rows [begin, end) of out, which may be null; every block participates with `threads` threads.
template <class T>
__device__ __forceinline__ void zero_rows(T* out, int64_t begin, int64_t end, int64_t width, int thread, int threads) {
  if (out == nullptr) return;
  for (int64_t i = begin * width + int64_t{blockIdx.x} * threads + thread; i < end * width;
       i += int64_t{gridDim.x} * threads)
    out[i] = from_float<T>(0.0f);
}

template <class T>
ForwardEnd<T> forward_end(const Gemm& p, void* out, void* pre, float* parts) {
  const bool wide = runs_are_wide<T>(p.bias, p.N) && runs_are_wide<T>(out, p.N) && runs_are_wide<T>(pre, p.N) &&
                    runs_are_wide<float>(parts, p.N);
  return {static_cast<const T*>(p.bias), static_cast<T*>(out), static_cast<T*>(pre), parts, p.S, p.N,
          p.gated ? 2 * p.N : p.N, p.act, p.gated, wide};
}

// Rows past the last expert's end, in every part.
template <class T>
__device__ __forceinline__ void zero_tail(const ForwardEnd<T>& end, const Gemm& p, int splits, int thread, int threads) {
  if (!p.zero_tail) return;
  const int tail = p.expert_offsets[p.E];
  zero_rows(end.out, tail, p.S, p.N, thread, threads);
  zero_rows(end.pre, tail, p.S, end.width, thread, threads);
  for (int split = 0; split < splits; ++split)
    zero_rows(end.parts ? end.parts + split * p.S * p.N : nullptr, tail, p.S, p.N, thread, threads);
}

template <class T>
HiddenEnd<T> hidden_end(const Gemm& p, const float* topk_weights, const void* z, void* dz, void* weighted, float* dots) {
  const bool wide = runs_are_wide<T>(z, p.N) && runs_are_wide<T>(dz, p.N) && runs_are_wide<T>(weighted, p.N);
  return {topk_weights, p.permutation, static_cast<const T*>(z), static_cast<T*>(dz), static_cast<T*>(weighted), dots,
          p.N, p.act, p.gated, wide};
}

// The patch of a warp, of which row r is row first_row + r of the layer and column c is column first_col + c of the
// tile of `tile_cols` columns.
template <class T>
__device__ __forceinline__ void finish_patch(const ForwardEnd<T>& end, const float* patch, const Tile& tile,
                                             int first_row, int first_col, int tile_cols) {
  const int lane = threadIdx.x % kWarp, runs = end.gated ? 2 : 4;
#pragma unroll 1
  for (int item = lane; item < kPatchRows * runs; item += kWarp) {
    const int row = first_row + item / runs, col = first_col + item % runs * (kPatchCols / runs);
    if (row >= tile.end_row) continue;
    const float* run = patch + item / runs * kPatchStride + item % runs * (kPatchCols / runs);
    const int index = weight_column(tile.tile_n, tile_cols, col, end.N, end.gated).index;
    if (end.parts) {
      end.finish_part(run, tile, row, index);
    } else {
      end.finish(run, tile.expert, row, index);
    }
  }
}

// Adds the dots of the patch's rows to dots[i], row lane / 4 + 8 i; every lane of four has the sum of its own run.
template <class T>
__device__ __forceinline__ void finish_patch(const HiddenEnd<T>& end, const float* patch, const Tile& tile,
                                             int first_row, int first_col, int tile_cols, float (&dots)[2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    if (first_row + row < tile.end_row)
      dots[i] += end.finish(patch + row * kPatchStride + lane % 4 * kRun, first_row + row,
                            tile.tile_n * tile_cols + first_col + lane % 4 * kRun);
  }
}

}  // namespace cumo
