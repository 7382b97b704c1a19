#include "report/runs.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "checkpoint/file.hpp"
#include "config/config.hpp"
#include "config/toml_tree.hpp"
#include "plan/active.hpp"
#include "plan/memory.hpp"
#include "plan/plan.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kAnySize = std::numeric_limits<int64_t>::max();

double number(const json& value) { return value.is_number() ? value.get<double>() : kNan; }

// UTF-8 throughout: what a page, or another reader, can show.
std::string printable(std::string text) {
  for (int64_t at = invalid_utf8(text); at >= 0; at = invalid_utf8(text)) text[static_cast<size_t>(at)] = '?';
  return text;
}

void add_line(Metrics& metrics, const json& line) {
  const size_t n = metrics.steps.size();
  metrics.steps.push_back(line["step"].get<double>());
  const auto put = [&](const std::string& key, double value) {
    auto& column = metrics.columns[key];
    column.resize(n, kNan);
    column.push_back(value);
  };
  for (const auto& [key, value] : line.items()) {
    if (key == "step") continue;
    if (value.is_number() || value.is_null()) put(key, number(value));
    else if (value.is_object() && key.ends_with("_by")) {
      std::map<std::string, double> parts;
      for (const auto& [part, of_part] : value.items()) parts[part] = number(of_part);
      metrics.by[key] = std::move(parts);
    } else if (value.is_array() && key.ends_with("expert_load")) {
      std::vector<double> counts;
      for (const json& count : value) counts.push_back(number(count));
      ExpertLoad& load = metrics.loads[key];
      if (!load.counts.empty() && load.counts.back().size() != counts.size()) continue;
      load.steps.push_back(metrics.steps.back());
      load.counts.push_back(std::move(counts));
    }
  }
}

std::string plain(const Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  return to_toml(value);
}

void flatten(const TomlNode& node, const std::string& prefix, std::map<std::string, std::string>& keys) {
  for (const TomlEntry& entry : node.entries) {
    const std::string key = prefix + entry.key;
    if (entry.node.kind == TomlNode::Kind::kValue) keys[key] = plain(entry.node.value);
    else if (entry.node.kind == TomlNode::Kind::kOther) keys[key] = entry.node.text;
    else flatten(entry.node, key + ".", keys);
  }
}

// A setting of a trial is TOML: "\"M*\"" says M*.
std::string plain_toml(const std::string& text) {
  std::map<std::string, std::string> keys;
  try {
    flatten(parse_toml("value = " + text, "trial.json"), "", keys);
  } catch (const Error&) {
    return text;
  }
  return keys.size() == 1 && keys.contains("value") ? keys["value"] : text;
}

std::string first_line_of(const std::string& text) { return text.substr(0, text.find('\n')); }

class Reader {
 public:
  void read(const std::string& path) {
    if (!fs::exists(path)) throw Error(ExitCode::kUsage, fmt::format("{}: there is no such file or folder", path), kWhat);
    if (!fs::is_directory(path)) return read_bench(path);
    if (fs::is_directory(fs::path(path) / "trials")) {
      std::vector<fs::path> trials;
      for (const auto& entry : fs::directory_iterator(fs::path(path) / "trials"))
        if (entry.is_directory() && is_run(entry.path())) trials.push_back(entry.path());
      std::sort(trials.begin(), trials.end());
      for (const fs::path& trial : trials) read_run(trial);
    } else if (is_run(path)) {
      read_run(path);
    } else {
      throw Error(ExitCode::kUsage, fmt::format("{}: neither a run nor a sweep: it holds no config.toml, metrics.jsonl, trial.json or trials/", path), kWhat);
    }
  }
  ReportInput input;

 private:
  static constexpr const char* kWhat = "name folders of `tessera train` or `tessera sweep`, or files with the output of `tessera bench --json`";

  static bool is_run(const fs::path& folder) {
    return fs::exists(folder / "config.toml") || fs::exists(folder / "metrics.jsonl") || fs::exists(folder / "trial.json");
  }

