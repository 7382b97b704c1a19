#include "plan/plan.hpp"

#include <algorithm>

#include <fmt/format.h>

namespace tessera {

namespace {

LayerPlan make_layer(const Config& config, const Env& env, const PatternLayer& letter, int64_t index, const std::string& prefix) {
  const Binding& binding = config.binding(letter.symbol);
  LayerPlan layer;
  layer.prefix = fmt::format("{}layers.{}.", prefix, index);
  layer.index = layer.weights_of = index;
  layer.stage = letter.stage;
  layer.symbol = letter.symbol;
  layer.binding = binding.name;
  layer.type = binding.type;
  layer.config = binding.config;
  if (binding.type->info().pre_norm)
    layer.params.push_back({.name = "pre_norm.weight", .shape = {env.hidden_size}, .shards = replicated(), .init = Init::constant(1), .decay = false, .hf_name = "norm.weight"});
  for (Param& param : binding.type->params(binding.config, env)) {
    if (param.hf_name.empty()) param.hf_name = "mixer." + param.name;
    layer.params.push_back(std::move(param));
  }
  layer.buffers = binding.type->buffers(binding.config, env);
  for (Buffer& buffer : layer.buffers)
    if (buffer.hf_name.empty()) buffer.hf_name = "mixer." + buffer.name;
  layer.states = binding.type->state(binding.config, env);
  return layer;
}

std::vector<LayerPlan> make_stack(const Config& config, const Env& env, const std::vector<PatternLayer>& letters, const std::string& prefix) {
  std::vector<LayerPlan> layers;
  for (const PatternLayer& letter : letters) {
    auto index = static_cast<int64_t>(layers.size());
    layers.push_back(make_layer(config, env, letter, index, prefix));
    if (!config.binding(letter.symbol).shared) continue;
    for (const LayerPlan& other : layers)
      if (other.symbol == letter.symbol) {
        layers.back().weights_of = other.index;
        break;
      }
  }
  return layers;
}

void add_rows(std::vector<TensorRow>& rows, const std::string& prefix, const ParamTable& params, const BufferTable& buffers, const LayerPlan* layer) {
  for (const Param& param : params) rows.push_back({.name = prefix + param.name, .param = &param, .layer = layer});
  for (const Buffer& buffer : buffers) rows.push_back({.name = prefix + buffer.name, .buffer = &buffer, .layer = layer});
}

void add_stack_rows(std::vector<TensorRow>& rows, const std::vector<LayerPlan>& layers) {
  for (const LayerPlan& layer : layers)
    if (layer.weights_of == layer.index) add_rows(rows, layer.prefix, layer.params, layer.buffers, &layer);
}

// Cuts the layers into stages so that the dearest, by FLOPs of matrix products, is as cheap as can be. The last one bears the output and the head as well.
void cut_by_cost(ModelPlan& plan, const Documents& documents, int64_t num_stages) {
  std::vector<double> costs;
  double behind = 0, low = 0, high = 0;
  for (const LayerPlan& layer : plan.layers) costs.push_back(layer.type->cost(layer.config, plan.env, documents).flops());
  for (const CostRow& row : cost_rows(plan, documents)) behind += row.cost.flops();
  for (const double cost : costs) behind -= cost, low = std::max(low, cost), high += cost;
  high += std::max(behind, 0.0);
  // Stages from the back, each as full as `most` allows while a layer is left for every stage before it; the number of stages that takes, and their marks.
  const auto cut = [&](double most, bool mark) {
    int64_t stage = num_stages - 1;
    double load = behind;
    bool any = false;
    for (size_t i = costs.size(); i-- > 0;) {
      const bool full = any && load + costs[i] > most, needed = static_cast<int64_t>(i) + 1 <= stage;
      if ((full || needed) && any) --stage, load = 0;
      if (stage < 0) return false;
      if (mark) plan.layers[i].stage = stage;
      load += costs[i], any = true;
      if (load > most && load > costs[i] + behind) return false;
    }
    return stage >= 0;
  };
  for (int step = 0; step < 60; ++step) {
    const double middle = (low + high) / 2;
    (cut(middle, false) ? high : low) = middle;
  }
  cut(high, true);
  plan.num_stages = num_stages;
}

}  // namespace

ModelPlan make_plan(const Config& config, const Mesh& mesh) {
  ModelPlan plan;
  plan.model = config.model;
  plan.env = make_env(config, mesh);
  plan.pattern = config.pattern;
  const int64_t d = config.model.hidden_size, v = config.model.vocab_size;
  const std::vector<Shard> by_vocabulary{{Axis::kTensor, 0}};
  // The embedding is looked up row by row and its gradient is a sum over equal ids, so it stays fp32 until the rows are picked.
  plan.embedding.push_back({.name = "embedding.weight", .shape = {v, d}, .shards = by_vocabulary, .init = Init::normal(config.model.init_std),
                       .fp32 = true, .hf_name = "embeddings.weight"});
  plan.output.push_back({.name = "final_norm.weight", .shape = {d}, .shards = replicated(), .init = Init::constant(1), .decay = false, .hf_name = "norm_f.weight"});
  if (!config.model.tie_embeddings)
    plan.output.push_back({.name = "lm_head.weight", .shape = {v, d}, .shards = by_vocabulary, .init = Init::normal(config.model.init_std), .hf_name = "lm_head.weight"});
  plan.layers = make_stack(config, plan.env, config.pattern.main, "");
  if (config.head) {
    HeadPlan head{.name = config.head->name, .type = config.head->type, .config = config.head->config, .passes = config.head->type->passes(config.head->config)};
    int64_t num_sets = 0;
    for (const HeadPass& pass : head.passes) num_sets = std::max(num_sets, pass.weight_set + 1);
    for (int64_t s = 0; s < num_sets; ++s) {
      HeadSet set;
      set.prefix = num_sets == 1 ? fmt::format("heads.{}.", head.name) : fmt::format("heads.{}.{}.", head.name, s);
      set.params = head.type->params(head.config, plan.env);
      set.layers = make_stack(config, plan.env, config.pattern.head, set.prefix);
      head.sets.push_back(std::move(set));
    }
    plan.head = std::move(head);
  }
  plan.num_stages = config.pattern.num_stages;
  if (plan.num_stages == 1 && mesh.pp > 1) cut_by_cost(plan, {{.length = config.training.seq_len, .count = 1}}, mesh.pp);
  return plan;
}

std::vector<TensorRow> tensor_rows(const ModelPlan& plan) {
  std::vector<TensorRow> rows;
  add_rows(rows, "", plan.embedding, {}, nullptr);
  add_rows(rows, "", plan.output, {}, nullptr);
  add_stack_rows(rows, plan.layers);
  if (plan.head)
    for (const HeadSet& set : plan.head->sets) {
      add_rows(rows, set.prefix, set.params, {}, nullptr);
      add_stack_rows(rows, set.layers);
    }
  return rows;
}

Totals totals(const ModelPlan& plan) {
  Totals sum;
  for (const TensorRow& row : tensor_rows(plan)) {
    const std::string& hub = row.param ? row.param->hf_name : row.buffer->hf_name;
    const int64_t n = num_elements(row.shape());
    sum.elements += n;
    sum.tensors += hub.find("{}") == std::string::npos ? 1 : row.shape()[0];
    if (row.param) sum.trained += n;
  }
  return sum;
}

std::vector<CostRow> cost_rows(const ModelPlan& plan, const Documents& documents) {
  std::vector<CostRow> rows;
  const double n = static_cast<double>(num_tokens(documents)), d = static_cast<double>(plan.env.hidden_size), v = static_cast<double>(plan.env.vocab_size);
  auto row = [&](const std::string& name) -> CostRow& {
    for (CostRow& r : rows)
      if (r.name == name) return r;
    return rows.emplace_back(CostRow{.name = name});
  };
  auto add = [&](const std::string& name, int64_t num_layers, const Cost& cost) {
    CostRow& r = row(name);
    r.num_layers += num_layers;
    r.cost += cost;
  };
  const Cost norm{.elementwise = 4 * n * d, .bytes = 2 * n * d, .activations = n * d};
  auto stack = [&](const std::vector<LayerPlan>& layers) {
    for (const LayerPlan& layer : layers) {
      add(layer.binding, 1, layer.type->cost(layer.config, plan.env, documents));
      if (layer.type->info().pre_norm) add("norm", 1, norm);
    }
  };
  const Cost logits{.matmul = 2 * n * d * v, .elementwise = 4 * n * v, .bytes = 3 * n * v, .activations = n * d};
  add("embedding", 1, {.bytes = 2 * n * d, .activations = n * d});
  stack(plan.layers);
  add("norm", 1, norm);
  add("lm_head", 1, logits);
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) {
      add(plan.head->name, 1, plan.head->type->cost(plan.head->config, plan.env, documents));
      stack(plan.head->sets[static_cast<size_t>(pass.weight_set)].layers);
      add("lm_head", 1, logits);
    }
  return rows;
}

}  // namespace tessera
