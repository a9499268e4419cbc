// Layouts of csrc/ itself, by running it in emulation: offsets, descriptors, tensor maps, filled
// stages.
#include "epilogue.cuh"
#include "hopper.cuh"

namespace cumo {

inline TensorMap noted[2];  // of the previous launch

// A better match than launch.cuh's own for kernels with two tensor maps.
template <class... Parameters, class... Arguments>
void launch(const Device&, void (*)(TensorMap, TensorMap, Parameters...), int64_t, int, int,
            const TensorMap& first, const TensorMap& second, const Arguments&...) {
  noted[0] = first, noted[1] = second;
}

}  // namespace cumo

#include "hopper.cu"
#include "hopper_weight_grad.cu"

#include "cases.h"

using namespace cases;

namespace {

template <class T>
const std::string kName = std::is_same_v<T, cumo::bf16_t> ? "bf16" : "fp16";
template <class T>
constexpr cumo::Dtype kDtype = std::is_same_v<T, cumo::bf16_t> ? cumo::Dtype::bf16 : cumo::Dtype::fp16;

const cumo::Device kDevice{nullptr, 1, 90, 227 * 1024, 0};

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

void offsets(int columns) {
  std::vector<int64_t> along, across;
  for (int outer = 0; outer < columns; ++outer)
    for (int k = 0; k < cumo::kSteps; ++k) {
      along.push_back(cumo::offset_along(outer, k * 2));
      across.push_back(cumo::offset_across(k, outer * 2, cumo::kSteps));
    }
  write_down("offsets/along/" + std::to_string(columns), along);
  write_down("offsets/across/" + std::to_string(columns), across);
}

// The descriptors that multiply_stages passes to wgmma in one round of the ring, and the operands marked as
// transposed.
template <class T, int kColumns, int kN, bool kAcrossA, bool kAcrossB, int kM>
void descriptors(const std::string& kernel) {
  using S = cumo::Stages<kColumns>;
  std::vector<int64_t> a[2], b[2], transposed[2];
  cumo::emulate::machine.run(1, cumo::kThreads, S::kShared, [&] {
    unsigned char* shared = cumo::shared_memory<unsigned char>();
    cumo::Barrier* full = reinterpret_cast<cumo::Barrier*>(shared + S::kBarriers);
    cumo::Barrier* empty = full + S::kCount;
    if (threadIdx.x == 0)
      for (int i = 0; i < S::kCount; ++i) {
        cumo::init_barrier(&full[i], 1);
        cumo::init_barrier(&empty[i], 2 * cumo::kGroup / cumo::kWarp);
      }
    cumo::sync_block();
    const int group = static_cast<int>(threadIdx.x) / cumo::kGroup - 1;
    if (threadIdx.x == 0)
      for (int i = 0; i < S::kCount; ++i) cumo::arrive(&full[i]);
    if (group < 0 || (kM == 2 && group == 1)) return;
    cumo::Turn<S::kCount> turn;
    float d[kM][kColumns / 2];
    cumo::multiply_stages<T, kColumns, kN, kAcrossA, kAcrossB, kM>(
        S::kCount, shared, full, empty, turn, d,
        [&](int, const unsigned char*) {
          if (threadIdx.x % cumo::kGroup != 0) return;
          for (const auto& one : cumo::emulate::wgmma_groups[threadIdx.x].back()) {
            a[group].push_back(static_cast<int64_t>(one.a));
            b[group].push_back(static_cast<int64_t>(one.b));
            transposed[group].insert(transposed[group].end(), {one.across_a, one.across_b});
          }
        },
        [] {});
  });
  for (int group = 0; group < (kM == 2 ? 1 : 2); ++group) {
    const std::string name = kernel + "/" + kName<T> + "/group" + std::to_string(group);
    write_down("descriptors/a/" + name, a[group]);
    write_down("descriptors/b/" + name, b[group]);
    write_down("transposed/" + name, transposed[group]);
  }
}

// Row and column of every thread's sums: A (64, 16) has the row and 1 in its first columns, B (16,
// kColumns) 256 and the column in its first rows. Integers up to 256 are exact in bf16.
template <int kColumns>
void accumulators() {
  using T = cumo::bf16_t;
  std::vector<int64_t> found(128 * kColumns / 2);
  cumo::emulate::machine.run(1, 128, 64 * 1024, [&] {
    unsigned char* a = cumo::shared_memory<unsigned char>();
    unsigned char* b = a + 16 * 1024;
    const auto put = [](unsigned char* tile, int outer, int k, float value) {
      *reinterpret_cast<T*>(tile + cumo::offset_along(outer, k * 2)) = cumo::from_float<T>(value);
    };
    if (threadIdx.x == 0) {
      for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 64; ++row) put(a, row, k, k == 0 ? row : k == 1);
        for (int col = 0; col < kColumns; ++col) put(b, col, k, k == 0 ? 256 : k == 1 ? col : 0);
      }
    }
    cumo::sync_block();
    float d[kColumns / 2] = {};
    cumo::wgmma<T, kColumns, false, false>(d, cumo::matrix_descriptor(cumo::shared_address(a), 0),
                                           cumo::matrix_descriptor(cumo::shared_address(b), 0));
    cumo::wgmma_commit();
    cumo::wgmma_wait<T, kColumns, 0>();
    for (int i = 0; i < kColumns / 2; ++i) found[threadIdx.x * kColumns / 2 + i] = static_cast<int64_t>(d[i]);
  });
  write_down("accumulators/" + std::to_string(kColumns), found);
}

