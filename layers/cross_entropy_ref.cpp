#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nll_loss.h>

#include "layers/cross_entropy.hpp"

namespace tessera {

at::Tensor linear_cross_entropy_ref(const at::Tensor& h_nd, const at::Tensor& lm_head_vd, const at::Tensor& targets_n) {
  const auto logits_nv = at::linear(h_nd.to(lm_head_vd.scalar_type()), lm_head_vd);
  const auto acc = logits_nv.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::nll_loss(at::log_softmax(logits_nv, 1, acc), targets_n, {}, at::Reduction::Sum, -1);
}

}  // namespace tessera
