// The parameter store: fp32 master values in flat buffers, their gradients and optimizer slots, and the views that a layer runs on.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "plan/plan.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// One flat buffer: the parameters of one unit (a layer, the stem, a head's own) that are reduced, computed and decayed alike.
struct FlatGroup {
  std::string unit;           // prefix of the unit's tensor names
  bool experts = false;       // reduced over the expert data ranks, not all of them
  bool fp32 = false;          // computed in fp32 in every dtype
  bool decay = false;
  bool trainable = true;
  struct Slot {
    std::string name;         // full checkpoint name
    const Param* row = nullptr;
    int64_t offset = 0;       // elements
    bool has_grad = false;    // written since the last zero_grad
  };
  std::vector<Slot> slots;
  at::Tensor data;            // fp32 [n], master
  at::Tensor compute;         // [n] in the compute dtype; undefined when the master itself is computed with
  bool stale = true;          // compute must be refreshed from data
  at::Tensor grad;            // fp32 [n]; allocated with the first backward pass
  at::Tensor exp_avg, exp_avg_sq;  // fp32 [n]; allocated with the first optimizer step
};

class Store {
 public:
  // Allocates the masters, uninitialised, where this machine's memory can hold them (require_memory). `freeze` holds names or prefixes of parameters that are not trained. The plan must outlive the store.
  Store(const ModelPlan& plan, at::Device device, at::ScalarType compute_dtype, const std::vector<std::string>& freeze = {});
  Store(const Store&) = delete;

  // Initial values from the rows. They depend on (seed, tensor name, element index) only.
  void initialise(int64_t seed);

  // Handles of one unit's parameters in the compute dtype, and its buffers. Under grad mode the views are differentiable and
  // backward adds into the flat gradients (in fp32). `rows` are the unit's own rows (a layer that shares weights passes its owner's prefix).
  Weights gather(const std::string& prefix);

  // fp32 views of the masters, gradients and buffers by full checkpoint name. Throws Error(kRuntime) for an unknown name.
  at::Tensor parameter(const std::string& name) const;
  at::Tensor gradient(const std::string& name);  // zeros where no gradient arrived
  at::Tensor buffer(const std::string& name) const;
  Buffers& buffers(const std::string& prefix) { return buffers_.at(prefix); }
  bool trainable(const std::string& name) const;
  // View of a parameter's part of some flat buffer of its group: gradients, optimizer slots.
  at::Tensor slot_view(const std::string& name, const std::function<const at::Tensor&(const FlatGroup&)>& flat) const;

  void zero_grad();
  // Zeroes the slots that no backward pass reached, so that the flat gradients are complete.
  void finish_grad();
  // To be called after masters were written from outside (load, optimizer step).
  void touch();

  std::deque<FlatGroup>& groups() { return groups_; }
  const ModelPlan& plan() const { return *plan_; }
  at::Device device() const { return device_; }
  at::ScalarType compute_dtype() const { return compute_dtype_; }
  int64_t bytes() const;  // of masters, gradients, optimizer slots, compute copies and buffers as allocated now

 private:
  void add_unit(const std::string& prefix, const ParamTable& params, const BufferTable& buffers, const std::vector<std::string>& freeze);
  void refresh(FlatGroup& group);                    // its compute copy, where it has one
  const Weights& plain(const std::string& prefix);   // a unit's parameters outside grad mode
  std::pair<FlatGroup*, FlatGroup::Slot*> find(const std::string& name) const;

  const ModelPlan* plan_;
  at::Device device_;
  at::ScalarType compute_dtype_;
  std::deque<FlatGroup> groups_;
  std::map<std::string, std::vector<FlatGroup*>, std::less<>> units_;
  std::map<std::string, std::pair<FlatGroup*, size_t>, std::less<>> slots_;
  std::map<std::string, Buffers, std::less<>> buffers_;
  std::map<std::string, Weights, std::less<>> plain_;  // made at first use
};

}  // namespace tessera
