// The activations as device functions, one case per row of cumo_kernels/activations.py: act(z) and act'(z), and
// those of the linear half, g(up) and g'(up).
//
// The kind is an argument, not a template: the branch is the same for a whole launch, and ten times as many kernels
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

__device__ __forceinline__ ActAndGrad act_and_grad(float z, const Act& act) {
  constexpr float kQuickGelu = 1.702f, kSqrtHalf = 0.7071067811865476f, kInvSqrt2Pi = 0.3989422804014327f;
  constexpr float kSqrt8OverPi = 1.5957691216057308f, kCubic = 0.044715f;
  switch (act.kind) {
    case ActKind::quick_gelu: {
      const Sigmoid s = sigmoid(kQuickGelu * z);
      return {z * s.value, s.value + kQuickGelu * z * s.slope};
    }
    case ActKind::gelu: {
      const float cdf = 0.5f * (1.0f + erff(z * kSqrtHalf));
      return {z * cdf, cdf + z * kInvSqrt2Pi * expf(-0.5f * z * z)};
    }
    case ActKind::gelu_tanh: {  // (1 + tanh(u)) / 2 is sigmoid(2 u)
      const Sigmoid s = sigmoid(kSqrt8OverPi * (z + kCubic * z * z * z));
      return {z * s.value, s.value + z * s.slope * kSqrt8OverPi * (1.0f + 3.0f * kCubic * z * z)};
    }
    case ActKind::silu: {
      const Sigmoid s = sigmoid(z);
      return {z * s.value, s.value + z * s.slope};
    }
    case ActKind::relu:  // not max(z, 0), which would turn NaN into 0
      return {z <= 0.0f ? 0.0f : z, z > 0.0f ? 1.0f : 0.0f};
    case ActKind::relu2: {
      const float r = z <= 0.0f ? 0.0f : z;
      return {r * r, 2.0f * r};
    }
    case ActKind::swiglu_clamped: {
      const float below = z > act.limit ? act.limit : z;  // NaN stays NaN
      const Sigmoid s = sigmoid(below);
      return {below * s.value, z <= act.limit ? s.value + below * s.slope : 0.0f};
    }
    case ActKind::swiglu_oai: {
      const float below = z > act.limit ? act.limit : z;
      const Sigmoid s = sigmoid(act.alpha * below);
      return {below * s.value, z <= act.limit ? s.value + act.alpha * below * s.slope : 0.0f};
    }
    case ActKind::clamped_swiglu: {
      const Sigmoid s = sigmoid(z);
      const float value = z * s.value;
      return {value > act.limit ? act.limit : value, value <= act.limit ? s.value + z * s.slope : 0.0f};
    }
    default:
      return {z, 1.0f};
  }
}

__device__ __forceinline__ float act(float z, const Act& act) { return act_and_grad(z, act).value; }

// g(u) and g'(u) of a gated activation act(gate) * g(up).
__device__ __forceinline__ ActAndGrad up_and_grad(float u, const Act& act) {
  if (act.limit == 0.0f) return {u, 1.0f};
  const float slope = u >= -act.limit && u <= act.limit ? 1.0f : 0.0f;
  const float within = u > act.limit ? act.limit : u < -act.limit ? -act.limit : u;  // NaN stays NaN
  return {act.kind == ActKind::swiglu_oai ? within + 1.0f : within, slope};
}

}  // namespace cumo
