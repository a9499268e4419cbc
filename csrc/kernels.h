// Functions called by bindings.cpp: one host function per kernel, on raw pointers. Plain C++, no torch, no CUDA headers.
//
// Shape letters are those of cumo_kernels/types.py. Pointers are to contiguous memory unless a stride is given; a
// stride counts elements. Every function returns after launching; with no elements to write it must not be called.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace cumo {

enum class Dtype { fp32, fp16, bf16 };
enum class ActKind { none, quick_gelu, gelu, gelu_tanh, relu, relu2, silu, swiglu_clamped, swiglu_oai, clamped_swiglu };
// A row of cumo_kernels/activations.py. A gated one's up half is clamped to +-limit if the limit is not 0.
struct Act {
  ActKind kind = ActKind::none;
  float alpha = 0.0f, limit = 0.0f;
  bool interleaved = false;  // gate and up alternate: [g0, u0, g1, u1, ...]
};

// The target of a launch and its properties.
struct Device {
  void* stream;
  int sms;
  int capability;     // 90 is 9.0
  int shared_memory;  // bytes that one block may have
  int copy_from;      // rows, and columns of the product, from which copying gathered rows pays
  int l2_bytes;
  bool overlap;       // launch with programmatic dependence: launch.cuh
};

enum class Score { softmax, sigmoid, sqrtsoftplus };
struct Route {
  const void* x;            // (T, E), or (T, H) with a gate
  const void* gate;         // (E, H) or null
  const int* group_offsets; // (G + 1,) or null: G equal groups
  int64_t stride_x_t, stride_gate_e;
  int T, H, E, K, G;
  bool renormalize;
  bool is_scored;  // not the plain softmax of `route`; the rest has then a meaning
  Score score;
  const float* bias;  // (E,), added to the scores that choose, or null
  const int* choice;  // (T, K) in [0, E], or null: the experts are chosen
  int expert_groups, top_groups;
  bool by_two;  // a group's value is the sum of its two largest
  float scale;
};
int64_t route_scratch(const Route&);  // floats
// weights (T, K) and the statistics fp32.
void route(const Device&, Dtype, const Route&, float* weights, int* indices, float* mean_probs, float* density,
           float* z, float* scratch);
// dlogits (T, E) in the dtype of x.
void route_backward(const Device&, Dtype, const Route&, const float* grad_weights, const float* grad_mean_probs,
                    const float* grad_z, const int* indices, void* dlogits);
constexpr int kMaxExperts = 1024;     // of route and sort_by_expert
constexpr int kMaxFusedExperts = 32;  // of a gate inside route and gate_backward
int gate_backward_blocks(const Device&, const Route&);
// dx = dlogits @ gate (T, H), dgate = dlogits^T @ x (E, H); sums (gate_backward_blocks, E, H) fp32 is scratch.
// dx, or dgate and sums, may be nullptr: not needed.
void gate_backward(const Device&, Dtype, const Route&, const void* dlogits, void* dx, void* dgate, float* sums);

int64_t sort_scratch(int64_t S, int E);  // integers, may be 0
void sort_by_expert(const Device&, const int* indices, int64_t S, int E, int* tokens_per_expert, int* expert_offsets,
                    int* permutation, int* inverse, int* scratch);

// The architecture whose code runs on the current device, as 90 for 9.0; a driver compiles kernels for an older one itself.
int compiled_for();

// out (width,) = the sum of `count` rows of `parts` (count, width), in their order.
void sum_parts(const Device&, Dtype, const float* parts, int count, int64_t width, void* out);

// Without `inverse` dropped slots are unknown, and their rows are tokens too.
void permute(const Device&, Dtype, const void* x, int64_t stride_x_t, const int* permutation, const int* inverse,
             int64_t S, int64_t H, int K, void* out);
// weights (T, K) or null for ones. With parts > 1 rows are fp32 (parts, T * K, H), added up first.
void combine(const Device&, Dtype, const void* rows, int64_t stride_rows_s, int parts, const float* weights,
             const int* inverse, int64_t T, int64_t H, int K, void* out);
void combine_backward(const Device&, Dtype, const void* grad, int64_t stride_grad_t, const void* rows,
                      int64_t stride_rows_s, const float* weights, const int* permutation, const int* inverse,
                      int64_t S, int64_t H, int K, void* drows, float* dweights);

