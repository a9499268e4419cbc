// cumo_kernels._C: the launchers of every stem, with the names and arguments of cumo_kernels/backends/*/<stem>.py.
//
// The only file that depends on torch and Python. A launcher checks what would cause out-of-bounds reads in a kernel,
// allocates its outputs from torch's caching allocator, and launches on the current stream of its first tensor's device;
// nothing synchronises with the GPU. Memory plans and the order of kernels: experts_layer.h. Routing: routing_launchers.h.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cstdlib>
#include <locale>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#ifndef CUMO_EMULATE
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

#include "checks.h"
#include "kernels.h"
#include "launches.h"
#include "tiles.h"

namespace cumo {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int kCopyFrom = 2048;

// CUMO_PDL: programmatic dependent launch, not measured yet. CUMO_BATCH_INVARIANT: cumo_kernels/tiles/tuning.py.
bool is_on(const char* name) {
  const char* setting = std::getenv(name);
  return setting && std::string(setting) == "1";
}

#ifdef CUMO_EMULATE

struct On {  // the emulated device; few processors by default, so that a block runs several tiles
  Device device{nullptr, number("CUMO_EMULATE_SMS", 2), number("CUMO_EMULATE_CAPABILITY", 80), 227 * 1024,
                number("CUMO_EMULATE_COPY_FROM", kCopyFrom), 50 << 20, is_on("CUMO_PDL")};

  explicit On(const Tensor&) {}

  static int number(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
  }
};

#else

struct On {  // makes the device of a tensor current and describes it
  c10::cuda::CUDAGuard guard;
  Device device;

  explicit On(const Tensor& tensor) : guard(tensor.device()), device(properties(tensor.device().index())) {
    device.stream = c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
    // code for older GPUs does not wait: platform.cuh
    device.overlap = is_on("CUMO_PDL") && device.capability >= 90 && compiled_for() >= 90;
  }

  static Device properties(int index) {
    static std::map<int, Device> known;  // under Python's lock
    const auto found = known.find(index);
    if (found != known.end()) return found->second;
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
      TORCH_CHECK(error == cudaSuccess, "device ", index, ": ", cudaGetErrorString(error));
      return value;
    };
    const int capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
    return known[index] = {nullptr, ask(cudaDevAttrMultiProcessorCount), capability,
                           ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), kCopyFrom, ask(cudaDevAttrL2CacheSize), false};
  }
};

#endif

struct Activation {
  Act act;
  bool gated;
};
struct Row {
  ActKind kind;
  bool gated;
};

const std::map<std::string, Row> kActivations = {
    {"quick_gelu", {ActKind::quick_gelu, false}},
    {"gelu", {ActKind::gelu, false}},
    {"gelu_tanh", {ActKind::gelu_tanh, false}},
    {"relu", {ActKind::relu, false}},
    {"relu2", {ActKind::relu2, false}},
    {"silu", {ActKind::silu, false}},
    {"swiglu", {ActKind::silu, true}},
    {"geglu", {ActKind::gelu, true}},
    {"geglu_tanh", {ActKind::gelu_tanh, true}},
    {"reglu", {ActKind::relu, true}},
    {"swiglu_clamped", {ActKind::swiglu_clamped, true}},
    {"swiglu_oai", {ActKind::swiglu_oai, true}},
    {"clamped_swiglu", {ActKind::clamped_swiglu, true}},
};

// The number after `key` in a name, or 0.
float parameter(const std::string& name, const std::string& key) {
  const size_t at = name.find(key);
  if (at == std::string::npos) return 0.0f;
  std::istringstream words(name.substr(at + key.size()));
  words.imbue(std::locale::classic());  // whatever locale the process has set
  float value = 0;
  words >> value;
  return value;
}

// A name as Activation.spelled of cumo_kernels/activations.py writes it, with all parameters.
Activation activation_of(const std::string& name) {
  const auto found = kActivations.find(name.substr(0, name.find('(')));
  TORCH_CHECK_VALUE(found != kActivations.end(), "activation must be one of csrc/activations.cuh, got '", name, "'");
  const Row row = found->second;
  const Act act{row.kind, parameter(name, "alpha="), parameter(name, "limit="),
                name.find("interleaved") != std::string::npos};
  const bool is_clamped = row.kind == ActKind::swiglu_clamped || row.kind == ActKind::swiglu_oai ||
                          row.kind == ActKind::clamped_swiglu;
  TORCH_CHECK_VALUE(is_clamped == (act.limit > 0) && (row.kind == ActKind::swiglu_oai) == (act.alpha > 0),
                    "activation must have the parameters of its kind, got '", name, "'");
  TORCH_CHECK_VALUE(row.gated || !act.interleaved, "activation must be gated if it is interleaved, got '", name, "'");
  return {act, row.gated};
}

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::fp32;
    case at::kHalf:
      return Dtype::fp16;
    case at::kBFloat16:
      return Dtype::bf16;
    default:
      TORCH_CHECK_VALUE(false, name, " must be float32, float16 or bfloat16, got ", tensor.scalar_type());
  }
}

