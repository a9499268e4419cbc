// Routing (CUDA): from logits, or from tokens and the gate, to top-k weights and loss statistics; and back.
//
//   logits = x, or x @ gate^T rounded to the dtype of x, as torch.nn.Linear would
//   p = softmax(logits)        idx = the K largest logits, ties to the lowest index, NaN ranks highest
//   w = p[idx] / sum(p[idx])   (or p[idx] when not renormalised)
//   mean_probs[g], top1_density[g], mean_squared_logsumexp[g]: means over the tokens of group g
//
// route_kernel: a block per 32 tokens, 16 with more than 512 experts, whose logits come from gate_logits.cuh. kLanes lanes
// have a token, and lane e % kLanes has expert e; the top-k is a tournament between lanes. Every overlapping (block, group)
// pair writes one row of sums, at block + group, so that a group's rows are adjacent, and the last block to finish a group
// adds them in order. Reads x once: T * H elements. sort_by_expert is in sorting.cu. Kernels with kScored have the scores,
// the choice and the scale of scores.cuh; they are separate kernels, so that a plain softmax takes no more registers.
// Contract: cumo_kernels/ops/routing.py. Reference: cumo_kernels/backends/reference/routing.py.
#include "scores.cuh"

namespace cumo {

// A block's probabilities are in shared memory, at most 64 KiB: every GPU has 99.
__host__ __device__ constexpr int tokens_per_warp(int per_lane) { return per_lane > 16 ? 2 : kTokensPerWarp; }

struct Softmax {
  float top, total;
};

template <int kLanes, int kPerLane>
__device__ __forceinline__ Softmax softmax(const float (&logits)[kPerLane], float (&probs)[kPerLane]) {
  float top = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, logits[i]);
  top = max_of_lanes<kLanes>(top);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) total += probs[i] = expf(logits[i] - top);
  total = sum_of_lanes<kLanes>(total);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) probs[i] = divide(probs[i], total);
  return {top, total};
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
  int* arrivals;      // (G,): blocks whose sums are written, initially zero
};

// A column of the statistics of group g: probabilities, first choices, squared logsumexp.
__device__ __forceinline__ void store_mean(const Route& r, const Stats& stats, int64_t g, int col, float mean) {
  if (col < r.E) {
    stats.mean_probs[g * r.E + col] = mean;
  } else if (col < 2 * r.E) {
    stats.density[g * r.E + col - r.E] = mean;
  } else {
    stats.z[g] = mean;
  }
}

// The means of group g, of `count` tokens, from the rows of its blocks; by all threads of a block.
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
      store_mean(r, stats, g, col, sum / static_cast<float>(count));
    }
    sync_block();
  }
}

// Shared-memory layout of a block of route_kernel, in floats.
template <class T, int kLanes, int kTokens>
struct Places {
  int squares, first, partial, last, chosen, shares, end;

  __host__ __device__ explicit Places(const Route& r)
      : squares(kTokens * r.E),
        first(squares + kTokens),
        partial(first + kTokens),
        last(partial + kThreads),
        chosen(last + 1),
        shares(chosen + kThreads / kLanes * r.K),
        end(shares + (r.gate != nullptr ? Shares<T, kLanes>::kFloats : 0)) {}
};

