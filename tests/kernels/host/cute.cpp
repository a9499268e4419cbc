// CuTe's layouts for the tiles of csrc/: offsets, descriptors, tensor maps, and the placement of elements
// of memory.
#include "driver.h"

#define __CUDACC_VER_MAJOR__ 12  // for CuTe's tensor maps, which it omits without nvcc
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cstddef>

alignas(1024) static unsigned char memory[256 * 1024];  // shared memory, which begins at address 0
static size_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const unsigned char*>(pointer) - memory;
}

#include <cute/tensor.hpp>  // before its parts, which do not include one another

#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "cases.h"

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                           void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
                                           const cuuint32_t* box, const cuuint32_t* steps,
                                           CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                           CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill outside) {
  return note_tensor_map(map, type, rank, base, sizes, strides, box, steps, interleave, swizzle, l2, outside);
}

using namespace cases;
using namespace cute;
namespace gmma = cute::SM90::GMMA;

namespace {

constexpr int kDepth = 64, kTileRows = 128;
using Depth = Int<kDepth>;

template <class T>
const std::string kName = is_same_v<T, bfloat16_t> ? "bf16" : "fp16";

// A tile (outer, k) with k, or outer, contiguous in memory and in shared memory.
template <class T, int kOuter>
auto tile_along() {
  return tile_to_shape(gmma::Layout_K_SW128_Atom<T>{}, Shape<Int<kOuter>, Depth>{});
}
template <class T, int kOuter>
auto tile_across() {
  return tile_to_shape(gmma::Layout_MN_SW128_Atom<T>{}, Shape<Int<kOuter>, Depth>{}, Step<_2, _1>{});
}

template <class T, class Layout>
auto in_shared(Layout layout, int byte) {
  return make_tensor(make_smem_ptr(reinterpret_cast<T*>(memory + byte)), layout);
}

// The byte offset of (outer, k) in the tile.
template <class Tile>
int64_t byte_of(const Tile& tile, int outer, int k) {
  return reinterpret_cast<const unsigned char*>(&tile(outer, k)) - memory;
}

template <class T, class Layout>
void offsets(const std::string& name, Layout layout) {
  const auto tile = in_shared<T>(layout, 0);
  std::vector<int64_t> all;
  for (int outer = 0; outer < size<0>(tile); ++outer)
    for (int k = 0; k < kDepth; ++k) all.push_back(byte_of(tile, outer, k));
  write_down("offsets/" + name, all);
}

template <class T>
void offsets_of_type() {
  const std::string type = "/" + kName<T>;
  offsets<T>("along/64" + type, tile_along<T, 64>());
  offsets<T>("along/128" + type, tile_along<T, 128>());
  offsets<T>("along/256" + type, tile_along<T, 256>());
  offsets<T>("across/64" + type, tile_across<T, 64>());
  offsets<T>("across/128" + type, tile_across<T, 128>());
  offsets<T>("across/256" + type, tile_across<T, 256>());
}

// The descriptors of a stage's products, stage by stage. A warpgroup has kM of the two blocks of 64
// rows.
template <class T, class Instruction, int kColumns, int kM, class LayoutA, class LayoutB>
void descriptors(const std::string& name, int stages, LayoutA layout_a, LayoutB layout_b) {
  using Traits = MMA_Traits<Instruction>;
  constexpr bool kAcrossA = is_same_v<typename Traits::FrgTypeA, gmma::smem_desc<gmma::Major::MN>>,
                 kAcrossB = is_same_v<typename Traits::FrgTypeB, gmma::smem_desc<gmma::Major::MN>>;
  const auto mma = make_tiled_mma(Instruction{}).get_slice(0);
  std::vector<int64_t> a[2], b[2], transposed[2];
  for (int stage = 0; stage < stages; ++stage) {
    const int begin = stage * (kTileRows + kColumns) * kDepth * 2;
    const auto tile_a = in_shared<T>(layout_a, begin);
    const auto tile_b = in_shared<T>(layout_b, begin + kTileRows * kDepth * 2);
    const auto all_a = mma.make_fragment_A(mma.partition_A(tile_a));
    const auto all_b = mma.make_fragment_B(mma.partition_B(tile_b));
    for (int block = 0; block < 2; block += kM)
      for (int k = 0; k < kDepth / 16; ++k)
        for (int m = 0; m < kM; ++m) {
          const uint64_t of_a = *all_a(_, block + m, k).data(), of_b = *all_b(_, 0, k).data();
          a[block].push_back(static_cast<int64_t>(of_a));
          b[block].push_back(static_cast<int64_t>(of_b));
          transposed[block].insert(transposed[block].end(), {kAcrossA, kAcrossB});
        }
  }
  for (int group = 0; group < 2 / kM; ++group) {
    const std::string full = name + "/" + kName<T> + "/group" + std::to_string(group);
    write_down("descriptors/a/" + full, a[group]);
    write_down("descriptors/b/" + full, b[group]);
    write_down("transposed/" + full, transposed[group]);
  }
}

template <class T, template <gmma::Major, gmma::Major> class Wide,
          template <gmma::Major, gmma::Major> class Narrow>
void descriptors_of_type() {
  constexpr auto kAlong = gmma::Major::K, kAcross = gmma::Major::MN;
  const auto a = tile_along<T, kTileRows>();
  descriptors<T, Wide<kAlong, kAlong>, 256, 1>("forward256-along", 4, a, tile_along<T, 256>());
  descriptors<T, Wide<kAlong, kAcross>, 256, 1>("forward256-across", 4, a, tile_across<T, 256>());
  // half of a tile's columns, in the ring of whole ones
  descriptors<T, Narrow<kAlong, kAlong>, 256, 1>("half256-along", 4, a, tile_along<T, 128>());
  descriptors<T, Narrow<kAlong, kAcross>, 256, 1>("half256-across", 4, a, tile_across<T, 128>());
  descriptors<T, Narrow<kAlong, kAlong>, 128, 2>("forward128-along", 6, a, tile_along<T, 128>());
  descriptors<T, Narrow<kAlong, kAcross>, 128, 2>("forward128-across", 6, a, tile_across<T, 128>());
  descriptors<T, Wide<kAcross, kAcross>, 256, 1>("weight_grad", 4, tile_across<T, kTileRows>(),
                                                 tile_across<T, 256>());
}

template <gmma::Major a, gmma::Major b>
using Bf16Wide = SM90_64x256x16_F32BF16BF16_SS<a, b>;
template <gmma::Major a, gmma::Major b>
using Bf16Narrow = SM90_64x128x16_F32BF16BF16_SS<a, b>;
template <gmma::Major a, gmma::Major b>
using Fp16Wide = SM90_64x256x16_F32F16F16_SS<a, b>;
template <gmma::Major a, gmma::Major b>
using Fp16Narrow = SM90_64x128x16_F32F16F16_SS<a, b>;

template <int kColumns>
void accumulators() {
  const gmma::CLayout_64xN<kColumns> layout;
  std::vector<int64_t> all;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < kColumns / 2; ++i) {
      const int at = layout(thread, i);
      all.push_back(at % 64 * 256 + at / 64);
    }
  write_down("accumulators/" + std::to_string(kColumns), all);
}

