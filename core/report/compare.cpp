// Grouping, statistics and notes.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <boost/math/distributions/students_t.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "report/tables.hpp"

namespace tessera {

using nlohmann::json;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr const char* kPattern = "model.hybrid_override_pattern";

double last_of(const std::vector<double>& values) { return values.empty() ? kNan : values.back(); }

// The newest finite value of a column. A run whose loss is not finite at its end has none: an earlier one would flatter it.
double newest(const RunData& run, const char* name) {
  const std::vector<double>* loss = run.metrics.column("loss");
  const std::vector<double>* column = run.metrics.column(name);
  if (!column || (loss && !std::isfinite(loss->back()))) return kNan;
  const auto found = std::find_if(column->rbegin(), column->rend(), [](double v) { return std::isfinite(v); });
  return found == column->rend() ? kNan : *found;
}

double last_losses(const RunData& run) {
  constexpr ptrdiff_t kLast = 10;
  const std::vector<double>* loss = run.metrics.column("loss");
  if (!loss || !std::isfinite(loss->back())) return kNan;
  std::vector<double> last(loss->end() - std::min<ptrdiff_t>(kLast, std::ssize(*loss)), loss->end());
  std::erase_if(last, [](double v) { return !std::isfinite(v); });
  return std::accumulate(last.begin(), last.end(), 0.0) / static_cast<double>(last.size());
}

double median_rate(const RunData& run) {
  const std::vector<double>* rate = run.metrics.column("tokens_per_s");
  if (!rate) return kNan;
  std::vector<double> values = *rate;
  std::erase_if(values, [](double v) { return !std::isfinite(v); });
  if (values.empty()) return kNan;
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Keys by which runs of one experiment may differ: how it is named, repeated, saved and watched.
bool tells_apart(const std::string& key) {
  for (const char* table : {"run.", "metrics.", "profiling.", "checkpoint."})
    if (key.starts_with(table)) return false;
  return key != "training.seed";
}

std::string value_of(const RunData& run, const std::string& key) {
  const auto found = run.keys.find(key);
  return found == run.keys.end() ? "" : found->second;
}

std::string group_key(const RunData& run) {
  std::string key;
  for (const auto& [name, value] : run.keys)
    if (tells_apart(name)) key += fmt::format("{}={}\n", name, value);
  return key.empty() ? "run " + run.folder : key;
}

// A block that a pattern does not use has no keys, which says no more than the pattern does; nor do the keys that a trial without a configuration does not set.
std::vector<std::string> varied_keys(const std::vector<RunData>& runs) {
  std::map<std::string, std::set<std::string>> values;
  std::map<std::string, size_t> said;  // by runs with a configuration
  size_t configurations = 0;
  for (const RunData& run : runs) {
    configurations += run.configured;
    for (const auto& [key, value] : run.keys)
      if (tells_apart(key)) values[key].insert(value), said[key] += run.configured;
  }
  std::vector<std::string> varied;
  for (const auto& [key, different] : values) {
    const bool of_a_block = key.starts_with("blocks.") || key.starts_with("symbols.") || key.starts_with("heads.");
    if (different.size() > 1 || (!of_a_block && said[key] < configurations)) varied.push_back(key);
  }
  std::stable_partition(varied.begin(), varied.end(), [](const std::string& key) { return key == kPattern; });
  return varied;
}

void label(RunComparison& c) {
  std::set<std::string> seen;
  for (RunGroup& group : c.groups) {
    const RunData& first = c.runs[group.runs.front()];
    constexpr size_t kMost = 4;
    for (size_t i = 0; i < c.varied.size(); ++i) {
      group.values.push_back(value_of(first, c.varied[i]));
      if (i >= kMost || group.values.back().empty()) continue;
      const std::string word = c.varied[i] == kPattern ? group.values.back() : fmt::format("{}={}", c.varied[i].substr(c.varied[i].rfind('.') + 1), group.values.back());
      group.label += (group.label.empty() ? "" : " ") + word;
    }
    if (group.label.empty()) group.label = first.name;
    if (!seen.insert(group.label).second) group.label += fmt::format(" ({})", first.name), seen.insert(group.label);
  }
}

void count(const RunComparison& c, RunGroup& group) {
  for (const size_t run : group.runs)
    if (c.runs[run].done()) group.counted.push_back(run);
  group.unfinished = group.counted.empty();
  if (group.unfinished) group.counted = group.runs;
  std::map<std::string, size_t> others;
  for (const size_t run : group.runs)
    if (!c.runs[run].done()) ++others[c.runs[run].state];
  group.status = group.unfinished ? "" : fmt::format("{}{}", group.counted.size(), others.empty() ? "" : " done");
  for (const auto& [state, number] : others) group.status += fmt::format("{}{} {}", group.status.empty() ? "" : ", ", number, state);
  for (const Measure& measure : measures()) {
    std::vector<double> values;
    for (const size_t run : group.counted) values.push_back(measure.of(c.runs[run]));
    group.summaries.push_back(summarise(values));
  }
  std::map<std::string, std::map<std::string, std::vector<double>>> by;
  for (const size_t run : group.counted)
    for (const auto& [name, parts] : c.runs[run].metrics.by)
      for (const auto& [part, value] : parts) by[name][part].push_back(value);
  for (const auto& [name, parts] : by)
    for (const auto& [part, values] : parts) group.by[name][part] = summarise(values);
}

std::string words(const json& start, std::initializer_list<const char*> keys) {
  std::vector<std::string> out;
  for (const char* key : keys)
    if (auto value = start.find(key); value != start.end()) out.push_back(value->is_string() ? value->get<std::string>() : value->dump());
  return fmt::format("{}", fmt::join(out, ", "));
}

// What runs of one comparison should share, by what their starts say.
void note_starts(RunComparison& c) {
  size_t silent = 0;
  std::set<std::string> machines, versions, computes;
  for (RunData& run : c.runs) {
    if (run.starts.empty()) silent += !run.metrics.steps.empty();
    std::set<std::string> own;
    for (const json& start : run.starts) {
      own.insert(words(start, {"host", "cpu", "cores"}));
      versions.insert(words(start, {"version", "build"}));
      computes.insert(words(start, {"device", "dtype", "threads", "ranks"}));
    }
    if (own.size() > 1) run.notes.push_back(fmt::format("it ran on {} machines: {}", own.size(), fmt::join(own, "; ")));
    machines.merge(own);
  }
  if (machines.size() > 1) c.notes.push_back(fmt::format("The runs are of {} machines, so their times and rates do not compare: {}.", machines.size(), fmt::join(machines, "; ")));
  if (versions.size() > 1) c.notes.push_back(fmt::format("The runs are of {} versions: {}.", versions.size(), fmt::join(versions, "; ")));
  if (computes.size() > 1) c.notes.push_back(fmt::format("The runs computed in {} ways (device, dtype, threads, ranks): {}.", computes.size(), fmt::join(computes, "; ")));
  if (silent) c.notes.push_back(fmt::format("{} of {} runs do not say which version and machine they ran on.", silent, c.runs.size()));
}

// `bench SWEEP.toml` names trials, `bench RUN/config.toml` a file of the run's folder.
void take_bench(RunComparison& c, const json& bench) {
  const auto config = bench.find("config"), train = bench.find("train");
  if (config == bench.end() || !config->is_string() || train == bench.end() || !train->is_object()) return;
  const auto rate = train->find("tokens_per_s");
  if (rate == train->end() || !rate->is_number() || rate->get<double>() <= 0) return;
  const std::filesystem::path file(config->get<std::string>());
  for (RunData& run : c.runs)
    if (run.name == file || std::filesystem::path(run.folder) / "config.toml" == file.lexically_normal()) run.bench_tokens_per_s = rate->get<double>();
}

void note_benches(RunComparison& c) {
  std::set<std::string> machines;
  for (const json& bench : c.benches)
    if (auto context = bench.find("context"); context != bench.end() && context->is_object()) machines.insert(words(*context, {"machine"}));
  if (machines.size() > 1) c.notes.push_back(fmt::format("The measurements of throughput are of {} machines or versions: {}.", machines.size(), fmt::join(machines, "; ")));
}

void note_groups(RunComparison& c) {
  std::map<std::string, size_t> states;
  for (const RunData& run : c.runs)
    if (!run.done()) ++states[run.state];
  std::vector<std::string> listed;
  for (const auto& [state, number] : states) listed.push_back(fmt::format("{} {}", number, state));
  if (!listed.empty()) c.notes.push_back(fmt::format("Of {} runs not all are done: {}. A row with a finished run is of its finished runs alone; one without is marked.", c.runs.size(), fmt::join(listed, ", ")));
  std::set<double> tokens;
  std::set<int64_t> sizes;
  for (const RunGroup& group : c.groups) {
    sizes.insert(std::ssize(group.counted));
    for (size_t m = 0; m < measures().size(); ++m)
      if (measures()[m].name == "tokens" && group.summaries[m].n) tokens.insert({group.summaries[m].low, group.summaries[m].high});
  }
  if (tokens.size() > 1) c.notes.push_back(fmt::format("The runs were trained on different numbers of tokens, {:.6g} to {:.6g}.", *tokens.begin(), *tokens.rbegin()));
  if (sizes.size() > 1) c.notes.push_back(fmt::format("The rows are of different numbers of runs, {} to {}.", *sizes.begin(), *sizes.rbegin()));
  for (const RunData& run : c.runs) {
    for (const std::string& note : run.notes) c.notes.push_back(fmt::format("{}: {}.", run.name, note));
    const std::vector<double>* loss = run.metrics.column("loss");
    const auto bad = loss ? std::count_if(loss->begin(), loss->end(), [](double v) { return !std::isfinite(v); }) : 0;
    if (bad) c.notes.push_back(fmt::format("{}: the loss of {} of {} steps is not finite{}.", run.name, bad, loss->size(), std::isfinite(loss->back()) ? "" : ", the last among them"));
  }
}

}  // namespace

const std::vector<Measure>& measures() {
  static const std::vector<Measure> list{
      {"val_loss", "validation loss", false, [](const RunData& run) { return newest(run, "val_loss"); }},
      {"val_accuracy", "validation accuracy", true, [](const RunData& run) { return newest(run, "val_accuracy"); }},
      {"loss", "training loss, last 10 steps", false, last_losses},
      {"params", "parameters", false, [](const RunData& run) { return run.params; }},
      {"active_params", "parameters that a token passes", false, [](const RunData& run) { return run.active_params; }},
      {"flops_per_token", "training FLOPs a token", false, [](const RunData& run) { return run.flops_per_token; }},
      {"tokens", "tokens", false, [](const RunData& run) { return newest(run, "tokens"); }},
      {"flops", "FLOPs", false, [](const RunData& run) { return last_of(spent_flops(run)); }},
      {"seconds", "wall time of the steps, s", false, [](const RunData& run) { return last_of(elapsed_seconds(run.metrics)); }},
      {"tokens_per_s", "tokens/s, median", true, median_rate},
      {"bench_tokens_per_s", "tokens/s by bench", true, [](const RunData& run) { return run.bench_tokens_per_s; }},
      {"peak_bytes", "peak memory, bytes", false, [](const RunData& run) { return newest(run, "peak_bytes"); }}};
  return list;
}

Summary summarise(const std::vector<double>& values) {
  Summary s{.n = 0, .mean = 0, .half = kNan, .low = kNan, .high = kNan};
  std::vector<double> finite;
  std::copy_if(values.begin(), values.end(), std::back_inserter(finite), [](double v) { return std::isfinite(v); });
  s.n = std::ssize(finite);
  if (s.n == 0) return s.mean = kNan, s;
  const auto n = static_cast<double>(s.n);
  const auto [low, high] = std::minmax_element(finite.begin(), finite.end());
  s.low = *low, s.high = *high;
  // From the least: equal values have no spread, whatever their sum is rounded to.
  double above = 0;
  for (const double v : finite) above += v - s.low;
  s.mean = s.low + above / n;
  if (s.n < 2) return s;
  double squares = 0;
  for (const double v : finite) squares += (v - s.mean) * (v - s.mean);
  if (std::sqrt(squares / n) < 1e-12 * std::abs(s.mean)) squares = 0;  // rounding, not spread
  s.half = boost::math::quantile(boost::math::students_t(n - 1), 0.975) * std::sqrt(squares / (n - 1) / n);
  return s;
}

RunComparison compare(ReportInput input) {
  RunComparison c{.runs = std::move(input.runs), .benches = std::move(input.benches)};
  for (const json& bench : c.benches) take_bench(c, bench);
  std::map<std::string, size_t> by_key;
  for (size_t i = 0; i < c.runs.size(); ++i) {
    const auto [group, is_new] = by_key.emplace(group_key(c.runs[i]), c.groups.size());
    if (is_new) c.groups.emplace_back();
    c.groups[group->second].runs.push_back(i);
  }
  c.varied = varied_keys(c.runs);
  label(c);
  for (RunGroup& group : c.groups) count(c, group);
  note_starts(c);
  note_benches(c);
  note_groups(c);
  return c;
}

std::vector<size_t> pareto_front(const std::vector<std::pair<double, double>>& points, bool more_is_better) {
  const auto better = [&](double a, double b) { return more_is_better ? a > b : a < b; };
  std::vector<size_t> order;
  for (size_t i = 0; i < points.size(); ++i)
    if (std::isfinite(points[i].first) && std::isfinite(points[i].second)) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return points[a].first != points[b].first ? points[a].first < points[b].first : better(points[a].second, points[b].second);
  });
  std::vector<size_t> front;
  for (const size_t i : order)
    if (front.empty() || better(points[i].second, points[front.back()].second) || points[i] == points[front.back()]) front.push_back(i);
  return front;
}

