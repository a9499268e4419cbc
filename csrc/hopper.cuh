// Hopper's own instructions, like platform.cuh for the GPU and for emulation: mbarriers, TMA copies, wgmma.
//
// Hand-written wrappers instead of CuTe: each has a counterpart on the CPU with the same descriptors, swizzles and
// phases, so that the tests execute the kernel that ships, and the build needs only nvcc.
#pragma once

#include "launches.h"
#include "platform.cuh"
#include "tiles.h"

#ifdef CUMO_EMULATE
#include <array>
#else
#include <cuda.h>

#include "wgmma.cuh"
#endif

namespace cumo {

// A tile of 128-byte rows in shared memory, as wgmma reads it: address, stride between groups of eight rows (1024 bytes
// here), and for operands stored across the reduction the stride between their chunks of 128 bytes of columns.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int chunk_stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t(chunk_stride >> 4) << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;  // 128-byte swizzle
}

constexpr int kMaxRank = 5;

#ifdef CUMO_EMULATE

struct TensorMap {  // contents of a CUtensorMap: 16-bit elements, 128-byte swizzle, zeros outside
  const char* base;
  int rank;
  uint64_t sizes[kMaxRank], strides[kMaxRank];  // strides in bytes; that of the first dimension is 2
  uint32_t box[kMaxRank];
};

struct Barrier {
  int16_t pending, expected;
  int32_t bytes_and_phase;  // bytes in flight * 2 + phase

  void settle() {
    if (pending == 0 && bytes_and_phase / 2 == 0) {
      bytes_and_phase ^= 1;
      pending = expected;
    }
  }
};

inline void init_barrier(Barrier* barrier, int arrivals) {
  *barrier = {static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0};
}
inline void fence_barriers() {}
inline void fence_async() {}
inline void arrive(Barrier* barrier) {
  if (barrier->pending <= 0) emulate::machine.fail("more arrivals at a barrier than it expects");
  --barrier->pending;
  barrier->settle();
}
inline void arrive_expecting(Barrier* barrier, int bytes) {
  barrier->bytes_and_phase += bytes * 2;
  arrive(barrier);
}
inline void wait_for(Barrier* barrier, int phase) {
  emulate::machine.wait("an mbarrier", [=] { return (barrier->bytes_and_phase & 1) != phase; });
}

inline void tma_load(void* target, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2 = 0, int c3 = 0,
                     int c4 = 0) {
  emulate::machine.late.push_back([=, map = *map] {
    const int first[kMaxRank] = {c0, c1, c2, c3, c4};
    uint32_t count = 1;
    for (int d = 0; d < map.rank; ++d) count *= map.box[d];
    for (uint32_t i = 0; i < count; ++i) {
      uint32_t rest = i;
      const char* source = map.base;
      bool inside = true;
      for (int d = 0; d < map.rank; ++d) {
        const int64_t at = first[d] + static_cast<int64_t>(rest % map.box[d]);
        rest /= map.box[d];
        inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[d]);
        source += at * static_cast<int64_t>(map.strides[d]);
      }
      // the swizzle takes its row from the address, so it matches tiles.h where a tile begins at 1024 bytes
      const uintptr_t linear = reinterpret_cast<uintptr_t>(target) + i * 2;
      auto* place = reinterpret_cast<uint16_t*>(linear ^ (linear >> 7 & 7) << 4);
      uint16_t value = 0;
      if (inside) std::memcpy(&value, source, 2);
      *place = value;
    }
    barrier->bytes_and_phase -= count * 2 * 2;
    barrier->settle();
  });
}

inline void prefetch_l2(const void* pointer, int bytes) {  // the blocks of a kernel prefetch ascending pieces, each once
  static volatile char byte;
  const char* first = static_cast<const char*>(pointer);
  if (first < emulate::machine.fetched) emulate::machine.fail("a piece is prefetched twice");
  byte = first[0], byte = first[bytes - 1];
  emulate::machine.fetched = first + bytes;
  fetched_ahead += bytes;
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulate::machine.shared);
}

