// What a GEMM does with two neighbouring sums of one row: shared by the portable and the Hopper kernels.
#pragma once

#include "activations.cuh"
#include "tile_math.cuh"

namespace cumo {

// z = sum + bias rounded to T; out = act(z), or act(gate) * up.
template <class T>
struct ForwardEnd {
  const T* bias;  // (E, width) or null
  T* out;         // (S, N) or null
  T* pre;         // (S, width) or null: z
  int N, width;   // width is N, or 2N if gated
  Act kind;
  bool gated, paired;

  __device__ __forceinline__ Pair finish_half(Pair sum, int64_t expert, int64_t row, int col, int left) const {
    if (bias) {
      const Pair b = load_pair(bias + expert * width + col, left, paired);
      sum.first += b.first, sum.second += b.second;
    }
    sum.first = rounded<T>(sum.first), sum.second = rounded<T>(sum.second);
    if (pre) store_pair(pre + row * width + col, sum.first, sum.second, left, paired);
    return sum;
  }

  // Columns col and col + 1 of `out`; `up` counts only when gated.
  __device__ __forceinline__ void finish(Pair sum, Pair up, int64_t expert, int64_t row, int col) const {
    const int left = N - col;
    if (left <= 0) return;
    Pair value = finish_half(sum, expert, row, col, left);
    if (kind != Act::none) value = {act(value.first, kind), act(value.second, kind)};
    if (gated) {
      const Pair factor = finish_half(up, expert, row, N + col, left);
      value.first *= factor.first, value.second *= factor.second;
    }
    if (out) store_pair(out + row * N + col, value.first, value.second, left, paired);
  }
};

// h = the sums; dz = w h act'(z), weighted = w act(z), and <h, act(z)> for the caller to add up.
template <class T>
struct HiddenEnd {
  const T* z;   // (S, N), or (S, 2N) if gated
  T* dz;        // like z, or null
  T* weighted;  // (S, N) or null
  int N;
  Act kind;
  bool gated, paired;

  __device__ __forceinline__ float finish(Pair h, float weight, int64_t row, int col) const {
    const int left = N - col;
    if (left <= 0) return 0.0f;
    const int64_t at = row * (gated ? 2 * N : N) + col;
    const Pair gate = load_pair(z + at, left, paired);
    ActAndGrad first = act_and_grad(gate.first, kind), second = act_and_grad(gate.second, kind);
    const float wh_first = h.first * weight, wh_second = h.second * weight;
    if (gated) {
      const Pair up = load_pair(z + at + N, left, paired);
      if (dz) store_pair(dz + at + N, wh_first * first.value, wh_second * second.value, left, paired);
      first = {first.value * up.first, first.slope * up.first};
      second = {second.value * up.second, second.slope * up.second};
    }
    if (dz) store_pair(dz + at, wh_first * first.slope, wh_second * second.slope, left, paired);
    if (weighted) store_pair(weighted + row * N + col, weight * first.value, weight * second.value, left, paired);
    return h.first * first.value + (left > 1 ? h.second * second.value : 0.0f);
  }
};

}  // namespace cumo
