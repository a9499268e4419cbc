// The problem whose layouts hopper.cpp (csrc/ itself), driver.cpp and cute.cpp (CuTe) print;
// test_cute.py compares lists of the same name.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace cases {

// Rows of x, columns and depth of the product, experts. All strides differ.
constexpr int kS = 300, kN = 512, kK = 320, kE = 2;
constexpr int kOffsets[] = {0, 100, 300};
constexpr int64_t kStrideX = kK + 8, kStrideAlong = kK + 16, kStrideAcross = kN + 24, kStrideGrad = kN + 32;
constexpr int64_t kExpertAlong = kN * kStrideAlong + 64, kExpertGated = 2 * kN * kStrideAlong + 64,
                  kExpertAcross = kK * kStrideAcross + 64;

// The tested stage: inside an expert that does not begin at a multiple of a tile.
constexpr int kExpert = 1, kFirstRow = kOffsets[kExpert], kTileN = 1, kStep = 1;

// Assumed addresses of tensors; never read.
constexpr uint64_t kAddressX = 1 << 20, kAddressWeight = 2 << 20, kAddressGrad = 3 << 20;

inline void write_down(const std::string& name, const std::vector<int64_t>& values) {
  std::printf("%s", name.c_str());
  for (const int64_t value : values) std::printf(" %lld", static_cast<long long>(value));
  std::printf("\n");
}

}  // namespace cases
