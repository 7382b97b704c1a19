#include "report/page.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "report/assets.hpp"

namespace tessera {

using nlohmann::json;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr size_t kMostColumns = 6;         // of keys in the table
constexpr double kMostPoints = 400;        // of a curve
constexpr double kMostNumbers = 150'000;   // of all curves together, and of all expert loads: some 1 MB each

// Six digits: what is drawn is not wider.
json drawn(double value) {
  if (!std::isfinite(value)) return nullptr;
  return std::strtod(fmt::format("{:.6g}", value).c_str(), nullptr);
}
json drawn(const std::vector<double>& values) {
  json out = json::array();
  for (const double value : values) out.push_back(drawn(value));
  return out;
}
json summary_json(const Summary& s) { return {s.n, drawn(s.mean), drawn(s.half), drawn(s.low), drawn(s.high)}; }

// Means of what is finite, a stretch of `width` steps each.
class Stretches {
 public:
  Stretches(const Metrics& metrics, double width, size_t number) : number_(number) {
    for (const double step : metrics.steps) of_.push_back(static_cast<size_t>(std::max(0.0, std::floor((step - 1) / width))));
  }
  std::vector<double> means(const std::vector<double>& values) const {
    std::vector<double> sums(number_), counts(number_);
    for (size_t i = 0; i < values.size() && i < of_.size(); ++i)
      if (std::isfinite(values[i]) && of_[i] < number_) sums[of_[i]] += values[i], ++counts[of_[i]];
    for (size_t i = 0; i < number_; ++i) sums[i] = counts[i] > 0 ? sums[i] / counts[i] : kNan;
    return sums;
  }