void write_map(const std::string& name, const cumo::TensorMap& map) {
  std::vector<int64_t> all{static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.base)), map.rank};
  for (int i = 0; i < map.rank; ++i) all.push_back(static_cast<int64_t>(map.sizes[i]));
  for (int i = 0; i < map.rank; ++i) all.push_back(static_cast<int64_t>(map.strides[i]) / 2);
  for (int i = 0; i < map.rank; ++i) all.push_back(map.box[i]);
  write_down("map/" + name, all);
}

// The 16-bit slots of a stage, where every element in memory is its own index, half of the index at a time.
template <class Fill>
void stage(const std::string& name, int slots, Fill fill) {
  std::vector<int64_t> all(slots);
  for (const int shift : {0, 16}) {
    const auto memory = [shift](uint64_t elements) {
      std::vector<uint16_t> values(elements);
      for (uint64_t i = 0; i < elements; ++i) values[i] = static_cast<uint16_t>(i >> shift);
      return values;
    };
    std::vector<uint16_t> found(slots);
    fill(memory, found.data());
    for (int i = 0; i < slots; ++i) all[i] |= int64_t{found[i]} << shift;
  }
  write_down("stage/" + name, all);
}

// The data that produce() loads for the tile and step of cases.h.
template <int kColumns, bool kAlong>
void produced(const std::string& name, cumo::TensorMap map_x, cumo::TensorMap map_w, const cumo::Gemm& p,
              int64_t weights, bool halves_apart = false) {
  using S = cumo::Stages<kColumns>;
  const int each = p.gated ? kColumns / 2 : kColumns, tiles_n = p.N / each;
  stage(name, S::kBytes / 2, [&](auto memory, uint16_t* found) {
    const auto x = memory(p.S * p.stride_x), w = memory(weights);
    map_x.base = reinterpret_cast<const char*>(x.data());
    map_w.base = reinterpret_cast<const char*>(w.data());
    cumo::emulate::machine.run(1, 2 * cumo::kWarp, S::kShared, [&] {
      unsigned char* shared = cumo::shared_memory<unsigned char>();
      cumo::Barrier* full = reinterpret_cast<cumo::Barrier*>(shared + S::kBarriers);
      cumo::Barrier* empty = full + S::kCount;
      if (threadIdx.x == 0)
        for (int i = 0; i < S::kCount; ++i) cumo::init_barrier(&full[i], 1), cumo::init_barrier(&empty[i], 1);
      cumo::sync_block();
      if (threadIdx.x < cumo::kWarp)
        cumo::produce<cumo::bf16_t, kColumns, kAlong>(map_x, map_w, p, cumo::Walk{tiles_n, 1, false, halves_apart}, shared,
                                                      full, empty);
      if (threadIdx.x != cumo::kWarp) return;
      cumo::TileWalk walk(p.expert_offsets, p.E, tiles_n, cumo::kRows, 1);
      cumo::Tile tile;
      cumo::Turn<S::kCount> turn;
      for (int number = 0; walk.find(number, tile); ++number)
        for (int step = 0; step < p.K / cumo::kSteps; ++step) {
          cumo::wait_for(&full[turn.stage], turn.phase);
          if (tile.expert == kExpert && tile.first_row == kFirstRow && tile.tile_n == kTileN && step == kStep)
            std::memcpy(found, shared + turn.stage * S::kBytes, S::kBytes);
          cumo::arrive(&empty[turn.stage]);
          turn.next();
        }
    });
  });
}

