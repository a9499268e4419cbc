// Routing (CUDA): from logits, or from tokens and the gate, to top-k weights and loss statistics; and back.
//
//   logits = x, or x @ gate^T rounded to the dtype of x, as torch.nn.Linear would
//   p = softmax(logits)        idx = the K largest logits, ties to the lowest index, NaN above all
//   w = p[idx] / sum(p[idx])   (or p[idx] when not renormalised)
//   mean_probs[g], top1_density[g], mean_squared_logsumexp[g]: means over the tokens of group g
//
// route_kernel: a block per 32 tokens, a warp per 4 of them: the gate is read once for four tokens, an expert's column
// lives in lane e % 32, the choice is a tournament between lanes. Every (block, group) pair that touch writes one row
// of sums, at block + group, so that a group's rows lie side by side, and the block that finishes a group last adds them
// in their order. Reads x once: T * H elements. sort_by_expert is in sorting.cu.
// Contract: cumo_kernels/ops/routing.py. Truth: cumo_kernels/backends/reference/routing.py.
#include <cmath>

#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokensPerWarp = 4, kTokensPerBlock = kWarps * kTokensPerWarp;
constexpr int kGateChunk = 4;  // experts whose sums a lane holds at once
constexpr int kNoKey = -2147483647 - 1;

template <class T>
__device__ __forceinline__ void load_pack(const T* row, int64_t col, int64_t end, bool wide, float* out) {
  constexpr int kVec = 16 / sizeof(T);
  if (wide && col + kVec <= end) {
    const auto pack = *reinterpret_cast<const Vec<T, kVec>*>(row + col);
    for (int i = 0; i < kVec; ++i) out[i] = to_float(pack.item[i]);
  } else {
    for (int i = 0; i < kVec; ++i) out[i] = col + i < end ? to_float(row[col + i]) : 0.0f;
  }
}

// Logits of the warp's four tokens; lane l holds experts l, l + 32, ...; -inf past E.
template <class T, int kPerLane>
__device__ __forceinline__ void load_logits(const Route& r, int64_t first_token, bool wide,
                                            float (&logits)[kTokensPerWarp][kPerLane]) {
  constexpr int kVec = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  const T* rows[kTokensPerWarp];
  for (int t = 0; t < kTokensPerWarp; ++t) {
    const int64_t token = first_token + t < r.T ? first_token + t : r.T - 1;
    rows[t] = static_cast<const T*>(r.x) + token * r.stride_x_t;
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + i * kWarp;
      logits[t][i] = r.gate == nullptr && expert < r.E ? to_float(rows[t][expert]) : -INFINITY;
    }
  }
  if (r.gate == nullptr) return;
  const T* gate = static_cast<const T*>(r.gate);
  for (int first = 0; first < r.E; first += kGateChunk) {
    float sums[kTokensPerWarp][kGateChunk] = {};
    for (int64_t col = lane * kVec; col < r.H; col += kWarp * kVec) {
      float x[kTokensPerWarp][kVec], w[kVec];
      for (int t = 0; t < kTokensPerWarp; ++t) load_pack(rows[t], col, r.H, wide, x[t]);
#pragma unroll
      for (int e = 0; e < kGateChunk; ++e) {
        const int expert = first + e < r.E ? first + e : r.E - 1;
        load_pack(gate + expert * r.stride_gate_e, col, r.H, wide, w);
#pragma unroll
        for (int t = 0; t < kTokensPerWarp; ++t)
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[t][e] += x[t][i] * w[i];
      }
    }
#pragma unroll
    for (int e = 0; e < kGateChunk; ++e)
#pragma unroll
      for (int t = 0; t < kTokensPerWarp; ++t) {
        const float sum = rounded<T>(sum_of_warp(sums[t][e]));
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (first + e < r.E && first + e == lane + i * kWarp) logits[t][i] = sum;
      }
  }
}

__device__ __forceinline__ float max_of_warp(float value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
  return value;
}

