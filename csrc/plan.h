// How a GEMM is split into tiles, partial sums and blocks: a function of sizes alone, tested on the host
// (tests/kernels/test_cuda.py). The sizes of tiles are those of tile_math.cuh and hopper_tiles.cuh.
//
// The distribution of rows over experts is known only on the GPU, so the plan assumes balanced routing.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tiles.h"

namespace cumo {

struct Plan {
  bool hopper;    // the kernels for sm_90a
  int tile_cols;  // columns of the weight; if gated, half of each kind
  int tiles_n;
  int tiles_k;    // for the gradient of weights
  int splits;     // partial sums of the reduction, added up in their order afterwards
  int64_t blocks;
  bool cuts = false;  // a short last round of tiles is split into halves: tiles.h, whole_tiles
};

constexpr int kPlanRows = 128, kPlanWide = 256, kPlanNarrow = 128;
constexpr int kMinSteps = 8;  // in a shorter sum, filling and draining the pipeline would dominate

// As many partial sums as run at once with enough work each: the rule of cumo_kernels/tiles/tuning.py.
inline int count_splits(int64_t tiles, int64_t steps, int64_t places) {
  int count = 1;
  while (2 * count * tiles <= places && steps >= int64_t{2} * count * kMinSteps) count *= 2;
  return count;
}

// Tiles of rows when S rows spread evenly over the experts.
inline int64_t even_row_tiles(int64_t S, int E) {
  const int64_t hit = std::max<int64_t>(1, std::min<int64_t>(S, E));
  return hit * (((S + hit - 1) / hit + kPlanRows - 1) / kPlanRows);
}

// The rows of S slots times weights of `width` rows (one half of a gated one's), `steps` whole stages long, on
// `places` blocks at a time; `busy`: an activation, or a sum to save, follows the product. Hopper has two kinds of tiles:
// a narrow one takes somewhat more than half the time of a wide one, but its epilogue runs during the next product. Wide
// tiles of a short last round are split in two. Partial sums cost a round trip through memory. With `steady` no row's
// result depends on S, nor on the instruction that multiplied it.
inline Plan plan_rows(bool hopper, int64_t S, int E, int64_t width, bool gated, int64_t steps, int64_t places,
                      bool can_split, bool busy, bool steady) {
  // in stages of a wide tile; estimated from instructions and bandwidths, not measured
  constexpr double kNarrow = 0.6, kBusyEnd = 8, kPlainEnd = 4, kSplit = 1.1;
  Plan best{};
  double least = 0;
  for (const bool split : {false, true}) {
    for (const int cols : {kPlanWide, kPlanNarrow}) {
      if ((!hopper && cols == kPlanWide) || (hopper && steady && cols == kPlanNarrow)) continue;
      Plan plan{hopper, cols, 0, 1, 1, 0};
      const int64_t each = gated ? cols / 2 : cols;
      plan.tiles_n = static_cast<int>((width + each - 1) / each);
      const int64_t tiles = even_row_tiles(S, E) * plan.tiles_n;
      if (split && (!can_split || steady)) continue;
      if (split && (plan.splits = count_splits(tiles, steps, places)) == 1) continue;
      plan.cuts = cols == kPlanWide && !steady;
      const int64_t most = most_row_tiles(S, E, kPlanRows) * plan.tiles_n * plan.splits;
      plan.blocks = std::min(places, plan.cuts ? 2 * most : most);
      const int64_t rounds = tiles * plan.splits / places, last = tiles * plan.splits % places;
      double product = static_cast<double>(steps) / plan.splits, end = busy ? kBusyEnd : kPlainEnd;
      const double half = kNarrow * product + end / 2;
      double time = rounds * (product + end);
      if (last) time += plan.cuts && 2 * last <= places ? half : product + end;
      if (hopper && cols == kPlanNarrow) {
        product *= kNarrow, end /= 2;
        time = static_cast<double>(rounds + (last > 0)) * std::max(product, (product + end) / 2) + end;
      }
      time *= split ? kSplit : 1.0;
      if (least == 0 || time < least) best = plan, least = time;
    }
  }
  return best;
}

// The gradient of weights (E, N, K), summed over S rows in steps of `depth`.
inline Plan plan_weight_grad(bool hopper, int64_t S, int E, int64_t N, int64_t K, int depth, int64_t places) {
  const int cols = hopper ? kPlanWide : kPlanNarrow;
  const int64_t hit = std::max<int64_t>(1, std::min<int64_t>(S, E));  // experts with rows under balanced routing
  const int tiles_n = static_cast<int>((N + kPlanRows - 1) / kPlanRows);
  const int tiles_k = static_cast<int>((std::max<int64_t>(K, 1) + cols - 1) / cols);  // without columns the bias remains
  const int64_t tiles = int64_t{E} * tiles_n * tiles_k;
  const int splits = count_splits(tiles, S / hit / depth, places);
  return {hopper, cols, tiles_n, tiles_k, splits, std::min(places, tiles * splits)};
}

}  // namespace cumo
