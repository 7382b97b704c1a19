// Gathering a unit's parameters for use, and taking their gradients back.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "store/store.hpp"

namespace tessera {

class Lease {
 public:
  Lease(Store& store, FlatGroup& group) : store_(store), group_(group) {
    const auto dtype = group.compute.defined() ? group.compute.scalar_type() : at::kFloat;
    full_ = at::empty({0}, group.data.options().dtype(dtype).requires_grad(false));
    bytes_ = static_cast<size_t>(group.length) * full_.element_size();
    full_.unsafeGetTensorImpl()->set_sizes_contiguous({group.length});
    start();
  }

  // The whole buffer; waits until it is there.
  const at::Tensor& full() {
    start();
    if (flight_) {
      flight_->wait();
      flight_.reset();
    }
    return full_;
  }
  void start() {
    if (held_) return;
    held_ = true;
    auto* storage = full_.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(storage->allocator()->allocate(bytes_));
    storage->set_nbytes(bytes_);
    store_.refresh(group_);
    const c10::InferenceMode off(false);
    flight_ = group_.shard->start_all_gather(full_, group_.compute.defined() ? group_.compute : group_.data.detach());
  }
  void release() {
    if (!held_) return;
    full();
    held_ = false;
    auto* storage = full_.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(storage->allocator()->allocate(0));
    storage->set_nbytes(0);
  }

