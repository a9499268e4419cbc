// Permutation (CUDA): token order -> expert order, and the weighted way back.
//
//   permute:           out[p] = x[permutation[p] / K]                                x (T, H)     out (S, H)
//   combine:           out[t] = sum_k topk_weights[t, k] * rows[inverse[t * K + k]]  rows (S, H)  out (T, H)
//   combine_backward:  drows[p] = w * grad[slot / K]   dweights[slot] = <grad[slot / K], rows[p]>, slot = permutation[p]
//
// Rows of combine may come as the partial sums of a split GEMM, fp32 (parts, S, H), which are added up on the way.
// Sorted positions of dropped slots (inverse -1) get zeros and are never read. One warp per row of the output, 16 bytes
// a lane where H and the strides allow it; sums in fp32, in the order of the choices. Memory bound: S * H + T * H
// elements (permute reads a token K times, from L2), 2 * S * H + T * H for combine_backward.
// Contract: cumo_kernels/ops/permutation.py. Truth: cumo_kernels/backends/reference/permutation.py.
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;

__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp; }

template <class T, int kVec>
__global__ void permute_kernel(const T* x, int64_t stride_x_t, const int* permutation, const int* inverse, int64_t S,
                               int64_t H, int K, T* out) {
  using V = Vec<T, kVec>;
  const int64_t position = row_of_warp();
  if (position >= S) return;
  const int slot = permutation[position];
  const bool kept = inverse[slot] >= 0;
  const T* source = x + (slot / K) * stride_x_t;
  for (int64_t col = threadIdx.x % kWarp * kVec; col < H; col += kWarp * kVec) {
    V value;
    if (kept) {
      value = *reinterpret_cast<const V*>(source + col);
    } else {
      for (int i = 0; i < kVec; ++i) value.item[i] = from_float<T>(0.0f);
    }
    *reinterpret_cast<V*>(out + position * H + col) = value;
  }
}

// R is T, or float for rows that are still in parts.
template <class R, class T, int kVec>
__global__ void combine_kernel(const R* rows, int64_t stride_rows_s, int parts, const float* weights,
                               const int* inverse, int64_t num_tokens, int64_t H, int K, T* out) {
  const int64_t token = row_of_warp();
  if (token >= num_tokens) return;
  for (int64_t col = threadIdx.x % kWarp * kVec; col < H; col += kWarp * kVec) {
    float sum[kVec] = {};
    for (int k = 0; k < K; ++k) {
      const int position = inverse[token * K + k];
      if (position < 0) continue;  // a dropped slot's weight may be anything
      const float weight = weights ? weights[token * K + k] : 1.0f;
      float row[kVec];
      for (int part = 0; part < parts; ++part) {
        const auto run = *reinterpret_cast<const Vec<R, kVec>*>(
            rows + (part * num_tokens * K + position) * stride_rows_s + col);
        for (int i = 0; i < kVec; ++i) row[i] = part ? row[i] + to_float(run.item[i]) : to_float(run.item[i]);
      }
      for (int i = 0; i < kVec; ++i) sum[i] += weight * row[i];
    }
    Vec<T, kVec> value;
    for (int i = 0; i < kVec; ++i) value.item[i] = from_float<T>(sum[i]);
    *reinterpret_cast<Vec<T, kVec>*>(out + token * H + col) = value;
  }
}

template <class T, int kVec>
__global__ void combine_backward_kernel(const T* grad, int64_t stride_grad_t, const T* rows, int64_t stride_rows_s,
                                        const float* weights, const int* permutation, const int* inverse, int64_t S,
                                        int64_t H, int K, T* drows, float* dweights) {
  using V = Vec<T, kVec>;
  const int64_t position = row_of_warp();
  if (position >= S) return;
  const int slot = permutation[position];
  const bool kept = inverse[slot] >= 0;
  const float weight = kept ? weights[slot] : 0.0f;
  const T* upstream = grad + (slot / K) * stride_grad_t;
  float dot = 0.0f;
  for (int64_t col = threadIdx.x % kWarp * kVec; col < H; col += kWarp * kVec) {
    V value;
    if (kept) {
      value = *reinterpret_cast<const V*>(upstream + col);
      const V row = *reinterpret_cast<const V*>(rows + position * stride_rows_s + col);
      for (int i = 0; i < kVec; ++i) {
        const float g = to_float(value.item[i]);
        dot += g * to_float(row.item[i]);
        value.item[i] = from_float<T>(weight * g);
      }
    } else {
      for (int i = 0; i < kVec; ++i) value.item[i] = from_float<T>(0.0f);
    }
    *reinterpret_cast<V*>(drows + position * H + col) = value;
  }
  dot = sum_of_warp(dot);
  if (threadIdx.x % kWarp == 0) dweights[slot] = dot;
}

void permute(const Device& device, Dtype dtype, const void* x, int64_t stride_x_t, const int* permutation,
             const int* inverse, int64_t S, int64_t H, int K, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = aligned16(x, H, stride_x_t, sizeof(T)) && aligned16(out, H, H, sizeof(T));
    launch(device, wide ? permute_kernel<T, 16 / sizeof(T)> : permute_kernel<T, 1>,
           ceil_div<int64_t>(S, kRowsPerBlock), kThreads, 0, static_cast<const T*>(x), stride_x_t, permutation, inverse,
           S, H, K, static_cast<T*>(out));
  });
}

void combine(const Device& device, Dtype dtype, const void* rows, int64_t stride_rows_s, int parts,
             const float* weights, const int* inverse, int64_t num_tokens, int64_t H, int K, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto* source) {
      using R = std::remove_pointer_t<decltype(source)>;
      const bool wide = aligned16(rows, H, stride_rows_s, sizeof(R)) && aligned16(out, H, H, sizeof(T));
      launch(device, wide ? combine_kernel<R, T, 16 / sizeof(R)> : combine_kernel<R, T, 1>,
             ceil_div<int64_t>(num_tokens, kRowsPerBlock), kThreads, 0, static_cast<const R*>(rows), stride_rows_s,
             parts, weights, inverse, num_tokens, H, K, static_cast<T*>(out));
    };
    if (parts > 1) return run(static_cast<float*>(nullptr));
    run(type);
  });
}

void combine_backward(const Device& device, Dtype dtype, const void* grad, int64_t stride_grad_t, const void* rows,
                      int64_t stride_rows_s, const float* weights, const int* permutation, const int* inverse,
                      int64_t S, int64_t H, int K, void* drows, float* dweights) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = aligned16(grad, H, stride_grad_t, sizeof(T)) && aligned16(rows, H, stride_rows_s, sizeof(T)) &&
                      aligned16(drows, H, H, sizeof(T));
    launch(device, wide ? combine_backward_kernel<T, 16 / sizeof(T)> : combine_backward_kernel<T, 1>,
           ceil_div<int64_t>(S, kRowsPerBlock), kThreads, 0, static_cast<const T*>(grad), stride_grad_t,
           static_cast<const T*>(rows), stride_rows_s, weights, permutation, inverse, S, H, K, static_cast<T*>(drows),
           dweights);
  });
}

}  // namespace cumo
