#include "store/store.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include "plan/memory.hpp"
#include "store/init.hpp"

namespace tessera {

namespace {

bool matches(const std::string& name, const std::vector<std::string>& prefixes) {
  for (const std::string& prefix : prefixes)
    if (name.starts_with(prefix)) return true;
  return false;
}

at::Tensor slot_view(const at::Tensor& flat, const FlatGroup::Slot& slot) {
  return flat.narrow(0, slot.offset, num_elements(slot.row->shape)).view(slot.row->shape);
}

}  // namespace

// Outputs are views of one group's compute buffer; backward adds each view's gradient into the flat fp32 gradient, which is
// where a reduction over data ranks will happen.
struct GatherFunction : public torch::autograd::Function<GatherFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& leaf, int64_t group_address) {
    auto* group = reinterpret_cast<FlatGroup*>(group_address);
    ctx->saved_data["group"] = group_address;
    ctx->set_materialize_grads(false);
    torch::autograd::variable_list views;
    at::AutoDispatchBelowADInplaceOrView plain;  // the outputs are no tracked views of the leaf
    const at::Tensor& flat = group->compute.defined() ? group->compute : leaf;
    for (const FlatGroup::Slot& slot : group->slots) views.push_back(slot_view(flat, slot));
    return views;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    auto* group = reinterpret_cast<FlatGroup*>(ctx->saved_data["group"].toInt());
    at::NoGradGuard no_grad;
    if (!group->grad.defined()) group->grad = at::zeros({group->data.numel()}, group->data.options().requires_grad(false));
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      FlatGroup::Slot& slot = group->slots[i];
      at::Tensor into = slot_view(group->grad, slot);
      if (slot.has_grad) into.add_(grads[i]);
      else into.copy_(grads[i]);
      slot.has_grad = true;
    }
    return {at::Tensor(), at::Tensor()};
  }
};

Store::Store(const ModelPlan& plan, at::Device device, at::ScalarType compute_dtype, const std::vector<std::string>& freeze)
    : plan_(&plan), device_(device), compute_dtype_(compute_dtype) {
  if (device.is_cpu()) require_memory(plan);
  add_unit("", plan.stem, {}, freeze);
  auto stack = [&](const std::vector<LayerPlan>& layers) {
    for (const LayerPlan& layer : layers)
      if (layer.weights_of == layer.index) add_unit(layer.prefix, layer.params, layer.buffers, freeze);
  };
  stack(plan.layers);
  if (plan.head)
    for (const HeadSet& set : plan.head->sets) {
      add_unit(set.prefix, set.params, {}, freeze);
      stack(set.layers);
    }
  for (const std::string& prefix : freeze) {
    bool used = false;
    for (const auto& [name, place] : slots_) used = used || name.starts_with(prefix);
    if (!used) throw Error(ExitCode::kUsage, fmt::format("training.freeze: no parameter's name begins with '{}'", prefix), "names are as `tessera plan` lists them: embedding.weight, layers.0.pre_norm.weight, ...");
  }
}

void Store::add_unit(const std::string& prefix, const ParamTable& params, const BufferTable& buffers, const std::vector<std::string>& freeze) {
  auto& unit = units_[prefix];
  for (const Param& param : params) {
    bool experts = false;
    for (const Shard& shard : param.shards) experts = experts || shard.axis != Axis::kTensor;
    const bool trainable = !matches(prefix + param.name, freeze);
    FlatGroup* group = nullptr;
    for (FlatGroup* g : unit)
      if (g->experts == experts && g->fp32 == param.fp32 && g->decay == param.decay && g->trainable == trainable) group = g;
    if (!group) {
      group = &groups_.emplace_back(FlatGroup{.unit = prefix, .experts = experts, .fp32 = param.fp32, .decay = param.decay, .trainable = trainable});
      unit.push_back(group);
    }
    int64_t end = 0;
    if (!group->slots.empty()) end = group->slots.back().offset + num_elements(group->slots.back().row->shape);
    end = (end + 15) / 16 * 16;  // 64-byte aligned views
    group->slots.push_back({.name = prefix + param.name, .row = &param, .offset = end});
    slots_[prefix + param.name] = {group, group->slots.size() - 1};
  }
  for (FlatGroup* group : unit) {
    const FlatGroup::Slot& last = group->slots.back();
    group->data = at::zeros({last.offset + num_elements(last.row->shape)}, at::TensorOptions(at::kFloat).device(device_));
    group->data.set_requires_grad(group->trainable);
  }
  Buffers& own = buffers_[prefix];
  for (const Buffer& buffer : buffers) own[buffer.name] = at::full(buffer.shape, buffer.init, at::TensorOptions(at::kFloat).device(device_));
}

