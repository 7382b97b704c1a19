#include "plan/active.hpp"

#include <algorithm>

namespace tessera {

namespace {

bool of_experts(const Param& param) {
  return std::any_of(param.shards.begin(), param.shards.end(), [](const Shard& shard) { return shard.axis == Axis::kExpert; });
}

// Of the layer's own parameters, those that no token's products use together with the others.
double idle_parameters(const LayerPlan& layer, const Env& env) {
  double experts = 0, matrices = 0;
  for (const Param& param : layer.params) {
    const auto elements = static_cast<double>(num_elements(param.shape));
    if (of_experts(param)) experts += elements;
    else if (param.shape.size() == 2) matrices += elements;
  }
  if (experts == 0) return 0;
  const double used = layer.type->cost(layer.config, env, {{.length = 1, .count = 1}}).matmul / 2 - matrices;
  return experts - std::clamp(used, 0.0, experts);
}

}  // namespace

double active_parameters(const ModelPlan& plan) {
  auto active = static_cast<double>(totals(plan).trained);
  const auto subtract = [&](const std::vector<LayerPlan>& layers) {
    for (const LayerPlan& layer : layers)
      if (layer.weights_of == layer.index) active -= idle_parameters(layer, plan.env);
  };
  subtract(plan.layers);
  if (plan.head)
    for (const HeadSet& set : plan.head->sets) subtract(set.layers);
  return active;
}

}  // namespace tessera
