// wgmma.mma_async for the tiles of hopper.cu: every accumulator is an operand of the instruction and must be listed.
// d (64, N) += a (64, 16) b (16, N), both from shared memory by descriptor.
#pragma once

#include "platform.cuh"

namespace cumo {

template <class T, int kN>
struct Wgmma;

#define CUMO_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CUMO_D64(i) \
  CUMO_D8(i), CUMO_D8(i + 8), CUMO_D8(i + 16), CUMO_D8(i + 24), CUMO_D8(i + 32), CUMO_D8(i + 40), CUMO_D8(i + 48), \
      CUMO_D8(i + 56)
#define CUMO_FIRST_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUMO_NEXT_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// SUMS and their names, then the numbers of the four operands after them: descriptors, and which are transposed.
#define CUMO_WGMMA(T, TYPE, N, NAMES, A, B, ACROSS_A, ACROSS_B, ...)                                                \
  template <>                                                                                                       \
  struct Wgmma<T, N> {                                                                                              \
    template <int kAcrossA, int kAcrossB>                                                                           \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b) {                         \
      asm volatile("{\n.reg .pred on;\nsetp.eq.u32 on, 0, 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B       \
                   ", on, 1, 1, " ACROSS_A ", " ACROSS_B ";\n}"                                                     \
                   : __VA_ARGS__                                                                                    \
                   : "l"(a), "l"(b), "n"(kAcrossA), "n"(kAcrossB));                                                 \
    }                                                                                                               \
  };
#define CUMO_WGMMAS(T, TYPE)                                                                    \
  CUMO_WGMMA(T, TYPE, 128, CUMO_FIRST_64, "%64", "%65", "%66", "%67", CUMO_D64(0))              \
  CUMO_WGMMA(T, TYPE, 256, CUMO_FIRST_64 ", " CUMO_NEXT_64, "%128", "%129", "%130", "%131", CUMO_D64(0), CUMO_D64(64))

CUMO_WGMMAS(bf16_t, "bf16")
CUMO_WGMMAS(half_t, "f16")

#undef CUMO_WGMMAS
#undef CUMO_WGMMA
#undef CUMO_NEXT_64
#undef CUMO_FIRST_64
#undef CUMO_D64
#undef CUMO_D8

}  // namespace cumo