template <class T, int kColumns>
void forward() {
  const std::string size = std::to_string(kColumns), type = "/" + kName<T>;
  const cumo::Plan plan{true, kColumns, 1, 1, 1, 1};
  cumo::Gemm p{};
  p.x = at<T>(kAddressX), p.weight = at<T>(kAddressWeight), p.expert_offsets = kOffsets;
  p.stride_x = kStrideX, p.S = kS, p.E = kE, p.N = kN, p.K = kK, p.top_k = 1;

  p.k_inner = true, p.stride_w = kStrideAlong, p.stride_w_e = kExpertAlong;
  cumo::hopper_grouped_gemm(kDevice, kDtype<T>, p, plan, nullptr, nullptr, nullptr);
  write_map("x/forward" + size + type, cumo::noted[0]);
  write_map("along/forward" + size + type, cumo::noted[1]);
  if (type == "/bf16")
    produced<kColumns, true>("along" + size, cumo::noted[0], cumo::noted[1], p, kE * kExpertAlong);

  p.gated = true, p.stride_w_e = kExpertGated;
  cumo::hopper_grouped_gemm(kDevice, kDtype<T>, p, plan, nullptr, nullptr, nullptr);
  write_map("gated/forward" + size + type, cumo::noted[1]);
  if (type == "/bf16")
    produced<kColumns, true>("gated" + size, cumo::noted[0], cumo::noted[1], p, kE * kExpertGated);
  setenv("CUMO_EMULATE_STRICT_MAPS", "1", 1);  // a driver that refuses it
  cumo::hopper_grouped_gemm(kDevice, kDtype<T>, p, plan, nullptr, nullptr, nullptr);
  unsetenv("CUMO_EMULATE_STRICT_MAPS");
  write_map("apart/forward" + size + type, cumo::noted[1]);
  if (type == "/bf16")
    produced<kColumns, true>("apart" + size, cumo::noted[0], cumo::noted[1], p, kE * kExpertGated, true);
  std::vector<int64_t> columns;
  for (int column = 0; column < kColumns; ++column)
    columns.push_back(cumo::weight_column(kTileN, kColumns, column, kN, true).index);
  write_down("columns/gated" + size, columns);

  p.gated = false, p.k_inner = false, p.stride_w = kStrideAcross, p.stride_w_e = kExpertAcross;
  cumo::hopper_grouped_gemm(kDevice, kDtype<T>, p, plan, nullptr, nullptr, nullptr);
  write_map("across/forward" + size + type, cumo::noted[1]);
  if (type == "/bf16")
    produced<kColumns, false>("across" + size, cumo::noted[0], cumo::noted[1], p, kE * kExpertAcross);
  if (kColumns != cumo::kHopperHiddenCols) return;
  p.gated = true;  // of z, not of the product
  cumo::hopper_grad_hidden(kDevice, kDtype<T>, p, nullptr, nullptr, nullptr, nullptr, nullptr);
  write_map("x/grad_hidden" + type, cumo::noted[0]);
  write_map("across/grad_hidden" + type, cumo::noted[1]);
}

// The rows of a step that fetch_rows loads, with a matrix of kWidth columns per tile.
template <int kWidth>
void fetched(const std::string& name, cumo::TensorMap map, int64_t elements) {
  stage(name, kWidth * cumo::kSteps, [&](auto memory, uint16_t* found) {
    const auto matrix = memory(elements);
    map.base = reinterpret_cast<const char*>(matrix.data());
    constexpr int kBytes = kWidth * cumo::kRowBytes;
    cumo::emulate::machine.run(1, cumo::kWarp, kBytes + 8, [&] {
      if (threadIdx.x != 0) return;
      unsigned char* shared = cumo::shared_memory<unsigned char>();
      cumo::Barrier* barrier = reinterpret_cast<cumo::Barrier*>(shared + kBytes);
      cumo::init_barrier(barrier, 1);
      cumo::arrive_expecting(barrier, kBytes);
      cumo::fetch_rows<kWidth>(shared, map, barrier, kFirstRow + kStep * cumo::kSteps, 0);
      cumo::wait_for(barrier, 0);
      std::memcpy(found, shared, kBytes);
    });
  });
}

template <class T>
void weight_grad() {
  const cumo::Plan plan{true, cumo::kPlanWide, 1, 1, 1, 1};
  cumo::WeightGrad p{};
  p.grad = at<T>(kAddressGrad), p.x = at<T>(kAddressX), p.expert_offsets = kOffsets;
  p.stride_grad = kStrideGrad, p.stride_x = kStrideX, p.S = kS, p.E = kE, p.N = kN, p.K = kK, p.top_k = 1;
  cumo::hopper_weight_grad(kDevice, kDtype<T>, p, plan, nullptr, nullptr);
  write_map("grad/weight_grad/" + kName<T>, cumo::noted[0]);
  write_map("rows/weight_grad/" + kName<T>, cumo::noted[1]);
  if (kName<T> != "bf16") return;
  fetched<cumo::kRows>("grad", cumo::noted[0], kS * kStrideGrad);
  fetched<cumo::kPlanWide>("rows", cumo::noted[1], kS * kStrideX);
}

template <class T>
void all_of_type() {
  descriptors<T, 256, 256, false, false, 1>("forward256-along");
  descriptors<T, 256, 256, false, true, 1>("forward256-across");
  descriptors<T, 256, 128, false, false, 1>("half256-along");
  descriptors<T, 256, 128, false, true, 1>("half256-across");
  descriptors<T, 128, 128, false, false, 2>("forward128-along");
  descriptors<T, 128, 128, false, true, 2>("forward128-across");
  descriptors<T, 256, 256, true, true, 1>("weight_grad");
  forward<T, cumo::kPlanWide>();
  forward<T, cumo::kPlanNarrow>();
  weight_grad<T>();
}

}  // namespace

int main() {
  for (const int columns : {64, 128, 256}) offsets(columns);
  accumulators<128>();
  accumulators<256>();
  all_of_type<cumo::bf16_t>();
  all_of_type<cumo::half_t>();
}
