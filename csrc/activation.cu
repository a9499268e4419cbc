// Activation (CUDA): act(z), or act(gate) * up, computed in fp32.
//
//   out[s] = act(x[s])                   x (S, I)    out (S, I)
//   out[s] = act(x[s, :I]) * x[s, I:]    x (S, 2I)   out (S, I)     gated
//
// One thread per 16 bytes of out (one element where I forbids it). Memory bound: 2 * S * I elements (3 gated) forward,
// 3 * S * I (5 gated) backward.
// Contract: cumo_kernels/ops/activation.py. Reference: cumo_kernels/backends/reference/activation.py.
#include "activations.cuh"
#include "launch.cuh"

namespace cumo {

constexpr int kThreads = 256;

template <class T, int kVec>
__device__ __forceinline__ Vec<T, kVec> load(const T* pointer) {
  return *reinterpret_cast<const Vec<T, kVec>*>(pointer);
}
template <class T, int kVec>
__device__ __forceinline__ void store(T* pointer, const Vec<T, kVec>& value) {
  *reinterpret_cast<Vec<T, kVec>*>(pointer) = value;
}

// The thread's position: row, and element of the row; false past the end.
template <int kVec>
__device__ __forceinline__ bool place(int64_t rows, int64_t I, int64_t& row, int64_t& col) {
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVec;
  row = rows == 1 ? 0 : index / I;
  col = index - row * I;
  return index < rows * I;
}

// -> elements of the gate, or of a plain z; `up` gets those of the up half.
template <class T, int kVec>
__device__ __forceinline__ Vec<T, kVec> load_halves(const T* x, int64_t row, int64_t col, int64_t I,
                                                    const Act& activation, bool gated, Vec<T, kVec>& up) {
  if (gated && activation.interleaved) {
    const T* pairs = x + 2 * (row * I + col);
    Vec<T, kVec> gate;
#pragma unroll
    for (int i = 0; i < kVec; ++i) gate.item[i] = pairs[2 * i], up.item[i] = pairs[2 * i + 1];
    return gate;
  }
  const T* source = x + row * (gated ? 2 * I : I) + col;
  if (gated) up = load<T, kVec>(source + I);
  return load<T, kVec>(source);
}

template <class T, int kVec>
__global__ void activate_kernel(const T* x, int64_t rows, int64_t I, Act activation, bool gated, T* out) {
  begin_kernel();
  int64_t row, col;
  if (!place<kVec>(rows, I, row, col)) return;
  Vec<T, kVec> up{};
  auto z = load_halves<T, kVec>(x, row, col, I, activation, gated, up);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float value = act(to_float(z.item[i]), activation);
    z.item[i] = from_float<T>(gated ? value * up_and_grad(to_float(up.item[i]), activation).value : value);
  }
  store<T, kVec>(out + row * I + col, z);
}

template <class T, int kVec>
__global__ void activate_backward_kernel(const T* grad, const T* x, int64_t rows, int64_t I, Act activation, bool gated,
                                         T* dx) {
  begin_kernel();
  int64_t row, col;
  if (!place<kVec>(rows, I, row, col)) return;
  const auto g = load<T, kVec>(grad + row * I + col);
  Vec<T, kVec> up{};
  auto z = load_halves<T, kVec>(x, row, col, I, activation, gated, up);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {  // as a loop its items would lie on the stack
    const ActAndGrad a = act_and_grad(to_float(z.item[i]), activation);
    const float upstream = to_float(g.item[i]);
    const ActAndGrad linear = gated ? up_and_grad(to_float(up.item[i]), activation) : ActAndGrad{1.0f, 1.0f};
    z.item[i] = from_float<T>(upstream * linear.value * a.slope);
    up.item[i] = from_float<T>(linear.slope == 0.0f ? 0.0f : upstream * a.value);
  }
  if (gated && activation.interleaved) {
    T* pairs = dx + 2 * (row * I + col);
#pragma unroll
    for (int i = 0; i < kVec; ++i) pairs[2 * i] = z.item[i], pairs[2 * i + 1] = up.item[i];
    return;
  }
  const int64_t at = row * (gated ? 2 * I : I) + col;
  store<T, kVec>(dx + at, z);
  if (gated) store<T, kVec>(dx + at + I, up);
}

void activate(const Device& device, Dtype dtype, const void* x, int64_t rows, int64_t I, Act activation, bool gated,
              void* out) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(T);
    const bool wide = aligned16(x, I, 0, sizeof(T)) && aligned16(out, I, 0, sizeof(T));
    launch(device, wide ? activate_kernel<T, kPack> : activate_kernel<T, 1>,
           ceil_div<int64_t>(rows * I / (wide ? kPack : 1), kThreads), kThreads, 0, static_cast<const T*>(x), rows, I,
           activation, gated, static_cast<T*>(out));
  });
}

void activate_backward(const Device& device, Dtype dtype, const void* grad, const void* x, int64_t rows, int64_t I,
                       Act activation, bool gated, void* dx) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(T);
    const bool wide =
        aligned16(x, I, 0, sizeof(T)) && aligned16(grad, I, 0, sizeof(T)) && aligned16(dx, I, 0, sizeof(T));
    launch(device, wide ? activate_backward_kernel<T, kPack> : activate_backward_kernel<T, 1>,
           ceil_div<int64_t>(rows * I / (wide ? kPack : 1), kThreads), kThreads, 0, static_cast<const T*>(grad),
           static_cast<const T*>(x), rows, I, activation, gated, static_cast<T*>(dx));
  });
}

}  // namespace cumo
