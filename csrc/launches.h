// How many kernels were launched so far: for tests that hold a launcher to a number.
#pragma once

#include <atomic>
#include <cstdint>

namespace cumo {

inline std::atomic<int64_t> launches{0};

}  // namespace cumo
