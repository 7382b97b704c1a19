#include "measure/prediction.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "checkpoint/file.hpp"
#include "metrics/machine.hpp"
#include "plan/memory.hpp"
#include "train/setup.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr double kBeyond = 2;  // times the sizes that were measured
constexpr int64_t kMostBytes = 1 << 24;

double elements(const ParamTable& params) {
  double sum = 0;
  for (const Param& param : params) sum += static_cast<double>(num_elements(param.shape));
  return sum;
}

double seconds(const Work& work, const Work& rate) {
  double sum = 0;
  for (size_t term = 0; term < kNumTerms; ++term) sum += work[term] * rate[term];
  return sum;
}

json to_json(const Calibration& c) {
  json out{{"machine", c.machine}, {"device", c.device}, {"dtype", c.dtype}, {"threads", c.threads}, {"date", c.date}, {"memory", c.memory}, {"parts", json::object()}};
  for (const auto& [kind, rate] : c.parts) out["parts"][kind] = {{"forward", rate.forward}, {"backward", rate.backward}, {"least", rate.least}, {"most", rate.most}};
  return out;
}

Calibration from_json(const json& in) {
  Calibration c{.machine = in.at("machine"), .device = in.at("device"), .dtype = in.at("dtype"), .threads = in.at("threads"), .date = in.at("date"), .parts = {}, .memory = in.at("memory")};
  for (const auto& [kind, rate] : in.at("parts").items())
    c.parts[kind] = {.forward = rate.at("forward"), .backward = rate.at("backward"), .least = rate.at("least"), .most = rate.at("most")};
  return c;
}

std::vector<Calibration> read_calibrations(const fs::path& file) {
  std::vector<Calibration> all;
  std::error_code none;
  if (!fs::exists(file, none)) return all;
  try {
    for (const json& one : json::parse(read_file(file, kMostBytes)).get<std::vector<json>>()) all.push_back(from_json(one));
  } catch (const json::exception& error) {
    throw Error(ExitCode::kUsage, fmt::format("{}: is no calibration: {}", file.string(), error.what()), "remove it and run `tessera bench --calibrate` again");
  }
  return all;
}

bool same_setting(const Calibration& a, const Calibration& b) { return a.machine == b.machine && a.device == b.device && a.dtype == b.dtype && a.threads == b.threads; }

}  // namespace

std::vector<PartWork> step_work(const ModelPlan& plan, const Config& config) {
  const Documents documents{{.length = config.training.seq_len, .count = config.training.local_batch_size}};
  const double n = static_cast<double>(num_tokens(documents)), d = static_cast<double>(plan.env.hidden_size), v = static_cast<double>(plan.env.vocab_size);
  const auto micro = static_cast<double>(num_micro_batches(config, {}));
  std::vector<PartWork> parts;
  const auto add = [&](const std::string& part, const std::string& kind, bool recomputed, const Cost& cost, double weights) {
    auto at = std::find_if(parts.begin(), parts.end(), [&](const PartWork& p) { return p.part == part; });
    if (at == parts.end()) at = parts.insert(at, {.part = part, .kind = kind, .recomputed = recomputed});
    const Work work{1, cost.matmul, cost.mixing, cost.elementwise, cost.bytes, weights};
    for (size_t term = 0; term < kNumTerms; ++term) at->work[term] += micro * work[term];
  };
  const Cost norm{.elementwise = 4 * n * d, .bytes = 2 * n * d};
  const auto stack = [&](const std::vector<LayerPlan>& layers) {
    for (const LayerPlan& layer : layers) {
      Cost cost = layer.type->cost(layer.config, plan.env, documents);
      if (layer.type->info().pre_norm) cost += norm;
      add(layer.binding, std::string(layer.type->type()), recomputed(config, layer.binding), cost, elements(layer.params));
    }
  };
  const auto logits = [&] { add("lm_head", "lm_head", false, {.matmul = 2 * n * d * v, .elementwise = 4 * n * v + 4 * n * d, .bytes = 3 * n * v + 2 * n * d}, v * d); };
  add("embedding", "embedding", false, {.bytes = 2 * n * d}, v * d);
  stack(plan.layers);
  logits();
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) {
      const HeadSet& set = plan.head->sets[static_cast<size_t>(pass.weight_set)];
      add(plan.head->name, std::string(plan.head->type->type()), false, plan.head->type->cost(plan.head->config, plan.env, documents), elements(set.params));
      stack(set.layers);
      logits();
    }
  const auto trained = static_cast<double>(totals(plan).trained), tensors = static_cast<double>(tensor_rows(plan).size());
  parts.push_back({.part = "optimizer", .kind = "optimizer", .work = {tensors, 0, 0, 0, 0, trained}});
  parts.push_back({.part = "rest", .kind = "rest", .work = {micro * static_cast<double>(plan.layers.size()), 0, 0, 0, micro * n * d, trained}});
  if (has_data(config)) parts.push_back({.part = "input", .kind = "input " + config.data.source, .work = {1, 0, 0, 0, static_cast<double>(global_batch_rows(config, {}) * config.training.seq_len), 0}});
  return parts;
}

