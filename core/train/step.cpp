#include "train/step.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace tessera {

namespace {

// Scalars on the device that are read back together, with one synchronisation.
class Readback {
 public:
  void add(double* to, const at::Tensor& value) {
    to_.push_back(to);
    values_.push_back(value.detach().to(at::kDouble).reshape({}));
  }
  void read() {
    if (values_.empty()) return;
    const at::Tensor host = at::stack(values_).to(at::kCPU);
    for (size_t i = 0; i < to_.size(); ++i) *to_[i] = host.const_data_ptr<double>()[i];
  }

 private:
  std::vector<double*> to_;
  std::vector<at::Tensor> values_;
};

struct Sums {
  at::Tensor loss, total;
  std::map<std::string, at::Tensor> parts;
};

void add_to(at::Tensor& sum, const at::Tensor& value) { sum = sum.defined() ? sum + value : value; }

Sums run_micro_batches(Model& model, const std::vector<Batch>& micro_batches) {
  Denominators over;
  for (const Batch& batch : micro_batches) over += denominators(model.plan(), batch);
  Sums sums;
  for (const Batch& batch : micro_batches) {
    at::AutoGradMode grad_mode(true);
    LossResult result = model.loss(batch, over, /*training=*/true);
    if (model.clock()) model.clock()->enter("lm_head", StepClock::kBackward);
    if (result.total.requires_grad()) torch::autograd::backward({result.total}, {});
    add_to(sums.loss, result.main);
    add_to(sums.total, result.value);
    for (const auto& [name, part] : result.parts) add_to(sums.parts[name], part);
  }
  return sums;
}

void read_sums(Readback& readback, const Sums& sums, StepResult& result) {
  readback.add(&result.loss, sums.loss);
  readback.add(&result.total_loss, sums.total);
  for (const auto& [name, part] : sums.parts) readback.add(&result.parts[name], part);
}

}  // namespace

StepResult accumulate(Model& model, const std::vector<Batch>& micro_batches) {
  StepResult result;
  const Sums sums = run_micro_batches(model, micro_batches);
  model.store().finish_grad();
  Readback readback;
  read_sums(readback, sums, result);
  readback.read();
  result.counts = model.take_counts();
  return result;
}

StepResult train_step(Model& model, Optimizer& optimizer, const std::vector<Batch>& micro_batches, double lr, double max_norm) {
  StepResult result;
  model.take_counts();
  const Sums sums = run_micro_batches(model, micro_batches);
  if (model.clock()) model.clock()->enter("optimizer", StepClock::kForward);
  const at::Tensor norm = optimizer.grad_norm();
  Readback readback;
  read_sums(readback, sums, result);
  readback.add(&result.grad_norm, norm);
  readback.read();
  result.counts = model.take_counts();
  result.finite = std::isfinite(result.total_loss) && std::isfinite(result.grad_norm);
  if (!result.finite) return result;
  optimizer.step(lr, max_norm, norm);
  model.after_step(result.counts);
  return result;
}

std::string diagnose_nonfinite(Model& model, const std::vector<Batch>& micro_batches) {
  for (const Batch& batch : micro_batches)
    if (std::string place = model.first_nonfinite(batch); !place.empty()) return place + ", forward";
  // Backward runs from the last unit to the first, so the last one that is not finite is where it began.
  std::string place;
  for (FlatGroup& group : model.store().groups())
    if (group.trainable && group.grad.defined() && !at::isfinite(group.grad).all().item<bool>()) {
      const bool stem = group.unit.empty();
      std::string unit = stem ? group.slots.back().name : group.unit.substr(0, group.unit.size() - 1);
      if (place.empty() || !stem) place = unit;
    }
  return place.empty() ? "no single layer: every gradient is finite, but their norm overflows" : place + ", backward";
}

}  // namespace tessera
