// Scores other than a softmax, and the choice by scores, for the kernels of routing.cu whose kScored is true.
//
//   s = sigmoid(logits) or sqrt(softplus(logits))       r = logits without a bias and groups, else s + bias
//   a group's value is its largest r, or the sum of its two largest; experts outside of the best groups are not chosen
//
// A choice is made among integer keys in the order of the values, so that ties go to the lowest index, and NaN ranks
// highest. Contract: cumo_kernels/ops/scores.py. Reference: cumo_kernels/backends/reference/scores.py.
#pragma once

#include "gate_logits.cuh"

namespace cumo {

constexpr int kNoKey = -2147483647 - 1;
constexpr float kTiny = 1e-20f;  // TINY of cumo_kernels/types.py

// Over the lanes of a token.
template <int kLanes>
__device__ __forceinline__ float max_of_lanes(float value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
  return value;
}
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// An integer in the order of `value`; -0 equals 0, NaN ranks highest.
__device__ __forceinline__ int rank_key(float value) {
  if (value != value) return 2147483647;
  const int bits = bits_of(value == 0.0f ? 0.0f : value);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float value_of_key(int key) {
  return float_of(static_cast<uint32_t>(key < 0 ? key ^ 0x7fffffff : key));
}

struct Scored {
  float score, slope;  // of an elementwise score; both 0 at -inf, NaN at NaN
};
__device__ __forceinline__ Scored score_of(const Route& r, float logit) {
  const float e = expf(-fabsf(logit)), inverse = 1.0f / (1.0f + e);
  if (r.score == Score::sigmoid) return {(logit >= 0.0f ? 1.0f : e) * inverse, e * inverse * inverse};
  // not max(logit, 0), which would turn NaN into 0
  const float root = sqrtf((logit < 0.0f ? 0.0f : logit) + log1pf(e));
  return {root, root == 0.0f ? 0.0f : (logit >= 0.0f ? 1.0f : e) * inverse / (2.0f * root)};
}

// Sets the keys of experts outside of the best groups to kNoKey. By all lanes of a warp; `group_keys` is shared memory of
// this token, (expert_groups,).
template <int kLanes, int kPerLane>
__device__ __forceinline__ void keep_best_groups(const Route& r, int* group_keys, int (&keys)[kPerLane]) {
  const int lane = threadIdx.x % kLanes, size = r.E / r.expert_groups;
  for (int g = 0; g < r.expert_groups; ++g) {
    int best = kNoKey, second = kNoKey;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int place = lane + i * kLanes - g * size;
      const int key = place >= 0 && place < size ? keys[i] : kNoKey;
      second = key > best ? best : key > second ? key : second;
      best = key > best ? key : best;
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      const int other = shuffle_xor(best, lanes), other_second = shuffle_xor(second, lanes);
      const int less = best < other ? best : other, most = second > other_second ? second : other_second;
      best = best > other ? best : other;
      second = less > most ? less : most;
    }
    if (lane == 0) group_keys[g] = r.by_two ? rank_key(value_of_key(best) + value_of_key(second)) : best;
  }
  sync_warp();
  for (int n = 0; n < r.top_groups; ++n) {
    int key = kNoKey, group = 2147483647;
    for (int g = lane; g < r.expert_groups; g += kLanes)
      if (group_keys[g] > key) key = group_keys[g], group = g;
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      const int other_key = shuffle_xor(key, lanes), other_group = shuffle_xor(group, lanes);
      if (other_key > key || (other_key == key && other_group < group)) key = other_key, group = other_group;
    }
    if (group % kLanes == lane) group_keys[group] = kNoKey;  // no other lane reads it before the barrier
  }
  sync_warp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kLanes;
    if (expert < r.E && group_keys[expert / size] != kNoKey) keys[i] = kNoKey;
  }
  sync_warp();
}

// The score of expert `expert` among those of a token's lanes, 0 for index E.
template <int kLanes, int kPerLane>
__device__ __forceinline__ float score_at(const Route& r, int expert, const float (&scores)[kPerLane]) {
  float value = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (expert < r.E && expert == static_cast<int>(threadIdx.x) % kLanes + i * kLanes) value = scores[i];
  return sum_of_lanes<kLanes>(value);
}

}  // namespace cumo
