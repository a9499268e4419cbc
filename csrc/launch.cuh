// Starting a kernel: on the GPU, or thread by thread in emulation.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launches.h"
#include "platform.cuh"

namespace cumo {

#ifndef CUMO_EMULATE
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("cumo_kernels._C: ") + cudaGetErrorString(error));
}
#endif

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Zeros in stream order; no kernel.
inline void clear(const Device& device, void* pointer, int64_t bytes) {
#ifdef CUMO_EMULATE
  (void)device;
  std::memset(pointer, 0, bytes);
#else
  check(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(device.stream)));
#endif
}

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

// With device.overlap a kernel may be scheduled, and prefetch weights, while the preceding one still runs; it waits for
// that one's end before anything else (platform.cuh, begin_kernel).
template <class... Parameters, class... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            const Arguments&... arguments) {
  if (blocks > kMaxGrid) throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks is too large");
  ++launches;
  if (shared_bytes > device.shared_memory)
    throw std::runtime_error("a block needs " + std::to_string(shared_bytes) + " bytes of shared memory, this GPU has " +
                             std::to_string(device.shared_memory));
#ifdef CUMO_EMULATE
  emulate::machine.waited = 0, emulate::machine.fetched = nullptr;
  emulate::machine.run(static_cast<int>(blocks), threads, shared_bytes, [&] { kernel(arguments...); });
  if (emulate::machine.waited != blocks * threads)
    throw std::runtime_error("not every thread of the kernel waited exactly once for earlier kernels");
#else
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &overlap, config.numAttrs = device.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
#endif
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::fp32:
      return f(static_cast<float*>(nullptr));
    case Dtype::fp16:
      return f(static_cast<half_t*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<bf16_t*>(nullptr));
  }
}

// target[at] of what is fp32 or T.
template <class T>
__device__ __forceinline__ void store_one(void* target, int64_t at, float value, bool fp32) {
  if (fp32) {
    static_cast<float*>(target)[at] = value;
  } else {
    static_cast<T*>(target)[at] = from_float<T>(value);
  }
}

inline int bytes_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

// Whether rows of `width` elements that begin at `pointer`, `stride` apart, can be moved 16 bytes at a time.
inline bool aligned16(const void* pointer, int64_t width, int64_t stride, int element_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && width * element_bytes % 16 == 0 &&
         stride * element_bytes % 16 == 0;
}

}  // namespace cumo
