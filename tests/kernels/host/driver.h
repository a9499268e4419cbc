// A stub of the driver's cuTensorMapEncodeTiled, which records its arguments.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

inline std::vector<int64_t> told;

// All arguments except the L2 promotion, which does not affect shared memory.
inline CUresult note_tensor_map(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill outside) {
  told = {type, rank, static_cast<int64_t>(reinterpret_cast<uintptr_t>(base)), interleave, swizzle, outside};
  told.insert(told.end(), sizes, sizes + rank);
  told.insert(told.end(), strides, strides + rank - 1);
  told.insert(told.end(), box, box + rank);
  told.insert(told.end(), steps, steps + rank);
  return CUDA_SUCCESS;
}
