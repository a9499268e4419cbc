// Permutation (CUDA): token order -> expert order, and the weighted sum back to token order.
//
//   permute:           out[p] = x[permutation[p] / K]                                x (T, H)     out (S, H)
//   combine:           out[t] = sum_k topk_weights[t, k] * rows[inverse[t * K + k]]  rows (S, H)  out (T, H)
//   combine_backward:  drows[p] = w * grad[slot / K]   dweights[slot] = <grad[slot / K], rows[p]>, slot = permutation[p]
//
// Rows of combine may be the partial sums of a split GEMM, fp32 (parts, S, H), which are added on the way. Sorted
// positions of dropped slots (inverse -1) are set to zero and never counted. Sums in fp32, in the order of the choices,
// and parts in theirs. Memory bound: S * H + T * H elements (permute reads a token K times, from L2), 2 * S * H + T * H
// for combine_backward. The number of loads in flight decides, 16 bytes each if H and the strides allow it. So permute
// and combine are split by rows and by columns, and few tokens fill the chip too: a block is eight rows, a warp each, and
// the columns that its lanes hold at once. combine_backward, whose dot product runs along the row, uses as many warps per
// row as its width needs.
// Contract: cumo_kernels/ops/permutation.py. Reference: cumo_kernels/backends/reference/permutation.py.
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRuns = 2;  // of kVec columns that a lane has in flight at once

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const T* x, int64_t stride_x_t, const int* permutation, const int* inverse, int64_t S, int64_t H,
                   int K, unsigned chunks, T* out) {
  begin_kernel();
  using V = Vec<T, kVec>;
  const int64_t position = int64_t{blockIdx.x / chunks} * kWarps + threadIdx.x / kWarp;
  if (position >= S) return;
  const int64_t first = int64_t{blockIdx.x % chunks * kRuns * kWarp + threadIdx.x % kWarp} * kVec;
  const int slot = permutation[position];
  const bool kept = inverse == nullptr || inverse[slot] >= 0;
  const T* source = x + (slot / K) * stride_x_t;
  V value[kRuns];  // a dropped slot's token is read too, so that the load need not wait
#pragma unroll
  for (int i = 0; i < kRuns; ++i)
    if (first + i * kWarp * kVec < H) value[i] = *reinterpret_cast<const V*>(source + first + i * kWarp * kVec);
#pragma unroll
  for (int i = 0; i < kRuns; ++i) {
    if (!kept)
      for (int j = 0; j < kVec; ++j) value[i].item[j] = from_float<T>(0.0f);
    if (first + i * kWarp * kVec < H) *reinterpret_cast<V*>(out + position * H + first + i * kWarp * kVec) = value[i];
  }
}

struct Part {  // of the row of a choice
  int k = 0, part = 0;
  __device__ __forceinline__ void next(int parts) {
    if (++part == parts) part = 0, ++k;
  }
};

// R is T, or with kSplit float: rows are still in parts.
template <class R, class T, bool kSplit, int kVec>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const R* rows, int64_t stride_rows_s, int all_parts, const float* weights, const int* inverse,
                   int64_t num_tokens, int64_t H, int K, unsigned chunks, T* out) {
  begin_kernel();
  constexpr int kBatch = kSplit ? 8 : 4;  // parts that a lane has in flight at once
  const int parts = kSplit ? all_parts : 1;
  const int64_t token = int64_t{blockIdx.x / chunks} * kWarps + threadIdx.x / kWarp;
  const int64_t col = int64_t{blockIdx.x % chunks * kWarp + threadIdx.x % kWarp} * kVec;
  if (token >= num_tokens || col >= H) return;
  float sum[kVec] = {}, row[kVec];
  for (Part next; next.k < K;) {
    Part loaded = next, added = next;
    int position[kBatch];
    float weight[kBatch];
    Vec<R, kVec> run[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, next.next(parts)) {
      position[i] = next.k < K ? inverse[token * K + next.k] : -1;
      weight[i] = next.k < K && weights ? weights[token * K + next.k] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, loaded.next(parts))
      if (position[i] >= 0)
        run[i] = *reinterpret_cast<const Vec<R, kVec>*>(
            rows + (loaded.part * num_tokens * K + position[i]) * stride_rows_s + col);
#pragma unroll
    for (int i = 0; i < kBatch; ++i, added.next(parts)) {
      if (position[i] < 0) continue;  // a dropped slot's weight may be anything
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float value = to_float(run[i].item[j]);
        row[j] = added.part ? row[j] + value : value;
        if (added.part == parts - 1) sum[j] += weight[i] * row[j];
      }
    }
  }
  Vec<T, kVec> value;
  for (int j = 0; j < kVec; ++j) value.item[j] = from_float<T>(sum[j]);
  *reinterpret_cast<Vec<T, kVec>*>(out + token * H + col) = value;
}