 private:
  std::vector<size_t> of_;
  size_t number_;
};

// Over seeds, at each point: mean, least, greatest of those that have one.
struct Band {
  std::vector<double> mean, low, high;
  explicit Band(const std::vector<std::vector<double>>& seeds) {
    for (size_t i = 0; i < seeds.front().size(); ++i) {
      std::vector<double> at;
      for (const auto& seed : seeds) at.push_back(seed[i]);
      const Summary s = summarise(at);
      mean.push_back(s.mean), low.push_back(s.low), high.push_back(s.high);
    }
  }
};

bool is_drawn(const std::string& column) {
  static const std::set<std::string> left_out{"tokens", "input_s", "save_s", "save_wait_s", "total_loss"};
  return column.find('.') == std::string::npos && !left_out.contains(column);
}

json curves(const RunComparison& c, const RunGroup& group, double width, size_t number) {
  std::set<std::string> names;
  std::vector<size_t> runs;
  for (const size_t run : group.counted) {
    if (!c.runs[run].metrics.steps.empty()) runs.push_back(run);
    for (const auto& [name, column] : c.runs[run].metrics.columns)
      if (is_drawn(name) && std::any_of(column.begin(), column.end(), [](double v) { return std::isfinite(v); })) names.insert(name);
  }
  if (runs.empty()) return json::object();
  const auto over_seeds = [&](const auto& values) {
    std::vector<std::vector<double>> seeds;
    for (const size_t run : runs) seeds.push_back(Stretches(c.runs[run].metrics, width, number).means(values(c.runs[run])));
    return Band(seeds);
  };
  const auto column = [](const char* name) {
    return [name](const RunData& run) {
      const std::vector<double>* found = run.metrics.column(name);
      return found ? *found : std::vector<double>();
    };
  };
  json out{{"step", drawn(over_seeds([](const RunData& run) { return run.metrics.steps; }).mean)},
           {"tokens", drawn(over_seeds(column("tokens")).mean)},
           {"flops", drawn(over_seeds([](const RunData& run) { return spent_flops(run); }).mean)},
           {"seconds", drawn(over_seeds([](const RunData& run) { return elapsed_seconds(run.metrics); }).mean)}};
  for (const std::string& name : names) {
    const Band band = over_seeds(column(name.c_str()));
    out["series"][name]["mean"] = drawn(band.mean);
    if (runs.size() > 1) out["series"][name]["low"] = drawn(band.low), out["series"][name]["high"] = drawn(band.high);
  }
  return out;
}

// Loads over their mean, of the first counted run of a group.
json loads(const RunComparison& c, const RunGroup& group, double all_experts) {
  json out = json::object();
  if (group.counted.empty()) return out;
  for (const auto& [name, load] : c.runs[group.counted.front()].metrics.loads) {
    const size_t wanted = static_cast<size_t>(std::clamp(kMostNumbers / all_experts, 4.0, 120.0));
    const size_t every = (load.steps.size() + wanted - 1) / wanted;
    json steps = json::array(), shares = json::array();
    for (size_t i = 0; i < load.steps.size(); i += every) {
      double sum = 0;
      for (const double count : load.counts[i]) sum += std::isfinite(count) ? count : 0;
      json share = json::array();
      for (const double count : load.counts[i]) share.push_back(std::isfinite(count) && sum > 0 ? std::round(1e3 * count * static_cast<double>(load.counts[i].size()) / sum) / 1e3 : 0);
      steps.push_back(load.steps[i]), shares.push_back(share);
    }
    if (!steps.empty() && !shares.front().empty()) out[name] = {{"steps", steps}, {"share", shares}};
  }
  return out;
}

double number(const json& from, const char* table, const char* key) {
  const json* at = &from;
  if (*table) {
    const auto found = from.find(table);
    if (found == from.end() || !found->is_object()) return 0;
    at = &*found;
  }
  if (!at->is_object()) return 0;
  const auto found = at->find(key);
  return found != at->end() && found->is_number() ? found->get<double>() : 0;
}

std::string text(const json& from, const char* key) {
  const auto found = from.find(key);
  return found != from.end() && found->is_string() ? found->get<std::string>() : "";
}

json bench_json(const json& bench, bool with_file) {
  const std::filesystem::path file(text(bench, "config"));
  std::string label = file.filename() == "config.toml" && file.has_parent_path() ? file.parent_path().filename() / file.filename() : file.filename();
  if (with_file) label += fmt::format(" in {}", text(bench, "file"));
  json out{{"label", label}, {"about", fmt::format("{} on {}, {:.6g} parameters{}", text(bench, "dtype"), text(bench, "device"), number(bench, "", "params"), text(bench, "routing") == "balanced" ? ", balanced routing" : "")},
           {"peak_bytes", number(bench, "", "peak_bytes")}, {"matrix_peak", number(bench, "", "matrix_peak_flops_per_s")}, {"memory_peak", number(bench, "", "memory_peak_bytes_per_s")}};
  for (const char* key : {"tokens_per_s", "step_s", "flops_per_s"}) out["train"][key] = drawn(number(bench, "train", key));
  for (const char* key : {"tokens_per_s", "prefill_tokens_per_s"}) out["decode"][key] = drawn(number(bench, "decode", key));
  out["contexts"] = json::array();
  if (const auto contexts = bench.find("contexts"); contexts != bench.end() && contexts->is_array())
    for (const json& context : *contexts) {
      json row;
      for (const char* key : {"context", "prefill_tokens_per_s", "decode_tokens_per_s", "state_bytes"}) row[key] = drawn(number(context, "", key));
      out["contexts"].push_back(row);
    }
  out["parts"] = json::array();
  for (const json& part : bench["parts"]) {
    if (!part.is_object()) continue;
    json row{{"part", text(part, "part")}};
    for (const char* key : {"layers", "forward_s", "recompute_s", "backward_s", "flops", "bytes"}) row[key] = drawn(number(part, "", key));
    out["parts"].push_back(row);
  }
  return out;
}

json run_json(const RunData& run) {
  return {{"name", run.name}, {"folder", run.folder}, {"state", run.state}, {"error", run.error}, {"seed", run.seed ? json(*run.seed) : json()},
          {"lines", run.metrics.steps.size()}, {"config", run.config_text}, {"starts", run.starts}, {"match", run.match}, {"fitted", fitted_text(run)}};
}

json group_json(const RunGroup& group, const RunComparison& c) {
  const RunData& first = c.runs[group.runs.front()];
  json out{{"label", group.label}, {"values", group.values}, {"runs", group.runs}, {"counted", group.counted.size()}, {"unfinished", group.unfinished}, {"status", group.status},
           {"stack", json::array()}, {"elements", first.elements}, {"memory", first.memory}, {"summaries", json::array()}, {"by", json::object()}};
  for (const StackCell& cell : first.stack)
    out["stack"].push_back({{"symbol", cell.symbol}, {"block", cell.block}, {"type", cell.type}, {"elements", cell.elements}, {"stage", cell.stage}, {"head", cell.head}});
  for (const Summary& summary : group.summaries) out["summaries"].push_back(summary_json(summary));
  for (const auto& [name, parts] : group.by)
    for (const auto& [part, summary] : parts) out["by"][name][part] = summary_json(summary);
  return out;
}

std::string escaped(const std::string& plain) {
  std::string out;
  for (const char c : plain) out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : c == '"' ? "&quot;" : std::string(1, c);
  return out;
}

}  // namespace

