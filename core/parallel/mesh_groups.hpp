// Where a rank lies in the mesh, and the groups it belongs to.
#pragma once
#include <c10/core/Device.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "parallel/backend_group.hpp"
#include "tessera/env.hpp"
#include "tessera/ranks.hpp"

namespace tessera {

// A rank's coordinates: rank = (((pp * dp_replicate + replicate) * dp_shard + shard) * cp + context) * tp + tensor. The expert axes are a second view
// of (shard, context, tensor): (copy * ep + expert) * etp + expert_tensor.
struct Place {
  int64_t rank = 0;
  int64_t pp = 0, dp_replicate = 0, dp_shard = 0, cp = 0, tp = 0;
  int64_t ep = 0, etp = 0, expert_copy = 0;
};
Place place_of(const Mesh& mesh, int64_t rank);
int64_t rank_at(const Mesh& mesh, const Place& place);  // by pp, dp_replicate, dp_shard, cp, tp
int64_t coordinate(const Place& place, Axis axis);
// What a group of `size` neighbouring ranks along an axis is called: "tp/2" where two such groups make the axis, "tp" where it is all tensor ranks.
std::string part_name(const Mesh& mesh, Axis axis, int64_t size);
// "rank 5 (pp 1, tp 1)": the axes that have more than one rank.
std::string place_text(const Mesh& mesh, int64_t rank);
// "dp_shard 2 x tp 2 (ep 2)": the axes that have more than one rank.
std::string mesh_text(const Mesh& mesh);

// This process among the others: how it reaches them. Made by a rendezvous, see parallel/rendezvous.hpp.
struct World {
  int64_t rank = 0, size = 1;
  int64_t local_rank = 0, local_size = 1;  // on this machine
  c10::intrusive_ptr<c10d::Store> store;   // shared by all ranks
  std::shared_ptr<gloo::transport::Device> device;
  at::Device compute = at::kCPU;           // alike on all ranks: groups go over NCCL where it is a GPU, else over Gloo
  std::chrono::milliseconds timeout{600000};
  bool shares_memory = true;               // with ranks of the same machine, where the system lets it
  std::shared_ptr<Whereabouts> whereabouts = std::make_shared<Whereabouts>();
};

// All groups of one rank of a mesh. A group of one rank is nullptr: nothing is to be exchanged.
class MeshGroups final : public BlockGroups {
 public:
  // Meets the other ranks; every rank of the mesh must come. Throws Error(kCollective).
  MeshGroups(World world, const Mesh& mesh);
  ~MeshGroups() override;

  const Mesh& mesh() const { return mesh_; }
  const Place& place() const { return place_; }
  const World& world() const { return world_; }
  Whereabouts& whereabouts() const { return *world_.whereabouts; }

  const Group* tensor() const override { return tensor_.get(); }
  const Group* context() const override { return context_.get(); }
  const Group* sequence() const override { return sequence_.get(); }
  const Group* experts() const override { return experts_.get(); }
  const Group* tensor_part(int64_t size) const override { return part(Axis::kTensor, size); }

  const Group* all() const { return all_.get(); }                        // the world
  const Group* shard() const { return shard_.get(); }                    // dp_shard x cp: they share the flat buffers of what is not an expert's
  const Group* expert_shard() const { return expert_shard_.get(); }      // the copies of an expert within a replica: they share its flat buffers
  const Group* replicate() const { return replicate_.get(); }            // dp_replicate
  const Group* data() const { return data_.get(); }                      // dp_replicate x dp_shard: each has rows of its own
  const Group* pipe() const { return pipe_.get(); }                      // pp
  const Group* stage() const { return stage_.get(); }                    // all ranks of this rank's pipeline stage
  const Group* ends() const { return ends_.get(); }                      // the first and the last stage; nullptr on those between
  // `size` neighbouring ranks along an axis that cuts parameters.
  const Group* part(Axis axis, int64_t size) const;
  // Every group made so far, for counters.
  std::vector<const Group*> list() const;

 private:
  std::unique_ptr<Group> make(const std::string& name, const std::vector<int64_t>& ranks) const;
  template <class F>
  std::vector<int64_t> where(F same) const;

  World world_;
  Mesh mesh_;
  Place place_;
  std::unique_ptr<Group> all_, tensor_, context_, sequence_, experts_, shard_, expert_shard_, replicate_, data_, pipe_, stage_, ends_;
  mutable std::map<std::pair<Axis, int64_t>, std::unique_ptr<Group>> parts_;
};

}  // namespace tessera
