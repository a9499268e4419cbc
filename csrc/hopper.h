// The Hopper kernels' host side, called by grouped_gemm.cu.
#pragma once

#include "kernels.h"

namespace cumo {

constexpr int kHopperHiddenCols = 128;  // columns of one tile of dots

std::vector<int> hopper_shared_bytes();
void hopper_grouped_gemm(const Device&, Dtype, const Gemm&, const Plan&, void* out, void* pre, float* parts);
void hopper_grad_hidden(const Device&, Dtype, const Gemm&, const float* topk_weights, const void* z, void* dz,
                        void* weighted, float* dots);

void hopper_weight_grad(const Device&, Dtype, const WeightGrad&, const Plan&, void* out, void* bias);

}  // namespace cumo
