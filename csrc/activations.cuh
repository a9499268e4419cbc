// The activations as device functions, one case per row of cumo_kernels/activations.py: act(z) and act'(z).
//
// The kind is an argument, not a template: the branch is the same for a whole launch, and eight times as many kernels
// would cost more build time and instruction cache than the branch does.
#pragma once

#include "kernels.h"
#include "platform.cuh"

namespace cumo {

struct ActAndGrad {
  float value, slope;
};

struct Sigmoid {
  float value, slope;  // slope = value * (1 - value), both accurate where the other is close to its limit
};

__device__ __forceinline__ Sigmoid sigmoid(float z) {
  const float t = expf(-fabsf(z)), inverse = 1.0f / (1.0f + t);
  return {(z >= 0.0f ? 1.0f : t) * inverse, t * inverse * inverse};
}

__device__ __forceinline__ ActAndGrad act_and_grad(float z, Act kind) {
  constexpr float kQuickGelu = 1.702f, kSqrtHalf = 0.7071067811865476f, kInvSqrt2Pi = 0.3989422804014327f;
  constexpr float kSqrt8OverPi = 1.5957691216057308f, kCubic = 0.044715f;
  switch (kind) {
    case Act::quick_gelu: {
      const Sigmoid s = sigmoid(kQuickGelu * z);
      return {z * s.value, s.value + kQuickGelu * z * s.slope};
    }
    case Act::gelu: {
      const float cdf = 0.5f * (1.0f + erff(z * kSqrtHalf));
      return {z * cdf, cdf + z * kInvSqrt2Pi * expf(-0.5f * z * z)};
    }
    case Act::gelu_tanh: {  // (1 + tanh(u)) / 2 is sigmoid(2 u)
      const Sigmoid s = sigmoid(kSqrt8OverPi * (z + kCubic * z * z * z));
      return {z * s.value, s.value + z * s.slope * kSqrt8OverPi * (1.0f + 3.0f * kCubic * z * z)};
    }
    case Act::silu: {
      const Sigmoid s = sigmoid(z);
      return {z * s.value, s.value + z * s.slope};
    }
    case Act::relu:  // not max(z, 0), which would turn NaN into 0
      return {z <= 0.0f ? 0.0f : z, z > 0.0f ? 1.0f : 0.0f};
    default:
      return {z, 1.0f};
  }
}

__device__ __forceinline__ float act(float z, Act kind) { return act_and_grad(z, kind).value; }

}  // namespace cumo