bool tf32_allowed(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}

Tensor make(const Tensor& like, at::IntArrayRef sizes) { return at::empty(sizes, like.options().requires_grad(false)); }
Tensor make(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, like.options().requires_grad(false).dtype(dtype));
}
Tensor zeros(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::zeros(sizes, like.options().requires_grad(false).dtype(dtype));
}

// With contiguous elements in every row; copied only if the strides require it.
Tensor rows_of(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const int* ints(const Tensor& tensor) { return tensor.const_data_ptr<int>(); }
const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }
void* out_or_null(Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

int narrow(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value < (int64_t{1} << 31), name, " must be below 2^31, got ", value);
  return static_cast<int>(value);
}

// ---- activation

Tensor activated(const Tensor& x, const Activation& activation) {
  auto sizes = x.sizes().vec();
  TORCH_CHECK_VALUE(!activation.gated || sizes.back() % 2 == 0, "x must have an even last dimension, got ", x.sizes());
  if (activation.gated) sizes.back() /= 2;
  const Dtype dtype = dtype_of("x", x);
  Tensor out = make(x, sizes);
  if (out.numel() == 0) return out;
  const On on(x);
  const int64_t rows = activation.gated ? out.numel() / sizes.back() : 1;
  const Tensor source = x.contiguous();
  activate(on.device, dtype, data(source), rows, out.numel() / rows, activation.act, activation.gated,
           out.mutable_data_ptr());
  return out;
}

Tensor activate(const Tensor& x, const std::string& name) {
  CHECK_DEVICE(x);
  return activated(x, activation_of(name));
}

Tensor activate_backward(const Tensor& grad, const Tensor& x, const std::string& name) {
  CHECK_DEVICE(x);
  CHECK_SAME_DEVICE(grad, x);
  CHECK_DTYPE(grad, x.scalar_type());
  const Activation activation = activation_of(name);
  const Dtype dtype = dtype_of("x", x);
  TORCH_CHECK_VALUE(grad.numel() * (activation.gated ? 2 : 1) == x.numel(), "grad must fit x ", x.sizes(), ", got ", grad.sizes());
  Tensor dx = make(x, x.sizes());
  if (dx.numel() == 0) return dx;
  const On on(x);
  const int64_t rows = activation.gated ? grad.numel() / (x.size(-1) / 2) : 1;
  const Tensor source = x.contiguous(), upstream = grad.contiguous();
  activate_backward(on.device, dtype, data(upstream), data(source), rows, grad.numel() / rows, activation.act,
                    activation.gated, dx.mutable_data_ptr());
  return dx;
}

// ---- permutation

Tensor permute(const Tensor& x, const Tensor& permutation, const Tensor& inverse_permutation, int64_t top_k) {
  CHECK_DEVICE(x);
  CHECK_DIM(x, 2);
  const int64_t S = permutation.numel();
  CHECK_INDEX(permutation, x, S);
  CHECK_INDEX(inverse_permutation, x, S);
  const Dtype dtype = dtype_of("x", x);
  Tensor out = make(x, {S, x.size(1)});
  if (out.numel() == 0) return out;
  const On on(x);
  const Tensor rows = rows_of(x);
  permute(on.device, dtype, data(rows), rows.stride(0), ints(permutation), ints(inverse_permutation), S, x.size(1),
          narrow("top_k", top_k), out.mutable_data_ptr());
  return out;
}

// rows (S, H), or fp32 partial sums (parts, S, H); out (T, H) of `out_dtype`.
Tensor combine_parts(const Tensor& rows, const MaybeTensor& topk_weights, const Tensor& inverse_permutation,
                     int64_t top_k, at::ScalarType out_dtype) {
  const int parts = rows.dim() == 3 ? static_cast<int>(rows.size(0)) : 1;
  const int64_t num_tokens = rows.size(-2) / top_k;
  CHECK_INDEX(inverse_permutation, rows, rows.size(-2));
  Tensor weights;
  if (topk_weights) {
    CHECK_DTYPE(*topk_weights, at::kFloat);
    CHECK_SHAPE(*topk_weights, num_tokens, top_k);
    CHECK_SAME_DEVICE(*topk_weights, rows);
    weights = topk_weights->contiguous();
  }
  Tensor out = make(rows, {num_tokens, rows.size(-1)}, out_dtype);
  if (out.numel() == 0) return out;
  const On on(rows);
  const Tensor source = rows_of(rows);
  combine(on.device, dtype_of("rows", out), data(source), source.stride(-2), parts,
          topk_weights ? floats(weights) : nullptr, ints(inverse_permutation), num_tokens, rows.size(-1),
          narrow("top_k", top_k), out.mutable_data_ptr());
  return out;
}