template <class T, class Shape, class Stride>
auto in_memory(uint64_t address, Shape shape, Stride stride) {
  return make_tensor(make_gmem_ptr(reinterpret_cast<T*>(address)), make_layout(shape, stride));
}

// Elements are 16-bit integers: their type has no other effect.
template <class Matrix, class Tile, class Tiler>
void map(const std::string& name, const Matrix& matrix, Tile tile, Tiler tiler) {
  make_tma_copy<uint16_t>(SM90_TMA_LOAD{}, matrix, tile, tiler, Int<1>{});
  using T = typename Matrix::value_type;
  write_down("map/" + name + "/" + kName<T>, told);
}

template <class T, int kColumns>
void maps() {
  using Across = Shape<Int<kColumns>, Depth>;
  constexpr int kBox = 128;  // columns of the weight that are loaded at once
  const std::string forward = "/forward" + std::to_string(kColumns);
  const auto x = in_memory<T>(kAddressX, make_shape(kS, kK, 1), make_stride(kStrideX, _1{}, kStrideX * kS));
  map("x" + forward, x, tile_along<T, kTileRows>(), Shape<Int<kTileRows>, Depth>{});
  const auto along =
      in_memory<T>(kAddressWeight, make_shape(kN, kK, kE), make_stride(kStrideAlong, _1{}, kExpertAlong));
  map("along" + forward, along, tile_along<T, kBox>(), Shape<Int<kBox>, Depth>{});
  const auto across =
      in_memory<T>(kAddressWeight, make_shape(kN, kK, kE), make_stride(_1{}, kStrideAcross, kExpertAcross));
  map("across" + forward, across, tile_across<T, kColumns>(), Across{});
  // eight rows of the gate, then eight of the up half
  const auto turns = make_stride(kStrideAlong, kN * kStrideAlong, 8 * kStrideAlong);
  const auto gated = in_memory<T>(kAddressWeight, make_shape(make_shape(_8{}, _2{}, kN / 8), kK, kE),
                                  make_stride(turns, _1{}, kExpertGated));
  map("gated" + forward, gated, tile_along<T, kBox>(), Shape<Shape<_8, _2, Int<kBox / 16>>, Depth>{});
  const auto apart =
      in_memory<T>(kAddressWeight, make_shape(2 * kN, kK, kE), make_stride(kStrideAlong, _1{}, kExpertGated));
  map("apart" + forward, apart, tile_along<T, kBox / 2>(), Shape<Int<kBox / 2>, Depth>{});
  if (kColumns == 256) {
    const auto rows =
        in_memory<T>(kAddressX, make_shape(kK, kS, 1), make_stride(_1{}, kStrideX, kStrideX * kS));
    map("rows/weight_grad", rows, tile_across<T, kColumns>(), Across{});
  } else {
    map("x/grad_hidden", x, tile_along<T, kTileRows>(), Shape<Int<kTileRows>, Depth>{});
    map("across/grad_hidden", across, tile_across<T, kColumns>(), Across{});
    const auto grad =
        in_memory<T>(kAddressGrad, make_shape(kN, kS, 1), make_stride(_1{}, kStrideGrad, kStrideGrad * kS));
    map("grad/weight_grad", grad, tile_across<T, kColumns>(), Across{});
  }
}