  void read_bench(const std::string& path) {
    const json all = json::parse(read_file(path), nullptr, false);
    const json list = !all.is_object() ? all : all.contains("results") ? all["results"] : json::array({all});
    const bool fits = list.is_array() && !list.empty() && std::all_of(list.begin(), list.end(), [](const json& one) {
      return one.is_object() && one.value("config", json()).is_string() && one.value("parts", json()).is_array() && one.value("train", json()).is_object();
    });
    if (!fits) throw Error(ExitCode::kUsage, fmt::format("{}: not the output of `tessera bench --json`", path), kWhat);
    for (json one : list) {
      one["file"] = path;
      if (all.is_object() && all.contains("context")) one["context"] = all["context"];
      input.benches.push_back(std::move(one));
    }
  }

  void read_run(const fs::path& folder) {
    RunData run;
    run.folder = printable(folder.string());
    run.name = printable(fs::weakly_canonical(folder).filename().string());
    run.params = run.active_params = run.flops_per_token = kNan;
    read_config(folder / "config.toml", run);
    read_metrics(folder, run);
    read_trial(folder / "trial.json", run);
    input.runs.push_back(std::move(run));
  }

  void read_config(const fs::path& file, RunData& run) {
    if (!fs::exists(file)) return;
    try {
      run.config_text = printable(read_file(file));
      flatten(parse_toml(run.config_text, file.string()), "", run.keys);
      run.configured = true;
    } catch (const Error& error) {
      run.notes.push_back(fmt::format("its config.toml cannot be read: {}", first_line_of(error.message())));
      return;
    }
    try {
      read_plan(file, run);
    } catch (const Error& error) {
      run.notes.push_back(fmt::format("parameters and FLOPs are not known, because its config.toml does not fit this build and its plugins: {}", first_line_of(error.message())));
      read_pattern(run);
    }
    if (auto seed = run.keys.find("training.seed"); seed != run.keys.end()) run.seed = std::strtoll(seed->second.c_str(), nullptr, 10);
  }

  void read_plan(const fs::path& file, RunData& run) {
    const std::vector<std::string> paths = plugin_paths(file, {});
    auto registry = registries_.find(paths);
    if (registry == registries_.end()) registry = registries_.emplace(paths, Registry::load(Registry::search_paths(paths))).first;
    const Config config = load_config(file, {}, registry->second);
    const Mesh mesh = make_mesh(config.parallelism);
    const ModelPlan plan = make_plan(config, mesh);
    const auto cell = [&](const LayerPlan& layer, bool head) {
      StackCell out{.symbol = std::string(1, layer.symbol), .block = layer.binding, .type = std::string(layer.type->type()), .stage = layer.stage, .head = head};
      if (layer.weights_of == layer.index)
        for (const Param& param : layer.params) out.elements += num_elements(param.shape);
      run.elements[layer.binding] += static_cast<double>(out.elements);
      run.stack.push_back(std::move(out));
    };
    for (const LayerPlan& layer : plan.layers) cell(layer, false);
    if (plan.head)
      for (const HeadSet& set : plan.head->sets) {
        for (const LayerPlan& layer : set.layers) cell(layer, true);
        for (const Param& param : set.params) run.elements[plan.head->name] += static_cast<double>(num_elements(param.shape));
      }
    for (const Param& param : plan.embedding) run.elements["embedding"] += static_cast<double>(num_elements(param.shape));
    for (const Param& param : plan.output) run.elements["output"] += static_cast<double>(num_elements(param.shape));
    run.params = static_cast<double>(totals(plan).trained);
    run.active_params = active_parameters(plan);
    const Documents documents{{.length = config.training.seq_len, .count = 1}};
    run.flops_per_token = 0;
    for (const CostRow& row : cost_rows(plan, documents)) run.flops_per_token += 3 * row.cost.flops() / static_cast<double>(config.training.seq_len);
    const MemoryPlan memory = plan_memory(plan, config, mesh);
    run.memory = {{"parameters", memory.parameters}, {"gradients", memory.gradients}, {"optimizer", memory.optimizer}, {"compute copies", memory.compute},
                  {"gathered", memory.gathered}, {"activations", memory.activations}, {"save copy", memory.save}};
    std::erase_if(run.memory, [](const auto& part) { return part.second == 0; });
  }