Tensor combine(const Tensor& rows, const MaybeTensor& topk_weights, const Tensor& inverse_permutation, int64_t top_k) {
  CHECK_DEVICE(rows);
  CHECK_DIM(rows, 2);
  return combine_parts(rows, topk_weights, inverse_permutation, top_k, rows.scalar_type());
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad, const Tensor& rows, const Tensor& topk_weights,
                                            const Tensor& permutation, const Tensor& inverse_permutation) {
  CHECK_DEVICE(rows);
  const int64_t S = rows.size(0), H = rows.size(1), top_k = topk_weights.size(1);
  CHECK_SHAPE(rows, topk_weights.numel(), H);
  CHECK_SHAPE(grad, topk_weights.size(0), H);
  CHECK_DTYPE(grad, rows.scalar_type());
  CHECK_DTYPE(topk_weights, at::kFloat);
  CHECK_SAME_DEVICE(grad, rows);
  CHECK_SAME_DEVICE(topk_weights, rows);
  CHECK_INDEX(permutation, rows, S);
  CHECK_INDEX(inverse_permutation, rows, S);
  const Dtype dtype = dtype_of("rows", rows);
  Tensor drows = make(rows, {S, H}), dweights = make(topk_weights, topk_weights.sizes());
  if (S == 0) return {drows, dweights};
  const On on(rows);
  const Tensor upstream = rows_of(grad), source = rows_of(rows), weights = topk_weights.contiguous();
  combine_backward(on.device, dtype, data(upstream), upstream.stride(0), data(source), source.stride(0),
                   floats(weights), ints(permutation), ints(inverse_permutation), S, H, narrow("top_k", top_k),
                   drows.mutable_data_ptr(), dweights.mutable_data_ptr<float>());
  return {drows, dweights};
}

}  // namespace cumo

#include "experts_layer.h"
#include "routing_launchers.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace cumo;
  namespace py = pybind11;
  using py::arg;
  m.doc() = "CUDA kernels of cumo_kernels; use them through its public functions.";
  m.attr("torch") = TORCH_VERSION;  // its C++ interface differs between releases
#ifdef CUMO_SOURCE
  m.attr("source") = CUMO_SOURCE;  // the hash of csrc/ that it was built from
#endif
#ifdef CUMO_ARCHITECTURES
  m.attr("architectures") = CUMO_ARCHITECTURES;  // the TORCH_CUDA_ARCH_LIST it was built with