template <class T, int kLanes, int kPerLane, bool kScored>
__global__ void __launch_bounds__(kThreads, kLanes == 8 ? 2 : 1)
    route_kernel(Route r, bool wide, float* weights, int* indices, Stats stats) {
  begin_kernel();
  constexpr int kPerWarp = tokens_per_warp(kPerLane), kTokens = kWarps * kPerWarp;
  const Places<T, kLanes, kTokens> at(r);
  float* token_probs = shared_memory<float>();                           // (tokens, E)
  float* token_squares = token_probs + at.squares;                       // (tokens,): logsumexp^2
  int* token_first = reinterpret_cast<int*>(token_probs + at.first);     // (tokens,): first choice
  float* partial = token_probs + at.partial;                             // (threads,)
  int* is_last = reinterpret_cast<int*>(token_probs + at.last);
  float* chosen = token_probs + at.chosen + threadIdx.x / kLanes * r.K;  // (K,) of this token
  float* shares = token_probs + at.shares;

  const int64_t block_begin = int64_t{blockIdx.x} * kTokens;
  share_logits<T, kLanes, kPerLane>(r, block_begin, wide, shares);
  const int lane = threadIdx.x % kLanes;
  for (int t = 0; t < kPerWarp; t += kWarp / kLanes) {
    const int of_warp = threadIdx.x / kWarp * kPerWarp + t, local = of_warp + threadIdx.x % kWarp / kLanes;
    if (block_begin + of_warp >= r.T) break;
    const int64_t token = block_begin + local;
    const bool inside = token < r.T;  // lanes without a token take part
    float row[kPerLane], probs[kPerLane];  // in probs: scores
    load_logits<T, kLanes>(r, block_begin, local, shares, row);
    const Softmax soft = softmax<kLanes>(row, probs);
    const float lse = logf(soft.total) + soft.top;
    float norm = 1.0f;
    bool by_scores = false;
    if constexpr (kScored) {
      by_scores = r.bias != nullptr || r.expert_groups > 1;
      if (r.score != Score::softmax) {
        norm = 0.0f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) norm += probs[i] = score_of(r, row[i]).score;
        norm = sum_of_lanes<kLanes>(norm) + kTiny;
      }
    }
    int keys[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + i * kLanes;
      const float rank = by_scores ? probs[i] + (r.bias != nullptr && expert < r.E ? r.bias[expert] : 0.0f) : row[i];
      keys[i] = expert < r.E ? rank_key(rank) : kNoKey;
    }
    if constexpr (kScored)
      if (r.expert_groups > 1)
        keep_best_groups<kLanes>(r, reinterpret_cast<int*>(token_probs + local * r.E), keys);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = lane + i * kLanes;
      const bool divides = kScored && r.score != Score::softmax;
      if (expert < r.E) token_probs[local * r.E + expert] = divides ? divide(probs[i], norm) : probs[i];
    }
    float kept = 0.0f;
    int first = 0;
    for (int k = 0; k < r.K; ++k) {
      int key = kNoKey, expert = 2147483647;
      float value = 0.0f;
      if (kScored && r.choice != nullptr) {
        expert = inside ? r.choice[token * r.K + k] : r.E;
        value = score_at<kLanes>(r, expert, probs);
      } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (keys[i] > key) key = keys[i], expert = lane + i * kLanes, value = probs[i];
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
          const int other_key = shuffle_xor(key, lanes), other_expert = shuffle_xor(expert, lanes);
          const float other_value = shuffle_xor(value, lanes);
          if (other_key > key || (other_key == key && other_expert < expert))
            key = other_key, expert = other_expert, value = other_value;
        }
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (expert == lane + i * kLanes) keys[i] = kNoKey;
      }
      if (k == 0) first = expert;
      kept += value;
      if (lane == 0) chosen[k] = value;
      if (lane == 0 && inside) indices[token * r.K + k] = expert;
    }
    if (kScored) kept += kTiny;
    sync_warp();
    for (int k = lane; k < r.K && inside; k += kLanes) {
      const float weight = r.renormalize ? divide(chosen[k], kept) : chosen[k];
      weights[token * r.K + k] = kScored ? weight * r.scale : weight;
    }
    if (lane == 0) token_squares[local] = lse * lse, token_first[local] = first;
    sync_warp();
  }
  sync_block();

  const int64_t block_end = block_begin + kTokens < r.T ? block_begin + kTokens : r.T;
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
#pragma unroll 8
      for (int t = begin; t < end; ++t)
        sum += col < r.E       ? token_probs[t * r.E + col]
               : col < 2 * r.E ? (token_first[t] == col - r.E ? 1.0f : 0.0f)
                               : token_squares[t];
      out[col] = sum;
    }
    const int first = group.begin / kTokens, last = (group.end - 1) / kTokens;
    sync_block();
    if (threadIdx.x == 0) *is_last = count_in(stats.arrivals + g) == last - first;
    sync_block();
    if (*is_last) add_up(r, stats, g, first, last, group.end - group.begin, partial);
  }
  if (r.group_offsets == nullptr || blockIdx.x > 0) return;
  for (g = threadIdx.x; g < r.G; g += kThreads) {  // groups that no block overlaps
    const Range group = tokens_of_group(r, g);
    for (int col = 0; group.begin >= group.end && col < width; ++col) store_mean(r, stats, g, col, 0.0f);
  }
}

