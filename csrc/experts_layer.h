// The GEMM launchers and the expert layer made of them: a part of bindings.cpp, which also depends on torch.
#pragma once

namespace cumo {

struct GemmTensors {  // owns the tensors that a Gemm points to
  Tensor x, weight, bias;
  Gemm p{};
};

GemmTensors describe_gemm(const Tensor& x, const Tensor& weight, const Tensor& expert_offsets, const MaybeTensor& bias,
                          const MaybeTensor& permutation, int64_t top_k, Activation activation) {
  CHECK_DEVICE(x);
  CHECK_DIM(x, 2);
  CHECK_SAME_DEVICE(weight, x);
  CHECK_DTYPE(weight, x.scalar_type());
  const int64_t num_experts = expert_offsets.numel() - 1;
  CHECK_INDEX(expert_offsets, x, num_experts + 1);
  CHECK_SHAPE(weight, num_experts, weight.size(1), x.size(1));
  GemmTensors t;
  t.x = rows_of(x);
  t.weight = weight.stride(2) == 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
  if (bias) {
    CHECK_SAME_DEVICE(*bias, x);
    CHECK_DTYPE(*bias, x.scalar_type());
    CHECK_SHAPE(*bias, num_experts, weight.size(1));
    t.bias = bias->contiguous();
  }
  if (permutation) CHECK_INDEX(*permutation, x, permutation->numel());
  Gemm& p = t.p;
  p.x = data(t.x);
  p.weight = data(t.weight);
  p.expert_offsets = ints(expert_offsets);
  p.permutation = permutation ? ints(*permutation) : nullptr;
  p.gathered = permutation.has_value();
  p.bias = bias ? data(t.bias) : nullptr;
  p.k_inner = t.weight.stride(2) == 1;
  p.stride_x = t.x.stride(0);
  p.stride_w_e = t.weight.stride(0);
  p.stride_w = t.weight.stride(p.k_inner ? 1 : 2);
  p.tf32 = tf32_allowed(x);
  p.S = permutation ? permutation->numel() : x.size(0);
  narrow("the number of rows", p.S);
  p.E = narrow("E", num_experts);
  p.N = narrow("N", weight.size(1) / (activation.gated ? 2 : 1));
  p.K = narrow("K", x.size(1));
  p.top_k = narrow("top_k", top_k);
  p.act = activation.act;
  p.gated = activation.gated;
  return t;
}

// Whether (S, cols) rows of tokens should be copied into expert order instead of gathered by a Hopper product of
// `width` columns: a product whose operands are all loaded by TMA is a quarter to a half faster; a copy moves at most
// 2 * S * cols elements.
bool copy_pays(const Device& device, int64_t S, int64_t cols, int64_t width) {
  return S >= device.copy_from && width >= device.copy_from && cols % 8 == 0;
}

// Row p is that of token permutation[p] / top_k, also for dropped slots, whose rows no product reads.
Tensor in_expert_order(const On& on, const Tensor& tokens, const Tensor& permutation, int64_t top_k) {
  Tensor out = make(tokens, {permutation.numel(), tokens.size(1)});
  permute(on.device, dtype_of("x", tokens), data(tokens), tokens.stride(0), ints(permutation), nullptr, out.size(0),
          out.size(1), static_cast<int>(top_k), out.mutable_data_ptr());
  return out;
}

// If that pays, t.x becomes a copy in expert order.
bool copy_if_it_pays(const On& on, Dtype dtype, GemmTensors& t, const Tensor& permutation, int64_t width) {
  if (!t.p.gathered || !uses_hopper(on.device, dtype, t.p) || !copy_pays(on.device, t.p.S, t.p.K, width)) return false;
  t.x = in_expert_order(on, t.x, permutation, t.p.top_k);
  t.p.x = data(t.x), t.p.stride_x = t.p.K, t.p.gathered = false;
  return true;
}

Tensor added_up(const Tensor& parts, at::ScalarType dtype) {
  Tensor out = make(parts, parts.sizes().slice(1), dtype);
  if (out.numel() == 0) return out;
  const On on(parts);
  sum_parts(on.device, dtype_of("out", out), floats(parts), static_cast<int>(parts.size(0)), out.numel(),
            out.mutable_data_ptr());
  return out;
}

// -> out and pre-activation, empty where not kept; with split-k, out is fp32 partial sums (parts, S, N), not yet added.
// Without `zero_tail` rows past the last expert's end are not written.
std::tuple<Tensor, Tensor> multiply(const Tensor& x, const Tensor& weight, const Tensor& expert_offsets,
                                    const MaybeTensor& bias, const MaybeTensor& permutation, int64_t top_k,
                                    Activation activation, bool keep_out, bool keep_pre, bool zero_tail) {
  if (activation.act.interleaved) {  // columns of tiles would alternate: one plain product as the weight is stored
    Tensor z = std::get<0>(
        multiply(x, weight, expert_offsets, bias, permutation, top_k, {Act{}, false}, true, false, zero_tail));
    if (z.dim() == 3) z = added_up(z, x.scalar_type());
    return {keep_out ? activated(z, activation) : make(x, {0}), keep_pre ? z : make(x, {0})};
  }
  const Dtype dtype = dtype_of("x", x);
  GemmTensors t = describe_gemm(x, weight, expert_offsets, bias, permutation, top_k, activation);
  t.p.zero_tail = zero_tail;
  t.p.can_split = activation.act.kind == ActKind::none && keep_out && !keep_pre;
  t.p.steady = is_on("CUMO_BATCH_INVARIANT");
  Tensor pre = keep_pre ? make(x, {t.p.S, weight.size(1)}) : make(x, {0});
  if (t.p.S * t.p.N == 0) return {keep_out ? make(x, {t.p.S, t.p.N}) : make(x, {0}), pre};
  const On on(x);
  if (permutation) copy_if_it_pays(on, dtype, t, *permutation, weight.size(1));
  const Plan plan = plan_gemm(on.device, dtype, t.p);
  if (plan.splits > 1) {
    Tensor parts = make(x, {plan.splits, t.p.S, t.p.N}, at::kFloat);
    grouped_gemm(on.device, dtype, t.p, plan, nullptr, nullptr, parts.mutable_data_ptr<float>());
    return {parts, pre};
  }
  Tensor out = keep_out ? make(x, {t.p.S, t.p.N}) : make(x, {0});
  grouped_gemm(on.device, dtype, t.p, plan, out_or_null(out), out_or_null(pre), nullptr);
  return {out, pre};
}

std::tuple<Tensor, Tensor> grouped_gemm(const Tensor& x, const Tensor& weight, const Tensor& expert_offsets,
                                        const MaybeTensor& bias, const MaybeTensor& permutation,
                                        const MaybeTensor& inverse_permutation, int64_t top_k,
                                        const std::optional<std::string>& activation) {
  // not needed: a gathered row past the last expert's end is a zero row of out anyway
  CHECK_DEVICE(x);
  if (inverse_permutation) CHECK_SAME_DEVICE(*inverse_permutation, x);
  const Activation act = activation ? activation_of(*activation) : Activation{Act{}, false};
  auto [out, pre] =
      multiply(x, weight, expert_offsets, bias, permutation, top_k, act, true, activation.has_value(), true);
  return {out.dim() == 3 ? added_up(out, x.scalar_type()) : out, pre};
}

std::tuple<Tensor, Tensor> weight_gradient(const Tensor& grad, const Tensor& x, const Tensor& expert_offsets,
                                           const MaybeTensor& permutation, int64_t top_k, bool need_bias,
                                           Gathered gathered) {
  CHECK_DEVICE(x);
  CHECK_SAME_DEVICE(grad, x);
  CHECK_DTYPE(grad, x.scalar_type());
  const int64_t num_experts = expert_offsets.numel() - 1;
  CHECK_INDEX(expert_offsets, x, num_experts + 1);
  if (permutation) CHECK_INDEX(*permutation, x, permutation->numel());
  const int64_t S = permutation ? permutation->numel() : x.size(0);
  if (gathered != Gathered::grad) {
    CHECK_SHAPE(grad, S, grad.size(1));
  }
  if (gathered != Gathered::x) {
    CHECK_SHAPE(x, S, x.size(1));
  }
  const Dtype dtype = dtype_of("x", x);
  Tensor grad_rows = rows_of(grad), x_rows = rows_of(x);
  WeightGrad p{};
  p.grad = data(grad_rows);
  p.x = data(x_rows);
  p.expert_offsets = ints(expert_offsets);
  p.permutation = permutation ? ints(*permutation) : nullptr;
  p.gathered = gathered;
  p.stride_grad = grad_rows.stride(0);
  p.stride_x = x_rows.stride(0);
  p.tf32 = tf32_allowed(x);
  p.S = S;
  p.E = narrow("E", num_experts);
  p.N = narrow("N", grad.size(1));
  p.K = narrow("K", x.size(1));
  p.top_k = narrow("top_k", top_k);
  if (num_experts * p.N == 0) return {make(x, {num_experts, p.N, p.K}), make(x, {need_bias ? num_experts : 0, p.N})};
  const On on(x);
  if (gathered != Gathered::none && uses_hopper(on.device, dtype, p)) {
    const bool of_grad = gathered == Gathered::grad;
    Tensor& tokens = of_grad ? grad_rows : x_rows;
    if (copy_pays(on.device, S, tokens.size(1), of_grad ? p.K : p.N)) {
      tokens = in_expert_order(on, tokens, *permutation, top_k);
      (of_grad ? p.grad : p.x) = data(tokens);
      (of_grad ? p.stride_grad : p.stride_x) = tokens.size(1);
      p.gathered = Gathered::none;
    }
  }
  const Plan plan = plan_weight_grad(on.device, dtype, p);
  const bool split = plan.splits > 1;
  std::vector<int64_t> sizes{num_experts, p.N, p.K}, bias_sizes{num_experts, p.N};
  if (split) sizes.insert(sizes.begin(), plan.splits), bias_sizes.insert(bias_sizes.begin(), plan.splits);
  const at::ScalarType stored = split ? at::kFloat : x.scalar_type();
  Tensor out = make(x, sizes, stored), bias = need_bias ? make(x, bias_sizes, stored) : make(x, {0});
  grouped_gemm_weight_grad(on.device, dtype, p, plan, out_or_null(out), out_or_null(bias));
  if (!split) return {out, bias};
  return {added_up(out, x.scalar_type()), need_bias ? added_up(bias, x.scalar_type()) : bias};
}

std::tuple<Tensor, Tensor> grouped_gemm_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& expert_offsets,
                                                    const MaybeTensor& permutation,
                                                    const MaybeTensor& inverse_permutation, int64_t top_k,
                                                    bool need_bias) {
  // not needed: rows of dropped slots lie past every expert's end
  CHECK_DEVICE(x);
  if (inverse_permutation) CHECK_SAME_DEVICE(*inverse_permutation, x);
  return weight_gradient(grad, x, expert_offsets, permutation, top_k, need_bias,
                         permutation ? Gathered::x : Gathered::none);
}