// `lanes`: threads of a row, a power of two of warps.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 3)
    combine_backward_kernel(const T* grad, int64_t stride_grad_t, const T* rows, int64_t stride_rows_s,
                            const float* weights, const int* permutation, const int* inverse, int64_t S, int64_t H,
                            int K, int lanes, T* drows, float* dweights) {
  begin_kernel();
  using V = Vec<T, kVec>;
  float* dots = shared_memory<float>();  // (warps,)
  const int warp = threadIdx.x / kWarp;
  const int64_t position = int64_t{blockIdx.x} * (kThreads / lanes) + threadIdx.x / lanes;
  const int slot = position < S ? permutation[position] : 0;
  float dot = 0.0f;
  if (position < S) {
    const bool kept = inverse[slot] >= 0;
    const float weight = weights[slot];
    const T* row = rows + position * stride_rows_s;
    const T* upstream = grad + (slot / K) * stride_grad_t;
    for (int64_t first = threadIdx.x % lanes * kVec; first < H; first += int64_t{kRuns} * lanes * kVec) {
      V run[kRuns], value[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i)
        if (first + i * lanes * kVec < H) run[i] = *reinterpret_cast<const V*>(row + first + i * lanes * kVec);
#pragma unroll
      for (int i = 0; i < kRuns; ++i)
        if (first + i * lanes * kVec < H) value[i] = *reinterpret_cast<const V*>(upstream + first + i * lanes * kVec);
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (first + i * lanes * kVec >= H) continue;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float g = to_float(value[i].item[j]);
          if (kept) dot += g * to_float(run[i].item[j]);
          value[i].item[j] = from_float<T>(kept ? weight * g : 0.0f);
        }
        *reinterpret_cast<V*>(drows + position * H + first + i * lanes * kVec) = value[i];
      }
    }
  }
  dot = sum_of_warp(dot);
  if (threadIdx.x % kWarp == 0) dots[warp] = dot;
  sync_block();
  if (position >= S || threadIdx.x % lanes != 0) return;
  for (int other = 1; other < lanes / kWarp; ++other) dot += dots[warp + other];
  dweights[slot] = dot;
}

// Number of blocks of `width` columns per row.
static unsigned chunks_of(int64_t H, int64_t width) { return static_cast<unsigned>(ceil_div(H, width)); }

void permute(const Device& device, Dtype dtype, const void* x, int64_t stride_x_t, const int* permutation,
             const int* inverse, int64_t S, int64_t H, int K, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = aligned16(x, H, stride_x_t, sizeof(T)) && aligned16(out, H, H, sizeof(T));
    const unsigned chunks = chunks_of(H, kRuns * kWarp * (wide ? 16 / sizeof(T) : 1));
    launch(device, wide ? permute_kernel<T, 16 / sizeof(T)> : permute_kernel<T, 1>,
           ceil_div<int64_t>(S, kWarps) * chunks, kThreads, 0, static_cast<const T*>(x), stride_x_t, permutation,
           inverse, S, H, K, chunks, static_cast<T*>(out));
  });
}

void combine(const Device& device, Dtype dtype, const void* rows, int64_t stride_rows_s, int parts,
             const float* weights, const int* inverse, int64_t num_tokens, int64_t H, int K, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = [&](auto* source, auto split) {
      using R = std::remove_pointer_t<decltype(source)>;
      constexpr bool kSplit = decltype(split)::value;
      const bool wide = aligned16(rows, H, stride_rows_s, sizeof(R)) && aligned16(out, H, H, sizeof(T));
      const unsigned chunks = chunks_of(H, kWarp * (wide ? 16 / sizeof(R) : 1));
      launch(device, wide ? combine_kernel<R, T, kSplit, 16 / sizeof(R)> : combine_kernel<R, T, kSplit, 1>,
             ceil_div<int64_t>(num_tokens, kWarps) * chunks, kThreads, 0, static_cast<const R*>(rows), stride_rows_s,
             parts, weights, inverse, num_tokens, H, K, chunks, static_cast<T*>(out));
    };
    if (parts > 1) return run(static_cast<float*>(nullptr), std::true_type());
    run(type, std::false_type());
  });
}

void combine_backward(const Device& device, Dtype dtype, const void* grad, int64_t stride_grad_t, const void* rows,
                      int64_t stride_rows_s, const float* weights, const int* permutation, const int* inverse,
                      int64_t S, int64_t H, int K, void* drows, float* dweights) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = aligned16(grad, H, stride_grad_t, sizeof(T)) && aligned16(rows, H, stride_rows_s, sizeof(T)) &&
                      aligned16(drows, H, H, sizeof(T));
    int lanes = kWarp;
    while (lanes < kThreads && int64_t{lanes} * kRuns * (wide ? 16 / sizeof(T) : 1) < H) lanes *= 2;
    launch(device, wide ? combine_backward_kernel<T, 16 / sizeof(T)> : combine_backward_kernel<T, 1>,
           ceil_div<int64_t>(S, kThreads / lanes), kThreads, kWarps * 4, static_cast<const T*>(grad), stride_grad_t,
           static_cast<const T*>(rows), stride_rows_s, weights, permutation, inverse, S, H, K, lanes,
           static_cast<T*>(drows), dweights);
  });
}

}  // namespace cumo