// With v = p[idx] and s = sum(v): dv = (dw - <dw, w>) / s; dp sums dv and the group's share, and
// dlogits = p * (dp - <dp, p> + 2 * lse * the group's share of dz). Other scores: as in the reference's scores.py.
template <class T, int kLanes, int kPerLane, bool kScored>
__global__ void __launch_bounds__(kThreads, kLanes == 8 ? 2 : 1)
    route_backward_kernel(Route r, bool wide, const float* grad_weights, const float* grad_mean_probs,
                          const float* grad_z, const int* indices, T* dlogits) {
  begin_kernel();
  constexpr int kPerWarp = tokens_per_warp(kPerLane), kTokens = kWarps * kPerWarp;
  float* shares = shared_memory<float>();
  const int64_t block_begin = int64_t{blockIdx.x} * kTokens;
  share_logits<T, kLanes, kPerLane>(r, block_begin, wide, shares);
  const int lane = threadIdx.x % kLanes;
  for (int t = 0; t < kPerWarp; t += kWarp / kLanes) {
    const int of_warp = threadIdx.x / kWarp * kPerWarp + t, local = of_warp + threadIdx.x % kWarp / kLanes;
    if (block_begin + of_warp >= r.T) return;
    // lanes without a token repeat the last one
    const int64_t token = block_begin + local < r.T ? block_begin + local : r.T - 1;
    float logits[kPerLane], probs[kPerLane], dprobs[kPerLane] = {};
    load_logits<T, kLanes>(r, block_begin, local, shares, logits);
    const Softmax soft = softmax<kLanes>(logits, probs);
    const bool is_elementwise = kScored && r.score != Score::softmax;
    float scores[kPerLane], slopes[kPerLane];  // slopes: of an elementwise score
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const Scored scored = is_elementwise ? score_of(r, logits[i]) : Scored{probs[i], 0.0f};
      scores[i] = scored.score, slopes[i] = scored.slope;
    }
    bool chosen[kPerLane] = {};
    for (int k = 0; k < r.K; ++k) {
      const int expert = indices[token * r.K + k];
      const float grad = kScored ? grad_weights[token * r.K + k] * r.scale : grad_weights[token * r.K + k];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (expert == lane + i * kLanes && (!kScored || expert < r.E)) dprobs[i] = grad, chosen[i] = true;
    }
    if (r.renormalize) {
      float kept = 0.0f, along = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (chosen[i]) kept += scores[i], along += dprobs[i] * scores[i];
      kept = sum_of_lanes<kLanes>(kept);
      if (kScored) kept += kTiny;
      along = sum_of_lanes<kLanes>(along) / kept;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (chosen[i]) dprobs[i] = (dprobs[i] - along) / kept;
    }
    const int g = group_of_token(r, static_cast<int>(token));
    float through_lse = 0.0f, count = 0.0f;
    if (g >= 0 && g < r.G) {
      const Range group = tokens_of_group(r, g);
      count = static_cast<float>(group.end - group.begin);
      through_lse = 2.0f * (logf(soft.total) + soft.top) * (grad_z[g] / count);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (lane + i * kLanes < r.E && !is_elementwise)
          dprobs[i] += grad_mean_probs[int64_t{g} * r.E + lane + i * kLanes] / count;
    }
    if (is_elementwise) {
      const auto mean_grad = [&](int i) {
        const int expert = lane + i * kLanes;
        return count > 0.0f && expert < r.E ? grad_mean_probs[int64_t{g} * r.E + expert] / count : 0.0f;
      };
      float all = 0.0f, along = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) all += scores[i], along += mean_grad(i) * scores[i];
      all = sum_of_lanes<kLanes>(all) + kTiny;
      along = sum_of_lanes<kLanes>(along) / all;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float grad = (mean_grad(i) - along) / all + dprobs[i];
        if (block_begin + local < r.T && lane + i * kLanes < r.E)
          dlogits[token * r.E + lane + i * kLanes] =
              from_float<T>(grad * slopes[i] + probs[i] * through_lse);
      }
      continue;
    }
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) dot += dprobs[i] * probs[i];
    dot = sum_of_lanes<kLanes>(dot);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (block_begin + local < r.T && lane + i * kLanes < r.E)
        dlogits[token * r.E + lane + i * kLanes] = from_float<T>(probs[i] * (dprobs[i] - dot + through_lse));
  }
}