MemoryTerms memory_terms(const ModelPlan& plan, const Config& config) {
  const MemoryPlan memory = plan_memory(plan, config, {});
  double moved = 0, elementwise = 0, all = 0, alike = 0;
  for (const PartWork& part : step_work(plan, config)) {
    if (std::none_of(config.bindings.begin(), config.bindings.end(), [&](const Binding& b) { return b.name == part.part; })) continue;
    moved = std::max(moved, part.work[kMoved] / part.work[kCalls]), elementwise = std::max(elementwise, part.work[kElementwise] / part.work[kCalls]);
    all += part.work[kMoved], alike += part.work[kMoved] * part.work[kMoved];
  }
  const double logits = static_cast<double>(config.training.local_batch_size * config.training.seq_len * config.model.vocab_size);
  return {1, memory.parameters + memory.gradients + memory.optimizer + memory.compute, memory.activations, memory.activations * (1 - alike / std::max(all * all, 1.0)), logits, moved, elementwise};
}

Prediction predict(const Calibration& calibration, const ModelPlan& plan, const Config& config) {
  Prediction out;
  for (const PartWork& part : step_work(plan, config)) {
    auto rate = calibration.parts.find(part.kind);
    if (rate == calibration.parts.end()) {
      if (part.part == "input") continue;  // of no other source's kind
      rate = calibration.parts.find("");
      if (rate == calibration.parts.end()) continue;
      out.notes.push_back(fmt::format("{} was not calibrated: other blocks' rates stand for it", part.kind));
    }
    const PartRate& r = rate->second;
    if (part.size() > kBeyond * r.most || part.size() < r.least / kBeyond)
      out.notes.push_back(fmt::format("{} is {:.2g} times as large as the {} that was calibrated", part.part, part.size() / (part.size() > r.most ? r.most : r.least), part.size() > r.most ? "largest" : "smallest"));
    const double s = (part.recomputed ? 2 : 1) * seconds(part.work, r.forward) + seconds(part.work, r.backward);
    out.parts[part.part] = s;
    out.step_s += s;
  }
  const MemoryTerms terms = memory_terms(plan, config);
  for (size_t i = 0; i < terms.size(); ++i) out.peak_bytes += calibration.memory[i] * terms[i];
  out.peak_bytes += plan_memory(plan, config, {}).save;
  return out;
}

fs::path default_calibration_file() {
  const auto of = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value ? value : "");
  };
  const fs::path cache = of("XDG_CACHE_HOME"), home = of("HOME");
  if (cache.is_absolute()) return cache / "tessera/calibration.json";
  return home.is_absolute() ? home / ".cache/tessera/calibration.json" : fs::path();
}

std::optional<Calibration> find_calibration(const fs::path& file, const Config& config) {
  std::vector<Calibration> all;
  if (!file.empty()) all = read_calibrations(file);
  if (all.empty()) return {};
  const at::Device device = choose_device(config.training.device);
  const Calibration wanted{.machine = machine_text(), .device = device.str(), .dtype = dtype_name(choose_dtype(config.training.dtype, device)), .threads = num_threads(config.training), .date = {}, .parts = {}};
  for (Calibration& one : all)
    if (same_setting(one, wanted)) return std::move(one);
  return {};
}

void keep_calibration(const fs::path& file, const Calibration& calibration) {
  json out = json::array();
  for (const Calibration& one : read_calibrations(file))
    if (!same_setting(one, calibration)) out.push_back(to_json(one));
  out.push_back(to_json(calibration));
  make_folder(file.parent_path());
  write_file(file, out.dump(1) + "\n");
}

}  // namespace tessera
