#include "plan/traffic.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "layers/cross_entropy.hpp"
#include "layers/pieces.hpp"
#include "plan/buffers.hpp"
#include "plan/memory.hpp"
#include "plan/schedule.hpp"
#include "tessera/context_cut.hpp"

namespace tessera {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many tokens of a micro-batch lie where.
struct Tokens {
  int64_t documents = 0, whole = 0, pieces = 0, shard = 0;
  int64_t most_shard = 0;  // of all ranks that share the micro-batch
  int64_t seq_len = 0;
  std::vector<Piece> chunks;  // where documents are cut over cp
  Spans spans;                // of the pieces

  // Rows that the context rank with most of them sends of documents that go on; reach < 0: all.
  int64_t most_before(int64_t reach) const {
    std::map<int64_t, int64_t> rows;
    for (const Piece& chunk : chunks) rows[chunk.rank] += reach < 0 ? chunk.tail : std::min(reach, chunk.tail);
    int64_t most = 0;
    for (const auto& [rank, n] : rows) most = std::max(most, n);
    return most;
  }
  int64_t targets(int64_t offset) const {
    if (chunks.empty()) return documents * std::max<int64_t>(0, seq_len - offset);
    int64_t n = 0;
    for (const Span& span : spans.list()) n += std::clamp<int64_t>(span.document_len - offset - span.start, 0, span.length);
    return n;
  }
};

Tokens tokens_of(int64_t rows, int64_t seq_len, const Mesh& mesh, const Place& place) {
  Tokens t{.documents = rows, .whole = rows * seq_len, .pieces = rows * seq_len, .most_shard = ceil_div(rows * seq_len, mesh.tp), .seq_len = seq_len, .chunks = {}, .spans = {}};
  if (mesh.cp > 1) {
    const ContextCut cut(Spans::uniform(rows, seq_len), mesh.cp, place.cp);
    t.spans = cut.spans(), t.chunks = pieces_of(cut), t.pieces = t.spans.num_tokens(), t.most_shard = ceil_div(cut.most_tokens(), mesh.tp);
  }
  const Range shard = sequence_range(t.pieces, mesh.tp, place.tp);
  t.shard = shard.end - shard.begin;
  return t;
}

// Plays a step as the model, the store and the pipeline run it, and adds up what is sent.
class Step {
 public:
  Step(const ModelPlan& plan, const Config& config, const Mesh& mesh, const Place& place)
      : plan_(plan), config_(config), mesh_(mesh), place_(place), bf16_(config.training.dtype == "bfloat16"), buffers_(flat_buffers(plan, config.training.freeze, mesh, place)) {
    for (const FlatBuffer& buffer : buffers_) units_[buffer.unit].push_back(&buffer);
    last_ = place.pp == mesh.pp - 1;
    const auto read = [&](const std::vector<LayerPlan>& layers) {
      for (const LayerPlan& layer : layers) exchanges_[&layer] = layer.type->exchanges(layer.config, plan.env);
    };
    read(plan.layers);
    if (plan.head)
      for (const HeadSet& set : plan.head->sets) read(set.layers);
  }

  void play(int64_t micro) {
    const Tokens tokens = tokens_of(config_.training.local_batch_size, config_.training.seq_len, mesh_, place_);
    if (mesh_.pp == 1) {
      for (int64_t m = 0; m < micro; ++m)
        for (const bool forward : {true, false}) pass(tokens, forward, -1);
    } else {
      const auto schedule = pipeline_schedule(mesh_.pp, plan_.num_stages, micro);
      for (const PipelineAction& a : schedule[static_cast<size_t>(place_.pp)]) {
        pass(tokens, a.forward, a.stage);
        const int64_t to = a.forward ? a.stage + 1 : a.stage - 1, n = tokens.shard;
        if (to >= 0 && to < plan_.num_stages && n > 0) add("pp", "send", n * plan_.env.hidden_size * (plan_.model.residual_in_fp32 ? 4 : element()));
      }
    }
    finish();
  }

  std::map<std::pair<std::string, std::string>, TrafficRow> rows;

