// Sums of partial sums (CUDA), from split GEMMs and the gate's gradient.
//
//   out[i] = sum over p of parts[p, i], p ascending          parts (P, width) fp32   out (width,)
//
// A thread has 16 bytes of each part, so that the order of additions is fixed. Memory bound: (4 P + 2) * width bytes.
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256;

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const float* parts, int count, int64_t width, T* out) {
  begin_kernel();
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVec;
  if (at >= width) return;
  float sum[kVec] = {};
#pragma unroll 4
  for (int part = 0; part < count; ++part) {
    const auto run = *reinterpret_cast<const Vec<float, kVec>*>(parts + part * width + at);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += run.item[i];
  }
  Vec<T, kVec> rounded_sum;
#pragma unroll
  for (int i = 0; i < kVec; ++i) rounded_sum.item[i] = from_float<T>(sum[i]);
  *reinterpret_cast<Vec<T, kVec>*>(out + at) = rounded_sum;
}

int compiled_for() {
#ifdef CUMO_EMULATE
  return 90;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, sum_parts_kernel<float, 1>));
  return attributes.ptxVersion;
#endif
}

void sum_parts(const Device& device, Dtype dtype, const float* parts, int count, int64_t width, void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = width % 4 == 0 && aligned16(parts, 0, 0, 4) && aligned16(out, 0, 0, sizeof(T));
    launch(device, wide ? sum_parts_kernel<T, 4> : sum_parts_kernel<T, 1>,
           ceil_div<int64_t>(width, kThreads * (wide ? 4 : 1)), kThreads, 0, parts, count, width, static_cast<T*>(out));
  });
}

}  // namespace cumo