// x (rows, I), or (rows, 2I) if gated; a plain activation may be passed as one long row.
void activate(const Device&, Dtype, const void* x, int64_t rows, int64_t I, Act, bool gated, void* out);
void activate_backward(const Device&, Dtype, const void* grad, const void* x, int64_t rows, int64_t I, Act, bool gated,
                       void* dx);

// One GEMM of all experts; the three functions below state which members they use.
struct Gemm {
  const void* x;
  const void* weight;
  const int* expert_offsets;  // (E + 1,)
  const int* permutation;     // (S,) or null
  bool gathered;              // row p of x is that of token permutation[p] / top_k
  const void* bias;           // (E, width of the product) or null
  int64_t stride_x, stride_w_e, stride_w;  // rows of x, experts, rows of the weight as stored
  bool k_inner;  // the weight is stored (E, N, K), else (E, K, N)
  bool tf32;     // fp32 operands may be rounded to TF32
  int64_t S;
  int E, N, K, top_k;  // N columns of `out`: half of the weight's for a gated activation
  Act act;
  bool gated;
  bool zero_tail;  // rows past the last expert's end are written as zeros, else not written
  bool can_split;  // there is neither an activation nor a pre-activation to save
  bool steady;     // a row's result must not depend on S
};
std::vector<int> gemm_shared_bytes();  // of a block: the portable GEMMs', then those for sm_90a
bool uses_hopper(const Device&, Dtype, const Gemm&);
Plan plan_gemm(const Device&, Dtype, const Gemm&);
// out[p] = act(x[row of p] @ weight[e]^T + bias[e]) and pre, its argument; either may be null. A plan with splits gives
// parts (splits, S, N) in fp32 instead, whose sum is out.
void grouped_gemm(const Device&, Dtype, const Gemm&, const Plan&, void* out, void* pre, float* parts);
// h = x[row of p] @ weight[e], weight (E, K, N); dz = w h act'(z), weighted = w act(z), dots = <h, act(z)> by
// column tile (S, grad_hidden_tiles); any of the three may be null.
int grad_hidden_tiles(const Device&, Dtype, const Gemm&);
void grad_hidden(const Device&, Dtype, const Gemm&, const float* topk_weights, const void* z, void* dz, void* weighted,
                 float* dots);

enum class Gathered { none, grad, x };

struct WeightGrad {
  const void* grad;  // (S, N), or (T, N) when gathered
  const void* x;     // (S, K), or (T, K) when gathered
  const int* expert_offsets;
  const int* permutation;     // (S,) or null
  Gathered gathered;          // by permutation[p] / top_k
  int64_t stride_grad, stride_x;
  bool tf32;
  int64_t S;
  int E, N, K, top_k;
};
bool uses_hopper(const Device&, Dtype, const WeightGrad&);
Plan plan_weight_grad(const Device&, Dtype, const WeightGrad&);
// out[e] = grad_e^T x_e (E, N, K), bias (E, N) = sums of grad or null; exact zeros for an expert without rows. Under a
// plan with splits both are fp32 and have that many parts, (splits, E, N, K) and (splits, E, N).
void grouped_gemm_weight_grad(const Device&, Dtype, const WeightGrad&, const Plan&, void* out, void* bias);

// out (parts, E, N) fp32: that many parts of each expert's sum of w[p] grad[token of p]; one part is (E, N) in dtype.
int bias_grad_parts(const Device&, Dtype, int64_t S, int E, int N);
void bias_grad(const Device&, Dtype, const void* grad, int64_t stride_grad, const int* permutation,
               const float* topk_weights, const int* expert_offsets, int E, int N, int top_k, int parts, void* out);

// (S, N): w[p] act(z[p]), z (S, N) or gated (S, 2N); without an activation w[p] source[token of p].
void weigh_rows(const Device&, Dtype, const void* source, int64_t stride_source, const float* topk_weights,
                const int* permutation, const int* end, int64_t S, int N, int top_k, Act, bool gated, void* out);
// out[slot] = sum of the slot's row of dots (S, tiles) + <grad[token], bias[expert]>; 0 for a dropped slot.
void topk_weights_grad(const Device&, Dtype, const float* dots, int tiles, const void* grad, int64_t stride_grad,
                       const void* bias, const int* inverse, const int* expert_offsets, int64_t S, int E, int O,
                       int top_k, float* out);

}  // namespace cumo
