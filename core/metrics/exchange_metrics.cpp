#include "metrics/exchange_metrics.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "plan/traffic.hpp"

namespace tessera {

ExchangeMetrics::Totals ExchangeMetrics::totals() const {
  Totals totals;
  for (const Group* group : ranks_.list()) {
    (group == ranks_.pipe() ? totals.pipeline_wait_s : totals.wait_s) += group->waited_s();
    totals.sent_bytes[group->name()] += group->sent_bytes();
  }
  return totals;
}

void ExchangeMetrics::begin() { before_ = totals(); }

void ExchangeMetrics::end(nlohmann::json& line, double step_s) {
  Totals now = totals();
  for (auto& [group, bytes] : now.sent_bytes) bytes -= before_.sent_bytes[group];
  const double wait_s = now.wait_s - before_.wait_s, pipeline_wait_s = now.pipeline_wait_s - before_.pipeline_wait_s;
  line["wait_s"] = wait_s;
  line["pipeline_wait_s"] = pipeline_wait_s;
  line["sent_bytes"] = by_axis(now.sent_bytes, ranks_.mesh());

  ranks_.whereabouts().place = "the times of the ranks";
  const auto options = at::TensorOptions(at::kDouble).device(device_);
  const at::Tensor all = at::empty({ranks_.all()->size()}, options);
  ranks_.all()->all_gather(all, at::full({1}, step_s - wait_s - pipeline_wait_s, options));
  const at::Tensor host = all.to(at::kCPU);
  const double *first = host.const_data_ptr<double>(), *last = first + host.numel(), *most = std::max_element(first, last);
  const double mean = std::accumulate(first, last, 0.0) / static_cast<double>(host.numel());
  line["slowest_rank"] = most - first;
  line["slowest_ratio"] = mean > 0 ? *most / mean : 1.0;
}

}  // namespace tessera
