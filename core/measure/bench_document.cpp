#include "measure/bench_document.hpp"

#include <nlohmann/json.hpp>
#include <thread>

#include "metrics/machine.hpp"

namespace tessera {

using nlohmann::json;

namespace {

json to_json(const BenchResult& r) {
  json out{{"config", r.config}, {"dtype", r.dtype}, {"device", r.device}, {"routing", r.routing}, {"params", r.params}, {"peak_bytes", r.peak_bytes},
           {"train", {{"tokens_per_s", r.train_tokens_per_s}, {"step_s", r.train_step_s}, {"flops_per_s", r.train_flops_per_s}, {"samples_s", r.step_s.values},
                      {"quartiles_s", {r.step_s.quantile(0.25), r.step_s.quantile(0.75)}}, {"warm_up_steps", r.warm_up_steps}}},
           {"decode", {{"tokens_per_s", r.decode_tokens_per_s}, {"prefill_tokens_per_s", r.prefill_tokens_per_s}}},
           {"matrix_peak_flops_per_s", r.matrix_peak}, {"memory_peak_bytes_per_s", r.memory_peak}, {"parts", json::array()}, {"ranks", json::array()},
           {"contexts", json::array()}, {"unchecked", r.unchecked}};
  if (!r.no_input.empty()) out["no_input"] = r.no_input;
  if (r.predicted) out["predicted"] = {{"step_s", r.predicted->step_s}, {"peak_bytes", r.predicted->peak_bytes}, {"parts", r.predicted->parts}, {"notes", r.predicted->notes}};
  for (const ContextPoint& c : r.contexts)
    out["contexts"].push_back({{"context", c.context}, {"prefill_tokens_per_s", c.prefill_tokens_per_s}, {"decode_tokens_per_s", c.decode_tokens_per_s}, {"state_bytes", c.state_bytes}});
  for (const RankTime& t : r.ranks)
    out["ranks"].push_back({{"place", t.place}, {"compute_s", t.compute_s}, {"wait_s", t.wait_s}, {"pipeline_wait_s", t.pipeline_wait_s}, {"peak_bytes", t.peak_bytes},
                            {"sent_bytes", t.sent_bytes}, {"planned_bytes", t.planned_bytes}});
  for (const PartTime& p : r.parts)
    out["parts"].push_back({{"part", p.name}, {"layers", p.num_layers}, {"forward_s", p.forward_s}, {"recompute_s", p.recompute_s}, {"backward_s", p.backward_s},
                            {"flops", p.flops}, {"bytes", p.bytes}, {"state_bytes", p.state_bytes}, {"kept_bytes", p.kept_bytes}, {"working_bytes", p.working_bytes}});
  return out;
}

// As Google Benchmark's tools read it: a row a round, and the median.
json as_benchmarks(const std::vector<BenchResult>& results) {
  json rows = json::array();
  for (const BenchResult& r : results) {
    const std::string name = r.config + "/train_step";
    const auto row = [&](const std::string& suffix, double seconds) {
      return json{{"name", name + suffix}, {"run_name", name}, {"repetitions", r.step_s.values.size()}, {"threads", 1}, {"iterations", 1}, {"real_time", 1e3 * seconds}, {"cpu_time", 1e3 * seconds}, {"time_unit", "ms"}};
    };
    for (size_t i = 0; i < r.step_s.values.size(); ++i) {
      json one = row("", r.step_s.values[i]);
      one["run_type"] = "iteration", one["repetition_index"] = i;
      rows.push_back(std::move(one));
    }
    if (r.step_s.values.empty()) continue;
    json median = row("_median", r.step_s.median());
    median["run_type"] = "aggregate", median["aggregate_name"] = "median", median["aggregate_unit"] = "time";
    rows.push_back(std::move(median));
  }
  return rows;
}

}  // namespace

json bench_document(const std::vector<BenchResult>& results) {
  json out = results.size() == 1 ? to_json(results[0]) : json{{"results", json::array()}};
  if (results.size() > 1)
    for (const BenchResult& r : results) out["results"].push_back(to_json(r));
  out["context"] = {{"machine", machine_text()}, {"num_cpus", std::thread::hardware_concurrency()}, {"library_build_type", "release"}, {"executable", "tessera bench"}};
  out["benchmarks"] = as_benchmarks(results);
  return out;
}

}  // namespace tessera