// An integer in the order of `value`; -0 equals 0, NaN is above all.
__device__ __forceinline__ int rank_key(float value) {
  if (value != value) return 2147483647;
  const int bits = bits_of(value == 0.0f ? 0.0f : value);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

struct Softmax {
  float top, total;
};

template <int kPerLane>
__device__ __forceinline__ Softmax softmax(const float (&logits)[kPerLane], float (&probs)[kPerLane]) {
  float top = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, logits[i]);
  top = max_of_warp(top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) total += probs[i] = expf(logits[i] - top);
  total = sum_of_warp(total);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) probs[i] = divide(probs[i], total);
  return {top, total};
}

// logsumexp with every step rounded to T, as torch.logsumexp computes it in that dtype.
template <class T, int kPerLane>
__device__ __forceinline__ float logsumexp_in(const float (&logits)[kPerLane], float top) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += rounded<T>(expf(rounded<T>(logits[i] - top)));
  return rounded<T>(rounded<T>(logf(rounded<T>(sum_of_warp(sum)))) + top);
}

struct Range {
  int begin, end;
};

// Tokens of group g.
__host__ __device__ __forceinline__ Range tokens_of_group(const Route& r, int g) {
  if (r.group_offsets == nullptr) return {g * (r.T / r.G), (g + 1) * (r.T / r.G)};
  const int begin = r.group_offsets[g], end = r.group_offsets[g + 1];
  return {begin < 0 ? 0 : begin < r.T ? begin : r.T, end < 0 ? 0 : end < r.T ? end : r.T};
}

