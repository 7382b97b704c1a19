#include "plan/memory.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "memory/kept_blocks.hpp"

namespace tessera {

namespace {

double local_elements(const Param& param, const Mesh& mesh) {
  const auto shape = local_shape(param, mesh, nullptr);
  return static_cast<double>(num_elements(shape ? *shape : param.shape));
}

bool recomputed(const Config& config, const std::string& binding) {
  const auto& types = config.activation_checkpoint.block_types;
  return config.activation_checkpoint.mode == "full" ||
         (config.activation_checkpoint.mode == "selective" && std::find(types.begin(), types.end(), binding) != types.end());
}

}  // namespace

MemoryPlan plan_memory(const ModelPlan& plan, const Config& config, const Mesh& mesh) {
  MemoryPlan memory;
  const bool bf16 = config.training.dtype == "bfloat16";
  const double element = bf16 ? 2 : 4;
  double elements = 0, copied = 0, buffers = 0;
  // The stage with most parameters decides; the stem lies on the first and last and is counted with every stage.
  std::vector<double> by_stage(static_cast<size_t>(std::max<int64_t>(plan.num_stages, 1)), 0.0), copied_by_stage = by_stage;
  // Flat buffers are sharded over the data ranks that hold the same slice; experts have fewer of those, being cut over ep first.
  const double dense_ranks = static_cast<double>(mesh.dp_shard), expert_ranks = static_cast<double>(mesh.dp_shard * mesh.cp * mesh.tp / (mesh.ep * mesh.etp));
  for (const TensorRow& row : tensor_rows(plan)) {
    if (row.buffer) {
      buffers += static_cast<double>(num_elements(row.buffer->shape));
      continue;
    }
    const bool expert = std::any_of(row.param->shards.begin(), row.param->shards.end(), [](const Shard& shard) { return shard.axis != Axis::kTensor; });
    const double n = local_elements(*row.param, mesh) / std::max(1.0, expert ? expert_ranks : dense_ranks), copy = row.param->fp32 ? 0 : n;
    if (row.layer && !row.name.starts_with("heads.") && mesh.pp > 1) by_stage[static_cast<size_t>(row.layer->stage % mesh.pp)] += n, copied_by_stage[static_cast<size_t>(row.layer->stage % mesh.pp)] += copy;
    else elements += n, copied += copy;
  }
  elements += *std::max_element(by_stage.begin(), by_stage.end());
  copied += *std::max_element(copied_by_stage.begin(), copied_by_stage.end());
  memory.parameters = 4 * (elements + buffers);
  memory.gradients = 4 * elements;
  memory.optimizer = 8 * elements;
  memory.compute = bf16 ? 2 * copied : 0;

  const Documents documents{{.length = config.training.seq_len, .count = config.training.local_batch_size}};
  const double n = static_cast<double>(num_tokens(documents)), d = static_cast<double>(plan.env.hidden_size);
  double kept = n * d, largest = 0;
  auto stack = [&](const std::vector<LayerPlan>& layers) {
    for (const LayerPlan& layer : layers) {
      const double activations = layer.type->cost(layer.config, plan.env, documents).activations + 2 * n * d;
      if (recomputed(config, layer.binding)) kept += n * d, largest = std::max(largest, activations);
      else kept += activations;
    }
  };
  stack(plan.layers);
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) {
      kept += plan.head->type->cost(plan.head->config, plan.env, documents).activations;
      stack(plan.head->sets[static_cast<size_t>(pass.weight_set)].layers);
    }
  memory.activations = (1 + kKeptShare) * element * (kept + largest + 2 * n * d) / static_cast<double>(mesh.cp * mesh.tp * mesh.pp);
  return memory;
}

void require_memory(const ModelPlan& plan, const TrainingConfig* training) {
  constexpr double kGiB = 1 << 30;
  const double machine = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE));
  double elements = 0, batch = 0;
  for (const TensorRow& row : tensor_rows(plan)) elements += static_cast<double>(num_elements(row.shape()));
  const double each = training ? 16 : 4;
  std::string text = fmt::format("{:.0f} elements of {} bytes{} take {:.1f} GiB", elements, each, training ? ", gradient and optimizer included," : "", each * elements / kGiB);
  if (training) {
    const double micro = static_cast<double>(training->local_batch_size), rows = std::max(micro, static_cast<double>(training->global_batch_size));
    const double element = training->dtype == "float32" ? 4 : 2, seq_len = static_cast<double>(training->seq_len);
    batch = 8 * rows * seq_len + element * micro * seq_len * static_cast<double>(plan.env.hidden_size) * static_cast<double>(plan.layers.size());
    text += fmt::format(" and {:.0f} rows of {:.0f} tokens, {:.0f} at a time through {} layers, at least {:.1f} GiB", rows, seq_len, micro, plan.layers.size(), batch / kGiB);
  }
  if (each * elements + batch > machine)
    throw Error(ExitCode::kRuntime, fmt::format("{}, but this machine has {:.1f} GiB of memory", text, machine / kGiB), "`tessera plan` tells what a configuration needs");
}

}  // namespace tessera
