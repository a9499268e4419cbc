// The stable sort of slots by expert (CUDA), a part of the routing stem.
//
// A block owns a run of slots. count_kernel counts them by expert; sort_kernel adds up the counts of all blocks before
// its own and places its run 256 slots at a time: a slot's rank is the number of earlier lanes with its expert, plus
// what earlier warps hold, plus what came before. The order of additions cannot change an integer, so nothing here
// depends on which thread is first. Up to kAlone slots one block does everything in one launch. S * log E reads.
// Contract: cumo_kernels/ops/routing.py. Truth: cumo_kernels/backends/reference/routing.py.
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kAlone = 2048, kSlotsPerBlock = 1024, kMaxBlocks = 256;

int sort_blocks(int64_t S) {
  return S <= kAlone ? 1 : static_cast<int>(std::min<int64_t>(kMaxBlocks, ceil_div<int64_t>(S, kSlotsPerBlock)));
}

static int slots_per_block(int64_t S, int blocks) {
  return static_cast<int>(ceil_div<int64_t>(ceil_div<int64_t>(S, blocks), kThreads)) * kThreads;
}

// Bin E collects the slots of no expert.
__device__ __forceinline__ int bin_of(int expert, int E) { return expert >= 0 && expert < E ? expert : E; }

__device__ __forceinline__ void count_run(const int* indices, int64_t begin, int64_t end, int E, int* counts) {
  for (int bin = threadIdx.x; bin <= E; bin += kThreads) counts[bin] = 0;
  sync_block();
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) add_shared(&counts[bin_of(indices[slot], E)], 1);
  sync_block();
}

__global__ void __launch_bounds__(kThreads) count_kernel(const int* indices, int64_t S, int run, int E, int* counts) {
  int* mine = shared_memory<int>();
  const int64_t begin = int64_t{blockIdx.x} * run;
  count_run(indices, begin, begin + run < S ? begin + run : S, E, mine);
  for (int bin = threadIdx.x; bin < E; bin += kThreads) counts[int64_t{blockIdx.x} * E + bin] = mine[bin];
}

__global__ void __launch_bounds__(kThreads) sort_kernel(const int* indices, const int* counts, int64_t S, int run, int E,
                                                         int* tokens_per_expert, int* expert_offsets, int* permutation,
                                                         int* inverse) {
  int* next = shared_memory<int>();        // (E + 1,): where the next slot of each bin goes
  int* total = next + E + 1;               // (E + 1,): slots of the bin in all blocks
  int* in_warp = total + E + 1;            // (warps, E + 1): slots of the bin in this step
  const int64_t begin = int64_t{blockIdx.x} * run, end = begin + run < S ? begin + run : S;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  if (gridDim.x == 1) {
    count_run(indices, 0, S, E, total);
    for (int bin = threadIdx.x; bin < E; bin += kThreads) next[bin] = 0;
  } else {
    for (int bin = threadIdx.x; bin < E; bin += kThreads) {
      int before = 0, sum = 0;
      for (unsigned block = 0; block < gridDim.x; ++block) {
        const int count = counts[int64_t{block} * E + bin];
        if (block < blockIdx.x) before += count;
        sum += count;
      }
      next[bin] = before;
      total[bin] = sum;
    }
  }
  sync_block();
  if (threadIdx.x == 0) {
    int offset = 0, before = 0;  // slots of earlier bins, and those of them in earlier blocks
    for (int bin = 0; bin < E; ++bin) {
      before += next[bin];
      next[bin] += offset;
      offset += total[bin];
      if (blockIdx.x == 0) expert_offsets[bin + 1] = offset;
    }
    if (blockIdx.x == 0) expert_offsets[0] = 0;
    next[E] = offset + static_cast<int>(begin) - before;
  }
  if (blockIdx.x == 0)
    for (int bin = threadIdx.x; bin < E; bin += kThreads) tokens_per_expert[bin] = total[bin];

  for (int64_t step = begin; step < end; step += kThreads) {
    for (int i = threadIdx.x; i < kWarps * (E + 1); i += kThreads) in_warp[i] = 0;
    sync_block();
    const int64_t slot = step + threadIdx.x;
    const int bin = slot < end ? bin_of(indices[slot], E) : -1;
    const unsigned same = match_any(bin);
    const int rank = count_bits(same & ((1u << lane) - 1));
    if (bin >= 0 && rank == 0) in_warp[warp * (E + 1) + bin] = count_bits(same);
    sync_block();
    if (bin >= 0) {
      int position = next[bin] + rank;
      for (int earlier = 0; earlier < warp; ++earlier) position += in_warp[earlier * (E + 1) + bin];
      permutation[position] = static_cast<int>(slot);
      inverse[slot] = bin < E ? position : -1;
    }
    sync_block();
    for (int i = threadIdx.x; i <= E; i += kThreads)
      for (int w = 0; w < kWarps; ++w) next[i] += in_warp[w * (E + 1) + i];
    sync_block();
  }
}

void sort_by_expert(const Device& device, const int* indices, int64_t S, int E, int* tokens_per_expert,
                    int* expert_offsets, int* permutation, int* inverse, int* counts) {
  const int blocks = sort_blocks(S), run = slots_per_block(S, blocks);
  if (blocks > 1) launch(device, count_kernel, blocks, kThreads, 4 * (E + 1), indices, S, run, E, counts);
  launch(device, sort_kernel, blocks, kThreads, 4 * (E + 1) * (2 + kWarps), indices, static_cast<const int*>(counts), S,
         run, E, tokens_per_expert, expert_offsets, permutation, inverse);
}

}  // namespace cumo
