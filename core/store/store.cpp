#include "store/store.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>

#include "plan/memory.hpp"
#include "store/init.hpp"

namespace tessera {

Store::Store(const ModelPlan& plan, at::Device device, at::ScalarType compute_dtype, const std::vector<std::string>& freeze, const MeshGroups* groups,
             const StoreOptions& options)
    : plan_(&plan), device_(device), compute_dtype_(compute_dtype), freeze_(freeze), ranks_(groups), options_(options) {
  if (device.is_cpu() && !groups) require_memory(plan);
  const Mesh mesh = groups ? groups->mesh() : Mesh{};
  const Place place = groups ? groups->place() : Place{};
  for (const Unit& unit : units_of(plan, mesh, place)) {
    std::vector<FlatGroup*>& of_unit = units_[unit.key];
    for (FlatBuffer& layout : flat_buffers(unit, freeze, mesh, place)) {
      FlatGroup& group = groups_.emplace_back(std::move(layout));
      of_unit.push_back(&group);
      if (groups) group.shard = group.experts ? groups->expert_shard() : groups->shard();
      group.data = at::zeros({group.size()}, at::TensorOptions(at::kFloat).device(device_));
      group.data.set_requires_grad(group.trainable);
      for (size_t i = 0; i < group.slots.size(); ++i) slots_[group.slots[i].name] = {&group, i};
    }
    Buffers& own = buffers_[unit.key];
    if (unit.buffers)
      for (const Buffer& buffer : *unit.buffers) own[buffer.name] = at::full(buffer.shape, buffer.init, at::TensorOptions(at::kFloat).device(device_));
  }
  for (const std::string& prefix : freeze) {
    bool used = false;
    for (const TensorRow& row : tensor_rows(plan)) used = used || (row.param && row.name.starts_with(prefix));
    if (!used) throw Error(ExitCode::kUsage, fmt::format("training.freeze: no parameter's name begins with '{}'", prefix), "names are as `tessera plan` lists them: embedding.weight, layers.0.pre_norm.weight, ...");
  }
}

const Group* Store::partners(const FlatBuffer::Shared& shared) const { return shared.axis ? ranks_->part(*shared.axis, shared.ranks) : ranks_->ends(); }

void Store::initialise(int64_t seed) {
  at::NoGradGuard no_grad;
  for (FlatGroup& group : groups_)
    for (const FlatGroup::Slot& slot : group.slots) {
      const Range own = common(slot.range(), group.own);
      if (own.begin >= own.end) continue;
      at::Tensor values = at::empty({own.end - own.begin}, at::kFloat);
      const int64_t first = own.begin - slot.offset;
      slot.part.for_stretches({first, own.end - slot.offset}, [&](int64_t global, int64_t at, int64_t count) {
        at::Tensor stretch = values.narrow(0, at - first, count);
        fill_initial(stretch, slot.row->init, seed, slot.name, global);
      });
      group.data.detach().narrow(0, own.begin - group.own.begin, own.end - own.begin).copy_(values);
    }
  touch();
}

std::pair<FlatGroup*, FlatGroup::Slot*> Store::find(const std::string& name) const {
  auto found = slots_.find(name);
  if (found == slots_.end()) throw Error(ExitCode::kRuntime, fmt::format("the model has no parameter '{}'", name));
  return {found->second.first, &found->second.first->slots[found->second.second]};
}

at::Tensor Store::slot_view(const std::string& name, const Flat& flat) const {
  auto [group, slot] = find(name);
  if (group->shard || !slot->part.whole()) throw Error(ExitCode::kRuntime, fmt::format("'{}' does not lie whole on this rank", name));
  return view_of(flat(*group).detach(), *slot);
}

at::Tensor Store::parameter(const std::string& name) const { return slot_view(name, masters); }

at::Tensor Store::gradient(const std::string& name) {
  auto [group, slot] = find(name);
  if (!group->grad.defined() || !group->has_grad[static_cast<size_t>(slot - group->slots.data())]) return at::zeros(slot->row->shape, group->data.options().requires_grad(false));
  return slot_view(name, gradients);
}

at::Tensor Store::buffer(const std::string& name) const {
  for (const auto& [prefix, own] : buffers_)
    if (name.starts_with(prefix)) {
      auto found = own.find(name.substr(prefix.size()));
      if (found != own.end()) return found->second;
    }
  throw Error(ExitCode::kRuntime, fmt::format("the model has no buffer '{}'", name));
}

bool Store::trainable(const std::string& name) const { return !frozen(name, freeze_); }

bool Store::has(const std::string& name) const {
  if (slots_.contains(name)) return true;
  for (const auto& [prefix, own] : buffers_)
    if (name.starts_with(prefix) && own.contains(name.substr(prefix.size()))) return true;
  return false;
}

void Store::for_stretches(const std::string& name, const Flat& flat, const std::function<void(int64_t, const at::Tensor&)>& visit, bool counted) const {
  const at::NoGradGuard no_grad;
  auto [group, slot] = find(name);
  const at::Tensor values = flat(*group).detach();
  const int64_t base = group->own.begin - slot->offset;  // of the rank's elements, counted from the slot's
  const auto within = [&](Range range) {
    const Range own = common(slot->range(), {range.begin + group->own.begin, range.end + group->own.begin});
    slot->part.for_stretches({own.begin - slot->offset, own.end - slot->offset}, [&](int64_t global, int64_t at, int64_t count) { visit(global, values.narrow(0, at - base, count)); });
  };
  if (!counted || !ranks_) return within({0, values.numel()});
  if (ranks_->place().dp_replicate != 0) return;
  for (const Range& range : group->counted) within(range);
}

void Store::assign(const std::string& name, const Flat& flat, const at::Tensor& values, int64_t first) {
  const at::Tensor from = values.reshape({-1});
  for_stretches(name, flat, [&](int64_t global, const at::Tensor& here) {
    const Range both = common({global, global + here.numel()}, {first, first + from.numel()});
    if (both.begin < both.end) here.narrow(0, both.begin - global, both.end - both.begin).copy_(from.narrow(0, both.begin - first, both.end - both.begin));
  });
}

at::Tensor Store::whole(const std::string& name, const Flat& flat) const {
  const at::NoGradGuard no_grad;
  if (!ranks_) return slot_view(name, flat).clone();
  // Every element comes from one rank, and zeros from all others.
  const std::vector<int64_t>* shape = nullptr;
  for (const TensorRow& row : tensor_rows(*plan_))
    if (row.param && row.name == name) shape = &row.param->shape;
  if (!shape) throw Error(ExitCode::kRuntime, fmt::format("the model has no parameter '{}'", name));
  at::Tensor all = at::zeros(*shape, at::TensorOptions(at::kFloat).device(device_));
  if (slots_.contains(name) && flat(*find(name).first).defined())
    for_stretches(name, flat, [&](int64_t global, const at::Tensor& values) { all.view({-1}).narrow(0, global, values.numel()).copy_(values); }, /*counted=*/true);
  if (ranks_->all()) ranks_->all()->all_reduce(all);
  return all;
}

void Store::zero_grad() {
  for (FlatGroup& group : groups_) group.has_grad.assign(group.slots.size(), false);
}

void Store::finish_grad() {
  at::NoGradGuard no_grad;
  finish_reduction();
  for (FlatGroup& group : groups_) {
    if (!group.trainable) continue;
    if (!group.grad.defined()) group.grad = at::zeros({group.data.numel()}, group.data.options().requires_grad(false));
    for (size_t i = 0; i < group.slots.size(); ++i) {
      if (group.has_grad[i]) continue;
      const Range own = common(group.slots[i].range(), group.own);
      if (own.begin < own.end) group.grad.narrow(0, own.begin - group.own.begin, own.end - own.begin).zero_();
    }
  }
  if (!ranks_) return;
  ranks_->whereabouts().place = "the sum of gradients";
  std::vector<std::pair<const Group*, std::vector<at::Tensor>>> alike;  // in the order of the plan, the same on all partners
  for (FlatGroup& group : groups_)
    for (const FlatGroup::Shared& shared : group.shared) {
      if (!group.trainable) continue;
      const Group* with = partners(shared);
      auto found = std::find_if(alike.begin(), alike.end(), [&](const auto& entry) { return entry.first == with; });
      if (found == alike.end()) found = alike.insert(found, {with, {}});
      found->second.push_back(group.grad.narrow(0, shared.range.begin, shared.range.end - shared.range.begin));
    }
  for (const auto& [partner, parts] : alike) {
    const at::Tensor sum = at::cat(parts);
    partner->all_reduce(sum);
    int64_t at = 0;
    for (const at::Tensor& part : parts) {
      part.copy_(sum.narrow(0, at, part.numel()));
      at += part.numel();
    }
  }
  if (ranks_->replicate())
    for (FlatGroup& group : groups_)
      if (group.trainable) ranks_->replicate()->all_reduce(group.grad);
}

void Store::touch() {
  for (const auto& [group, lease] : prefetched_) give_back({lease});
  prefetched_.clear();
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
