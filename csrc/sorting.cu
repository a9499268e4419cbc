// The stable sort of slots by expert (CUDA, routing stem).
//
// A block owns a run of slots and places it 256 at a time. A slot's position is the number of slots of earlier experts,
// plus those of its own expert in earlier blocks, steps, warps and lanes. Up to kAlone slots every block counts all of
// them itself, in one launch; with more, count_kernel has counted each run before. Integer sums do not depend on the
// order of additions, so the result does not depend on the order of threads.
// Contract: cumo_kernels/ops/routing.py. Reference: cumo_kernels/backends/reference/routing.py.
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kAlone = 32768, kSlotsPerBlock = 1024, kMaxBlocks = 256;
constexpr int kBatch = 16;  // slots that a thread loads at once

static int sort_blocks(int64_t S) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(kMaxBlocks, ceil_div<int64_t>(S, kSlotsPerBlock))));
}

static int slots_per_block(int64_t S, int blocks) {
  return static_cast<int>(ceil_div<int64_t>(ceil_div<int64_t>(S, blocks), kThreads)) * kThreads;
}

// Bin E counts the dropped slots.
__device__ __forceinline__ int bin_of(int expert, int E) { return expert >= 0 && expert < E ? expert : E; }

// counts[e] += slots [begin, end) of expert e, by all threads of a block, which must synchronise afterwards.
__device__ __forceinline__ void count_run(const int* indices, int64_t begin, int64_t end, int E, int* counts) {
  // eight counters of eight bits in two registers: with few experts all lanes would add to the same few words
  const bool few = E <= 8;
  uint32_t low = 0, high = 0;
  int held = 0;  // at most in one counter
  const auto flush = [&] {
    for (int e = 0; e < E; ++e) {
      const int count = sum_of_warp(static_cast<int>((e < 4 ? low : high) >> (e % 4 * 8) & 0xff));
      if (threadIdx.x % kWarp == 0) add_shared(&counts[e], count);
    }
    low = high = held = 0;
  };
  for (int64_t first = begin; first < end; first += kThreads * kBatch) {
    int expert[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t slot = first + i * kThreads + threadIdx.x;
      expert[i] = slot < end ? indices[slot] : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (expert[i] < 0 || expert[i] >= E) continue;
      if (!few) {
        add_shared(&counts[expert[i]], 1);
      } else if (expert[i] < 4) {
        low += 1u << (expert[i] * 8);
      } else {
        high += 1u << (expert[i] * 8 - 32);
      }
    }
    held += kBatch;
    if (few && held + kBatch > 255) flush();
  }
  if (few) flush();
}

__global__ void __launch_bounds__(kThreads) count_kernel(const int* indices, int64_t S, int run, int E, int* counts) {
  begin_kernel();
  int* mine = shared_memory<int>();
  const int64_t begin = int64_t{blockIdx.x} * run;
  for (int bin = threadIdx.x; bin < E; bin += kThreads) mine[bin] = 0;
  sync_block();
  count_run(indices, begin, begin + run < S ? begin + run : S, E, mine);
  sync_block();
  for (int bin = threadIdx.x; bin < E; bin += kThreads) counts[int64_t{blockIdx.x} * E + bin] = mine[bin];
}

// Adds what count_kernel counted to before[e], of the blocks before this one, and to total[e], of all; by all threads of a
// block, which must synchronise afterwards. With few experts several threads share the blocks of one.
__device__ __forceinline__ void add_counts(const int* counts, int E, int* before, int* total) {
  const int columns = E < kThreads ? E : kThreads, parts = kThreads / columns, part = threadIdx.x / columns;
  if (part >= parts) return;
  for (int bin = threadIdx.x % columns; bin < E; bin += columns) {
    int earlier = 0, sum = 0;
#pragma unroll 8
    for (unsigned block = part; block < gridDim.x; block += parts) {
      const int count = counts[int64_t{block} * E + bin];
      earlier += block < blockIdx.x ? count : 0;
      sum += count;
    }
    add_shared(&before[bin], earlier);
    add_shared(&total[bin], sum);
  }
}

// The sum of `value` over the lanes up to this one.
__device__ __forceinline__ int scan_of_warp(int value) {
  const int lane = threadIdx.x % kWarp;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int lower = shuffle(value, (lane - lanes) & (kWarp - 1));
    value += lane >= lanes ? lower : 0;
  }
  return value;
}

