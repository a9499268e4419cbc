// The instructions in which kernels are written: on a GPU one PTX instruction or intrinsic each, in emulation
// (emulate.h) its meaning according to the PTX manual. The rest of csrc/ does not depend on which of the two it is
// compiled for, except hopper.cuh, which does the same for Hopper's own instructions.
#pragma once

#include <cstdint>

#ifdef CUMO_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace cumo {

constexpr int kWarp = 32;

#ifdef CUMO_EMULATE

struct bf16_t {
  uint16_t bits;
};
struct half_t {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16_t value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(half_t value) {
  _Float16 out;
  std::memcpy(&out, &value, 2);
  return static_cast<float>(out);
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16_t from_float<bf16_t>(float value) {
  if (value != value) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline half_t from_float<half_t>(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  half_t out;
  std::memcpy(&out, &rounded, 2);
  return out;
}

inline int bits_of(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int count_bits(unsigned value) { return __builtin_popcount(value); }
inline float divide(float a, float b) { return a / b; }

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulate::machine.shared);
}

inline void let_next_kernel_start() {}
inline void wait_for_earlier_kernels() { ++emulate::machine.waited; }

inline void sync_block() { emulate::machine.barrier(0, emulate::machine.threads.x); }
inline void sync_some(int id, int threads) { emulate::machine.barrier(id, threads); }
inline void sync_warp() {
  auto& m = emulate::machine;
  m.meet(m.warp(), 32, m.thread.x % 32, "sync_warp", nullptr, [](void**) {});
}

template <class T>
T shuffle_xor(T value, int lanes) {
  auto& m = emulate::machine;
  T out;
  std::pair<T, T*> argument{value, &out};
  m.meet(m.warp(), 32, m.thread.x % 32, "shuffle_xor", &argument, [lanes](void** all) {
    for (int lane = 0; lane < 32; ++lane)
      *static_cast<std::pair<T, T*>*>(all[lane])->second = static_cast<std::pair<T, T*>*>(all[lane ^ lanes])->first;
  });
  return out;
}

// `value` of that lane; each lane may name a different one.
inline int shuffle(int value, int lane) {
  auto& m = emulate::machine;
  struct {
    int value, lane, out;
  } argument{value, lane, 0};
  using Argument = decltype(argument);
  m.meet(m.warp(), 32, m.thread.x % 32, "shuffle", &argument, [](void** all) {
    for (int i = 0; i < 32; ++i) {
      auto* mine = static_cast<Argument*>(all[i]);
      mine->out = static_cast<Argument*>(all[mine->lane % 32])->value;
    }
  });
  return argument.out;
}

// The lanes of the warp that hold the same value, as a mask.
inline unsigned match_any(int value) {
  auto& m = emulate::machine;
  unsigned out;
  std::pair<int, unsigned*> argument{value, &out};
  m.meet(m.warp(), 32, m.thread.x % 32, "match_any", &argument, [](void** all) {
    auto at = [&](int lane) { return static_cast<std::pair<int, unsigned*>*>(all[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      *at(lane)->second = 0;
      for (int other = 0; other < 32; ++other)
        *at(lane)->second |= unsigned{at(lane)->first == at(other)->first} << other;
    }
  });
  return out;
}

inline void add_shared(int* counter, int value) { *counter += value; }
inline int count_in(int* counter) { return (*counter)++; }
inline float load_of_others(const float* pointer) { return *pointer; }

// 16 bytes to shared memory in the background: the first `bytes` from `source`, the rest zero.
inline void cp_async16(void* target, const void* source, int bytes) {
  emulate::machine.fiber().open.push_back([=] {
    std::memcpy(target, source, bytes);
    std::memset(static_cast<char*>(target) + bytes, 0, 16 - bytes);
  });
}
inline void cp_async_commit() {
  auto& fiber = emulate::machine.fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
// Waits until at most kPending of this thread's groups are in flight.
template <int kPending>
void cp_async_wait() {
  auto& groups = emulate::machine.fiber().groups;
  while (groups.size() > kPending) {
    for (auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}

namespace emulate {
struct LoadMatrix {
  const void* row;
  uint32_t* out;
};
inline void load_matrices(const void* row, uint32_t* out, bool transposed) {
  LoadMatrix argument{row, out};
  machine.meet(machine.warp(), 32, machine.thread.x % 32, "ldmatrix", &argument, [transposed](void** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
          const int row = transposed ? lane % 4 * 2 + j : lane / 4, col = transposed ? lane / 4 : lane % 4 * 2 + j;
          pair[j] = static_cast<const uint16_t*>(static_cast<LoadMatrix*>(all[8 * i + row])->row)[col];
        }
        std::memcpy(&static_cast<LoadMatrix*>(all[lane])->out[i], pair, 4);
      }
  });
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
// The fragments of mma.m16n8: element (row, k) of A is in the lane and register that `find` names, B likewise.
template <int kDepth, class Element>
void multiply(Mma argument, Element element) {
  machine.meet(machine.warp(), 32, machine.thread.x % 32, "mma", &argument, [element](void** all) {
    constexpr int kHalf = kDepth / 2, kPer = kDepth / 8;  // elements per register: 1 (k8) or 2 (k16)
    float a[16][kDepth], b[kDepth][8];
    auto at = [&](int lane) { return static_cast<Mma*>(all[lane]); };
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kDepth; ++k)
        a[row][k] = element(at(row % 8 * 4 + k % kHalf / kPer)->a[row / 8 + k / kHalf * 2], k % kPer);
    for (int k = 0; k < kDepth; ++k)
      for (int col = 0; col < 8; ++col) b[k][col] = element(at(col * 4 + k % kHalf / kPer)->b[k / kHalf], k % kPer);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][col];
        at(lane)->d[i] += sum;
      }
  });
}
}  // namespace emulate

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r names row r of matrix i.
inline void ldmatrix(uint32_t (&out)[4], const void* row) { emulate::load_matrices(row, out, false); }
inline void ldmatrix_trans(uint32_t (&out)[4], const void* row) { emulate::load_matrices(row, out, true); }

// d += a b: a (16, 16), b (16, 8) of T, d (16, 8) fp32.
template <class T>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate::multiply<16>({d, a, b}, [](uint32_t pair, int i) {
    return to_float(T{static_cast<uint16_t>(pair >> (16 * i))});
  });
}
// d += a b: a (16, 8), b (8, 8) as to_tf32 gives them.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate::multiply<8>({d, a, b}, [](uint32_t bits, int) { return float_of(bits); });
}
inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x1000) & ~0x1fffu;  // 10 bits of mantissa, ties away from zero
}

