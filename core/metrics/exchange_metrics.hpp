// What a step's metrics say of the exchanges between ranks.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "parallel/mesh_groups.hpp"

namespace tessera {

// What a rank's groups did since the start, or between two moments.
struct Exchanged {
  double wait_s = 0, pipeline_wait_s = 0;     // in collectives; for neighbouring pipeline stages
  std::map<std::string, int64_t> sent_bytes;  // by group
};
Exchanged exchanged(const MeshGroups& ranks);
Exchanged operator-(Exchanged now, const Exchanged& before);

class ExchangeMetrics {
 public:
  // `ranks` has several ranks and outlives this. `planned_bytes`: what plan_traffic says that this rank sends in a step, by group.
  ExchangeMetrics(const MeshGroups& ranks, at::Device device, const std::map<std::string, int64_t>& planned_bytes);

  // Before a step.
  void begin() { before_ = exchanged(ranks_); }
  // After it, on every rank: adds `compute_s`, `wait_s` and `pipeline_wait_s`, which with `input_s` make up the step, `sent_bytes` and `planned_bytes` by axis,
  // `slowest_rank` and `slowest_ratio` to the line. `step_s`: seconds since begin(), `input_s` of them for the batch. All are this rank's, but the slowest rank is
  // the one that took most time beside its waits, and the ratio is to the mean's.
  void end(nlohmann::json& line, double step_s, double input_s);

 private:
  const MeshGroups& ranks_;
  at::Device device_;
  std::map<std::string, int64_t> planned_bytes_;  // by axis
  Exchanged before_;
};

}  // namespace tessera