#endif

  m.def("activate", py::overload_cast<const Tensor&, const std::string&>(&activate), arg("x"), arg("name"));
  m.def("activate_backward", py::overload_cast<const Tensor&, const Tensor&, const std::string&>(&activate_backward),
        arg("grad"), arg("x"), arg("name"));
  m.def("permute", py::overload_cast<const Tensor&, const Tensor&, const Tensor&, int64_t>(&permute), arg("x"),
        arg("permutation"), arg("inverse_permutation"), arg("top_k"));
  m.def("combine", py::overload_cast<const Tensor&, const MaybeTensor&, const Tensor&, int64_t>(&combine), arg("rows"),
        arg("topk_weights"), arg("inverse_permutation"), arg("top_k"));
  m.def("combine_backward",
        py::overload_cast<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&>(&combine_backward),
        arg("grad"), arg("rows"), arg("topk_weights"), arg("permutation"), arg("inverse_permutation"));
  m.def("route",
        py::overload_cast<const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t, int64_t, bool>(&route),
        arg("x"), arg("gate_weight"), arg("group_offsets"), arg("num_groups"), arg("top_k"), arg("renormalize"));
  m.def("route_backward",
        py::overload_cast<const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&,
                          const MaybeTensor&, bool, bool, bool>(&route_backward),
        arg("grad_weights"), arg("grad_mean_probs"), arg("grad_z"), arg("x"), arg("gate_weight"), arg("topk_indices"),
        arg("group_offsets"), arg("renormalize"), arg("need_x"), arg("need_gate"));
  m.def("scored_route", &scored_route, arg("x"), arg("gate_weight"), arg("selection_bias"), arg("group_offsets"),
        arg("num_groups"), arg("top_k"), arg("renormalize"), arg("scoring"), arg("topk_indices") = py::none());
  m.def("scored_route_backward", &scored_route_backward, arg("grad_weights"), arg("grad_mean_probs"), arg("grad_z"),
        arg("x"), arg("gate_weight"), arg("topk_indices"), arg("group_offsets"), arg("renormalize"), arg("need_x"),
        arg("need_gate"), arg("scoring"));
  m.def("sort_by_expert", py::overload_cast<const Tensor&, int64_t>(&sort_by_expert), arg("topk_indices"),
        arg("num_experts"));
  m.def("grouped_gemm",
        py::overload_cast<const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                          const MaybeTensor&, int64_t, const std::optional<std::string>&>(&grouped_gemm),
        arg("x"), arg("weight"), arg("expert_offsets"), arg("bias"), arg("permutation"), arg("inverse_permutation"),
        arg("top_k"), arg("activation"));
  m.def("grouped_gemm_weight_grad",
        py::overload_cast<const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t,
                          bool>(&grouped_gemm_weight_grad),
        arg("grad"), arg("x"), arg("expert_offsets"), arg("permutation"), arg("inverse_permutation"), arg("top_k"),
        arg("need_bias"));
  m.def("expert_mlp", &expert_mlp, arg("x"), arg("topk_weights"), arg("permutation"), arg("inverse_permutation"),
        arg("expert_offsets"), arg("up_proj"), arg("down_proj"), arg("up_bias"), arg("down_bias"), arg("activation"),
        arg("memory"));
  m.def("expert_mlp_backward", &expert_mlp_backward, arg("grad"), arg("x"), arg("topk_weights"), arg("permutation"),
        arg("inverse_permutation"), arg("expert_offsets"), arg("up_proj"), arg("down_proj"), arg("up_bias"),
        arg("down_bias"), arg("z"), arg("a"), arg("activation"), arg("memory"), arg("need_x"), arg("need_weights"),
        arg("need_up"), arg("need_up_bias"), arg("need_down"), arg("need_down_bias"));

  // index arithmetic, for tests/kernels/test_cuda.py
  m.def("_find_tiles", [](const std::vector<int>& offsets, int tiles_n, int tile_rows, int splits, int whole) {
    TileWalk walk(offsets.data(), static_cast<int>(offsets.size()) - 1, tiles_n, tile_rows, splits);
    std::vector<std::tuple<int, int, int, int, int, bool>> found;
    for (Tile tile; walk.find(static_cast<int>(found.size()), whole, tile);)
      found.emplace_back(tile.expert, tile.first_row, tile.end_row, tile.tile_n, tile.split, tile.halved);
    return found;
  }, py::arg("offsets"), py::arg("tiles_n"), py::arg("tile_rows"), py::arg("splits"), py::arg("whole") = 1 << 30);
  m.def("_whole_tiles", &whole_tiles);
  m.def("_sums_bias", &sums_bias);
  m.def("_steps_of_split", [](int steps, int split, int splits) {
    const Steps found = steps_of_split(steps, split, splits);
    return std::make_tuple(found.begin, found.end);
  });
  m.def("_grad_tile", [](const std::vector<int>& offsets, int number, int tiles_n, int tiles_k, int splits, int depth) {
    const GradTile<256> t(offsets.data(), number, tiles_n, tiles_k, splits, depth);
    return std::make_tuple(t.expert, t.split, t.begin, t.end, t.first_n, t.first_k);
  });
  const auto as_tuple = [](const Plan& p) {
    return std::make_tuple(p.tile_cols, p.tiles_n, p.tiles_k, p.splits, p.blocks, p.cuts);
  };
  m.def("_plan_rows", [as_tuple](bool hopper, int64_t S, int E, int64_t width, bool gated, int64_t steps, int64_t places,
                                 bool can_split, bool steady) {
    return as_tuple(plan_rows(hopper, S, E, width, gated, steps, places, can_split, !can_split, steady));
  });
  m.def("_plan_weight_grad", [as_tuple](bool hopper, int64_t S, int E, int64_t N, int64_t K, int depth, int64_t places) {
    return as_tuple(plan_weight_grad(hopper, S, E, N, K, depth, places));
  });
  m.def("_shared_bytes", [] { return gemm_shared_bytes(); });
  m.def("_launches", [] { return launches.load(); });
  m.def("_fetched_ahead", [] { return fetched_ahead.load(); });
  m.def("_most_row_tiles", &most_row_tiles);
  m.def("_weight_column", [](int tile_n, int tile_columns, int r, int N, bool gated) {
    const WeightColumn column = weight_column(tile_n, tile_columns, r, N, gated);
    return std::make_tuple(column.index, column.left);
  });
  m.def("_offset_along", &offset_along);
  m.def("_offset_across", &offset_across);
}