// A thread owns columns of x; a block has every gridDim-th run of tokens, and adds its sums in one order. dx or sums may
// be nullptr: not needed.
template <class T, int kExperts>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(Route r, const T* dlogits, T* dx, float* sums) {
  begin_kernel();
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

// Calls f with the number of lanes per token, and of experts per lane.
template <class F>
static auto with_lanes(int E, F f) {
  using std::integral_constant;
  const integral_constant<int, kWarp> warp;
  if (E <= 8) return f(integral_constant<int, 8>(), integral_constant<int, 1>());
  if (E <= kWarp) return f(warp, integral_constant<int, 1>());
  if (E <= 8 * kWarp) return f(warp, integral_constant<int, 8>());
  if (E <= 16 * kWarp) return f(warp, integral_constant<int, 16>());
  return f(warp, integral_constant<int, kMaxExperts / kWarp>());
}

static int route_blocks(const Route& r) {
  return with_lanes(r.E, [&](auto, auto per_lane) {
    return ceil_div(r.T, kWarps * tokens_per_warp(decltype(per_lane)::value));
  });
}
static int64_t rows_of_sums(const Route& r) { return (int64_t{route_blocks(r)} + r.G) * (2 * r.E + 1); }

int64_t route_scratch(const Route& r) { return rows_of_sums(r) + r.G; }

static bool packs(const Route& r, int element_bytes) {
  return r.gate != nullptr && aligned16(r.x, 0, r.stride_x_t, element_bytes) &&
         aligned16(r.gate, 0, r.stride_gate_e, element_bytes);
}

void route(const Device& device, Dtype dtype, const Route& r, float* weights, int* indices, float* mean_probs,
           float* density, float* z, float* scratch) {
  // cleared at each call: persistent counters would be shared by streams and stay wrong after an abort
  int* arrivals = reinterpret_cast<int*>(scratch + rows_of_sums(r));
  clear(device, arrivals, int64_t{4} * r.G);
  const Stats stats{mean_probs, density, z, scratch, arrivals};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_lanes(r.E, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value, kPerLane = decltype(per_lane)::value;
      constexpr int kTokens = kWarps * tokens_per_warp(kPerLane);
      const auto kernel = r.is_scored ? route_kernel<T, kLanes, kPerLane, true> : route_kernel<T, kLanes, kPerLane, false>;
      launch(device, kernel, route_blocks(r), kThreads, 4 * Places<T, kLanes, kTokens>(r).end, r, packs(r, sizeof(T)),
             weights, indices, stats);
    });
  });
}

void route_backward(const Device& device, Dtype dtype, const Route& r, const float* grad_weights,
                    const float* grad_mean_probs, const float* grad_z, const int* indices, void* dlogits) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_lanes(r.E, [&](auto lanes, auto per_lane) {
      constexpr int kLanes = decltype(lanes)::value, kPerLane = decltype(per_lane)::value;
      const auto kernel =
          r.is_scored ? route_backward_kernel<T, kLanes, kPerLane, true> : route_backward_kernel<T, kLanes, kPerLane, false>;
      launch(device, kernel, route_blocks(r), kThreads,
             r.gate != nullptr ? 4 * Shares<T, kLanes>::kFloats : 0, r, packs(r, sizeof(T)), grad_weights,
             grad_mean_probs, grad_z, indices, static_cast<T*>(dlogits));
    });
  });
}

int gate_backward_blocks(const Device& device, const Route& r) {
  return std::min(ceil_div(r.T, kTokensPerBlock), 2 * device.sms);
}

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
