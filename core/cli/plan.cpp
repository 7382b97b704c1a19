// tessera plan: what a configuration means, without allocating anything of its size.
#include "plan/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/calibration.hpp"
#include "cli/verbs.hpp"
#include "plan/active.hpp"
#include "plan/memory.hpp"
#include "plan/traffic.hpp"

namespace tessera {

namespace {

using nlohmann::json;

std::string grouped(int64_t n) {
  std::string digits = fmt::format("{}", n), out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string bytes(double n) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t u = 0;
  while (n >= 1024 && u < 4) n /= 1024, ++u;
  return fmt::format("{:.{}f} {}", n, u ? 2 : 0, units[u]);
}

int64_t layer_elements(const LayerPlan& layer) {
  int64_t sum = 0;
  for (const Param& param : layer.params) sum += num_elements(param.shape);
  for (const Buffer& buffer : layer.buffers) sum += num_elements(buffer.shape);
  return sum;
}

json layer_json(const LayerPlan& layer, const Mesh& mesh) {
  json params = json::array();
  for (const Param& param : layer.params) {
    json row{{"name", layer.prefix + param.name}, {"shape", param.shape}, {"fp32", param.fp32}, {"decay", param.decay}};
    if (auto local = local_shape(param, mesh, nullptr)) row["local_shape"] = *local;
    params.push_back(row);
  }
  return {{"index", layer.index}, {"symbol", std::string(1, layer.symbol)}, {"block", layer.binding}, {"type", std::string(layer.type->type())},
          {"stage", layer.stage}, {"weights_of", layer.weights_of}, {"elements", layer_elements(layer)}, {"params", params}};
}

// What a layout costs its ranks, by pipeline rank.
struct LayoutCost {
  std::vector<MemoryPlan> memory;
  std::vector<Traffic> traffic;
  // The pipeline ranks that hold and send most.
  const MemoryPlan& fullest() const {
    return *std::max_element(memory.begin(), memory.end(), [](const MemoryPlan& a, const MemoryPlan& b) { return a.total() < b.total(); });
  }
  size_t busiest() const {
    return static_cast<size_t>(std::max_element(traffic.begin(), traffic.end(), [](const Traffic& a, const Traffic& b) { return a.bytes() < b.bytes(); }) - traffic.begin());
  }
};

double step_tokens(const Config& config) { return static_cast<double>(global_batch_rows(config) * config.training.seq_len); }

json memory_json(const MemoryPlan& memory) {
  return {{"parameters", memory.parameters}, {"gradients", memory.gradients}, {"optimizer", memory.optimizer}, {"compute_copies", memory.compute},
          {"gathered", memory.gathered}, {"activations", memory.activations}, {"save_copy", memory.save}, {"total", memory.total()}};
}

json traffic_json(const Traffic& traffic, const Mesh& mesh) {
  json rows = json::array();
  for (const TrafficRow& row : traffic.rows)
    rows.push_back({{"group", row.group}, {"collective", row.collective}, {"axis", axis_of(row.group, mesh)}, {"calls", row.calls}, {"bytes", row.bytes}, {"estimate", row.estimate}});
  return {{"bytes", traffic.bytes()}, {"by_axis", by_axis(traffic.by_group(), mesh)}, {"rows", rows}};
}

json to_json(const ModelPlan& plan, const Config& config, const Mesh& mesh, const LayoutCost& layout, const Documents& documents, const std::optional<Prediction>& prediction) {
  const Totals sum = totals(plan);
  json out{{"pattern", plan.pattern.text}, {"dialect", plan.model.dialect}, {"totals", {{"elements", sum.elements}, {"tensors", sum.tensors}, {"trained", sum.trained}, {"active", static_cast<int64_t>(active_parameters(plan))}}}};
  for (const Binding& binding : config.bindings) out["legend"][std::string(1, binding.symbol)] = binding.name;
  out["layers"] = json::array();
  for (const LayerPlan& layer : plan.layers) out["layers"].push_back(layer_json(layer, mesh));
  if (plan.head)
    for (const HeadSet& set : plan.head->sets)
      for (const LayerPlan& layer : set.layers) out["head_layers"].push_back(layer_json(layer, mesh));
  const double n = static_cast<double>(num_tokens(documents));
  for (const CostRow& row : cost_rows(plan, documents))
    out["flops_per_token"][row.name] = {{"layers", row.num_layers}, {"matmul", row.cost.matmul / n}, {"mixing", row.cost.mixing / n}};
  out["memory_per_rank"] = memory_json(layout.fullest());
  out["sent_per_step"] = traffic_json(layout.traffic[layout.busiest()], mesh);
  for (size_t pp = 0; pp < layout.memory.size(); ++pp)
    out["pipeline_ranks"].push_back({{"memory", memory_json(layout.memory[pp])}, {"sent_per_step", traffic_json(layout.traffic[pp], mesh)}});
  out["ranks"] = mesh.size();
  if (prediction)
    out["predicted"] = {{"step_s", prediction->step_s}, {"tokens_per_s", step_tokens(config) / prediction->step_s}, {"peak_bytes", prediction->peak_bytes}, {"parts", prediction->parts}, {"notes", prediction->notes}};
  return out;
}

void print_layers(const std::vector<LayerPlan>& layers) {
  // Runs of like layers share a line.
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerPlan& layer = layers[i];
    fmt::print("  {:>4}  {}  {:<14} {:>16}{}{}\n", layer.index, layer.symbol, layer.binding, grouped(layer_elements(layer)),
               layer.weights_of == layer.index ? "" : fmt::format("  weights of layer {}", layer.weights_of), layer.stage ? fmt::format("  stage {}", layer.stage) : "");
  }
}

void print_traffic(const LayoutCost& layout, const Mesh& mesh) {
  const Traffic& traffic = layout.traffic[layout.busiest()];
  fmt::print("\nsent by a rank in a step{}: {}\n", mesh.pp > 1 ? fmt::format(", of pipeline rank {} which sends most", layout.busiest()) : "", bytes(static_cast<double>(traffic.bytes())));
  for (const auto& [axis, sum] : by_axis(traffic.by_group(), mesh)) {
    fmt::print("  {:<14} {:>12}\n", axis, bytes(static_cast<double>(sum)));
    for (const TrafficRow& row : traffic.rows)
      if (axis_of(row.group, mesh) == axis)
        fmt::print("    {:<24} {:<15} {:>6} x  {:>12}{}\n", row.group, row.collective, row.calls, bytes(static_cast<double>(row.bytes)), row.estimate ? "  at even routing" : "");
  }
}

void print(const ModelPlan& plan, const Config& config, const Mesh& mesh, const LayoutCost& layout, const Documents& documents, const std::optional<Prediction>& prediction) {
  fmt::print("pattern   {}   (dialect {})\nlegend   ", plan.pattern.text, plan.model.dialect);
  for (const Binding& binding : config.bindings) fmt::print(" {} = {}{}", binding.symbol, binding.name, binding.shared ? " (shared)" : "");
  if (config.head) fmt::print("  / = {}", config.head->name);
  fmt::print("\nmodel     hidden {}, vocabulary {}, {} layers{}\n\n  layer    block                elements\n", plan.model.hidden_size, plan.model.vocab_size,
             plan.layers.size(), plan.model.tie_embeddings ? ", tied embeddings" : "");
  print_layers(plan.layers);
  if (plan.head)
    for (const HeadSet& set : plan.head->sets) {
      fmt::print("  {}, {} passes\n", set.prefix.substr(0, set.prefix.size() - 1), plan.head->passes.size());
      print_layers(set.layers);
    }
  const Totals sum = totals(plan);
  fmt::print("\ntotal     {} elements in {} tensors (hub layout), {} trained, {} of them active for a token\n\n", grouped(sum.elements), grouped(sum.tensors), grouped(sum.trained),
             grouped(static_cast<int64_t>(active_parameters(plan))));
  const double n = static_cast<double>(num_tokens(documents));
  double all = 0;
  const auto rows = cost_rows(plan, documents);
  for (const CostRow& row : rows) all += row.cost.flops();
  fmt::print("FLOPs a token, forward, documents of {} tokens (training takes 3x)\n", documents.front().length);
  for (const CostRow& row : rows)
    if (row.cost.flops() > 0)
      fmt::print("  {:<14} {:>3} x  {:>12.4g}  {:>5.1f} %  (matrix products with weights {:.4g}, mixing {:.4g})\n", row.name, row.num_layers, row.cost.flops() / n,
                 100 * row.cost.flops() / all, row.cost.matmul / n, row.cost.mixing / n);
  fmt::print("  {:<14}        {:>12.4g}\n\n", "sum", all / n);
  const MemoryPlan& memory = layout.fullest();
  fmt::print("memory a rank, {} rank{}{}: {}\n", mesh.size(), mesh.size() > 1 ? "s" : "",
             mesh.pp > 1 ? fmt::format(", of pipeline rank {} which holds most", memory.stage) : "", bytes(memory.total()));
  for (const auto& [name, value] : {std::pair<const char*, double>{"parameters", memory.parameters}, {"gradients", memory.gradients}, {"optimizer", memory.optimizer},
                                    {"compute copies", memory.compute}, {"gathered", memory.gathered}, {"activations", memory.activations}, {"save copy", memory.save}})
    fmt::print("  {:<14} {:>12}\n", name, bytes(value));
  if (mesh.size() > 1) print_traffic(layout, mesh);
  if (!prediction) return;
  fmt::print("\npredicted for this machine: {:.4g} s a step, {:.4g} tokens/s, peak memory {}\n", prediction->step_s, step_tokens(config) / prediction->step_s, bytes(prediction->peak_bytes));
  for (const auto& [part, seconds] : prediction->parts) fmt::print("  {:<14} {:>9.2f} ms\n", part, 1e3 * seconds);
  for (const std::string& note : prediction->notes) fmt::print("  uncertain: {}\n", note);
}

}  // namespace