 private:
  int64_t element() const { return bf16_ ? 2 : 4; }
  void add(const std::string& group, const char* collective, int64_t bytes, bool estimate = false) {
    TrafficRow& row = rows[{group, collective}];
    row.group = group, row.collective = collective, row.bytes += bytes, row.calls += 1, row.estimate = row.estimate || estimate;
  }
  void all_reduce(const std::string& group, int64_t size, int64_t bytes) {
    if (size > 1) add(group, "all_reduce", 2 * (size - 1) * bytes / size);
  }
  // Of `bytes` on each rank, and the reverse.
  void gather(const std::string& group, int64_t size, int64_t bytes, bool reverse) {
    if (size > 1 && bytes > 0) add(group, reverse ? "reduce_scatter" : "all_gather", (size - 1) * bytes);
  }
  std::string shard_group(const FlatBuffer& buffer) const { return buffer.experts ? "expert copies" : mesh_.cp > 1 ? "dp_shard x cp" : "dp_shard"; }

  void gather_unit(const std::string& unit) {
    if (!prefetched_.erase(unit)) gather_buffers(unit);
  }
  void gather_buffers(const std::string& unit) {
    for (const FlatBuffer* buffer : units_.at(unit)) gather(shard_group(*buffer), buffer->ranks, buffer->size() * buffer->element_bytes(bf16_), false);
  }
  void prefetch(const std::string& unit) {
    if (units_.contains(unit) && prefetched_.insert(unit).second) gather_buffers(unit);
  }
  void reduce_unit(const std::string& unit) {
    const bool narrow = config_.parallelism.reduce_dtype != "float32";
    for (const FlatBuffer* buffer : units_.at(unit))
      if (buffer->trainable) gather(shard_group(*buffer), buffer->ranks, buffer->size() * (narrow ? buffer->element_bytes(bf16_) : 4), true);
  }

  // One stage's pass, or the whole model's where stage is -1.
  void pass(const Tokens& t, bool forward, int64_t stage) {
    const bool embeds = stage <= 0, predicts = stage < 0 || stage == plan_.num_stages - 1;
    std::vector<const LayerPlan*> layers;
    for (const LayerPlan& layer : plan_.layers)
      if (stage < 0 || layer.stage == stage) layers.push_back(&layer);
    if (forward) {
      if (embeds) embed(t, true);
      for (const LayerPlan* layer : layers) this->layer(*layer, plan_.layers, t, true);
      if (predicts) predict(t, true);
    } else {
      if (predicts) predict(t, false);
      for (size_t i = layers.size(); i-- > 0;) this->layer(*layers[i], plan_.layers, t, false);
      if (embeds) embed(t, false);
    }
  }

  void embed(const Tokens& t, bool forward) {
    if (forward) gather_unit(kEmbeddingUnit);
    else if (!units_.at(kEmbeddingUnit).front()->trainable) return;
    else reduce_unit(kEmbeddingUnit);
    gather("tp", mesh_.tp, ceil_div(t.pieces, mesh_.tp) * plan_.env.hidden_size * 4, forward);
  }

  void predict(const Tokens& t, bool forward) {
    const auto loss = [&](int64_t offset) {
      gather("tp", mesh_.tp, ceil_div(t.pieces, mesh_.tp) * plan_.env.hidden_size * element(), !forward);
      const int64_t n = t.targets(offset), chunk = std::max<int64_t>(1, kLogitBytes / (plan_.env.vocab_size / mesh_.tp * element()));
      for (int64_t row = 0; forward && row < n; row += chunk)
        for (const int64_t bytes : {4, 8}) all_reduce("tp", mesh_.tp, bytes * std::min(chunk, n - row));
    };
    const auto output = [&] {
      for (const char* unit : {kOutputUnit, kEmbeddingUnit}) {
        if (unit == kEmbeddingUnit && !plan_.model.tie_embeddings) continue;
        forward ? gather_unit(unit) : reduce_unit(unit);
      }
    };
    if (forward) output(), loss(1);
    if (plan_.head) {
      const auto& passes = plan_.head->passes;
      for (size_t i = 0; i < passes.size(); ++i) {
        const HeadPass& p = passes[forward ? i : passes.size() - 1 - i];
        const HeadSet& set = plan_.head->sets[static_cast<size_t>(p.weight_set)];
        if (forward) gather_unit(set.prefix), embed(t, true);
        else loss(p.offset);
        for (size_t l = 0; l < set.layers.size(); ++l) layer(set.layers[forward ? l : set.layers.size() - 1 - l], set.layers, t, forward);
        if (forward) loss(p.offset);
        else reduce_unit(set.prefix), embed(t, false);
      }
    }
    if (!forward) loss(1), output();
  }

