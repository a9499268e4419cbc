#include "hopper.h"
namespace cumo {
bool uses_hopper(const Device&, Dtype, const Gemm&) { return false; }
void hopper_grouped_gemm(const Device&, Dtype, const Gemm&, void*, void*) {}
void hopper_grad_hidden(const Device&, Dtype, const Gemm&, const float*, const void*, void*, void*, float*) {}
}
