#include "train/optimizer.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/square.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "layers/gpu.hpp"

namespace tessera {

double learning_rate(const OptimizerConfig& optimizer, const LrSchedulerConfig& s, int64_t step, int64_t steps) {
  if (step < s.warmup_steps) return optimizer.lr * static_cast<double>(step + 1) / static_cast<double>(s.warmup_steps);
  if (s.decay_type == "constant") return optimizer.lr;
  const int64_t after = std::max<int64_t>(steps - s.warmup_steps, 1);
  const int64_t decay = s.decay_ratio < 0 ? after : std::min<int64_t>(after, std::llround(s.decay_ratio * static_cast<double>(steps)));
  const int64_t begin = steps - decay;
  if (step < begin || decay == 0) return optimizer.lr;
  const double progress = std::min(1.0, static_cast<double>(step - begin + 1) / static_cast<double>(decay));
  double factor = 1 - progress;  // linear
  if (s.decay_type == "cosine") factor = 0.5 * (1 + std::cos(std::numbers::pi * progress));
  if (s.decay_type == "sqrt") factor = 1 - std::sqrt(progress);
  return optimizer.lr * (s.min_lr_factor + (1 - s.min_lr_factor) * factor);
}

Optimizer::Optimizer(Store& store, const OptimizerConfig& config) : store_(&store), config_(config) {}

const std::vector<std::string>& Optimizer::slots() {
  static const std::vector<std::string> names{"exp_avg", "exp_avg_sq"};
  return names;
}

void Optimizer::allocate() {
  for (FlatGroup& group : store_->groups()) {
    if (!group.trainable || group.exp_avg.defined()) continue;
    group.exp_avg = at::zeros_like(group.data.detach());
    group.exp_avg_sq = at::zeros_like(group.data.detach());
  }
}

Flat Optimizer::slot(const std::string& name) {
  allocate();
  return name == "exp_avg" ? Flat([](FlatGroup& group) -> at::Tensor& { return group.exp_avg; }) : Flat([](FlatGroup& group) -> at::Tensor& { return group.exp_avg_sq; });
}

at::Tensor Optimizer::moment(const std::string& slot_name, const std::string& parameter) { return store_->slot_view(parameter, slot(slot_name)); }

at::Tensor Optimizer::grad_norm() {
  at::NoGradGuard no_grad;
  store_->finish_grad();
  const MeshGroups* ranks = store_->ranks();
  std::vector<at::Tensor> grads;
  for (FlatGroup& group : store_->groups()) {
    if (!group.trainable) continue;
    if (!ranks) grads.push_back(group.grad);
    else if (ranks->place().dp_replicate == 0)
      for (const Range& range : group.counted) grads.push_back(group.grad.narrow(0, range.begin, range.end - range.begin));
  }
  if (!ranks && grads.empty()) throw Error(ExitCode::kUsage, "training.freeze: every parameter is frozen, so there is nothing to train");
  at::Tensor norm = grads.empty() ? at::zeros({}, at::TensorOptions(at::kFloat).device(store_->device())) : at::linalg_vector_norm(at::stack(at::_foreach_norm(grads, 2)));
  if (!ranks || !ranks->all()) return norm;
  norm = norm.to(at::kDouble).square();
  ranks->whereabouts().place = "the gradient norm";
  ranks->all()->all_reduce(norm);
  return norm.sqrt().to(at::kFloat);
}

void Optimizer::step(double lr, double max_norm, const at::Tensor& grad_norm) {
  at::NoGradGuard no_grad;
  allocate();
  ++steps_taken_;
  if (on_gpu(grad_norm)) return step_on_gpu(lr, max_norm, grad_norm);
  std::optional<at::Tensor> grad_scale;  // the kernel divides gradients by it
  if (max_norm > 0) grad_scale = ((grad_norm + 1e-6) / max_norm).clamp_min(1.0).to(at::kFloat);
  for (const bool decay : {true, false}) {
    std::vector<at::Tensor> params, grads, exp_avgs, exp_avg_sqs, steps;
    for (FlatGroup& group : store_->groups()) {
      if (!group.trainable || group.decay != decay) continue;
      params.push_back(group.data.detach());
      grads.push_back(group.grad);
      exp_avgs.push_back(group.exp_avg);
      exp_avg_sqs.push_back(group.exp_avg_sq);
      steps.push_back(at::full({}, static_cast<double>(steps_taken_), group.data.options().requires_grad(false)));
    }
    if (params.empty()) continue;
    at::_fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, {}, steps, lr, config_.beta1, config_.beta2, decay ? config_.weight_decay : 0.0,
                      config_.eps, /*amsgrad=*/false, /*maximize=*/false, grad_scale);
  }
  store_->touch();
  store_->zero_grad();
}

void Optimizer::step_on_gpu(double lr, double max_norm, const at::Tensor& grad_norm) {
  std::vector<FlatGroup*> copied;  // whose copy in the compute dtype is up to date, and stays so
  for (FlatGroup& group : store_->groups())
    if (group.trainable && !group.stale && group.compute.defined() && group.compute.scalar_type() == at::kBFloat16) copied.push_back(&group);
  store_->touch();
  for (FlatGroup& group : store_->groups()) {
    if (!group.trainable) continue;
    const bool copy = std::find(copied.begin(), copied.end(), &group) != copied.end();
    gpu_kernels()->adamw(group.data.detach(), group.grad, group.exp_avg, group.exp_avg_sq, copy ? group.compute : at::Tensor(), grad_norm,
                         {.lr = lr, .beta1 = config_.beta1, .beta2 = config_.beta2, .eps = config_.eps, .weight_decay = group.decay ? config_.weight_decay : 0.0,
                          .max_norm = max_norm, .t = steps_taken_});
    if (copy) group.stale = false;
  }
  store_->zero_grad();
}

}  // namespace tessera