void Store::initialise(int64_t seed) {
  at::NoGradGuard no_grad;
  for (FlatGroup& group : groups_)
    for (const FlatGroup::Slot& slot : group.slots) {
      at::Tensor values = at::empty(slot.row->shape, at::kFloat);
      fill_initial(values, slot.row->init, seed, slot.name);
      tessera::slot_view(group.data, slot).copy_(values);
    }
  touch();
}

// What a caller in inference mode allocates or views here outlives that mode.
void Store::refresh(FlatGroup& group) {
  // fp32 rows are those that no training dtype may narrow; fp64 is wider, and tests differentiate in it.
  if (!group.stale || compute_dtype_ == at::kFloat || (compute_dtype_ != at::kDouble && group.fp32)) return;
  const c10::InferenceMode off(false);
  const at::NoGradGuard no_grad;
  if (group.compute.defined()) group.compute.copy_(group.data);
  else group.compute = group.data.detach().to(compute_dtype_);
  group.stale = false;
}

const Weights& Store::plain(const std::string& prefix) {
  auto [place, added] = plain_.try_emplace(prefix);
  if (added) {
    const c10::InferenceMode off(false);
    const at::NoGradGuard no_grad;
    for (FlatGroup* group : units_.at(prefix)) {
      const at::Tensor flat = group->compute.defined() ? group->compute : group->data.detach();
      for (const FlatGroup::Slot& slot : group->slots) place->second.add(tessera::slot_view(flat, slot), slot.row);
    }
  }
  return place->second;
}

Weights Store::gather(const std::string& prefix) {
  const std::vector<FlatGroup*>& groups = units_.at(prefix);
  for (FlatGroup* group : groups) refresh(*group);
  Weights weights;
  if (at::GradMode::is_enabled()) {
    for (FlatGroup* group : groups) {
      const auto views = GatherFunction::apply(group->data, reinterpret_cast<int64_t>(group));
      for (size_t i = 0; i < views.size(); ++i) weights.add(views[i], group->slots[i].row);
    }
  } else {
    weights = plain(prefix);
  }
  for (const auto& [name, tensor] : buffers_.at(prefix)) weights.add_buffer(name, tensor);
  return weights;
}

std::pair<FlatGroup*, FlatGroup::Slot*> Store::find(const std::string& name) const {
  auto found = slots_.find(name);
  if (found == slots_.end()) throw Error(ExitCode::kRuntime, fmt::format("the model has no parameter '{}'", name));
  return {found->second.first, &found->second.first->slots[found->second.second]};
}

at::Tensor Store::parameter(const std::string& name) const {
  auto [group, slot] = find(name);
  return tessera::slot_view(group->data.detach(), *slot);
}

at::Tensor Store::gradient(const std::string& name) {
  auto [group, slot] = find(name);
  if (!group->grad.defined() || !slot->has_grad) return at::zeros(slot->row->shape, group->data.options().requires_grad(false));
  return tessera::slot_view(group->grad, *slot);
}

at::Tensor Store::buffer(const std::string& name) const {
  for (const auto& [prefix, own] : buffers_)
    if (name.starts_with(prefix)) {
      auto found = own.find(name.substr(prefix.size()));
      if (found != own.end()) return found->second;
    }
  throw Error(ExitCode::kRuntime, fmt::format("the model has no buffer '{}'", name));
}

at::Tensor Store::slot_view(const std::string& name, const std::function<const at::Tensor&(const FlatGroup&)>& flat) const {
  auto [group, slot] = find(name);
  return tessera::slot_view(flat(*group), *slot);
}

bool Store::trainable(const std::string& name) const { return find(name).first->trainable; }

void Store::zero_grad() {
  for (FlatGroup& group : groups_)
    for (FlatGroup::Slot& slot : group.slots) slot.has_grad = false;
}

void Store::finish_grad() {
  at::NoGradGuard no_grad;
  for (FlatGroup& group : groups_) {
    if (!group.trainable) continue;
    if (!group.grad.defined()) group.grad = at::zeros({group.data.numel()}, group.data.options().requires_grad(false));
    for (FlatGroup::Slot& slot : group.slots)
      if (!slot.has_grad) tessera::slot_view(group.grad, slot).zero_();
  }
}

void Store::touch() {
  for (FlatGroup& group : groups_) group.stale = true;
}

int64_t Store::bytes() const {
  int64_t total = 0;
  auto add = [&](const at::Tensor& tensor) {
    if (tensor.defined()) total += static_cast<int64_t>(tensor.nbytes());
  };
  for (const FlatGroup& group : groups_)
    for (const at::Tensor* tensor : {&group.data, &group.compute, &group.grad, &group.exp_avg, &group.exp_avg_sq}) add(*tensor);
  for (const auto& [prefix, own] : buffers_)
    for (const auto& [name, tensor] : own) add(tensor);
  return total;
}

}  // namespace tessera