// (E, N): each expert's sum of weighted rows of tokens.
Tensor bias_gradient(const Tensor& grad, const Tensor& topk_weights, const Tensor& permutation,
                     const Tensor& expert_offsets) {
  const Tensor rows = rows_of(grad);
  const Dtype dtype = dtype_of("grad", rows);
  const int E = narrow("E", expert_offsets.numel() - 1), N = narrow("N", rows.size(1));
  if (int64_t{E} * N == 0) return make(rows, {E, N});
  const On on(rows);
  const int parts = bias_grad_parts(on.device, dtype, permutation.numel(), E, N);
  Tensor out = parts > 1 ? make(rows, {parts, E, N}, at::kFloat) : make(rows, {E, N});
  bias_grad(on.device, dtype, data(rows), rows.stride(0), ints(permutation), floats(topk_weights), ints(expert_offsets), E,
            N, narrow("top_k", topk_weights.size(1)), parts, out.mutable_data_ptr());
  return parts > 1 ? added_up(out, rows.scalar_type()) : out;
}

// All checks, before the first launch, with the names of the layer's own arguments.
void check_layer(const Tensor& x, const Tensor& topk_weights, const Tensor& permutation,
                 const Tensor& inverse_permutation, const Tensor& expert_offsets, const Tensor& up_proj,
                 const Tensor& down_proj, const MaybeTensor& up_bias, const MaybeTensor& down_bias) {
  CHECK_DEVICE(x);
  CHECK_DTYPE(topk_weights, at::kFloat);
  CHECK_SAME_DEVICE(topk_weights, x);
  CHECK_INDEX(permutation, x, topk_weights.numel());
  CHECK_INDEX(inverse_permutation, x, topk_weights.numel());
  CHECK_INDEX(expert_offsets, x, up_proj.size(0) + 1);
  for (const auto& [name, tensor] : {std::pair{"up_proj", &up_proj}, std::pair{"down_proj", &down_proj},
                                     std::pair{"up_bias", up_bias ? &*up_bias : nullptr},
                                     std::pair{"down_bias", down_bias ? &*down_bias : nullptr}})
    if (tensor)
      TORCH_CHECK_VALUE(tensor->device() == x.device() && tensor->scalar_type() == x.scalar_type(), name,
                        " must have the device and dtype of x, ", x.device(), " ", x.scalar_type(), ", got ",
                        tensor->device(), " ", tensor->scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& permutation,
                                              const Tensor& inverse_permutation, const Tensor& expert_offsets,
                                              const Tensor& up_proj, const Tensor& down_proj,
                                              const MaybeTensor& up_bias, const MaybeTensor& down_bias,
                                              const std::string& activation, const std::string& memory) {
  check_layer(x, topk_weights, permutation, inverse_permutation, expert_offsets, up_proj, down_proj, up_bias,
              down_bias);
  const int64_t top_k = topk_weights.size(1);
  auto [a, z] = multiply(x, up_proj, expert_offsets, up_bias, permutation, top_k, activation_of(activation), true,
                         memory == "preact" || memory == "all", false);
  const Tensor y = std::get<0>(multiply(a, down_proj, expert_offsets, down_bias, std::nullopt, top_k,
                                        {Act{}, false}, true, false, false));
  return {combine_parts(y, topk_weights, inverse_permutation, top_k, x.scalar_type()), z,
          memory == "all" ? a : make(x, {0})};
}

// w[p] act(z[p]) of a pre-activation, or w[p] grad[token of p] without an activation: (S, N).
Tensor weigh(const Tensor& source, const Tensor& topk_weights, const Tensor& permutation, const Tensor& expert_offsets,
             Activation activation) {
  const Tensor rows = rows_of(source);
  const int64_t S = permutation.numel(), N = source.size(1) / (activation.gated ? 2 : 1);
  Tensor out = make(source, {S, N});
  if (out.numel() == 0) return out;
  const On on(source);
  weigh_rows(on.device, dtype_of("source", source), data(rows), rows.stride(0), floats(topk_weights), ints(permutation),
             ints(expert_offsets) + expert_offsets.numel() - 1, S, narrow("N", N), narrow("top_k", topk_weights.size(1)),
             activation.act, activation.gated, out.mutable_data_ptr());
  return out;
}

// -> gradients of x, topk_weights, up_proj, up_bias, down_proj, down_bias; empty where not needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& topk_weights, const Tensor& permutation,
    const Tensor& inverse_permutation, const Tensor& expert_offsets, const Tensor& up_proj, const Tensor& down_proj,
    const MaybeTensor& up_bias, const MaybeTensor& down_bias, const Tensor& z, const Tensor& a,
    const std::string& activation, const std::string& memory, bool need_x, bool need_weights, bool need_up,
    bool need_up_bias, bool need_down, bool need_down_bias) {
  check_layer(x, topk_weights, permutation, inverse_permutation, expert_offsets, up_proj, down_proj, up_bias,
              down_bias);
  CHECK_SAME_DEVICE(grad, x);
  CHECK_DTYPE(grad, x.scalar_type());
  CHECK_SAME_DEVICE(z, x);
  CHECK_SAME_DEVICE(a, x);
  const Activation act = activation_of(activation);
  const Dtype dtype = dtype_of("x", x);
  const int64_t top_k = topk_weights.size(1), S = permutation.numel();
  const Tensor weights = topk_weights.contiguous();
  const auto nothing = [&] { return make(x, {0}); };  // a separate tensor each: no two outputs may be the same
  Tensor dx = nothing(), dup = nothing(), dup_bias = nothing(), ddown = nothing(), ddown_bias = nothing();
  Tensor dweights = make(weights, {0}), kept_z = z;
  if (memory == "x")
    kept_z = std::get<1>(multiply(x, up_proj, expert_offsets, up_bias, permutation, top_k, act, false, true, false));

  // if `a` is saved, applying the weight to the narrower gradient costs less
  const bool need_weighted = need_down && memory != "all";
  Tensor weighted = nothing(), dz = nothing(), ordered_grad;
  const bool need_dz = need_x || need_up || need_up_bias;
  if (need_dz || need_weights) {
    GemmTensors t = describe_gemm(grad, down_proj.transpose(1, 2), expert_offsets, std::nullopt, permutation, top_k,
                                  {Act{}, false});
    if (t.p.k_inner) {  // grad_hidden reads down_proj as (E, O, I) is stored
      t.weight = down_proj.contiguous().transpose(1, 2);
      t.p.weight = data(t.weight);
      t.p.k_inner = false;
      t.p.stride_w_e = t.weight.stride(0), t.p.stride_w = t.weight.stride(2);
    }
    const On on(x);
    const Tensor tokens = t.x;
    if (copy_if_it_pays(on, dtype, t, permutation, t.p.N)) ordered_grad = t.x;
    t.p.act = act.act, t.p.gated = act.gated;
    // the epilogue has no registers left to read every second column: halves of z side by side, and of dz back
    const auto swapped = [](const Tensor& rows, int64_t outer, int64_t inner) {
      return rows.reshape({rows.size(0), outer, inner}).transpose(1, 2).contiguous().view(rows.sizes());
    };
    const Tensor halves = act.act.interleaved ? swapped(kept_z, t.p.N, 2) : kept_z;
    t.p.act.interleaved = false;
    const int tiles = grad_hidden_tiles(on.device, dtype, t.p);
    if (need_dz) dz = make(kept_z, kept_z.sizes());
    if (need_weighted) weighted = make(x, {S, t.p.N});
    Tensor dots = make(weights, {need_weights ? S : 0, tiles});
    if (S > 0 && t.p.N > 0)
      grad_hidden(on.device, dtype, t.p, floats(weights), data(halves), out_or_null(dz), out_or_null(weighted),
                  static_cast<float*>(out_or_null(dots)));
    if (act.act.interleaved && dz.numel()) dz = swapped(dz, 2, t.p.N);
    if (need_weights) {
      dweights = make(weights, weights.sizes());
      const Tensor bias = down_bias ? down_bias->contiguous() : Tensor();
      if (S)
        topk_weights_grad(on.device, dtype, floats(dots), tiles, data(tokens), tokens.stride(0),
                          down_bias ? data(bias) : nullptr, ints(inverse_permutation), ints(expert_offsets), S, t.p.E,
                          narrow("O", grad.size(1)), t.p.top_k, dweights.mutable_data_ptr<float>());
    }
  } else if (need_weighted) {
    weighted = weigh(kept_z, weights, permutation, expert_offsets, act);
  }

  if (need_down && memory == "all") {
    ddown = std::get<0>(weight_gradient(weigh(grad, weights, permutation, expert_offsets, {Act{}, false}), a,
                                        expert_offsets, std::nullopt, top_k, false, Gathered::none));
  } else if (need_down) {
    const bool ordered = ordered_grad.defined();
    ddown = std::get<0>(weight_gradient(ordered ? ordered_grad : grad, weighted, expert_offsets, permutation, top_k, false,
                                        ordered ? Gathered::none : Gathered::grad));
  }
  if (need_down_bias) ddown_bias = bias_gradient(grad, weights, permutation, expert_offsets);
  ordered_grad = Tensor();  // frees memory for the following steps
  if (need_up || need_up_bias) {
    // only a bias: with the smallest weight gradient, which sums in the same order
    std::tie(dup, dup_bias) = weight_gradient(dz, need_up ? x : x.narrow(1, 0, 1), expert_offsets, permutation, top_k,
                                              need_up_bias, Gathered::x);
  }
  if (!need_up) dup = nothing();
  if (need_x) {
    const Tensor rows = std::get<0>(multiply(dz, up_proj.transpose(1, 2), expert_offsets, std::nullopt, std::nullopt,
                                             top_k, {Act{}, false}, true, false, false));
    dx = combine_parts(rows, std::nullopt, inverse_permutation, top_k, x.scalar_type());
  }
  return {dx, dweights, dup, dup_bias, ddown, ddown_bias};
}

}  // namespace cumo
