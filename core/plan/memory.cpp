#include "plan/memory.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "memory/kept_blocks.hpp"
#include "store/store.hpp"
#include "train/pipeline.hpp"

namespace tessera {

namespace {

constexpr int64_t kAlign = 16;  // elements: parameters begin at 64 bytes, and so does every rank's part

int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

bool frozen(const std::string& name, const std::vector<std::string>& freeze) {
  return std::any_of(freeze.begin(), freeze.end(), [&](const std::string& prefix) { return name.starts_with(prefix); });
}

// Parameters of one unit as flat buffers.
class Units {
 public:
  Units(const std::vector<std::string>& freeze, const Mesh& mesh, const Place& place) : freeze_(freeze), mesh_(mesh), place_(place) {}

  void add(const std::string& unit, const std::string& prefix, const ParamTable& params, bool on_both_ends) {
    const size_t first = buffers.size();
    std::vector<std::vector<Common>> common;
    for (const Param& param : params) {
      const bool experts = is_expert(param), trainable = !frozen(prefix + param.name, freeze_);
      size_t at = first;
      while (at < buffers.size() && !(buffers[at].experts == experts && buffers[at].fp32 == param.fp32 && buffers[at].decay == param.decay && buffers[at].trainable == trainable)) ++at;
      if (at == buffers.size()) {
        const int64_t ranks = experts ? mesh_.dp_shard * mesh_.cp * mesh_.tp / (mesh_.ep * mesh_.etp) : mesh_.dp_shard * mesh_.cp;
        buffers.push_back({.unit = unit, .experts = experts, .fp32 = param.fp32, .decay = param.decay, .trainable = trainable, .ranks = ranks});
        common.emplace_back();
      }
      PlannedBuffer& buffer = buffers[at];
      const LocalPart part(param, mesh_, place_);
      const int64_t offset = buffer.length ? aligned(buffer.length) : 0;
      buffer.length = offset + part.size();
      for (const SharedElements& shared : part.shared())
        common[at - first].push_back({{offset + shared.elements.begin, offset + shared.elements.end}, {part_name(shared.axis, shared.size), shared.size}});
    }
    for (size_t i = first; i < buffers.size(); ++i) {
      PlannedBuffer& buffer = buffers[i];
      if (buffer.ranks > 1) buffer.length = aligned((buffer.length + buffer.ranks - 1) / buffer.ranks) * buffer.ranks;
      const int64_t rank = buffer.experts ? place_.expert_copy : place_.dp_shard * mesh_.cp + place_.cp, begin = buffer.own() * rank;
      std::map<std::pair<std::string, int64_t>, int64_t> sums;
      for (const Common& c : common[i - first])
        if (const int64_t n = std::min(c.range.end, begin + buffer.own()) - std::max(c.range.begin, begin); n > 0) sums[c.with] += n;
      if (on_both_ends) sums[{"ends", 2}] += buffer.own();
      for (const auto& [with, n] : sums) buffer.shared.push_back({.group = with.first, .ranks = with.second, .elements = n});
    }
  }

  std::vector<PlannedBuffer> buffers;

 private:
  struct Common {
    Range range;
    std::pair<std::string, int64_t> with;
  };
  std::string part_name(Axis axis, int64_t size) const {
    if (axis == Axis::kTensor && size == mesh_.tp) return "tp";
    return fmt::format("{}/{}", axis_name(axis), degree(mesh_, axis) / size);
  }

  const std::vector<std::string>& freeze_;
  const Mesh& mesh_;
  const Place& place_;
};

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

std::vector<PlannedBuffer> plan_buffers(const ModelPlan& plan, const std::vector<std::string>& freeze, const Mesh& mesh, const Place& place) {
  Units units(freeze, mesh, place);
  const bool first = place.pp == 0, last = place.pp == mesh.pp - 1, embeds_again = plan.head || plan.model.tie_embeddings;
  if (first || (last && embeds_again)) units.add(Store::kEmbedding, "", plan.embedding, mesh.pp > 1 && embeds_again);
  if (last) units.add(Store::kOutput, "", plan.output, false);
  const auto stack = [&](const std::vector<LayerPlan>& layers, bool main) {
    for (const LayerPlan& layer : layers)
      if (layer.weights_of == layer.index && (!main || layer.stage % mesh.pp == place.pp)) units.add(layer.prefix, layer.prefix, layer.params, false);
  };
  stack(plan.layers, true);
  if (plan.head && last)
    for (const HeadSet& set : plan.head->sets) {
      units.add(set.prefix, set.prefix, set.params, false);
      stack(set.layers, false);
    }
  return units.buffers;
}

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
    struct Unit {
      double whole = 0, gradient = 0;
    };
    std::map<std::string, Unit> units;  // that ranks share: bytes while they are used
    for (const PlannedBuffer& buffer : plan_buffers(plan, config.training.freeze, mesh, place)) {
      const auto own = static_cast<double>(buffer.own()), bytes = static_cast<double>(buffer.element_bytes(bf16));
      memory.parameters += 4 * own;
      if (buffer.trainable) memory.gradients += 4 * own, memory.optimizer += 8 * own;
      if (bytes < 4) memory.compute += bytes * own;
      if (buffer.ranks == 1) continue;
      Unit& unit = units[buffer.unit];
      unit.whole += bytes * static_cast<double>(buffer.length);
      if (buffer.trainable) unit.gradient += (config.parallelism.reduce_dtype == "float32" ? 4 : bytes) * (static_cast<double>(buffer.length) + own);
    }
    for (const TensorRow& row : tensor_rows(plan))
      if (row.buffer && (row.name.starts_with("heads.") ? pp == mesh.pp - 1 : row.layer->stage % mesh.pp == pp)) memory.parameters += 4 * static_cast<double>(num_elements(row.shape()));

    double one = 0, two = 0, every = 0, gradient = 0;
    for (const auto& [name, unit] : units) {
      gradient = std::max(gradient, unit.gradient);
      if (name == Store::kEmbedding || name == Store::kOutput) continue;
      every += unit.whole;
      if (unit.whole > one) two = std::exchange(one, unit.whole);
      else two = std::max(two, unit.whole);
    }
    const bool again = pp == mesh.pp - 1 && (plan.head || plan.model.tie_embeddings);
    memory.gathered = (config.parallelism.reshard_after_forward ? one + two : every) + units[Store::kOutput].whole + (again ? units[Store::kEmbedding].whole : 0);
    memory.gathered = std::max(memory.gathered, units[Store::kEmbedding].whole) + gradient;

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
