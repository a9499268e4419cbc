// The launchers of routing and of the sort: a part of bindings.cpp, which also depends on torch.
#pragma once

namespace cumo {

struct RouteTensors {  // owns the tensors that a Route points to
  Tensor x, gate, bias, choice;
  Route r{};
};

// A Scoring of cumo_kernels/types.py as it writes itself.
void parse_scoring(const std::string& text, Route& r) {
  std::string score, group_score;
  std::istringstream words(text);
  words.imbue(std::locale::classic());
  words >> score >> r.expert_groups >> r.top_groups >> group_score >> r.scale;
  const bool known = score == "softmax" || score == "sigmoid" || score == "sqrtsoftplus";
  const bool fits = r.expert_groups > 0 && r.E % r.expert_groups == 0 && r.top_groups > 0 && r.top_groups <= r.expert_groups;
  TORCH_CHECK_VALUE(words && known && fits, "scoring must be a Scoring for ", r.E, " experts, got '", text, "'");
  r.is_scored = true;
  r.score = score == "softmax" ? Score::softmax : score == "sigmoid" ? Score::sigmoid : Score::sqrtsoftplus;
  r.by_two = group_score == "top2";
}

RouteTensors describe_route(const Tensor& x, const MaybeTensor& gate_weight, const MaybeTensor& group_offsets,
                            int64_t num_groups, int64_t top_k, bool renormalize) {
  CHECK_DEVICE(x);
  CHECK_DIM(x, 2);
  RouteTensors t;
  t.x = rows_of(x);
  if (gate_weight) {
    CHECK_SAME_DEVICE(*gate_weight, x);
    CHECK_DTYPE(*gate_weight, x.scalar_type());
    CHECK_SHAPE(*gate_weight, gate_weight->size(0), x.size(1));
    t.gate = rows_of(*gate_weight);
    if (gate_weight->size(0) > kMaxFusedExperts) t.x = at::mm(x, gate_weight->t()), t.gate = Tensor();
  }
  if (group_offsets) CHECK_INDEX(*group_offsets, x, num_groups + 1);
  const int64_t num_experts = t.gate.defined() ? t.gate.size(0) : t.x.size(1);
  TORCH_CHECK_VALUE(num_experts <= kMaxExperts, "x must have at most ", kMaxExperts, " experts, got ", num_experts);
  t.r.x = data(t.x);
  t.r.gate = t.gate.defined() ? data(t.gate) : nullptr;
  t.r.group_offsets = group_offsets ? ints(*group_offsets) : nullptr;
  t.r.stride_x_t = t.x.stride(0);
  t.r.stride_gate_e = t.gate.defined() ? t.gate.stride(0) : 0;
  t.r.T = narrow("T", x.size(0));
  t.r.H = narrow("H", x.size(1));
  t.r.E = static_cast<int>(num_experts);
  t.r.K = narrow("top_k", top_k);
  t.r.G = narrow("num_groups", num_groups);
  t.r.renormalize = renormalize;
  return t;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_route(const Tensor& x, const Route& r) {
  const Dtype dtype = dtype_of("x", x);
  Tensor weights = make(x, {r.T, r.K}, at::kFloat), indices = make(x, {r.T, r.K}, at::kInt);
  const auto stats = [&](at::IntArrayRef sizes) { return r.T ? make(x, sizes, at::kFloat) : zeros(x, sizes, at::kFloat); };
  Tensor mean_probs = stats({r.G, r.E}), density = stats({r.G, r.E}), z = stats({r.G});
  if (r.T) {
    const On on(x);
    Tensor scratch = make(x, {route_scratch(r)}, at::kFloat);
    route(on.device, dtype, r, weights.mutable_data_ptr<float>(), indices.mutable_data_ptr<int>(),
          mean_probs.mutable_data_ptr<float>(), density.mutable_data_ptr<float>(), z.mutable_data_ptr<float>(),
          scratch.mutable_data_ptr<float>());
  }
  return {weights, indices, mean_probs, density, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& x, const MaybeTensor& gate_weight,
                                                         const MaybeTensor& group_offsets, int64_t num_groups,
                                                         int64_t top_k, bool renormalize) {
  return run_route(x, describe_route(x, gate_weight, group_offsets, num_groups, top_k, renormalize).r);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scored_route(const Tensor& x, const MaybeTensor& gate_weight,
                                                                const MaybeTensor& selection_bias,
                                                                const MaybeTensor& group_offsets, int64_t num_groups,
                                                                int64_t top_k, bool renormalize,
                                                                const std::string& scoring,
                                                                const MaybeTensor& topk_indices) {
  RouteTensors t = describe_route(x, gate_weight, group_offsets, num_groups, top_k, renormalize);
  parse_scoring(scoring, t.r);
  if (selection_bias) {
    CHECK_SAME_DEVICE(*selection_bias, x);
    CHECK_DTYPE(*selection_bias, at::kFloat);
    CHECK_SHAPE(*selection_bias, t.r.E);
    t.bias = selection_bias->contiguous(), t.r.bias = floats(t.bias);
  }
  if (topk_indices) {
    CHECK_SAME_DEVICE(*topk_indices, x);
    CHECK_DTYPE(*topk_indices, at::kInt);
    CHECK_SHAPE(*topk_indices, t.r.T, t.r.K);
    t.choice = topk_indices->contiguous(), t.r.choice = ints(t.choice);
  }
  return run_route(x, t.r);
}

// `scoring` of scored_route, or nullptr.
std::tuple<Tensor, Tensor> run_route_backward(const Tensor& grad_weights, const Tensor& grad_mean_probs,
                                              const Tensor& grad_z, const Tensor& x, const MaybeTensor& gate_weight,
                                              const Tensor& topk_indices, const MaybeTensor& group_offsets,
                                              bool renormalize, bool need_x, bool need_gate, const std::string* scoring) {
  const Dtype dtype = dtype_of("x", x);
  const int64_t G = grad_mean_probs.size(0);
  RouteTensors t = describe_route(x, gate_weight, group_offsets, G, topk_indices.size(1), renormalize);
  Route& r = t.r;
  if (scoring != nullptr) parse_scoring(*scoring, r);
  CHECK_SHAPE(topk_indices, r.T, r.K);
  CHECK_SHAPE(grad_weights, r.T, r.K);
  CHECK_SHAPE(grad_mean_probs, G, r.E);
  CHECK_SHAPE(grad_z, G);
  CHECK_DTYPE(topk_indices, at::kInt);
  CHECK_SAME_DEVICE(topk_indices, x);
  CHECK_SAME_DEVICE(grad_weights, x);
  CHECK_SAME_DEVICE(grad_mean_probs, x);
  CHECK_SAME_DEVICE(grad_z, x);
  Tensor dlogits = make(x, {r.T, r.E});
  const Tensor nothing = make(x, {0});
  if (r.T == 0)
    return {need_x ? make(x, x.sizes()) : nothing,
            need_gate ? zeros(x, gate_weight->sizes(), x.scalar_type()) : nothing};
  const On on(x);
  const Tensor dweights = grad_weights.contiguous().to(at::kFloat), dmeans = grad_mean_probs.contiguous().to(at::kFloat);
  const Tensor dz = grad_z.contiguous().to(at::kFloat), indices = topk_indices.contiguous();
  route_backward(on.device, dtype, r, floats(dweights), floats(dmeans), floats(dz), ints(indices),
                 dlogits.mutable_data_ptr());
  if (!gate_weight) return {need_x ? dlogits : nothing, nothing};
  if (!t.gate.defined())
    return {need_x ? at::mm(dlogits, *gate_weight) : nothing, need_gate ? at::mm(dlogits.t(), x) : nothing};
  Tensor dx = need_x ? make(x, x.sizes()) : nothing, dgate = need_gate ? make(x, gate_weight->sizes()) : nothing;
  Tensor sums = need_gate ? make(x, {gate_backward_blocks(on.device, r), r.E, r.H}, at::kFloat) : nothing;
  if (need_x || need_gate)
    gate_backward(on.device, dtype, r, data(dlogits), need_x ? dx.mutable_data_ptr() : nullptr,
                  need_gate ? dgate.mutable_data_ptr() : nullptr,
                  need_gate ? sums.mutable_data_ptr<float>() : nullptr);
  return {dx, dgate};
}

std::tuple<Tensor, Tensor> route_backward(const Tensor& grad_weights, const Tensor& grad_mean_probs,
                                          const Tensor& grad_z, const Tensor& x, const MaybeTensor& gate_weight,
                                          const Tensor& topk_indices, const MaybeTensor& group_offsets,
                                          bool renormalize, bool need_x, bool need_gate) {
  return run_route_backward(grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets,
                            renormalize, need_x, need_gate, nullptr);
}

std::tuple<Tensor, Tensor> scored_route_backward(const Tensor& grad_weights, const Tensor& grad_mean_probs,
                                                 const Tensor& grad_z, const Tensor& x, const MaybeTensor& gate_weight,
                                                 const Tensor& topk_indices, const MaybeTensor& group_offsets,
                                                 bool renormalize, bool need_x, bool need_gate,
                                                 const std::string& scoring) {
  return run_route_backward(grad_weights, grad_mean_probs, grad_z, x, gate_weight, topk_indices, group_offsets,
                            renormalize, need_x, need_gate, &scoring);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sort_by_expert(const Tensor& topk_indices, int64_t num_experts) {
  CHECK_DEVICE(topk_indices);
  CHECK_DTYPE(topk_indices, at::kInt);
  TORCH_CHECK_VALUE(num_experts <= kMaxExperts, "num_experts must be at most ", kMaxExperts, ", got ", num_experts);
  const Tensor indices = topk_indices.contiguous();
  const int64_t S = indices.numel();
  narrow("the number of slots", S);
  const On on(indices);
  Tensor tokens_per_expert = make(indices, {num_experts}), expert_offsets = make(indices, {num_experts + 1});
  Tensor permutation = make(indices, {S}), inverse = make(indices, {S});
  Tensor scratch = make(indices, {sort_scratch(S, static_cast<int>(num_experts))});
  sort_by_expert(on.device, ints(indices), S, static_cast<int>(num_experts), tokens_per_expert.mutable_data_ptr<int>(),
                 expert_offsets.mutable_data_ptr<int>(), permutation.mutable_data_ptr<int>(),
                 inverse.mutable_data_ptr<int>(), scratch.mutable_data_ptr<int>());
  return {tokens_per_expert, expert_offsets, permutation, inverse};
}

}  // namespace cumo
