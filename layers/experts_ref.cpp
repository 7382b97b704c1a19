#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>

#include "layers/experts.hpp"

namespace tessera {

Dispatch dispatch_ref(const at::Tensor& indices_nk, int64_t num_experts) {
  const auto k = indices_nk.size(1);
  const auto slot_m = std::get<1>(at::sort(indices_nk.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false));
  return {.counts_e = at::bincount(indices_nk.flatten(), {}, num_experts),
          .slot_m = slot_m,
          .token_m = slot_m.div(k, "floor"),
          .row_nk = std::get<1>(at::sort(slot_m)).view(indices_nk.sizes())};
}

at::Tensor permute_tokens_ref(const at::Tensor& x_nd, const Dispatch& d) { return x_nd.index_select(0, d.token_m); }

at::Tensor combine_tokens_ref(const at::Tensor& y_md, const at::Tensor& weights_nk, const Dispatch& d) {
  const auto N = d.row_nk.size(0), k = d.row_nk.size(1);
  const auto chosen_nkd = y_md.index_select(0, d.row_nk.flatten()).view({N, k, y_md.size(1)});
  return (chosen_nkd * weights_nk.unsqueeze(2)).sum(1).to(y_md.scalar_type());
}

}  // namespace tessera
