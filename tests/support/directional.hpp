// A model's gradients against central differences along random directions, one parameter at a time.
#pragma once
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <string>

#include "tests/support/model.hpp"

namespace tessera {

// What a block draws from libtorch's generator is drawn alike in every pass that begins with this.
inline void draw_alike() { at::manual_seed(5); }

// The training loss, auxiliary losses included.
inline double total_loss(Model& model, const Batch& batch) {
  draw_alike();
  at::NoGradGuard no_grad;
  const double value = model.loss(batch, denominators(model.plan(), batch), /*training=*/true).value.item<double>();
  model.take_counts();
  return value;
}

inline void backward(Model& model, const Batch& batch) {
  draw_alike();
  at::AutoGradMode grad_mode(true);
  model.store().zero_grad();
  torch::autograd::backward({model.loss(batch, denominators(model.plan(), batch), /*training=*/true).total}, {});
  model.take_counts();
}

// |measured - expected| of one parameter, as a share of what a sum of that many terms typically is. Masters are fp32, so the step that
// was really taken is measured and the expected change computed from it.
inline double directional_error(Model& model, const Batch& batch, const std::string& name, uint64_t seed, double step) {
  Store& store = model.store();
  at::NoGradGuard no_grad;
  at::Tensor w = store.parameter(name);
  const at::Tensor rest = w.clone(), g = store.gradient(name).to(at::kDouble).flatten();
  const double size = std::sqrt(rest.to(at::kDouble).square().mean().item<double>());
  const at::Tensor u = at::randn(w.sizes(), at::detail::createCPUGenerator(seed), at::TensorOptions(at::kDouble)).mul_(step * (size > 0 ? size : 0.1));
  const auto at_point = [&](const at::Tensor& point) {
    w.copy_(point);
    store.touch();
    return std::pair{total_loss(model, batch), w.to(at::kDouble).flatten()};
  };
  const auto [above, w_above] = at_point(rest.to(at::kDouble).add(u));
  const auto [below, w_below] = at_point(rest.to(at::kDouble).sub(u));
  at_point(rest);
  const at::Tensor terms = g * (w_above - w_below);
  const double typical = std::sqrt(terms.square().sum().item<double>());
  return std::abs((above - below) - terms.sum().item<double>()) / (typical > 0 ? typical : 1);
}

}  // namespace tessera
