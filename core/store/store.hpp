// The parameter store: fp32 master values in flat buffers, their gradients and optimizer slots, and the views that a layer runs on.
// Over several ranks a store holds the units of its pipeline stage, of each parameter the part that tensor and expert axes leave it, and of each flat
// buffer its share among the data ranks.
#pragma once
#include <ATen/core/Tensor.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "plan/buffers.hpp"
#include "tessera/weights.hpp"

namespace tessera {

// One flat buffer and its tensors, of what this rank holds of it.
struct FlatGroup : FlatBuffer {
  explicit FlatGroup(FlatBuffer layout) : FlatBuffer(std::move(layout)), has_grad(slots.size(), false) {}
  const Group* shard = nullptr;  // the ranks that share the buffer; nullptr: it is whole here
  at::Tensor data;            // fp32, master
  at::Tensor compute;         // in the compute dtype; undefined when the master itself is computed with
  bool stale = true;          // compute must be refreshed from data
  at::Tensor grad;            // fp32; allocated with the first backward pass
  at::Tensor exp_avg, exp_avg_sq;  // fp32; allocated with the first optimizer step
  std::vector<bool> has_grad;      // by slot: written since the last zero_grad
};

// A parameter's part in a tensor of a whole flat buffer.
inline at::Tensor view_of(const at::Tensor& flat, const FlatBuffer::Slot& slot) { return flat.narrow(0, slot.offset, slot.part.size()).view(slot.part.shape()); }

// Which tensor of a flat buffer is meant.
using Flat = std::function<at::Tensor&(FlatGroup&)>;
inline at::Tensor& masters(FlatGroup& group) { return group.data; }
inline at::Tensor& gradients(FlatGroup& group) { return group.grad; }

struct StoreOptions {
  bool reshard_after_forward = true;  // a gathered buffer is given back after the forward pass and gathered again for the backward pass
  bool reduce_in_fp32 = true;         // else gradients are summed over ranks in the compute dtype
};

// A flat buffer gathered from its ranks for one use.
class Lease;
struct Leases;
using LeasePtr = std::shared_ptr<Lease>;

class Store {
 public:
  // Allocates the masters, uninitialised, where this machine's memory can hold them (require_memory). `freeze` holds names or prefixes of parameters that are not trained. The plan must outlive the store, and `groups`, which is nullptr in a single process.
  Store(const ModelPlan& plan, at::Device device, at::ScalarType compute_dtype, const std::vector<std::string>& freeze = {}, const MeshGroups* groups = nullptr,
        const StoreOptions& options = {});
  ~Store();
  Store(const Store&) = delete;

  // Initial values from the rows. They depend on (seed, tensor name, element index) only.
  void initialise(int64_t seed);

  // By the keys of units, see plan/buffers.hpp.
  bool holds(const std::string& unit) const { return units_.contains(unit); }

  // Handles of one unit's parameters in the compute dtype, and its buffers. Under grad mode the views are differentiable and
  // backward adds into the flat gradients (in fp32). `unit` is the unit's own key (a layer that shares weights passes its owner's prefix).
  // Over data ranks that share the unit its buffers are gathered; `leases` then gets them, to be released when the forward pass is over.
  Weights gather(const std::string& unit, std::vector<LeasePtr>* leases = nullptr);
  // Begins to gather a unit that will be asked for next.
  void prefetch(const std::string& unit);
  // Gives the gathered memory back for good: where the backward pass needs no parameter.
  void give_back(const std::vector<LeasePtr>& leases);
  // Gives the gathered memory back until the gradient of the result comes by, when it is gathered again. `where` is told to the errors of collectives.
  at::Tensor release(const at::Tensor& y, std::vector<LeasePtr> leases, const std::string& where);

  // fp32 views of the masters, gradients and buffers by full checkpoint name, where this rank holds them whole. Throws Error(kRuntime) for an unknown name.
  at::Tensor parameter(const std::string& name) const;
  at::Tensor gradient(const std::string& name);  // zeros where no gradient arrived
  at::Tensor buffer(const std::string& name) const;
  Buffers& buffers(const std::string& prefix) { return buffers_.at(prefix); }
  bool trainable(const std::string& name) const;  // of any parameter of the plan
  // View of a parameter's part of some flat buffer of its group: gradients, optimizer slots.
  at::Tensor slot_view(const std::string& name, const Flat& flat) const;

  // Over several ranks. Whether this rank's stage has the parameter or buffer at all.
  bool has(const std::string& name) const;
  // The stretches of a parameter's global elements that lie here: their first global element, and the values. `counted`: only those that this rank
  // counts among all that hold them alike, so that the ranks together visit every element once.
  void for_stretches(const std::string& name, const Flat& flat, const std::function<void(int64_t global, const at::Tensor& values)>& visit, bool counted = false) const;
  // Writes what lies here of values whose first element is the global element `first`.
  void assign(const std::string& name, const Flat& flat, const at::Tensor& values, int64_t first = 0);
  // The whole tensor in its global shape, on every rank. All ranks must call it.
  at::Tensor whole(const std::string& name, const Flat& flat = masters) const;

  void zero_grad();
  // Completes the flat gradients: zeroes the slots that no backward pass reached, and adds up what other ranks hold alike.
  void finish_grad();
  // To be called after masters were written from outside (load, optimizer step).
  void touch();

  std::deque<FlatGroup>& groups() { return groups_; }
  const ModelPlan& plan() const { return *plan_; }
  const MeshGroups* ranks() const { return ranks_; }
  at::Device device() const { return device_; }
  at::ScalarType compute_dtype() const { return compute_dtype_; }
  int64_t bytes() const;  // of masters, gradients, optimizer slots, compute copies and buffers as allocated now

 private:
  friend class Lease;
  friend struct GatherFunction;
  const Group* partners(const FlatBuffer::Shared& shared) const;
  void refresh(FlatGroup& group);                  // its compute copy, where it has one
  const Weights& plain(const std::string& unit);   // a unit's parameters outside grad mode, where nothing is gathered
  LeasePtr lease(FlatGroup& group);                // prefetched, or begun now
  void add_gradients(FlatGroup& group, const std::vector<at::Tensor>& grads);
  void finish_reduction();
  std::pair<FlatGroup*, FlatGroup::Slot*> find(const std::string& name) const;

  const ModelPlan* plan_;
  at::Device device_;
  at::ScalarType compute_dtype_;
  std::vector<std::string> freeze_;
  const MeshGroups* ranks_;
  StoreOptions options_;
  std::deque<FlatGroup> groups_;
  std::map<std::string, std::vector<FlatGroup*>, std::less<>> units_;
  std::map<std::string, std::pair<FlatGroup*, size_t>, std::less<>> slots_;
  std::map<std::string, Buffers, std::less<>> buffers_;
  std::map<std::string, Weights, std::less<>> plain_;  // made at first use
  std::map<FlatGroup*, LeasePtr> prefetched_;
  std::shared_ptr<Leases> last_;  // of the running forward pass: what the backward pass needs first
  struct Reduction {
    FlatGroup* group = nullptr;
    at::Tensor part;
    FlightPtr flight;
  };
  Reduction reduction_;  // one is in flight while the layer before computes
};

}  // namespace tessera