void add_plan(CLI::App& app, Run& run) {
  struct Options {
    std::string config, mesh, calibration;
    std::vector<std::string> sets;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("plan", "what a configuration means: layers, parameters, FLOPs, memory and traffic of a rank; allocates nothing");
  verb->add_option("CONFIG", o->config, "a TOML file")->required();
  verb->add_option("--mesh", o->mesh, "axis=degree,...: pp, dp_replicate, dp_shard, cp, tp, ep, etp");
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  add_calibration(*verb, o->calibration);
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      const Loaded loaded = load_with_plugins(o->config, o->sets);
      const Mesh mesh = o->mesh.empty() ? make_mesh(loaded.config.parallelism) : parse_mesh(o->mesh);
      Issues issues;
      check_config(loaded.config, mesh, issues);
      issues.raise();
      const ModelPlan plan = make_plan(loaded.config, mesh);
      const Documents documents{{.length = loaded.config.training.seq_len, .count = loaded.config.training.local_batch_size}};
      const LayoutCost layout{.memory = plan_stage_memory(plan, loaded.config, mesh), .traffic = plan_traffic(plan, loaded.config, mesh)};
      const auto prediction = mesh.size() == 1 ? predict(o->calibration, plan, loaded.config) : std::nullopt;
      if (o->json) std::cout << to_json(plan, loaded.config, mesh, layout, documents, prediction).dump(1) << "\n";
      else print(plan, loaded.config, mesh, layout, documents, prediction);
      return 0;
    };
  });
}

}  // namespace tessera