// The last group that begins at or before `token`; -1 before the first, G past the last.
__device__ __forceinline__ int group_of_token(const Route& r, int token) {
  if (r.group_offsets == nullptr) return token / (r.T / r.G);
  int low = 0, high = r.G + 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (r.group_offsets[middle] <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

struct Stats {
  float* mean_probs;  // (G, E)
  float* density;     // (G, E)
  float* z;           // (G,)
  float* sums;        // (blocks + G, 2E + 1)
  int* arrivals;      // (G,): blocks whose sums are there, zero at first
};

// A column of the statistics of group g: probabilities, first choices, squared logsumexp.
template <class T>
__device__ __forceinline__ void store_mean(const Route& r, const Stats& stats, int64_t g, int col, float mean) {
  if (col < r.E) {
    stats.mean_probs[g * r.E + col] = r.compat == Compat::cumo ? rounded<T>(mean) : mean;
  } else if (col < 2 * r.E) {
    stats.density[g * r.E + col - r.E] = mean;
  } else {
    stats.z[g] = mean;
  }
}

// The means of group g, of `count` tokens, from the rows of its blocks; by all threads of a block.
template <class T>
__device__ __forceinline__ void add_up(const Route& r, const Stats& stats, int g, int first, int last, int count,
                                       float* partial) {
  const int width = 2 * r.E + 1, columns = width < kThreads ? width : kThreads, parts = kThreads / columns;
  const int part = threadIdx.x / columns;
  for (int left = 0; left < width; left += columns) {
    const int col = left + threadIdx.x % columns;
    float sum = 0.0f;
    if (part < parts && col < width) {
#pragma unroll 8
      for (int block = first + part; block <= last; block += parts)
        sum += load_of_others(stats.sums + (int64_t{block} + g) * width + col);
    }
    partial[threadIdx.x] = sum;
    sync_block();
    if (part == 0 && col < width) {
      for (int other = 1; other < parts; ++other) sum += partial[other * columns + threadIdx.x];
      store_mean<T>(r, stats, g, col, sum / static_cast<float>(count));
    }
    sync_block();
  }
}

template <class T, int kPerLane>
__global__ void __launch_bounds__(kThreads) route_kernel(Route r, bool wide, float* weights, int* indices,
                                                          Stats stats) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* token_probs = shared_memory<float>();                            // (tokens, E)
  float* token_squares = token_probs + kTokensPerBlock * r.E;             // (tokens,): logsumexp^2
  int* token_first = reinterpret_cast<int*>(token_squares + kTokensPerBlock);  // (tokens,): first choice
  float* partial = token_squares + 2 * kTokensPerBlock;                   // (threads,)
  int* is_last = reinterpret_cast<int*>(partial + kThreads);
  float* chosen = partial + kThreads + 1 + warp * r.K;                    // (K,) of this warp

  const int64_t block_begin = int64_t{blockIdx.x} * kTokensPerBlock;
  const int64_t first_token = block_begin + warp * kTokensPerWarp;
  float logits[kTokensPerWarp][kPerLane];
  if (first_token < r.T) load_logits<T>(r, first_token, wide, logits);
  for (int t = 0; t < kTokensPerWarp && first_token + t < r.T; ++t) {
    const int64_t token = first_token + t;
    float probs[kPerLane], row[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {  // t is no constant: registers must not be indexed by it
      row[i] = logits[0][i];
#pragma unroll
      for (int other = 1; other < kTokensPerWarp; ++other) row[i] = t == other ? logits[other][i] : row[i];
    }
    const Softmax soft = softmax(row, probs);
    float square;
    if (r.compat == Compat::none) {
      const float lse = logf(soft.total) + soft.top;
      square = lse * lse;
    } else {
      const float lse = logsumexp_in<T>(row, soft.top);
      square = rounded<T>(lse * lse);
    }
    int keys[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + i * kWarp;
      if (r.compat == Compat::cumo) probs[i] = rounded<T>(probs[i]);
      keys[i] = expert < r.E ? rank_key(r.compat == Compat::cumo ? probs[i] : row[i]) : kNoKey;
      if (expert < r.E) token_probs[(token - block_begin) * r.E + expert] = probs[i];
    }
    float kept = 0.0f;
    int first = 0;
    for (int k = 0; k < r.K; ++k) {
      int key = kNoKey, expert = 2147483647;
      float value = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (keys[i] > key) key = keys[i], expert = lane + i * kWarp, value = probs[i];
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const int other_key = shuffle_xor(key, lanes), other_expert = shuffle_xor(expert, lanes);
        const float other_value = shuffle_xor(value, lanes);
        if (other_key > key || (other_key == key && other_expert < expert))
          key = other_key, expert = other_expert, value = other_value;
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (expert == lane + i * kWarp) keys[i] = kNoKey;
      if (k == 0) first = expert;
      kept += value;
      if (lane == 0) chosen[k] = value, indices[token * r.K + k] = expert;
    }
    sync_warp();
    if (r.compat == Compat::cumo) kept = rounded<T>(kept);
    for (int k = lane; k < r.K; k += kWarp) {
      const float weight = r.renormalize ? divide(chosen[k], kept) : chosen[k];
      weights[token * r.K + k] = r.compat == Compat::none ? weight : rounded<T>(weight);
    }
    if (lane == 0) token_squares[token - block_begin] = square, token_first[token - block_begin] = first;
    sync_warp();
  }
  sync_block();

  const int64_t block_end = block_begin + kTokensPerBlock < r.T ? block_begin + kTokensPerBlock : r.T;
  const int g_last = group_of_token(r, static_cast<int>(block_end) - 1), width = 2 * r.E + 1;
  int g = group_of_token(r, static_cast<int>(block_begin));
  for (g = g < 0 ? 0 : g; g <= g_last && g < r.G; ++g) {
    const Range group = tokens_of_group(r, g);
    const int begin = static_cast<int>((group.begin > block_begin ? group.begin : block_begin) - block_begin);
    const int end = static_cast<int>((group.end < block_end ? group.end : block_end) - block_begin);
    if (begin >= end) continue;
    float* out = stats.sums + (int64_t{blockIdx.x} + g) * width;
    for (int col = threadIdx.x; col < width; col += kThreads) {
      float sum = 0.0f;
      for (int t = begin; t < end; ++t)
        sum += col < r.E       ? token_probs[t * r.E + col]
               : col < 2 * r.E ? (token_first[t] == col - r.E ? 1.0f : 0.0f)
                               : token_squares[t];
      out[col] = sum;
    }
    const int first = group.begin / kTokensPerBlock, last = (group.end - 1) / kTokensPerBlock;
    sync_block();
    if (threadIdx.x == 0) *is_last = count_in(stats.arrivals + g) == last - first;
    sync_block();
    if (*is_last) add_up<T>(r, stats, g, first, last, group.end - group.begin, partial);
  }
  if (r.group_offsets == nullptr || blockIdx.x > 0) return;
  for (g = threadIdx.x; g < r.G; g += kThreads) {  // groups that no block has met
    const Range group = tokens_of_group(r, g);
    for (int col = 0; group.begin >= group.end && col < width; ++col) store_mean<T>(r, stats, g, col, 0.0f);
  }
}

// With v = p[idx] and s = sum(v): dv = (dw - <dw, w>) / s; dp collects dv and the group's share, and
// dlogits = p * (dp - <dp, p> + 2 * lse * the group's share of dz).
template <class T, int kPerLane>
__global__ void __launch_bounds__(kThreads, 1)
    route_backward_kernel(Route r, bool wide, const float* grad_weights, const float* grad_mean_probs,
                          const float* grad_z, const int* indices, T* dlogits) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_token = (int64_t{blockIdx.x} * kWarps + warp) * kTokensPerWarp;
  if (first_token >= r.T) return;
  float logits[kTokensPerWarp][kPerLane];
  load_logits<T>(r, first_token, wide, logits);
#pragma unroll
  for (int t = 0; t < kTokensPerWarp; ++t) {
    const int64_t token = first_token + t;
    if (token >= r.T) return;
    float probs[kPerLane], dprobs[kPerLane] = {};
    const Softmax soft = softmax(logits[t], probs);
    bool chosen[kPerLane] = {};
    for (int k = 0; k < r.K; ++k) {
      const int expert = indices[token * r.K + k];
      const float grad = grad_weights[token * r.K + k];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (expert == lane + i * kWarp) dprobs[i] = grad, chosen[i] = true;
    }
    if (r.renormalize) {
      float kept = 0.0f, along = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (chosen[i]) kept += probs[i], along += dprobs[i] * probs[i];
      kept = sum_of_warp(kept);
      along = sum_of_warp(along) / kept;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (chosen[i]) dprobs[i] = (dprobs[i] - along) / kept;
    }
    const int g = group_of_token(r, static_cast<int>(token));
    float through_lse = 0.0f;
    if (g >= 0 && g < r.G) {
      const Range group = tokens_of_group(r, g);
      const float count = static_cast<float>(group.end - group.begin);
      through_lse = 2.0f * (logf(soft.total) + soft.top) * (grad_z[g] / count);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (lane + i * kWarp < r.E) dprobs[i] += grad_mean_probs[int64_t{g} * r.E + lane + i * kWarp] / count;
    }
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) dot += dprobs[i] * probs[i];
    dot = sum_of_warp(dot);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (lane + i * kWarp < r.E)
        dlogits[token * r.E + lane + i * kWarp] = from_float<T>(probs[i] * (dprobs[i] - dot + through_lse));
  }
}

