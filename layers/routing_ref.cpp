#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <map>

#include "layers/routing.hpp"

namespace tessera {
namespace {

// Indices of the k greatest of the last dimension, ties to the lower index.
at::Tensor best(const at::Tensor& values, int64_t k) {
  return std::get<1>(at::sort(values, /*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(-1, 0, k);
}

}  // namespace

at::Tensor choose_experts_ref(const at::Tensor& scores_ne, const at::Tensor& bias_e, int64_t k, int64_t num_groups, int64_t topk_group) {
  at::NoGradGuard no_grad;
  constexpr double kLowest = -std::numeric_limits<double>::infinity();
  const auto N = scores_ne.size(0), E = scores_ne.size(1);
  auto biased_ne = bias_e.defined() ? scores_ne + bias_e : scores_ne;
  biased_ne = biased_ne.masked_fill(biased_ne.isnan(), kLowest);
  if (num_groups > 1) {
    const auto grouped_ngs = biased_ne.view({N, num_groups, E / num_groups});
    const auto score_ng = std::get<0>(at::sort(grouped_ngs, true, -1, true)).narrow(-1, 0, 2).sum(-1);
    const auto dropped_ng = at::zeros({N, num_groups}, scores_ne.options()).add_(1).scatter_(1, best(score_ng, topk_group), 0);
    biased_ne = grouped_ngs.masked_fill(dropped_ng.unsqueeze(2).to(at::kBool), kLowest).view({N, E});
  }
  return std::get<0>(at::sort(best(biased_ne, k), true, -1, false));
}

at::Tensor seq_aux_loss_ref(const at::Tensor& logits_ne, const Spans& spans, const at::Tensor& valid_n, int64_t k) {
  const auto E = logits_ne.size(1);
  std::map<int64_t, std::vector<int64_t>> rows_of_document;
  for (int64_t i = 0; i < spans.size(); ++i)
    for (int64_t row = spans.rows()[i]; row < spans.rows()[i + 1]; ++row)
      if (!valid_n.defined() || valid_n[row].item<bool>()) rows_of_document[spans.list()[i].document].push_back(row);
  auto total = at::zeros({}, logits_ne.options());
  for (const auto& [document, rows] : rows_of_document) {
    const auto scores_te = at::sigmoid(logits_ne.index_select(0, at::tensor(at::ArrayRef<int64_t>(rows)).to(logits_ne.device())));
    const auto P_e = (scores_te / (scores_te.sum(1, true) + 1e-20)).sum(0);
    const auto c_e = expert_counts(choose_experts_ref(scores_te, {}, k), {}, E);
    const auto T = static_cast<double>(rows.size());
    total = total + (P_e * c_e).sum() * (static_cast<double>(E) / (static_cast<double>(k) * T * T));
  }
  return total;
}

}  // namespace tessera