// For each slot of the tile, the element of memory (in a layout (outer, k)) that is there: the inverse of
// both.
template <class Tile, class Matrix>
std::vector<int64_t> filled(Tile layout, Matrix matrix) {
  const auto tile = in_shared<bfloat16_t>(layout, 0);
  std::vector<int64_t> slots(size(layout), -1);
  for (int outer = 0; outer < size<0>(layout); ++outer)
    for (int k = 0; k < kDepth; ++k) slots[byte_of(tile, outer, k) / 2] = matrix(outer, k);
  return slots;
}

template <int kColumns>
void stages() {
  using T = bfloat16_t;
  const std::string size = std::to_string(kColumns);
  const auto write = [&](const std::string& name, auto tile, auto weight) {
    const auto x = make_layout(Shape<Int<kTileRows>, Depth>{}, make_stride(kStrideX, _1{}));
    std::vector<int64_t> all = filled(tile_along<T, kTileRows>(), [&](int row, int k) {
      return kFirstRow * kStrideX + kStep * kDepth + x(row, k);
    });
    const std::vector<int64_t> b = filled(tile, weight);
    all.insert(all.end(), b.begin(), b.end());
    write_down("stage/" + name + size, all);
  };
  const auto along = make_layout(make_shape(kN, kK, kE), make_stride(kStrideAlong, _1{}, kExpertAlong));
  write("along", tile_along<T, kColumns>(),
        [&](int n, int k) { return along(kTileN * kColumns + n, kStep * kDepth + k, kExpert); });
  const auto across = make_layout(make_shape(kN, kK, kE), make_stride(_1{}, kStrideAcross, kExpertAcross));
  write("across", tile_across<T, kColumns>(),
        [&](int n, int k) { return across(kTileN * kColumns + n, kStep * kDepth + k, kExpert); });
  const auto gated = make_layout(
      make_shape(make_shape(_8{}, _2{}, kN / 8), kK, kE),
      make_stride(make_stride(kStrideAlong, kN * kStrideAlong, 8 * kStrideAlong), _1{}, kExpertGated));
  write("gated", tile_along<T, kColumns>(),
        [&](int n, int k) { return gated(kTileN * kColumns + n, kStep * kDepth + k, kExpert); });
  // 64 rows of the gate, then 64 of the up half
  const auto apart = make_layout(
      make_shape(make_shape(_64{}, _2{}, kN / 64), kK, kE),
      make_stride(make_stride(kStrideAlong, kN * kStrideAlong, 64 * kStrideAlong), _1{}, kExpertGated));
  write("apart", tile_along<T, kColumns>(),
        [&](int n, int k) { return apart(kTileN * kColumns + n, kStep * kDepth + k, kExpert); });
  std::vector<int64_t> columns;
  for (int n = 0; n < kColumns; ++n) columns.push_back(gated(kTileN * kColumns + n, 0, 0) / kStrideAlong);
  write_down("columns/gated" + size, columns);
}

template <int kWidth>
void rows(const std::string& name, int64_t stride) {
  const auto matrix = make_layout(Shape<Int<kWidth>, Depth>{}, make_stride(_1{}, stride));
  write_down("stage/" + name, filled(tile_across<bfloat16_t, kWidth>(), [&](int column, int k) {
               return (kFirstRow + kStep * kDepth) * stride + matrix(column, k);
             }));
}

}  // namespace

int main() {
  offsets_of_type<bfloat16_t>();
  offsets_of_type<half_t>();
  accumulators<128>();
  accumulators<256>();
  descriptors_of_type<bfloat16_t, Bf16Wide, Bf16Narrow>();
  descriptors_of_type<half_t, Fp16Wide, Fp16Narrow>();
  maps<bfloat16_t, 128>();
  maps<bfloat16_t, 256>();
  maps<half_t, 128>();
  maps<half_t, 256>();
  stages<128>();
  stages<256>();
  rows<128>("grad", kStrideGrad);
  rows<256>("rows", kStrideX);
}