  void layer(const LayerPlan& layer, const std::vector<LayerPlan>& stack, const Tokens& t, bool forward) {
    const auto unit = [&](int64_t i) { return i < 0 || i >= static_cast<int64_t>(stack.size()) ? "" : stack[static_cast<size_t>(stack[static_cast<size_t>(i)].weights_of)].prefix; };
    const bool again = recomputed(config_, layer.binding), several = mesh_.size() > 1;
    if (forward || again) {
      gather_unit(unit(layer.index));
      if (several) prefetch(unit(layer.index + (forward ? 1 : -1)));
      exchange(layer, t, false, !forward);
    }
    if (forward) return;
    if (!again && config_.parallelism.reshard_after_forward) gather_buffers(unit(layer.index));
    exchange(layer, t, true, false);
    reduce_unit(unit(layer.index));
  }

  // At the block's edges and within it.
  void exchange(const LayerPlan& layer, const Tokens& t, bool backward, bool replaying) {
    const BlockInfo& info = layer.type->info();
    const bool whole = mesh_.cp > 1 && !info.takes_pieces, shards = info.input == Layout::kSequenceShard;
    const int64_t width = plan_.env.hidden_size * element(), tp = mesh_.tp;
    const auto over_tensor = [&](int64_t tokens, int64_t bytes, bool scatter) { gather("tp", tp, ceil_div(tokens, tp) * bytes, scatter != backward); };
    if (whole) gather("cp x tp", mesh_.cp * tp, t.most_shard * width, backward);
    else if (!shards) over_tensor(t.pieces, width, false);
    if (whole && info.output == Layout::kSequenceShard) over_tensor(t.whole, width, false);
    if (info.output == Layout::kPartialSum) over_tensor(t.pieces, width, true);

    const int64_t all = whole ? t.whole : t.pieces;
    const Range part = sequence_range(t.whole, tp, place_.tp);
    const int64_t own = !shards ? all : whole ? part.end - part.begin : t.shard;
    for (const Exchange& x : exchanges_.at(&layer)) {
      if ((backward && !x.backward) || (replaying && !x.again) || x.over == Exchange::Over::kStage) continue;
      const int64_t bytes = x.elements * (x.bytes ? x.bytes : element());
      const auto [name, size] = group_of(x);
      if (size < 2 || (x.over == Exchange::Over::kContext && whole)) continue;
      if (x.form == Exchange::Form::kSend) {
        const double sent = static_cast<double>(size - 1) / static_cast<double>(size) * static_cast<double>(bytes) * static_cast<double>(x.per == Exchange::Per::kToken ? own : 1);
        add(name, "all_to_all", std::llround(sent), x.estimate());
      } else if (x.form == Exchange::Form::kSum) {
        const int64_t times = x.per == Exchange::Per::kToken ? own : x.per == Exchange::Per::kDocument ? t.documents : 1;
        if (times > 0) all_reduce(name, size, bytes * times);
      } else if (x.per != Exchange::Per::kToken) {
        gather(name, size, bytes, (x.form == Exchange::Form::kScatter) != backward);
      } else if (x.over == Exchange::Over::kContext) {
        gather(name, size, bytes * t.most_before(x.reach), backward);
      } else {
        over_tensor(all, bytes, x.form == Exchange::Form::kScatter);
      }
    }
  }

  std::pair<std::string, int64_t> group_of(const Exchange& x) const {
    switch (x.over) {
      case Exchange::Over::kTensor: return {"tp", mesh_.tp};
      case Exchange::Over::kTensorPart: return {part_name(mesh_, Axis::kTensor, x.part), x.part};
      case Exchange::Over::kContext: return {"cp", mesh_.cp};
      case Exchange::Over::kSequence: return {"cp x tp", mesh_.cp * mesh_.tp};
      case Exchange::Over::kExperts: return {"ep", mesh_.ep * mesh_.etp};
      case Exchange::Over::kStage: return {"stage", mesh_.size() / mesh_.pp};
    }
    return {};
  }

