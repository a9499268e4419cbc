// The arguments that csrc/tensor_map.cuh, as in a GPU build, passes to the driver for the maps of hopper.cpp.
#include <cuda_runtime.h>

#include <iostream>
#include <sstream>

#include "cases.h"
#include "driver.h"

// Built into nvcc. The kernels that call them are compiled here, but never run.
int __float_as_int(float), __popc(unsigned), atomicAdd(int*, int), __shfl_sync(unsigned, int, int);
float __uint_as_float(unsigned), __fdiv_rn(float, float), __ldcg(const float*);
unsigned __match_any_sync(unsigned, int);
size_t __cvta_generic_to_shared(const void*);
void __syncthreads(), __syncwarp(), __threadfence();

#include "tensor_map.cuh"

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                        unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(note_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string name;
    uint64_t base;
    int rank, box[cumo::kMaxRank] = {};
    int64_t sizes[cumo::kMaxRank] = {}, strides[cumo::kMaxRank] = {};
    words >> name >> base >> rank;
    for (int i = 0; i < rank; ++i) words >> sizes[i];
    for (int i = 0; i < rank; ++i) words >> strides[i];
    for (int i = 0; i < rank; ++i) words >> box[i];
    cumo::describe(reinterpret_cast<const void*>(base), rank, sizes, strides, box);
    cases::write_down(name, told);
  }
}
