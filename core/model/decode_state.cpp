#include "model/decode_state.hpp"

#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>

#include "tessera/error.hpp"

namespace tessera {

// Calls visit(row, what this rank holds of its name, its shape on this rank).
template <class F>
void DecodeState::for_rows(State::Per per, F visit) {
  for (const LayerPlan& layer : plan_->layers) {
    if (layer.stage % num_pipe_ranks_ != pipe_rank_) continue;
    for (const State& state : layer.states) {
      if (state.per != per) continue;
      std::string why;
      const auto shape = local_shape(Param{.name = state.name, .shape = state.shape, .shards = state.shards}, plan_->env.mesh, &why);
      if (!shape) throw Error(ExitCode::kUsage, fmt::format("{}{}", layer.prefix, why));
      visit(state, layers_[static_cast<size_t>(layer.index)][state.name], *shape);
    }
  }
}

DecodeState::DecodeState(const ModelPlan& plan, int64_t slots, at::Device device, at::ScalarType compute_dtype, const MeshGroups* groups)
    : plan_(&plan), device_(device), compute_dtype_(compute_dtype), slots_(slots), layers_(plan.layers.size()) {
  if (groups) num_pipe_ranks_ = groups->mesh().pp, pipe_rank_ = groups->place().pp;
  if (plan.env.mesh.cp > 1)
    throw Error(ExitCode::kUsage, fmt::format("generation does not run over context-parallel ranks, got cp = {}", plan.env.mesh.cp), "use tp, pp or ep instead: one token at a time cannot be cut over cp");
  for_rows(State::Per::kSequence, [&](const State& state, at::Tensor& rows, std::vector<int64_t> shape) {
    shape.insert(shape.begin(), slots);
    rows = at::zeros(shape, at::TensorOptions(state.fp32 ? at::kFloat : compute_dtype).device(device));
  });
}

void DecodeState::reserve(int64_t capacity) {
  if (capacity <= capacity_) return;
  const int64_t grown = std::max(capacity, 2 * capacity_);
  for_rows(State::Per::kToken, [&](const State& state, at::Tensor& rows, std::vector<int64_t> shape) {
    shape.insert(shape.begin(), {slots_, grown});
    at::Tensor larger = at::zeros(shape, at::TensorOptions(state.fp32 ? at::kFloat : compute_dtype_).device(device_));
    if (rows.defined()) larger.narrow(1, 0, capacity_).copy_(rows);
    rows = larger;
  });
  capacity_ = grown;
}

void DecodeState::reserve(const Spans& spans) {
  int64_t needed = 0;
  for (const Span& span : spans.list()) needed = std::max(needed, span.start + span.length);
  reserve(needed);
}

DecodeState DecodeState::snapshot() const {
  DecodeState copy = *this;
  for (auto& layer : copy.layers_)
    for (auto& [name, tensor] : layer) tensor = tensor.clone();
  return copy;
}

int64_t DecodeState::bytes() const {
  int64_t total = 0;
  for (const auto& layer : layers_)
    for (const auto& [name, tensor] : layer) total += static_cast<int64_t>(tensor.nbytes());
  return total;
}

}  // namespace tessera
