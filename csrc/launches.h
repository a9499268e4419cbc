// How many kernels were launched so far, and bytes fetched ahead in emulation: for tests that check a launcher's number.
#pragma once

#include <atomic>
#include <cstdint>

namespace cumo {

inline std::atomic<int64_t> launches{0}, fetched_ahead{0};

}  // namespace cumo
