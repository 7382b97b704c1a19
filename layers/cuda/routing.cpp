// The router on the GPU: tensors to pointers.
#include "layers/cuda/routing.hpp"

#include <ATen/ops/empty.h>

#include "layers/cuda/table.hpp"
#include "layers/cuda/tensors.hpp"

namespace tessera::gpu {
namespace {

static_assert(kMostRoutedExperts == kMostExperts);

at::Tensor fp32(const at::Tensor& t) { return t.detach().to(at::kFloat).contiguous(); }

at::Tensor choose(const at::Tensor& scores_ne, bool of_logits, const at::Tensor& bias_e, int64_t k, int64_t num_groups, int64_t topk_group) {
  const Launches launches("choose_experts", scores_ne);
  const at::Tensor scores = fp32(scores_ne), bias = bias_e.defined() ? fp32(bias_e) : bias_e;
  at::Tensor chosen = at::empty({scores.size(0), k}, scores.options().dtype(at::kLong));
  launches.check(choose_experts({scores.size(0), scores.size(1), k, num_groups, topk_group}, scores.const_data_ptr<float>(), of_logits,
                                bias.defined() ? bias.const_data_ptr<float>() : nullptr, chosen.mutable_data_ptr<int64_t>(), launches.stream()));
  return chosen;
}

at::Tensor counts(const at::Tensor& indices_nk, const at::Tensor& valid_n, int64_t num_experts) {
  const Launches launches("expert_counts", indices_nk);
  const at::Tensor indices = indices_nk.contiguous(), valid = valid_n.defined() ? valid_n.contiguous() : valid_n;
  const Choices c{.N = indices.size(0), .E = num_experts, .k = indices.size(1), .num_groups = 1, .topk_group = 1};
  at::Tensor partials = at::empty({count_parts(c), num_experts}, indices.options().dtype(at::kFloat));
  launches.check(count_experts(c, indices.const_data_ptr<int64_t>(), valid.defined() ? valid.const_data_ptr<bool>() : nullptr, partials.mutable_data_ptr<float>(), launches.stream()));
  return sum_partials(launches, partials, partials[0])[0];
}

at::Tensor weights(const at::Tensor& logits_ne, const at::Tensor& indices_nk, bool normed, double scaling) {
  const Launches launches("expert_weights", logits_ne);
  const at::Tensor logits = fp32(logits_ne), indices = indices_nk.contiguous();
  at::Tensor out = at::empty(indices.sizes(), logits.options());
  launches.check(routed_weights({logits.size(0), logits.size(1), indices.size(1), 1, 1}, logits.const_data_ptr<float>(), indices.const_data_ptr<int64_t>(), normed,
                                static_cast<float>(scaling), out.mutable_data_ptr<float>(), launches.stream()));
  return out;
}

at::Tensor weights_backward(const at::Tensor& logits_ne, const at::Tensor& indices_nk, bool normed, double scaling, const at::Tensor& dweights_nk) {
  const Launches launches("expert_weights", logits_ne);
  const at::Tensor logits = fp32(logits_ne), indices = indices_nk.contiguous(), dweights = fp32(dweights_nk);
  at::Tensor out = at::empty(logits.sizes(), logits.options());
  launches.check(routed_weights_backward({logits.size(0), logits.size(1), indices.size(1), 1, 1}, logits.const_data_ptr<float>(), indices.const_data_ptr<int64_t>(), normed,
                                         static_cast<float>(scaling), dweights.const_data_ptr<float>(), out.mutable_data_ptr<float>(), launches.stream()));
  return out;
}

}  // namespace

void add_routing(GpuKernels& table) {
  table.choose_experts = choose;
  table.expert_counts = counts;
  table.routed_weights = weights;
  table.routed_weights_backward = weights_backward;
}

}  // namespace tessera::gpu
