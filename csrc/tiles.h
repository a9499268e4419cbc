// Index arithmetic of the grouped GEMMs, the same on host and device, tested on the host (tests/kernels/test_cuda.py).
//
// Rows of expert e are [expert_offsets[e], expert_offsets[e + 1]); it owns ceil(rows / tile rows) * tiles_n tiles, and
// as many again for each further part of a split reduction. Tiles are numbered expert by expert, so a persistent block
// finds its tiles from the offsets alone and the grid does not depend on the routing.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CUMO_BOTH __host__ __device__ __forceinline__
#else
#define CUMO_BOTH inline
#endif

namespace cumo {

constexpr int kGroupRows = 8;  // row tiles that run before the next column tile, so that concurrent tiles share L2

struct Tile {
  int expert, first_row, end_row, tile_n;  // rows [first_row, ...) of an expert that ends at end_row
  int split;                               // part of the reduction
  bool halved = false;                     // half as wide as the others, and tile_n counts such halves
};

// Iterates over the tiles in ascending order.
struct TileWalk {
  const int* expert_offsets;
  int E, tiles_n, tile_rows, splits;
  int expert = 0, before = 0;  // tiles of the experts before `expert`

  CUMO_BOTH TileWalk(const int* offsets, int experts, int columns, int rows, int parts)
      : expert_offsets(offsets), E(experts), tiles_n(columns), tile_rows(rows), splits(parts) {}

  CUMO_BOTH int row_tiles() const {
    return (expert_offsets[expert + 1] - expert_offsets[expert] + tile_rows - 1) / tile_rows;
  }

  // False if there are at most `number` tiles.
  CUMO_BOTH bool find(int number, Tile& tile) {
    for (; expert < E; before += row_tiles() * tiles_n * splits, ++expert) {
      const int tiles_m = row_tiles(), whole = tiles_m * tiles_n;
      if (number >= before + whole * splits) continue;
      const int split = (number - before) / whole, local = (number - before) % whole;
      const int group = local / (kGroupRows * tiles_n), within = local % (kGroupRows * tiles_n);
      const int left = tiles_m - group * kGroupRows, size = left < kGroupRows ? left : kGroupRows;
      const int begin = expert_offsets[expert];
      tile = {expert, begin + (group * kGroupRows + within % size) * tile_rows, expert_offsets[expert + 1],
              within / size, split};
      return true;
    }
    return false;
  }

  // The same if tiles from number `whole` on are split in two by columns, each half with a number.
  CUMO_BOTH bool find(int number, int whole, Tile& tile) {
    const int half = number - whole;
    if (!find(half < 0 ? number : whole + half / 2, tile)) return false;
    if (half >= 0) tile.halved = true, tile.tile_n = 2 * tile.tile_n + half % 2;
    return true;
  }
};

// The first tile to be split: those of a last round that would leave half of the blocks, or more, without work.
CUMO_BOTH int whole_tiles(int tiles, int blocks) {
  const int last = tiles % blocks;
  return 2 * last <= blocks ? tiles - last : tiles;
}

// Steps [begin, end) of a reduction of `steps` that are split number `split`; the last ones may be empty.
struct Steps {
  int begin, end;
};

CUMO_BOTH Steps steps_of_split(int steps, int split, int splits) {
  const int share = (steps + splits - 1) / splits, begin = split * share, end = begin + share;
  return {begin < steps ? begin : steps, end < steps ? end : steps};
}

// Tile `number` of the gradient of weights: 128 rows x kCols columns of expert e, summed over rows [begin, end).
template <int kCols>
struct GradTile {
  int expert, split, begin, end, first_n, first_k;

  CUMO_BOTH GradTile(const int* expert_offsets, int number, int tiles_n, int tiles_k, int splits, int depth) {
    const int part = number / (tiles_n * tiles_k), local = number % (tiles_n * tiles_k);
    expert = part / splits, split = part % splits;
    first_n = local / tiles_k * 128, first_k = local % tiles_k * kCols;
    const int first = expert_offsets[expert], rows = expert_offsets[expert + 1] - first;
    const Steps steps = steps_of_split((rows + depth - 1) / depth, split, splits);
    begin = first + steps.begin * depth;
    end = first + (steps.end * depth < rows ? steps.end * depth : rows);
  }

  // The (N, K) matrix of the output that contains it, of (splits, E).
  CUMO_BOTH int64_t slab(int E) const { return int64_t{split} * E + expert; }
};

// Whether tile `number` of the gradient of weights is the one of its row of tiles that also sums the bias: one column
// further in each round of the blocks, so that all blocks have their share.
CUMO_BOTH bool sums_bias(int number, int tiles_k, int blocks) {
  const int column = number % tiles_k;
  return column == (number - column) / blocks % tiles_k;
}

// The largest number of row tiles that a routing of S rows can need.
CUMO_BOTH int64_t most_row_tiles(int64_t S, int E, int tile_rows) {
  const int64_t most = (S + tile_rows - 1) / tile_rows + E - 1;
  return most < S ? most : S;
}

// The column of the weight (E, width, K) at column r of a column tile, and how many columns of the same kind remain from
// there. In a gated tile of C columns, eight of the gate alternate with eight of the up half (C / 2 each), so that one
// thread's accumulators hold both factors of a product.
struct WeightColumn {
  int index, left;
};

CUMO_BOTH WeightColumn weight_column(int tile_n, int tile_columns, int r, int N, bool gated) {
  if (!gated) return {tile_n * tile_columns + r, N - tile_n * tile_columns - r};
  const int local = tile_n * (tile_columns / 2) + r / 16 * 8 + r % 8;
  return {r / 8 % 2 * N + local, N - local};
}

// Operand tiles in shared memory are rows of 128 bytes whose 16-byte pieces are exchanged by an XOR with the row, so
// that eight rows of one column of pieces are in different banks. The same pattern is TMA's and wgmma's 128B swizzle
// when the tile begins at a multiple of 1024 bytes.
constexpr int kRowBytes = 128;

CUMO_BOTH int swizzled(int row, int byte) { return row * kRowBytes + (byte ^ (row % 8 * 16)); }

// Along: a row of the tile is a row (or column) of the matrix, along the reduction. Across: a row of the tile is one
// step of the reduction; the columns that do not fit into 128 bytes follow `depth` rows later.
CUMO_BOTH int offset_along(int outer, int k_byte) { return swizzled(outer, k_byte); }
CUMO_BOTH int offset_across(int k, int outer_byte, int depth) {
  return outer_byte / kRowBytes * depth * kRowBytes + swizzled(k, outer_byte % kRowBytes);
}

}  // namespace cumo
