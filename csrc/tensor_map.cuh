// Creates TMA tensor maps. Separate from the kernels, so that a host program can test the arguments of the driver
// (tests/kernels/test_cute.py).
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "hopper.cuh"

namespace cumo {

// Sizes and box of 16-bit elements, strides in elements; the innermost box is 64 elements, 128 bytes, swizzled.
// -> the driver's error, 0 if the map was made
inline int try_describe(TensorMap& map, const void* base, int rank, const int64_t (&sizes)[kMaxRank],
                        const int64_t (&strides)[kMaxRank], const int (&box)[kMaxRank]) {
#ifdef CUMO_EMULATE
  map = {static_cast<const char*>(base), rank, {}, {}, {}};
  for (int i = 0; i < rank; ++i) map.sizes[i] = sizes[i], map.strides[i] = strides[i] * 2, map.box[i] = box[i];
  // a driver that requires ascending strides, as in its manual
  const bool strict = std::getenv("CUMO_EMULATE_STRICT_MAPS") != nullptr;
  for (int i = 1; strict && i < rank; ++i)
    if (strides[i] < strides[i - 1]) return 1;
  return 0;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("cumo_kernels._C: this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  cuuint64_t extent[kMaxRank], step[kMaxRank];
  cuuint32_t tile[kMaxRank], ones[kMaxRank];
  for (int i = 0; i < rank; ++i) {
    extent[i] = sizes[i], tile[i] = box[i], ones[i] = 1;
    if (i > 0) step[i - 1] = strides[i] * 2;
  }
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, rank, const_cast<void*>(base), extent, step, tile, ones,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
#endif
}

inline TensorMap describe(const void* base, int rank, const int64_t (&sizes)[kMaxRank],
                          const int64_t (&strides)[kMaxRank], const int (&box)[kMaxRank]) {
  TensorMap map;
  const int error = try_describe(map, base, rank, sizes, strides, box);
  if (error) throw std::runtime_error("cumo_kernels._C: cuTensorMapEncodeTiled failed with " + std::to_string(error));
  return map;
}

}  // namespace cumo