  // The letters alone.
  static void read_pattern(RunData& run) {
    const auto pattern = run.keys.find("model.hybrid_override_pattern");
    if (pattern == run.keys.end()) return;
    StackCell cell;
    for (const char c : pattern->second)
      if (c == '|') ++cell.stage;
      else if (c == '/') cell.head = true;
      else if (c > ' ' && c <= '~') cell.symbol = std::string(1, c), run.stack.push_back(cell);
  }

  static void read_metrics(const fs::path& folder, RunData& run) {
    if (fs::exists(folder / "metrics.jsonl")) run.metrics = parse_metrics(read_file(folder / "metrics.jsonl", kAnySize));
    if (run.metrics.unreadable) run.notes.push_back(fmt::format("{} lines of its metrics.jsonl cannot be read and are left out", run.metrics.unreadable));
    const auto steps = run.keys.find("training.steps");
    const double wanted = steps == run.keys.end() ? kNan : std::strtod(steps->second.c_str(), nullptr);
    if (run.metrics.steps.empty()) run.state = "no metrics";
    else run.state = run.metrics.steps.back() >= wanted ? "done" : "unfinished";
    if (!fs::exists(folder / "starts.jsonl")) return;
    const std::string text = read_file(folder / "starts.jsonl");
    for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1)
      if (json start = json::parse(text.substr(begin, end - begin), nullptr, false); start.is_object()) run.starts.push_back(std::move(start));
  }

  static void read_trial(const fs::path& file, RunData& run) {
    if (!fs::exists(file)) return;
    const json trial = json::parse(read_file(file), nullptr, false);
    if (!trial.is_object()) {
      run.notes.emplace_back("its trial.json cannot be read");
      return;
    }
    const auto text = [&](const char* key, std::string& to) {
      if (auto value = trial.find(key); value != trial.end() && value->is_string()) to = value->get<std::string>();
    };
    text("name", run.name);
    text("state", run.state);
    text("error", run.error);
    if (auto seed = trial.find("seed"); seed != trial.end() && seed->is_number_integer()) run.seed = seed->get<int64_t>();
    if (auto match = trial.find("match"); match != trial.end() && match->is_object()) {
      if (const json said = match->value("text", json()); said.is_string()) run.match = said.get<std::string>();
      run.match_error = number(match->value("error", json()));
    }
    const auto settings = [&](const char* table) {
      std::map<std::string, std::string> out;
      if (const auto sets = trial.find(table); sets != trial.end() && sets->is_object())
        for (const auto& [key, value] : sets->items()) out[key] = value.is_string() ? plain_toml(value.get<std::string>()) : value.dump();
      return out;
    };
    run.fitted = settings("fitted");
    if (!run.keys.empty()) return;
    run.keys = run.fitted;
    run.keys.merge(settings("sets"));
    read_pattern(run);
  }

  std::map<std::vector<std::string>, Registry> registries_;
};

}  // namespace

const std::vector<double>* Metrics::column(const std::string& name) const {
  const auto found = columns.find(name);
  return found == columns.end() ? nullptr : &found->second;
}

Metrics parse_metrics(std::string_view text) {
  Metrics metrics;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string_view::npos; begin = end + 1) {
    const json line = json::parse(text.substr(begin, end - begin), nullptr, false);
    if (!line.is_object() || !line.contains("step") || !line["step"].is_number()) {
      ++metrics.unreadable;
      continue;
    }
    add_line(metrics, line);
  }
  for (auto& [key, column] : metrics.columns) column.resize(metrics.steps.size(), kNan);
  return metrics;
}

ReportInput read_report_input(const std::vector<std::string>& paths) {
  Reader reader;
  for (const std::string& path : paths) reader.read(path);
  return std::move(reader.input);
}

}  // namespace tessera
