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

namespace {

bool matches(const std::string& name, const std::vector<std::string>& prefixes) {
  for (const std::string& prefix : prefixes)
    if (name.starts_with(prefix)) return true;
  return false;
}

at::Tensor slot_view(const at::Tensor& flat, const FlatGroup::Slot& slot) { return flat.narrow(0, slot.offset, slot.part.size()).view(slot.part.shape()); }

constexpr int64_t kAlign = 16;  // elements: views begin at 64 bytes

int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

Range common(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

}  // namespace

Store::Store(const ModelPlan& plan, at::Device device, at::ScalarType compute_dtype, const std::vector<std::string>& freeze, const MeshGroups* groups,
             const StoreOptions& options)
    : plan_(&plan), device_(device), compute_dtype_(compute_dtype), freeze_(freeze), ranks_(groups), options_(options) {
  if (device.is_cpu() && !groups) require_memory(plan);
  const int64_t stages = groups ? groups->mesh().pp : 1, stage = groups ? groups->place().pp : 0;
  const bool first = stage == 0, last = stage == stages - 1, embeds_again = plan.head || plan.model.tie_embeddings;
  if (first || (last && embeds_again)) add_unit(kEmbedding, "", plan.embedding, {});
  if (last) add_unit(kOutput, "", plan.output, {});
  auto stack = [&](const std::vector<LayerPlan>& layers, bool main) {
    for (const LayerPlan& layer : layers)
      if (layer.weights_of == layer.index && (!main || layer.stage % stages == stage)) add_unit(layer.prefix, layer.prefix, layer.params, layer.buffers);
  };
  stack(plan.layers, true);
  if (plan.head && last)
    for (const HeadSet& set : plan.head->sets) {
      add_unit(set.prefix, set.prefix, set.params, {});
      stack(set.layers, false);
    }
  for (const std::string& prefix : freeze) {
    bool used = false;
    for (const TensorRow& row : tensor_rows(plan)) used = used || (row.param && row.name.starts_with(prefix));
    if (!used) throw Error(ExitCode::kUsage, fmt::format("training.freeze: no parameter's name begins with '{}'", prefix), "names are as `tessera plan` lists them: embedding.weight, layers.0.pre_norm.weight, ...");
  }
}

void Store::add_unit(const std::string& unit, const std::string& prefix, const ParamTable& params, const BufferTable& buffers) {
  auto& groups = units_[unit];
  const Mesh mesh = ranks_ ? ranks_->mesh() : Mesh{};
  const Place place = ranks_ ? ranks_->place() : Place{};
  for (const Param& param : params) {
    const bool experts = is_expert(param), trainable = this->trainable(prefix + param.name);
    FlatGroup* group = nullptr;
    for (FlatGroup* g : groups)
      if (g->experts == experts && g->fp32 == param.fp32 && g->decay == param.decay && g->trainable == trainable) group = g;
    if (!group) {
      group = &groups_.emplace_back(FlatGroup{.unit = unit, .experts = experts, .fp32 = param.fp32, .decay = param.decay, .trainable = trainable});
      groups.push_back(group);
    }
    const int64_t end = group->slots.empty() ? 0 : aligned(group->slots.back().range().end);
    group->slots.push_back({.name = prefix + param.name, .row = &param, .part = LocalPart(param, mesh, place), .offset = end});
    slots_[prefix + param.name] = {group, group->slots.size() - 1};
  }
  const bool on_both_ends = unit == kEmbedding && mesh.pp > 1 && (plan_->head || plan_->model.tie_embeddings);
  for (FlatGroup* group : groups) lay_out(*group, on_both_ends);
  Buffers& own = buffers_[unit];
  for (const Buffer& buffer : buffers) own[buffer.name] = at::full(buffer.shape, buffer.init, at::TensorOptions(at::kFloat).device(device_));
}

// Cuts the buffer over its ranks, and lists what of it other ranks hold alike.
void Store::lay_out(FlatGroup& group, bool on_both_ends) {
  if (ranks_) group.shard = group.experts ? ranks_->expert_shard() : ranks_->shard();
  const int64_t ranks = group.shard ? group.shard->size() : 1, rank = group.shard ? group.shard->rank() : 0, end = group.slots.back().range().end;
  group.length = group.shard ? aligned((end + ranks - 1) / ranks) * ranks : end;
  group.own = {group.length / ranks * rank, group.length / ranks * (rank + 1)};
  group.data = at::zeros({group.own.end - group.own.begin}, at::TensorOptions(at::kFloat).device(device_));
  group.data.set_requires_grad(group.trainable);
  if (!ranks_) return;

  std::vector<Range> others;  // counted by another rank
  const Place& place = ranks_->place();
  for (const FlatGroup::Slot& slot : group.slots)
    for (const SharedElements& shared : slot.part.shared()) {
      const Range range = common({slot.offset + shared.elements.begin, slot.offset + shared.elements.end}, group.own);
      if (range.begin >= range.end) continue;
      const Range own{range.begin - group.own.begin, range.end - group.own.begin};
      const Group* with = shared.axis == Axis::kTensor ? ranks_->tensor_part(shared.size) : ranks_->expert_part(shared.axis, shared.size);
      const int64_t at = shared.axis == Axis::kTensor ? place.tp : shared.axis == Axis::kExpert ? place.ep : place.etp;
      group.shared.push_back({own, with});
      if (at % shared.size != 0) others.push_back(own);
    }
  const Range all{0, group.data.numel()};
  if (on_both_ends) {
    group.shared.push_back({all, ranks_->ends()});
    if (place.pp != 0) return;
  }
  std::sort(others.begin(), others.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  int64_t at = 0;
  for (const Range& range : others) {
    if (at < range.begin) group.counted.push_back({at, range.begin});
    at = std::max(at, range.end);
  }
  if (at < all.end) group.counted.push_back({at, all.end});
}

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
  return tessera::slot_view(flat(*group).detach(), *slot);
}

at::Tensor Store::parameter(const std::string& name) const { return slot_view(name, masters); }

at::Tensor Store::gradient(const std::string& name) {
  auto [group, slot] = find(name);
  if (!group->grad.defined() || !slot->has_grad) return at::zeros(slot->row->shape, group->data.options().requires_grad(false));
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

bool Store::trainable(const std::string& name) const { return !matches(name, freeze_); }

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
  for (FlatGroup& group : groups_)
    for (FlatGroup::Slot& slot : group.slots) slot.has_grad = false;
}

void Store::finish_grad() {
  at::NoGradGuard no_grad;
  finish_reduction();
  for (FlatGroup& group : groups_) {
    if (!group.trainable) continue;
    if (!group.grad.defined()) group.grad = at::zeros({group.data.numel()}, group.data.options().requires_grad(false));
    for (FlatGroup::Slot& slot : group.slots) {
      if (slot.has_grad) continue;
      const Range own = common(slot.range(), group.own);
      if (own.begin < own.end) group.grad.narrow(0, own.begin - group.own.begin, own.end - own.begin).zero_();
    }
  }
  if (!ranks_) return;
  ranks_->whereabouts().place = "the sum of gradients";
  std::vector<const Group*> partners;  // in the order of the plan, alike on all of them
  for (const FlatGroup& group : groups_)
    for (const FlatGroup::Shared& shared : group.shared)
      if (group.trainable && std::find(partners.begin(), partners.end(), shared.ranks) == partners.end()) partners.push_back(shared.ranks);
  for (const Group* partner : partners) {
    std::vector<at::Tensor> parts;
    for (FlatGroup& group : groups_)
      for (const FlatGroup::Shared& shared : group.shared)
        if (group.trainable && shared.ranks == partner) parts.push_back(group.grad.narrow(0, shared.range.begin, shared.range.end - shared.range.begin));
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
