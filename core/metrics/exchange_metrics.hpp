// What a step's metrics say of the exchanges between ranks.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "parallel/mesh_groups.hpp"

namespace tessera {

class ExchangeMetrics {
 public:
  // `ranks` has several ranks and outlives this.
  ExchangeMetrics(const MeshGroups& ranks, at::Device device) : ranks_(ranks), device_(device) {}

  // Before a step.
  void begin();
  // After it, on every rank: adds `wait_s`, `pipeline_wait_s`, `sent_bytes` by axis, `slowest_rank` and `slowest_ratio` to the line. `step_s`: seconds since
  // begin(). The waits and bytes are this rank's; the slowest rank is the one that took most time beside its waits, and the ratio is to the mean's.
  void end(nlohmann::json& line, double step_s);

 private:
  struct Totals {
    double wait_s = 0, pipeline_wait_s = 0;
    std::map<std::string, int64_t> sent_bytes;  // by group
  };
  Totals totals() const;

  const MeshGroups& ranks_;
  at::Device device_;
  Totals before_;
};

}  // namespace tessera
