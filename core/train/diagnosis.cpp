#include "train/diagnosis.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "train/pipeline.hpp"

namespace tessera {

namespace {

bool finite(const at::Tensor& x) { return at::isfinite(x).all().item<bool>(); }

std::vector<double> greatest(const Group* group, const std::vector<double>& own, at::Device device) {
  if (!group) return own;
  const at::Tensor all = at::tensor(own, at::kDouble).to(device);
  group->all_reduce(all, Reduce::kMax);
  const at::Tensor host = all.to(at::kCPU);
  return {host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel()};
}

// The places that a forward pass comes through, in its order.
std::vector<std::string> places(const ModelPlan& plan) {
  std::vector<std::string> names{"embedding"};
  for (const LayerPlan& layer : plan.layers) names.push_back(fmt::format("layers.{} ({})", layer.index, layer.binding));
  names.emplace_back("final_norm");
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) names.push_back("heads." + pass.name);
  return names;
}

// Which of them give a value that is not finite (1) on this rank.
std::vector<double> broken_places(Model& model, const Batch& batch) {
  const ModelPlan& plan = model.plan();
  std::vector<double> broken(places(plan).size());
  const at::Tensor hidden_nd = hidden_by_stage(model, batch, nullptr, [&](int64_t layer, const at::Tensor& x_nd) { broken[static_cast<size_t>(layer + 1)] = !finite(x_nd); });
  if (!hidden_nd.defined()) return broken;
  const size_t norm = plan.layers.size() + 1;
  broken[norm] = !finite(hidden_nd);
  const auto head = model.head_logits(batch, hidden_nd);
  for (size_t i = 0; i < head.size(); ++i) broken[norm + 1 + i] = !finite(head[i]);
  return broken;
}

}  // namespace

std::string diagnose_nonfinite(Model& model, const std::vector<Batch>& micro_batches) {
  at::NoGradGuard no_grad;
  const MeshGroups* ranks = model.store().ranks();
  if (ranks) ranks->whereabouts().place = "the search for a value that is not finite";
  const at::Device device = model.store().device();
  for (const Batch& batch : micro_batches) {
    const Batch there = batch.on(device);
    const std::vector<double> broken = greatest(ranks ? ranks->all() : nullptr, broken_places(model, there), device);
    const auto first = std::find(broken.begin(), broken.end(), 1.0);
    if (first != broken.end()) return places(model.plan())[static_cast<size_t>(first - broken.begin())] + ", forward";
  }
  // Backward runs from the last unit to the first, so the last one that is not finite is where it began. A rank has a share of each unit's gradient, and the
  // units of its stages.
  const std::vector<Unit> units = units_of(model.plan(), {}, {});
  std::vector<double> broken(units.size());
  for (size_t u = 0; u < units.size(); ++u)
    for (const FlatGroup& group : model.store().groups())
      if (group.unit == units[u].key && group.trainable && group.grad.defined() && !finite(group.grad)) broken[u] = 1;
  broken = greatest(ranks ? ranks->all() : nullptr, broken, device);
  std::string place;
  for (size_t u = 0; u < units.size(); ++u) {
    if (broken[u] == 0) continue;
    const bool stem = units[u].key == kEmbeddingUnit || units[u].key == kOutputUnit;
    if (place.empty() || !stem) place = stem ? units[u].key : units[u].key.substr(0, units[u].key.size() - 1);
  }
  return place.empty() ? "no single layer: every gradient is finite, but their norm overflows" : place + ", backward";
}

std::map<int64_t, double> residual_norms(Model& model, const Batch& batch) {
  std::map<int64_t, at::Tensor> squares;
  const Batch there = batch.on(model.store().device());
  hidden_by_stage(model, there, nullptr, [&](int64_t layer, const at::Tensor& x_nd) { squares[layer] = x_nd.to(at::kFloat).square().mean(); });
  std::map<int64_t, double> norms;
  for (const auto& [layer, square] : squares) norms[layer] = std::sqrt(square.item<double>());
  return norms;
}

}  // namespace tessera
