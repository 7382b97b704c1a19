#include "plan/memory.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "memory/kept_blocks.hpp"
#include "plan/buffers.hpp"
#include "plan/schedule.hpp"

namespace tessera {

namespace {

// Elements of one micro-batch that a layer keeps on a rank, beside its input's share of the residual stream.
double layer_activations(const LayerPlan& layer, const ModelPlan& plan, const Mesh& mesh, const Documents& documents) {
  const BlockInfo& info = layer.type->info();
  const bool whole = mesh.cp > 1 && !info.takes_pieces;
  const double all = static_cast<double>(num_tokens(documents)), n = whole ? all : all / static_cast<double>(mesh.cp), d = static_cast<double>(plan.env.hidden_size);
  const double kept = layer.type->cost(layer.config, plan.env, documents).activations * n / all, tp = static_cast<double>(mesh.tp);
  // The input, of all tokens unless the block takes shards, is one of them; the rest is cut with the parameters or the tokens.
  double elements = info.input == Layout::kSequenceShard ? kept / tp : n * d + (kept - n * d) / tp;
  for (const Exchange& x : layer.type->exchanges(layer.config, plan.env)) {
    if (x.form != Exchange::Form::kGather || x.per != Exchange::Per::kToken) continue;
    if (x.over == Exchange::Over::kTensor) elements += static_cast<double>(x.elements) * n * (1 - 1 / tp);
    if (x.over == Exchange::Over::kContext && !whole)
      elements += static_cast<double>(x.elements) * (x.reach < 0 ? all : std::min(all, static_cast<double>(2 * mesh.cp * x.reach)));
  }
  return elements;
}

}  // namespace

bool recomputed(const Config& config, const std::string& binding) {
  const auto& types = config.activation_checkpoint.block_types;
  return config.activation_checkpoint.mode == "full" ||
         (config.activation_checkpoint.mode == "selective" && std::find(types.begin(), types.end(), binding) != types.end());
}

int64_t num_micro_batches(const Config& config, const Mesh& mesh) {
  return std::max<int64_t>(1, global_batch_rows(config, mesh) / (config.training.local_batch_size * mesh.dp_replicate * mesh.dp_shard));
}

std::vector<MemoryPlan> plan_stage_memory(const ModelPlan& plan, const Config& config, const Mesh& mesh) {
  const bool bf16 = config.training.dtype == "bfloat16";
  const double element = bf16 ? 2 : 4;
  const int64_t micro = std::min(num_micro_batches(config, mesh), 2 * plan.num_stages + 2);  // more are never in flight
  const auto schedule = mesh.pp > 1 ? pipeline_schedule(mesh.pp, plan.num_stages, micro) : std::vector<std::vector<PipelineAction>>{};

  // Activations of one micro-batch by stage.
  const Documents documents{{.length = config.training.seq_len, .count = config.training.local_batch_size}};
  const double n = static_cast<double>(num_tokens(documents)), d = static_cast<double>(plan.env.hidden_size), pieces = n / static_cast<double>(mesh.cp),
               shard = pieces / static_cast<double>(mesh.tp);
  const auto num_stages = static_cast<size_t>(mesh.pp > 1 ? plan.num_stages : 1);
  std::vector<double> kept(num_stages, 0.0), largest(num_stages, 0.0);
  kept[0] += shard * d;
  const auto stack = [&](const std::vector<LayerPlan>& layers, bool main) {
    for (const LayerPlan& layer : layers) {
      const size_t stage = main && mesh.pp > 1 ? static_cast<size_t>(layer.stage) : num_stages - 1;
      const double elements = layer_activations(layer, plan, mesh, documents) + 2 * shard * d;
      if (recomputed(config, layer.binding)) kept[stage] += shard * d, largest[stage] = std::max(largest[stage], elements);
      else kept[stage] += elements;
    }
  };
  stack(plan.layers, true);
  if (plan.head)
    for (const HeadPass& pass : plan.head->passes) {
      kept.back() += plan.head->type->cost(plan.head->config, plan.env, documents).activations / static_cast<double>(mesh.cp * mesh.tp);
      stack(plan.head->sets[static_cast<size_t>(pass.weight_set)].layers, false);
    }
  kept.back() += 2 * pieces * d;

  std::vector<MemoryPlan> stages;
  for (int64_t pp = 0; pp < mesh.pp; ++pp) {
    MemoryPlan memory{.stage = pp};
    const Place place = place_of(mesh, rank_at(mesh, {.pp = pp}));
    struct Gathered {
      double whole = 0, gradient = 0;
    };
    std::map<std::string, Gathered> units;  // that ranks share: bytes while they are used
    for (const FlatBuffer& buffer : flat_buffers(plan, config.training.freeze, mesh, place)) {
      const auto own = static_cast<double>(buffer.size()), bytes = static_cast<double>(buffer.element_bytes(bf16));
      memory.parameters += 4 * own;
      if (buffer.trainable) memory.gradients += 4 * own, memory.optimizer += 8 * own;
      if (bytes < 4) memory.compute += bytes * own;
      if (buffer.ranks == 1) continue;
      Gathered& unit = units[buffer.unit];
      unit.whole += bytes * static_cast<double>(buffer.length);
      if (buffer.trainable) unit.gradient += (config.parallelism.reduce_dtype == "float32" ? 4 : bytes) * (static_cast<double>(buffer.length) + own);
    }
    for (const Unit& unit : units_of(plan, mesh, place))
      if (unit.buffers)
        for (const Buffer& buffer : *unit.buffers) memory.parameters += 4 * static_cast<double>(num_elements(buffer.shape));
    if (config.checkpoint.async_mode == "async") memory.save = memory.parameters + memory.optimizer;

    double one = 0, two = 0, every = 0, gradient = 0;
    for (const auto& [name, unit] : units) {
      gradient = std::max(gradient, unit.gradient);
      if (name == kEmbeddingUnit || name == kOutputUnit) continue;
      every += unit.whole;
      if (unit.whole > one) two = std::exchange(one, unit.whole);
      else two = std::max(two, unit.whole);
    }
    const bool again = pp == mesh.pp - 1 && (plan.head || plan.model.tie_embeddings);
    memory.gathered = (config.parallelism.reshard_after_forward ? one + two : every) + units[kOutputUnit].whole + (again ? units[kEmbeddingUnit].whole : 0);
    memory.gathered = std::max(memory.gathered, units[kEmbeddingUnit].whole) + gradient;

    double in_flight = 0, most = 0, again_once = 0;
    for (size_t stage = static_cast<size_t>(pp); stage < num_stages; stage += static_cast<size_t>(mesh.pp)) again_once = std::max(again_once, largest[stage]);
    if (mesh.pp == 1) most = kept[0];
    else
      for (const PipelineAction& a : schedule[static_cast<size_t>(pp)]) {
        in_flight += (a.forward ? 1 : -1) * kept[static_cast<size_t>(a.stage)];
        most = std::max(most, in_flight);
      }
    memory.activations = (1 + kKeptShare) * element * (most + again_once);
    stages.push_back(memory);
  }
  return stages;
}

MemoryPlan plan_memory(const ModelPlan& plan, const Config& config, const Mesh& mesh) {
  const auto stages = plan_stage_memory(plan, config, mesh);
  return *std::max_element(stages.begin(), stages.end(), [](const MemoryPlan& a, const MemoryPlan& b) { return a.total() < b.total(); });
}

void require_memory(const ModelPlan& plan, const TrainingConfig* training, bool save_copy) {
  constexpr double kGiB = 1 << 30;
  const double machine = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE));
  double elements = 0, batch = 0;
  for (const TensorRow& row : tensor_rows(plan)) elements += static_cast<double>(num_elements(row.shape()));
  const double each = training ? save_copy ? 28 : 16 : 4;
  std::string text = fmt::format("{:.0f} elements of {} bytes{} take {:.1f} GiB", elements, each, training ? save_copy ? ", gradient, optimizer and the copy for a save included," : ", gradient and optimizer included," : "", each * elements / kGiB);
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