json page_data(const RunComparison& c) {
  json out{{"notes", c.notes}, {"varied", c.varied}, {"most_columns", kMostColumns}, {"groups", json::array()}, {"runs", json::array()}, {"benches", json::array()},
           {"by_parts", by_parts(c)}, {"fronts", pareto_fronts(c)}, {"measures", json::array()}};
  for (const Measure& measure : measures()) out["measures"].push_back({{"name", measure.name}, {"title", measure.title}});
  double last = 1, columns = 1, experts = 1;
  for (const RunGroup& group : c.groups)
    for (const size_t index : group.counted) {
      const Metrics& metrics = c.runs[index].metrics;
      if (!metrics.steps.empty()) last = std::max(last, *std::max_element(metrics.steps.begin(), metrics.steps.end()));
      if (index != group.counted.front()) continue;
      for (const auto& [name, column] : metrics.columns) columns += is_drawn(name) ? (group.counted.size() > 1 ? 3 : 1) : 0;
      for (const auto& [name, load] : metrics.loads) experts += static_cast<double>(load.counts.front().size());
    }
  const double width = std::max(1.0, std::ceil(last / std::clamp(kMostNumbers / columns, 40.0, kMostPoints)));
  out["thinning"] = width > 1 ? fmt::format("Each point is the mean of {} steps.", width) : "Each point is one step.";
  for (const RunGroup& group : c.groups) {
    out["groups"].push_back(group_json(group, c));
    out["groups"].back()["curves"] = curves(c, group, width, static_cast<size_t>(std::ceil(last / width)));
    out["groups"].back()["loads"] = loads(c, group, experts);
  }
  for (const RunData& run : c.runs) out["runs"].push_back(run_json(run));
  std::set<std::string> files;
  for (const json& bench : c.benches) files.insert(text(bench, "file"));
  for (const json& bench : c.benches) out["benches"].push_back(bench_json(bench, files.size() > 1));
  const auto plural = [](size_t n, const char* one, const char* many) { return fmt::format("{} {}", n, n == 1 ? one : many); };
  out["summary"] = plural(c.runs.size(), "run", "runs") + " of " + plural(c.groups.size(), "configuration", "configurations") +
                   (c.benches.empty() ? "" : ", " + plural(c.benches.size(), "measurement of throughput", "measurements of throughput"));
  out["made"] = fmt::format("Made by Tessera {} at {:%Y-%m-%d %H:%M:%S} UTC. Charts by Chart.js, which is in this file.", TESSERA_VERSION, fmt::gmtime(std::time(nullptr)));
  return out;
}

std::string to_html(const RunComparison& comparison, const std::string& title, int64_t refresh_s) {
  // `<` would let data end the script it is in.
  std::string data;
  for (const char c : page_data(comparison).dump(-1, ' ', false, json::error_handler_t::replace)) data += c == '<' ? std::string("\\u003c") : std::string(1, c);
  const std::map<std::string_view, std::string_view> parts{{"STYLE", assets::kStyle}, {"LIBRARY", assets::kLibrary}, {"SCRIPT", assets::kScript}};
  std::string out;
  for (std::string_view page = assets::kPage; !page.empty();) {
    const size_t begin = page.find('@'), end = begin == std::string_view::npos ? begin : page.find('@', begin + 1);
    if (end == std::string_view::npos) return out += page;
    const std::string_view name = page.substr(begin + 1, end - begin - 1);
    out += page.substr(0, begin);
    if (name == "TITLE") out += escaped(title);
    else if (name == "DATA") out += data;
    else if (name == "REFRESH") out += refresh_s > 0 ? fmt::format("<meta http-equiv=\"refresh\" content=\"{}\">\n", refresh_s) : "";
    else out += parts.at(name);
    page = page.substr(end + 1);
  }
  return out;
}

}  // namespace tessera
