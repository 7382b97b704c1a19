#include "parallel/mesh_groups.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "parallel/mailboxes.hpp"
#include "tessera/error.hpp"

namespace tessera {

Place place_of(const Mesh& mesh, int64_t rank) {
  Place place{.rank = rank};
  place.tp = rank % mesh.tp, rank /= mesh.tp;
  place.cp = rank % mesh.cp, rank /= mesh.cp;
  place.dp_shard = rank % mesh.dp_shard, rank /= mesh.dp_shard;
  place.dp_replicate = rank % mesh.dp_replicate, rank /= mesh.dp_replicate;
  place.pp = rank;
  const int64_t within = (place.dp_shard * mesh.cp + place.cp) * mesh.tp + place.tp;
  place.etp = within % mesh.etp;
  place.ep = within / mesh.etp % mesh.ep;
  place.expert_copy = within / (mesh.etp * mesh.ep);
  return place;
}

int64_t rank_at(const Mesh& mesh, const Place& place) {
  return (((place.pp * mesh.dp_replicate + place.dp_replicate) * mesh.dp_shard + place.dp_shard) * mesh.cp + place.cp) * mesh.tp + place.tp;
}

int64_t coordinate(const Place& place, Axis axis) {
  switch (axis) {
    case Axis::kTensor: return place.tp;
    case Axis::kExpert: return place.ep;
    case Axis::kExpertTensor: return place.etp;
  }
  return 0;
}

std::string part_name(const Mesh& mesh, Axis axis, int64_t size) {
  if (axis == Axis::kTensor && size == mesh.tp) return "tp";
  return fmt::format("{}/{}", axis_name(axis), degree(mesh, axis) / size);
}

std::string place_text(const Mesh& mesh, int64_t rank) {
  const Place place = place_of(mesh, rank);
  std::vector<std::string> axes;
  for (const auto& [name, degree, at] : {std::tuple{"pp", mesh.pp, place.pp}, {"dp_replicate", mesh.dp_replicate, place.dp_replicate}, {"dp_shard", mesh.dp_shard, place.dp_shard},
                                         {"cp", mesh.cp, place.cp}, {"tp", mesh.tp, place.tp}})
    if (degree > 1) axes.push_back(fmt::format("{} {}", name, at));
  return axes.empty() ? fmt::format("rank {}", rank) : fmt::format("rank {} ({})", rank, fmt::join(axes, ", "));
}

std::string mesh_text(const Mesh& mesh) {
  std::vector<std::string> axes, experts;
  for (const auto& [name, degree] : {std::pair{"pp", mesh.pp}, {"dp_replicate", mesh.dp_replicate}, {"dp_shard", mesh.dp_shard}, {"cp", mesh.cp}, {"tp", mesh.tp}})
    if (degree > 1) axes.push_back(fmt::format("{} {}", name, degree));
  for (const auto& [name, degree] : {std::pair{"ep", mesh.ep}, {"etp", mesh.etp}})
    if (degree > 1) experts.push_back(fmt::format("{} {}", name, degree));
  const std::string text = axes.empty() ? "one rank" : fmt::format("{}", fmt::join(axes, " x "));
  return experts.empty() ? text : fmt::format("{} ({})", text, fmt::join(experts, " x "));
}

template <class F>
std::vector<int64_t> MeshGroups::where(F same) const {
  std::vector<int64_t> ranks;
  for (int64_t rank = 0; rank < mesh_.size(); ++rank)
    if (same(place_of(mesh_, rank))) ranks.push_back(rank);
  return ranks;
}

std::unique_ptr<Group> MeshGroups::make(const std::string& name, const std::vector<int64_t>& ranks) const {
  if (ranks.size() < 2) return nullptr;
  int64_t here = -1;
  for (size_t i = 0; i < ranks.size(); ++i)
    if (ranks[i] == place_.rank) here = static_cast<int64_t>(i);
  if (here < 0) return nullptr;
  const auto size = static_cast<int64_t>(ranks.size());
  try {
    const auto store = c10::make_intrusive<c10d::PrefixStore>(fmt::format("{}/{}/", name, fmt::join(ranks, "-")), world_.store);
    if (world_.compute.is_cuda()) return make_backend_group(name, ranks, here, world_.whereabouts, nccl_backend(store, here, size, world_.compute, world_.timeout));
    auto boxes = world_.shares_memory ? Mailboxes::meet(store, here, size, world_.timeout) : nullptr;
    return make_pairwise_group(name, ranks, here, world_.whereabouts, gloo_backend(store, here, size, world_.device, world_.timeout), std::move(boxes));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string why = error.what();
    throw Error(ExitCode::kCollective, fmt::format("rank {} could not meet ranks {} of {}: {}", place_.rank, fmt::join(ranks, ", "), name, why.substr(0, why.find('\n'))));
  }
}

MeshGroups::MeshGroups(World world, const Mesh& mesh) : world_(std::move(world)), mesh_(mesh), place_(place_of(mesh, world_.rank)) {
  const Place& p = place_;
  // The ranks that share one micro-batch's rows or parameters lie within one replica of one stage.
  const auto replica = [&p](const Place& o) { return o.pp == p.pp && o.dp_replicate == p.dp_replicate; };
  all_ = make("world", where([](const Place&) { return true; }));
  pipe_ = make("pp", where([&](const Place& o) { return o.dp_replicate == p.dp_replicate && o.dp_shard == p.dp_shard && o.cp == p.cp && o.tp == p.tp; }));
  stage_ = make("stage", where([&](const Place& o) { return o.pp == p.pp; }));
  if (mesh_.pp > 1)
    ends_ = make("ends", where([&](const Place& o) {
                   return (o.pp == 0 || o.pp == mesh_.pp - 1) && o.dp_replicate == p.dp_replicate && o.dp_shard == p.dp_shard && o.cp == p.cp && o.tp == p.tp;
                 }));
  replicate_ = make("dp_replicate", where([&](const Place& o) { return o.pp == p.pp && o.dp_shard == p.dp_shard && o.cp == p.cp && o.tp == p.tp; }));
  data_ = make("dp_replicate x dp_shard", where([&](const Place& o) { return o.pp == p.pp && o.cp == p.cp && o.tp == p.tp; }));
  shard_ = make(mesh_.cp > 1 ? "dp_shard x cp" : "dp_shard", where([&](const Place& o) { return replica(o) && o.tp == p.tp; }));
  sequence_ = make("cp x tp", where([&](const Place& o) { return replica(o) && o.dp_shard == p.dp_shard; }));
  context_ = make("cp", where([&](const Place& o) { return replica(o) && o.dp_shard == p.dp_shard && o.tp == p.tp; }));
  tensor_ = make("tp", where([&](const Place& o) { return replica(o) && o.dp_shard == p.dp_shard && o.cp == p.cp; }));
  experts_ = make("ep", where([&](const Place& o) { return replica(o) && o.expert_copy == p.expert_copy; }));
  expert_shard_ = make("expert copies", where([&](const Place& o) { return replica(o) && o.ep == p.ep && o.etp == p.etp; }));
}

MeshGroups::~MeshGroups() = default;

const Group* MeshGroups::part(Axis axis, int64_t size) const {
  if (size < 2) return nullptr;
  if (axis == Axis::kTensor && size == mesh_.tp) return tensor();
  auto [found, added] = parts_.try_emplace({axis, size});
  const Place& p = place_;
  const auto aside = [&](const Place& o) {  // o differs along the axis at most
    if (o.pp != p.pp || o.dp_replicate != p.dp_replicate) return false;
    if (axis == Axis::kTensor) return o.dp_shard == p.dp_shard && o.cp == p.cp;
    return o.expert_copy == p.expert_copy && (axis == Axis::kExpert ? o.etp == p.etp : o.ep == p.ep);
  };
  if (added)
    found->second = make(part_name(mesh_, axis, size), where([&](const Place& o) { return aside(o) && coordinate(o, axis) / size == coordinate(p, axis) / size; }));
  return found->second.get();
}

std::vector<const Group*> MeshGroups::list() const {
  std::vector<const Group*> groups;
  for (const auto* group : {&all_, &tensor_, &context_, &sequence_, &experts_, &shard_, &expert_shard_, &replicate_, &data_, &pipe_, &stage_, &ends_})
    if (*group) groups.push_back(group->get());
  for (const auto& [key, group] : parts_)
    if (group) groups.push_back(group.get());
  return groups;
}

}  // namespace tessera
