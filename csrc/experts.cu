// Expert MLPs (CUDA): the two memory-bound steps of the backward pass that belong to no other stem.
//
//   weigh_rows:        out[p] = w[p] act(z[p]), or w[p] grad[token of p]
//   topk_weights_grad: out[slot] = <h, a> (summed over column tiles, from grad_hidden) + <grad[token], down_bias[expert]>
//
// The layer itself, forward in three launches (GEMM with gather, bias and activation; GEMM with bias; combine), is in
// experts_layer.h; gathered copies are made only for Hopper's large products. A warp per row. Memory bound.
// Contract: cumo_kernels/ops/experts.py. Reference: cumo_kernels/backends/reference/experts.py.
#include "activations.cuh"
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kRowsPerBlock = kThreads / kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh_rows_kernel(const T* source, int64_t stride_source, const float* topk_weights, const int* permutation,
                      const int* end, int N, int top_k, Act activation, bool gated, T* out) {
  begin_kernel();
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= *end) return;
  const int slot = permutation[row];
  const float weight = topk_weights[slot];
  const T* from = source + (activation.kind == ActKind::none ? slot / top_k : row) * stride_source;
  for (int col = threadIdx.x % kWarp; col < N; col += kWarp) {
    const int gate = gated && activation.interleaved ? 2 * col : col;
    float value = act(to_float(from[gate]), activation);
    if (gated) value *= up_and_grad(to_float(from[activation.interleaved ? gate + 1 : N + col]), activation).value;
    out[row * N + col] = from_float<T>(weight * value);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    topk_weights_grad_kernel(const float* dots, int tiles, const T* grad, int64_t stride_grad, const T* bias,
                             const int* inverse, const int* expert_offsets, int64_t S, int E, int O, int top_k,
                             float* out) {
  begin_kernel();
  const int64_t slot = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kWarp;
  if (slot >= S) return;
  const int lane = threadIdx.x % kWarp, position = inverse[slot];
  float sum = 0.0f;
  if (position >= 0) {
    for (int tile = lane; tile < tiles; tile += kWarp) sum += dots[int64_t{position} * tiles + tile];
    if (bias) {
      int expert = 0;  // the first whose rows end behind the position
      for (int end = E - 1; expert < end;) {
        const int middle = (expert + end) / 2;
        if (expert_offsets[middle + 1] <= position) expert = middle + 1;
        else end = middle;
      }
      const T* row = grad + (slot / top_k) * stride_grad;
      for (int col = lane; col < O; col += kWarp) sum += to_float(row[col]) * to_float(bias[int64_t{expert} * O + col]);
    }
  }
  sum = sum_of_warp(sum);
  if (lane == 0) out[slot] = sum;
}

void weigh_rows(const Device& device, Dtype dtype, const void* source, int64_t stride_source, const float* topk_weights,
                const int* permutation, const int* end, int64_t S, int N, int top_k, Act activation, bool gated,
                void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(device, weigh_rows_kernel<T>, ceil_div<int64_t>(S, kRowsPerBlock), kThreads, 0,
           static_cast<const T*>(source), stride_source, topk_weights, permutation, end, N, top_k, activation, gated,
           static_cast<T*>(out));
  });
}

void topk_weights_grad(const Device& device, Dtype dtype, const float* dots, int tiles, const void* grad,
                       int64_t stride_grad, const void* bias, const int* inverse, const int* expert_offsets, int64_t S,
                       int E, int O, int top_k, float* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(device, topk_weights_grad_kernel<T>, ceil_div<int64_t>(S, kRowsPerBlock), kThreads, 0, dots, tiles,
           static_cast<const T*>(grad), stride_grad, static_cast<const T*>(bias), inverse, expert_offsets, S, E, O,
           top_k, out);
  });
}

}  // namespace cumo