std::map<std::string, std::map<std::string, std::vector<size_t>>> pareto_fronts(const RunComparison& c) {
  const std::set<std::string> qualities{"val_loss", "loss", "val_accuracy"};
  std::map<std::string, std::map<std::string, std::vector<size_t>>> out;
  for (size_t y = 0; y < measures().size(); ++y) {
    if (!qualities.contains(measures()[y].name)) continue;
    for (size_t x = 0; x < measures().size(); ++x) {
      if (qualities.contains(measures()[x].name)) continue;
      std::vector<std::pair<double, double>> points;
      for (const RunGroup& group : c.groups) {
        const double cost = group.summaries[x].mean;
        points.emplace_back(measures()[x].more_is_better ? -cost : cost, group.summaries[y].mean);
      }
      out[measures()[y].name][measures()[x].name] = pareto_front(points, measures()[y].more_is_better);
    }
  }
  return out;
}

std::vector<double> elapsed_seconds(const Metrics& metrics) {
  const std::vector<double>*tokens = metrics.column("tokens"), *rate = metrics.column("tokens_per_s"), *save = metrics.column("save_s");
  std::vector<double> out;
  double sum = 0, before = 0;
  for (size_t i = 0; i < metrics.steps.size(); ++i) {
    sum += tokens && rate ? ((*tokens)[i] - before) / (*rate)[i] : kNan;
    if (save && std::isfinite((*save)[i])) sum += (*save)[i];
    if (tokens) before = (*tokens)[i];
    out.push_back(sum);
  }
  return out;
}

std::vector<double> spent_flops(const RunData& run) {
  const std::vector<double>*tokens = run.metrics.column("tokens"), *rate = run.metrics.column("tokens_per_s"), *flops = run.metrics.column("flops_per_s");
  std::vector<double> out;
  for (size_t i = 0; i < run.metrics.steps.size(); ++i) {
    const double per_token = rate && flops ? (*flops)[i] / (*rate)[i] : run.flops_per_token;
    out.push_back(tokens ? per_token * (*tokens)[i] : kNan);
  }
  return out;
}

}  // namespace tessera