#else

using bf16_t = __nv_bfloat16;
using half_t = __half;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16_t value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(half_t value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float value) {
  return __float2half_rn(value);
}

__device__ __forceinline__ int bits_of(float value) { return __float_as_int(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ int count_bits(unsigned value) { return __popc(value); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char cumo_shared[];
  return reinterpret_cast<T*>(cumo_shared);
}
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
__device__ __forceinline__ int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ __forceinline__ unsigned match_any(int value) { return __match_any_sync(0xffffffffu, value); }
__device__ __forceinline__ void add_shared(int* counter, int value) { atomicAdd(counter, value); }
// Returns how many blocks arrived before this one. What this block wrote before a barrier is visible to later blocks;
// what earlier blocks wrote is visible to this block after a barrier, through load_of_others.
__device__ __forceinline__ int count_in(int* counter) {
  __threadfence();
  const int before = atomicAdd(counter, 1);
  __threadfence();
  return before;
}
__device__ __forceinline__ float load_of_others(const float* pointer) { return __ldcg(pointer); }

__device__ __forceinline__ void cp_async16(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16<half_t>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

#endif

// First in every kernel. With programmatic dependent launch (launch.cuh) the next kernel may be scheduled from here on;
// only after the wait may a kernel read what earlier kernels write, or overwrite what they read.
__device__ __forceinline__ void begin_kernel() {
  let_next_kernel_start();
  wait_for_earlier_kernels();
}

template <class T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// kVec elements of T, moved by one instruction.
template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Vec {
  T item[kVec];
};

}  // namespace cumo
