#include "plan/buffers.hpp"

#include <algorithm>

namespace tessera {

namespace {

constexpr int64_t kAlign = 16;  // elements: parameters begin at 64 bytes, and so does every rank's part

int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

// Cuts the buffer over its ranks, and lists what of it other ranks hold alike.
void cut(FlatBuffer& buffer, bool on_both_ends, const Mesh& mesh, const Place& place) {
  const int64_t end = buffer.slots.back().range().end, rank = buffer.experts ? place.expert_copy : place.dp_shard * mesh.cp + place.cp;
  buffer.ranks = mesh.dp_shard * mesh.cp;
  if (buffer.experts) buffer.ranks = buffer.ranks * mesh.tp / (mesh.ep * mesh.etp);
  buffer.length = buffer.ranks > 1 ? aligned((end + buffer.ranks - 1) / buffer.ranks) * buffer.ranks : end;
  buffer.own = {buffer.length / buffer.ranks * rank, buffer.length / buffer.ranks * (rank + 1)};

  std::vector<Range> others;  // counted by another rank
  for (const FlatBuffer::Slot& slot : buffer.slots)
    for (const SharedElements& shared : slot.part.shared()) {
      const Range range = common({slot.offset + shared.elements.begin, slot.offset + shared.elements.end}, buffer.own);
      if (range.begin >= range.end) continue;
      const Range own{range.begin - buffer.own.begin, range.end - buffer.own.begin};
      buffer.shared.push_back({own, shared.axis, shared.size});
      if (coordinate(place, shared.axis) % shared.size != 0) others.push_back(own);
    }
  const Range all{0, buffer.size()};
  if (on_both_ends) {
    buffer.shared.push_back({all, std::nullopt, 2});
    if (place.pp != 0) return;
  }
  std::sort(others.begin(), others.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  int64_t at = 0;
  for (const Range& range : others) {
    if (at < range.begin) buffer.counted.push_back({at, range.begin});
    at = std::max(at, range.end);
  }
  if (at < all.end) buffer.counted.push_back({at, all.end});
}

}  // namespace

bool frozen(const std::string& name, const std::vector<std::string>& freeze) {
  return std::any_of(freeze.begin(), freeze.end(), [&](const std::string& prefix) { return name.starts_with(prefix); });
}

std::vector<Unit> units_of(const ModelPlan& plan, const Mesh& mesh, const Place& place) {
  std::vector<Unit> units;
  const bool first = place.pp == 0, last = place.pp == mesh.pp - 1, embeds_again = plan.head || plan.model.tie_embeddings;
  if (first || (last && embeds_again)) units.push_back({.key = kEmbeddingUnit, .params = &plan.embedding, .on_both_ends = mesh.pp > 1 && embeds_again});
  if (last) units.push_back({.key = kOutputUnit, .params = &plan.output});
  const auto stack = [&](const std::vector<LayerPlan>& layers, bool main) {
    for (const LayerPlan& layer : layers)
      if (layer.weights_of == layer.index && (!main || layer.stage % mesh.pp == place.pp))
        units.push_back({.key = layer.prefix, .prefix = layer.prefix, .params = &layer.params, .buffers = &layer.buffers});
  };
  stack(plan.layers, true);
  if (plan.head && last)
    for (const HeadSet& set : plan.head->sets) {
      units.push_back({.key = set.prefix, .prefix = set.prefix, .params = &set.params});
      stack(set.layers, false);
    }
  return units;
}

std::vector<FlatBuffer> flat_buffers(const Unit& unit, const std::vector<std::string>& freeze, const Mesh& mesh, const Place& place) {
  std::vector<FlatBuffer> buffers;
  for (const Param& param : *unit.params) {
    const bool experts = is_expert(param), trainable = !frozen(unit.prefix + param.name, freeze);
    auto buffer = std::find_if(buffers.begin(), buffers.end(),
                               [&](const FlatBuffer& b) { return b.experts == experts && b.fp32 == param.fp32 && b.decay == param.decay && b.trainable == trainable; });
    if (buffer == buffers.end())
      buffer = buffers.insert(buffer, FlatBuffer{.unit = unit.key, .experts = experts, .fp32 = param.fp32, .decay = param.decay, .trainable = trainable});
    const int64_t offset = buffer->slots.empty() ? 0 : aligned(buffer->slots.back().range().end);
    buffer->slots.push_back({.name = unit.prefix + param.name, .row = &param, .part = LocalPart(param, mesh, place), .offset = offset});
  }
  for (FlatBuffer& buffer : buffers) cut(buffer, unit.on_both_ends, mesh, place);
  return buffers;
}

std::vector<FlatBuffer> flat_buffers(const ModelPlan& plan, const std::vector<std::string>& freeze, const Mesh& mesh, const Place& place) {
  std::vector<FlatBuffer> all;
  for (const Unit& unit : units_of(plan, mesh, place))
    for (FlatBuffer& buffer : flat_buffers(unit, freeze, mesh, place)) all.push_back(std::move(buffer));
  return all;
}

}  // namespace tessera