  // After the micro-batches: counts and sums, and the gradients that several ranks hold.
  void finish() {
    const int64_t passes = plan_.head ? static_cast<int64_t>(plan_.head->passes.size()) : 0, stage = mesh_.size() / mesh_.pp;
    all_reduce("dp_replicate x dp_shard", mesh_.dp_replicate * mesh_.dp_shard, 8 * 3 * (1 + passes));
    std::map<std::pair<std::string, int64_t>, int64_t> alike;
    for (const FlatBuffer& buffer : buffers_) {
      if (!buffer.trainable) continue;
      for (const FlatBuffer::Shared& shared : buffer.shared)
        alike[{shared.axis ? part_name(mesh_, *shared.axis, shared.ranks) : "ends", shared.ranks}] += 4 * (shared.range.end - shared.range.begin);
      all_reduce("dp_replicate", mesh_.dp_replicate, 4 * buffer.size());
    }
    for (const auto& [group, bytes] : alike) all_reduce(group.first, group.second, bytes);
    all_reduce("world", mesh_.size(), 8);

    std::set<std::string> losses;
    std::map<std::pair<std::string, std::string>, int64_t> counts;
    const auto collect = [&](const std::vector<LayerPlan>& layers) {
      for (const LayerPlan& layer : layers) {
        const std::string& unit = layers[static_cast<size_t>(layer.weights_of)].prefix;
        for (const Exchange& x : exchanges_.at(&layer)) {
          if (x.over != Exchange::Over::kStage || !units_.contains(unit)) continue;
          if (x.per == Exchange::Per::kLoss) losses.insert(x.name);
          else counts[{unit, x.name}] = x.elements * x.bytes;
        }
      }
    };
    collect(plan_.layers);
    if (plan_.head && last_)
      for (const HeadSet& set : plan_.head->sets) collect(set.layers);
    all_reduce("stage", stage, 8 * (2 + static_cast<int64_t>(losses.size()) + (last_ ? passes : 0)));
    for (const auto& [name, bytes] : counts) all_reduce("stage", stage, bytes);
    gather("pp", mesh_.pp, kLossReportBytes, false);
  }

  const ModelPlan& plan_;
  const Config& config_;
  const Mesh& mesh_;
  Place place_;
  bool bf16_, last_ = false;
  std::vector<FlatBuffer> buffers_;
  std::map<std::string, std::vector<const FlatBuffer*>> units_;
  std::map<const LayerPlan*, ExchangeTable> exchanges_;
  std::set<std::string> prefetched_;
};

}  // namespace

int64_t Traffic::bytes() const {
  int64_t sum = 0;
  for (const TrafficRow& row : rows) sum += row.bytes;
  return sum;
}

std::map<std::string, int64_t> Traffic::by_group() const {
  std::map<std::string, int64_t> sums;
  for (const TrafficRow& row : rows) sums[row.group] += row.bytes;
  return sums;
}

Traffic plan_traffic(const ModelPlan& plan, const Config& config, const Mesh& mesh, int64_t rank) {
  if (mesh.size() == 1) return {};
  const Place place = place_of(mesh, rank);
  // Many micro-batches: each further one costs what the one before it did.
  const int64_t count = num_micro_batches(config, mesh), played = std::min(count, 2 * plan.num_stages + 2);
  const auto play = [&](int64_t micro) {
    Step step(plan, config, mesh, place);
    step.play(micro);
    return step.rows;
  };
  auto total = play(played);
  if (played < count) {
    auto less = play(played - 1);
    for (auto& [key, row] : total) {
      row.bytes += (count - played) * (row.bytes - less[key].bytes);
      row.calls += (count - played) * (row.calls - less[key].calls);
    }
  }
  Traffic traffic;
  for (const auto& [key, row] : total) traffic.rows.push_back(row);
  return traffic;
}

std::vector<Traffic> plan_traffic(const ModelPlan& plan, const Config& config, const Mesh& mesh) {
  std::vector<Traffic> stages;
  for (int64_t stage = 0; stage < mesh.pp; ++stage) stages.push_back(plan_traffic(plan, config, mesh, rank_at(mesh, {.pp = stage})));
  return stages;
}

std::string axis_of(const std::string& group, const Mesh& mesh) {
  if (group == "world" || group == "stage") return "all";
  if (group == "ends") return "pp";
  if (group == "cp x tp") return mesh.cp > 1 ? "cp" : "tp";
  if (group == "dp_replicate x dp_shard") return mesh.dp_replicate > 1 ? "dp_replicate" : "dp_shard";
  if (group == "dp_shard x cp" || group == "expert copies") return "dp_shard";
  const std::string axis = group.substr(0, group.find('/'));
  return axis == "etp" ? "ep" : axis;
}

std::map<std::string, int64_t> by_axis(const std::map<std::string, int64_t>& by_group, const Mesh& mesh) {
  std::map<std::string, int64_t> sums;
  for (const auto& [group, bytes] : by_group) sums[axis_of(group, mesh)] += bytes;
  return sums;
}

}  // namespace tessera