 private:
  Store& store_;
  FlatGroup& group_;
  at::Tensor full_;  // views of it live in the graph; its storage comes and goes
  size_t bytes_;
  bool held_ = false;
  FlightPtr flight_;
};

// What one layer's forward pass gave back, and the layer before it: in a backward pass the next one.
struct Leases {
  std::vector<LeasePtr> list;
  std::weak_ptr<Leases> before;  // gone where that layer's backward pass has run
};

// As autograd keeps them.
struct Kept : torch::CustomClassHolder {
  std::shared_ptr<Leases> leases;
};

namespace {

c10::IValue kept(std::shared_ptr<Leases> leases) {
  auto holder = c10::make_intrusive<Kept>();
  holder->leases = std::move(leases);
  return c10::IValue::make_capsule(holder);
}

Leases& leases_of(const c10::IValue& value) { return *c10::static_intrusive_pointer_cast<Kept>(value.toCapsule())->leases; }

}  // namespace

// Outputs are views of one group's compute buffer; backward adds each view's gradient into the flat fp32 gradient, which is
// where a reduction over data ranks will happen.
struct GatherFunction : public torch::autograd::Function<GatherFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& leaf, int64_t store, int64_t group_address, const LeasePtr& lease) {
    auto* group = reinterpret_cast<FlatGroup*>(group_address);
    ctx->saved_data["store"] = store;
    ctx->saved_data["group"] = group_address;
    if (lease) ctx->saved_data["lease"] = kept(std::make_shared<Leases>(Leases{.list = {lease}, .before = {}}));
    ctx->set_materialize_grads(false);
    torch::autograd::variable_list views;
    at::AutoDispatchBelowADInplaceOrView plain;  // the outputs are no tracked views of the leaf
    const at::Tensor& flat = lease ? lease->full() : group->compute.defined() ? group->compute : leaf;
    for (const FlatGroup::Slot& slot : group->slots) views.push_back(view_of(flat, slot));
    return views;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const at::NoGradGuard no_grad;
    reinterpret_cast<Store*>(ctx->saved_data["store"].toInt())->add_gradients(*reinterpret_cast<FlatGroup*>(ctx->saved_data["group"].toInt()), grads);
    if (const auto found = ctx->saved_data.find("lease"); found != ctx->saved_data.end()) leases_of(found->second).list[0]->release();
    return {at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

namespace {

// The identity; its gradient comes by before the layer's own backward pass, which needs the parameters again.
struct Refill : public torch::autograd::Function<Refill> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& y, const std::shared_ptr<Leases>& leases, int64_t whereabouts, const std::string& where) {
    ctx->saved_data["leases"] = kept(leases);
    ctx->saved_data["whereabouts"] = whereabouts;
    ctx->saved_data["where"] = where;
    return y.view_as(y);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    reinterpret_cast<Whereabouts*>(ctx->saved_data["whereabouts"].toInt())->place = ctx->saved_data["where"].toStringRef() + ", backward";
    const Leases& leases = leases_of(ctx->saved_data["leases"]);
    for (const LeasePtr& lease : leases.list) lease->full();
    if (const auto before = leases.before.lock())
      for (const LeasePtr& lease : before->list) lease->start();
    return {grads[0], at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

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

Store::~Store() = default;

const Weights& Store::plain(const std::string& unit) {
  auto [place, added] = plain_.try_emplace(unit);
  if (added) {
    const c10::InferenceMode off(false);
    const at::NoGradGuard no_grad;
    for (FlatGroup* group : units_.at(unit)) {
      const at::Tensor flat = group->compute.defined() ? group->compute : group->data.detach();
      for (const FlatGroup::Slot& slot : group->slots) place->second.add(view_of(flat, slot), slot.row);
    }
  }
  return place->second;
}

LeasePtr Store::lease(FlatGroup& group) {
  if (auto found = prefetched_.find(&group); found != prefetched_.end()) {
    LeasePtr ready = std::move(found->second);
    prefetched_.erase(found);
    return ready;
  }
  refresh(group);
  return std::make_shared<Lease>(*this, group);
}

void Store::prefetch(const std::string& unit) {
  const auto found = units_.find(unit);
  if (found == units_.end()) return;
  for (FlatGroup* group : found->second)
    if (group->shard && !prefetched_.contains(group)) {
      refresh(*group);
      prefetched_.emplace(group, std::make_shared<Lease>(*this, *group));
    }
}

Weights Store::gather(const std::string& unit, std::vector<LeasePtr>* leases) {
  const std::vector<FlatGroup*>& groups = units_.at(unit);
  bool whole = true;
  for (FlatGroup* group : groups) refresh(*group), whole = whole && !group->shard;
  Weights weights;
  if (whole && !at::GradMode::is_enabled()) {
    weights = plain(unit);
  } else {
    for (FlatGroup* group : groups) {
      LeasePtr taken;
      if (group->shard) {
        taken = lease(*group);
        if (leases) leases->push_back(taken);
      }
      std::vector<at::Tensor> views;
      if (at::GradMode::is_enabled()) {
        views = GatherFunction::apply(group->data, reinterpret_cast<int64_t>(this), reinterpret_cast<int64_t>(group), taken);
      } else {
        const at::Tensor flat = taken ? taken->full() : group->compute.defined() ? group->compute : group->data.detach();
        for (const FlatGroup::Slot& slot : group->slots) views.push_back(view_of(flat, slot));
      }
      for (size_t i = 0; i < views.size(); ++i) weights.add(views[i], group->slots[i].row);
    }
  }
  for (const auto& [name, tensor] : buffers_.at(unit)) weights.add_buffer(name, tensor);
  return weights;
}

void Store::give_back(const std::vector<LeasePtr>& leases) {
  for (const LeasePtr& lease : leases) lease->release();
}

at::Tensor Store::release(const at::Tensor& y, std::vector<LeasePtr> leases, const std::string& where) {
  auto taken = std::make_shared<Leases>();
  if (options_.reshard_after_forward) taken->list = std::move(leases);
  for (const LeasePtr& lease : taken->list) lease->release();
  taken->before = std::exchange(last_, taken);
  return Refill::apply(y, taken, reinterpret_cast<int64_t>(&ranks_->whereabouts()), where);
}

void Store::add_gradients(FlatGroup& group, const std::vector<at::Tensor>& grads) {
  last_.reset();
  if (group.shard) {
    finish_reduction();
    const auto dtype = options_.reduce_in_fp32 || !group.compute.defined() ? at::kFloat : group.compute.scalar_type();
    const auto options = group.data.options().requires_grad(false).dtype(dtype);
    const at::Tensor flat = at::empty({group.length}, options);
    int64_t end = 0;
    const auto fill = [&](int64_t until) {
      if (end < until) flat.narrow(0, end, until - end).zero_();
    };
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      fill(group.slots[i].offset);
      view_of(flat, group.slots[i]).copy_(grads[i]);
      end = group.slots[i].range().end;
    }
    fill(group.length);
    reduction_.group = &group;
    reduction_.part = dtype == at::kFloat && group.grad.defined() && !group.has_grad.front() ? group.grad : at::empty({group.size()}, options);
    reduction_.flight = group.shard->start_reduce_scatter(reduction_.part, flat);
    return;
  }
  if (!group.grad.defined()) group.grad = at::zeros({group.data.numel()}, group.data.options().requires_grad(false));
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined()) continue;
    at::Tensor into = view_of(group.grad, group.slots[i]);
    if (group.has_grad[i]) into.add_(grads[i]);
    else into.copy_(grads[i]);
    group.has_grad[i] = true;
  }
}

void Store::finish_reduction() {
  if (!reduction_.group) return;
  FlatGroup& group = *reduction_.group;
  reduction_.flight->wait();
  if (group.has_grad.front()) group.grad.add_(reduction_.part);
  else if (!group.grad.defined()) group.grad = reduction_.part.to(at::kFloat);
  else if (!group.grad.is_same(reduction_.part)) group.grad.copy_(reduction_.part);
  group.has_grad.assign(group.slots.size(), true);
  reduction_ = {};
}

}  // namespace tessera