namespace emulate {

struct PendingWgmma {
  float* d;
  uint64_t a, b;
  bool across_a, across_b;
};
using WgmmaGroups = std::deque<std::vector<PendingWgmma>>;
inline std::array<std::vector<PendingWgmma>, 1024> open_wgmma;
inline std::array<WgmmaGroups, 1024> wgmma_groups;

// The 16-bit element that a descriptor finds at (outer, k): PTX's canonical layouts for the 128-byte swizzle.
inline uint16_t described(uint64_t descriptor, int outer, int k, bool across) {
  const uint32_t start = (descriptor & 0x3fff) << 4, chunk = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t group = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t linear = across ? start + outer / 64 * chunk + outer % 64 * 2 + k / 8 * group + k % 8 * 128
                                 : start + outer / 8 * group + outer % 8 * 128 + k * 2;
  uint16_t value;
  std::memcpy(&value, machine.shared + (linear ^ (linear >> 7 & 7) << 4), 2);
  return value;
}

}  // namespace emulate

template <class T, int kN, bool kAcrossA, bool kAcrossB>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  emulate::open_wgmma[emulate::machine.thread.x].push_back({d, a, b, kAcrossA, kAcrossB});
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& open = emulate::open_wgmma[emulate::machine.thread.x];
  emulate::wgmma_groups[emulate::machine.thread.x].push_back(std::move(open));
  open.clear();
}
// Waits until at most kPending of the warpgroup's groups are in flight.
template <class T, int kN, int kPending>
void wgmma_wait() {
  auto& m = emulate::machine;
  auto& mine = emulate::wgmma_groups[m.thread.x];
  while (mine.size() > kPending) {
    m.meet(m.warpgroup(), 128, m.thread.x % 128, "wgmma", &mine.front(), [](void** all) {
      using Ops = std::vector<emulate::PendingWgmma>;
      static float a[64][16], b[16][kN];
      const Ops& first = *static_cast<Ops*>(all[0]);
      for (size_t op = 0; op < first.size(); ++op) {
        for (int k = 0; k < 16; ++k) {
          for (int row = 0; row < 64; ++row)
            a[row][k] = to_float(T{emulate::described(first[op].a, row, k, first[op].across_a)});
          for (int col = 0; col < kN; ++col)
            b[k][col] = to_float(T{emulate::described(first[op].b, col, k, first[op].across_b)});
        }
        for (int thread = 0; thread < 128; ++thread) {
          const auto& own = (*static_cast<Ops*>(all[thread]))[op];
          if (own.a != first[op].a || own.b != first[op].b)
            emulate::machine.fail("the threads of a warpgroup pass different descriptors to wgmma");
          for (int i = 0; i < kN / 2; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
            own.d[i] += sum;
          }
        }
      }
    });
    mine.pop_front();
  }
}

template <int kCount>
void pin(float (&)[kCount]) {}

template <int kRegisters>
void fewer_registers() {}
template <int kRegisters>
void more_registers() {}

#else

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What this thread wrote to shared memory becomes visible to TMA and wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is complete; on a new barrier phase 1 counts as complete.
__device__ __forceinline__ void wait_for(Barrier* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra over;\n"  // not bra.uni: threads of a warp may get different results
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* target, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void tma_load(void* target, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2,
                                         int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Prefetches a multiple of 16 bytes, at a multiple of 16, into L2.
__device__ __forceinline__ void prefetch_l2(const void* pointer, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(pointer), "r"(bytes)
               : "memory");
}

// d (64, kN) += a (64, 16) b (16, kN), in the background; an operand is stored along or across the reduction.
template <class T, int kN, bool kAcrossA, bool kAcrossB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  Wgmma<T, kN>::template run<kAcrossA, kAcrossB>(d, a, b);
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <class T, int kN, int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not know that wgmma writes its sums until the wait; this marks the point where they are valid.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace cumo
