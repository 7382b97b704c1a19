#include "metrics/exchange_metrics.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "plan/traffic.hpp"

namespace tessera {

Exchanged exchanged(const MeshGroups& ranks) {
  Exchanged all;
  for (const Group* group : ranks.list()) {
    (group == ranks.pipe() ? all.pipeline_wait_s : all.wait_s) += group->waited_s();
    all.sent_bytes[group->name()] += group->sent_bytes();
  }
  return all;
}

Exchanged operator-(Exchanged now, const Exchanged& before) {
  now.wait_s -= before.wait_s;
  now.pipeline_wait_s -= before.pipeline_wait_s;
  for (const auto& [group, bytes] : before.sent_bytes) now.sent_bytes[group] -= bytes;
  return now;
}

ExchangeMetrics::ExchangeMetrics(const MeshGroups& ranks, at::Device device, const std::map<std::string, int64_t>& planned_bytes)
    : ranks_(ranks), device_(device), planned_bytes_(by_axis(planned_bytes, ranks.mesh())) {}

void ExchangeMetrics::end(nlohmann::json& line, double step_s, double input_s) {
  const Exchanged step = exchanged(ranks_) - before_;
  const double own_s = step_s - step.wait_s - step.pipeline_wait_s;
  line["compute_s"] = own_s - input_s;
  line["wait_s"] = step.wait_s;
  line["pipeline_wait_s"] = step.pipeline_wait_s;
  line["sent_bytes"] = by_axis(step.sent_bytes, ranks_.mesh());
  line["planned_bytes"] = planned_bytes_;

  ranks_.whereabouts().place = "the times of the ranks";
  const auto options = at::TensorOptions(at::kDouble).device(device_);
  const at::Tensor all = at::empty({ranks_.all()->size()}, options);
  ranks_.all()->all_gather(all, at::full({1}, own_s, options));
  const at::Tensor host = all.to(at::kCPU);
  const double *first = host.const_data_ptr<double>(), *last = first + host.numel(), *most = std::max_element(first, last);
  const double mean = std::accumulate(first, last, 0.0) / static_cast<double>(host.numel());
  line["slowest_rank"] = most - first;
  line["slowest_ratio"] = mean > 0 ? *most / mean : 1.0;
}

}  // namespace tessera
