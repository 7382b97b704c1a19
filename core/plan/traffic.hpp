// What the ranks of a layout send each other in an optimizer step, from the plan's rows alone: params and their shards, flat buffers, the blocks' layouts
// and exchanges, accumulation, recomputation, the schedule of pipeline stages.
//
// The rule about data: every row of the batch is one document that fills it, without padding. Then all volumes are exact to the byte but those of rows
// that go to experts, for which even routing is expected. Shorter documents save halos, keys and values over cp, and add sums of the balance loss.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "plan/plan.hpp"

namespace tessera {

// By the counting of Group::sent_bytes.
struct TrafficRow {
  std::string group, collective;  // "tp" and "all_gather": as MeshGroups and Group name them
  int64_t calls = 0;
  int64_t bytes = 0;              // that the rank sends
  bool estimate = false;          // depends on the data, see above
};
struct Traffic {
  std::vector<TrafficRow> rows;   // by group, then collective
  int64_t bytes() const;
  std::map<std::string, int64_t> by_group() const;
};

// Of train_step on one rank of the mesh. The run's own sums, of signals and metrics, are a few bytes more.
Traffic plan_traffic(const ModelPlan& plan, const Config& config, const Mesh& mesh, int64_t rank);
// Of the first rank of each pipeline stage: the others differ by what an uneven cut of tokens, or of what ranks hold alike, leaves them.
std::vector<Traffic> plan_traffic(const ModelPlan& plan, const Config& config, const Mesh& mesh);

// The axis that a group's traffic counts for. Parts of an axis and the ends of the pipeline are their axis's; dp_shard x cp and the copies of experts are
// dp_shard's, ep x etp is ep's. cp x tp gathers whole documents where cp > 1 and is cp's then, else tp's; dp_replicate x dp_shard counts targets and is
// dp_replicate's where that is > 1, else dp_shard's. Sums over a whole stage or the world are nobody's: "all".
std::string axis_of(const std::string& group, const Mesh& mesh);
std::map<std::string, int64_t> by_axis(const std::map<std::string, int64_t>& by_group, const Mesh& mesh);

// What a pipeline rank tells the others of its losses.
inline constexpr int64_t kLossReportBytes = 1 << 14;

}  // namespace tessera