// A thread owns columns of x; a block takes every gridDim-th run of tokens, and its sums follow each other in one
// order. dx or sums may be nullptr: not wanted.
template <class T, int kExperts>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(Route r, const T* dlogits, T* dx, float* sums) {
  float* shares = shared_memory<float>();  // (tokens, kExperts): dlogits, zero past E
  const T* x = static_cast<const T*>(r.x);
  const T* gate = static_cast<const T*>(r.gate);
  for (int64_t begin = int64_t{blockIdx.x} * kTokensPerBlock; begin < r.T;
       begin += int64_t{gridDim.x} * kTokensPerBlock) {
    const int count = r.T - begin < kTokensPerBlock ? static_cast<int>(r.T - begin) : kTokensPerBlock;
    for (int i = threadIdx.x; i < count * kExperts; i += kThreads) {
      const int e = i % kExperts;
      shares[i] = e < r.E ? to_float(dlogits[(begin + i / kExperts) * r.E + e]) : 0.0f;
    }
    sync_block();
    for (int col = threadIdx.x; col < r.H; col += kThreads) {
      float w[kExperts], sum[kExperts] = {};
#pragma unroll
      for (int e = 0; e < kExperts; ++e) w[e] = e < r.E ? to_float(gate[e * r.stride_gate_e + col]) : 0.0f;
      for (int t = 0; t < count; ++t) {
        const float value = sums != nullptr ? to_float(x[(begin + t) * r.stride_x_t + col]) : 0.0f;
        float grad = 0.0f;
#pragma unroll
        for (int e = 0; e < kExperts; ++e) {
          const float share = shares[t * kExperts + e];
          grad += share * w[e];
          sum[e] += share * value;
        }
        if (dx != nullptr) dx[(begin + t) * r.H + col] = from_float<T>(grad);
      }
#pragma unroll
      for (int e = 0; e < kExperts; ++e)
        if (e < r.E && sums != nullptr) {
          float* out = sums + (int64_t{blockIdx.x} * r.E + e) * r.H + col;
          *out = begin == int64_t{blockIdx.x} * kTokensPerBlock ? sum[e] : *out + sum[e];
        }
    }
    sync_block();
  }
}

