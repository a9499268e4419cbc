// The gradient of down_bias (CUDA): the sum of each expert's rows of the upstream gradient, weighted.
//
//   out[e] = sum over the rows p of expert e of w[p] * grad[token(p)]        grad (T, N)   out (E, N)
//
// w[p] is the routing weight of slot permutation[p]. (Unweighted rows are summed at less cost together with a weight's
// gradient: bias_sum.cuh.) A block has eight runs of columns and 32 rows at a time. Where experts and columns alone
// would not fill the chip, an expert's rows are split into parts, added in order (sums.cu), so results repeat. An expert
// without rows gives exact zeros. Memory bound: S * N elements; a token's second and later reads come from L2.
// The same stem in Triton: cumo_kernels/backends/triton/bias_grad.py.
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kLanes = 8, kRowsAtOnce = kThreads / kLanes;
constexpr int kBatch = 8;  // rows that a thread has in flight

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    bias_grad_kernel(const T* grad, int64_t stride_grad_t, const int* permutation, const float* weights,
                     const int* expert_offsets, int E, int N, int top_k, int parts, void* out) {
  begin_kernel();
  using V = Vec<T, kVec>;
  float* sums = shared_memory<float>();  // (warps, kLanes * kVec)
  const int tiles_n = ceil_div(N, kLanes * kVec), slab = blockIdx.x / tiles_n;  // part * E + expert
  const int first_col = blockIdx.x % tiles_n * kLanes * kVec, col = first_col + threadIdx.x % kLanes * kVec;
  const int begin = expert_offsets[slab % E], end = expert_offsets[slab % E + 1];
  const int share = ceil_div(end - begin, parts), first = begin + slab / E * share;
  const int last = first + share < end ? first + share : end;
  float sum[kVec] = {};
  if (col < N)
    for (int row = first + threadIdx.x / kLanes; row < last; row += kBatch * kRowsAtOnce) {
      int slot[kBatch];
      float weight[kBatch];
      V value[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int p = row + i * kRowsAtOnce;
        slot[i] = p < last ? permutation[p] : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row + i * kRowsAtOnce >= last) continue;
        weight[i] = weights[slot[i]];
        value[i] = *reinterpret_cast<const V*>(grad + slot[i] / top_k * stride_grad_t + col);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (row + i * kRowsAtOnce < last)
#pragma unroll
          for (int j = 0; j < kVec; ++j) sum[j] += weight[i] * to_float(value[i].item[j]);
    }
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    for (int lanes = kLanes; lanes < kWarp; lanes *= 2) sum[j] += shuffle_xor(sum[j], lanes);
    if (threadIdx.x % kWarp < kLanes)
      sums[threadIdx.x / kWarp * kLanes * kVec + threadIdx.x % kLanes * kVec + j] = sum[j];
  }
  sync_block();
  const int mine = threadIdx.x;
  if (mine >= kLanes * kVec || first_col + mine >= N) return;
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += sums[warp * kLanes * kVec + mine];
  store_one<T>(out, int64_t{slab} * N + first_col + mine, total, parts > 1);
}

int bias_grad_parts(const Device& device, Dtype dtype, int64_t S, int E, int N) {
  // a part is 1024 rows of an expert under balanced routing: fewer are read before the launch that adds parts starts
  constexpr int kMost = 32, kRowsOfStep = 1024 / kMinSteps;
  const int64_t tiles = int64_t{E} * ceil_div(N, kLanes * 16 / bytes_of(dtype)), places = int64_t{8} * device.sms - 1;
  return std::min(kMost, count_splits(tiles, S / (int64_t{E} * kRowsOfStep), places));
}

void bias_grad(const Device& device, Dtype dtype, const void* grad, int64_t stride_grad, const int* permutation,
               const float* topk_weights, const int* expert_offsets, int E, int N, int top_k, int parts, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto kernel, int vec) {
      launch(device, kernel, int64_t{parts} * E * ceil_div(N, kLanes * vec), kThreads,
             kThreads / kWarp * kLanes * vec * 4, static_cast<const T*>(grad), stride_grad, permutation, topk_weights,
             expert_offsets, E, N, top_k, parts, out);
    };
    constexpr int kVec = 16 / sizeof(T);
    if (aligned16(grad, N, stride_grad, sizeof(T))) {
      run(bias_grad_kernel<T, kVec>, kVec);
    } else {
      run(bias_grad_kernel<T, 1>, 1);
    }
  });
}

}  // namespace cumo