// A thread has adjacent bins: sums over the bins before its own, first in its warp, then over earlier warps.
__device__ __forceinline__ void scan_bins(int E, int64_t begin, const int* before, const int* total, int* warp_sums,
                                          int* next, int* tokens_per_expert, int* expert_offsets) {
  const int warp = threadIdx.x / kWarp, each = (E + kThreads) / kThreads;  // of E + 1 bins
  const int first = threadIdx.x * each, end = first + each < E ? first + each : E;
  int mine = 0, mine_before = 0;
  for (int bin = first; bin < end; ++bin) mine += total[bin], mine_before += before[bin];
  int offset = scan_of_warp(mine), earlier = scan_of_warp(mine_before);
  if (threadIdx.x % kWarp == kWarp - 1) warp_sums[warp] = offset, warp_sums[kWarps + warp] = earlier;
  sync_block();
  offset -= mine, earlier -= mine_before;
  for (int w = 0; w < warp; ++w) offset += warp_sums[w], earlier += warp_sums[kWarps + w];
  for (int bin = first; bin < first + each && bin <= E; ++bin) {
    const int slots = bin < E ? total[bin] : 0, slots_before = bin < E ? before[bin] : 0;
    next[bin] = bin < E ? offset + slots_before : offset + static_cast<int>(begin) - earlier;
    if (blockIdx.x == 0) {
      expert_offsets[bin] = offset;
      if (bin < E) tokens_per_expert[bin] = slots;
    }
    offset += slots, earlier += slots_before;
  }
}

__global__ void __launch_bounds__(kThreads) sort_kernel(const int* indices, const int* counts, int64_t S, int run, int E,
                                                         int* tokens_per_expert, int* expert_offsets, int* permutation,
                                                         int* inverse) {
  begin_kernel();
  int* before = shared_memory<int>();      // (E,): slots of the bin in earlier blocks
  int* total = before + E;                 // (E,): slots of the bin in all blocks
  int* next = total + E;                   // (E + 1,): position of the next slot of each bin
  int* in_warp = next + E + 1;             // (warps, E + 1): slots of the bin in this step, zero between steps
  int* warp_sums = in_warp + kWarps * (E + 1);  // (2, warps)
  const int64_t begin = int64_t{blockIdx.x} * run < S ? int64_t{blockIdx.x} * run : S;
  const int64_t end = begin + run < S ? begin + run : S;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  for (int bin = threadIdx.x; bin < E; bin += kThreads) before[bin] = total[bin] = 0;
  for (int i = threadIdx.x; i < kWarps * (E + 1); i += kThreads) in_warp[i] = 0;
  sync_block();
  if (counts) {
    add_counts(counts, E, before, total);
  } else {
    count_run(indices, 0, begin, E, before);
    count_run(indices, begin, S, E, total);
    sync_block();
    for (int bin = threadIdx.x; bin < E; bin += kThreads) total[bin] += before[bin];
  }
  sync_block();
  scan_bins(E, begin, before, total, warp_sums, next, tokens_per_expert, expert_offsets);

  for (int64_t step = begin; step < end; step += kThreads) {
    const int64_t slot = step + threadIdx.x;
    const int bin = slot < end ? bin_of(indices[slot], E) : -1;
    const unsigned same = match_any(bin);
    const int rank = count_bits(same & ((1u << lane) - 1)), number = count_bits(same);
    const bool leads = bin >= 0 && rank == 0;
    if (leads) in_warp[warp * (E + 1) + bin] = number;
    sync_block();
    if (bin >= 0) {
      int position = next[bin] + rank;
      for (int earlier = 0; earlier < warp; ++earlier) position += in_warp[earlier * (E + 1) + bin];
      permutation[position] = static_cast<int>(slot);
      inverse[slot] = bin < E ? position : -1;
    }
    sync_block();
    if (leads) {
      add_shared(&next[bin], number);
      in_warp[warp * (E + 1) + bin] = 0;
    }
    sync_warp();  // in the next step another lane may lead that bin
  }
}

int64_t sort_scratch(int64_t S, int E) { return S <= kAlone ? 0 : int64_t{sort_blocks(S)} * E; }

void sort_by_expert(const Device& device, const int* indices, int64_t S, int E, int* tokens_per_expert,
                    int* expert_offsets, int* permutation, int* inverse, int* scratch) {
  const int blocks = sort_blocks(S), run = slots_per_block(S, blocks);
  const bool counted = S > kAlone;
  if (counted) launch(device, count_kernel, blocks, kThreads, 4 * E, indices, S, run, E, scratch);
  launch(device, sort_kernel, blocks, kThreads, 4 * (2 * E + (E + 1) * (1 + kWarps) + 2 * kWarps), indices,
         static_cast<const int*>(counted ? scratch : nullptr), S, run, E, tokens_per_expert, expert_offsets, permutation,
         inverse);
}

}  // namespace cumo