static int route_blocks(int T) { return ceil_div(T, kTokensPerBlock); }
static int64_t rows_of_sums(const Route& r) { return (int64_t{route_blocks(r.T)} + r.G) * (2 * r.E + 1); }

int64_t route_scratch(const Route& r) { return rows_of_sums(r) + r.G; }

static bool packs(const Route& r, int element_bytes) {
  return r.gate != nullptr && aligned16(r.x, 0, r.stride_x_t, element_bytes) &&
         aligned16(r.gate, 0, r.stride_gate_e, element_bytes);
}

void route(const Device& device, Dtype dtype, const Route& r, float* weights, int* indices, float* mean_probs,
           float* density, float* z, float* scratch) {
  // cleared anew each time: counters kept between calls would be shared by streams, and stay wrong after an abort
  int* arrivals = reinterpret_cast<int*>(scratch + rows_of_sums(r));
  clear(device, arrivals, int64_t{4} * r.G);
  const Stats stats{mean_probs, density, z, scratch, arrivals};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int shared = 4 * (kTokensPerBlock * (r.E + 2) + kThreads + 1 + kWarps * r.K);
    launch(device, r.E <= kWarp ? route_kernel<T, 1> : route_kernel<T, kMaxExperts / kWarp>, route_blocks(r.T),
           kThreads, shared, r, packs(r, sizeof(T)), weights, indices, stats);
  });
}

void route_backward(const Device& device, Dtype dtype, const Route& r, const float* grad_weights,
                    const float* grad_mean_probs, const float* grad_z, const int* indices, void* dlogits) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(device, r.E <= kWarp ? route_backward_kernel<T, 1> : route_backward_kernel<T, kMaxExperts / kWarp>,
           route_blocks(r.T), kThreads, 0, r, packs(r, sizeof(T)), grad_weights, grad_mean_probs, grad_z, indices,
           static_cast<T*>(dlogits));
  });
}

int gate_backward_blocks(const Device& device, const Route& r) { return std::min(route_blocks(r.T), 2 * device.sms); }

void gate_backward(const Device& device, Dtype dtype, const Route& r, const void* dlogits, void* dx, void* dgate,
                   float* sums) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int blocks = gate_backward_blocks(device, r), experts = r.E <= 8 ? 8 : kMaxFusedExperts;
    launch(device, r.E <= 8 ? gate_backward_kernel<T, 8> : gate_backward_kernel<T, kMaxFusedExperts>, blocks, kThreads,
           4 * kTokensPerBlock * experts, r, static_cast<const T*>(dlogits), static_cast<T*>(dx), sums);
  });
  if (sums != nullptr) sum_parts(device, dtype, sums, gate_backward_blocks(device, r), int64_t{r.E} * r.H, dgate);
}

}  // namespace cumo
