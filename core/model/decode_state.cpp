#include "model/decode_state.hpp"

#include <ATen/ops/zeros.h>

#include <algorithm>

namespace tessera {

DecodeState::DecodeState(const ModelPlan& plan, int64_t slots, at::Device device, at::ScalarType compute_dtype)
    : plan_(&plan), device_(device), compute_dtype_(compute_dtype), slots_(slots), layers_(plan.layers.size()) {
  for (const LayerPlan& layer : plan.layers)
    for (const State& state : layer.states) {
      if (state.per == State::Per::kToken) continue;
      std::vector<int64_t> shape{slots};
      shape.insert(shape.end(), state.shape.begin(), state.shape.end());
      layers_[static_cast<size_t>(layer.index)][state.name] = at::zeros(shape, at::TensorOptions(state.fp32 ? at::kFloat : compute_dtype).device(device));
    }
}

void DecodeState::reserve(int64_t capacity) {
  if (capacity <= capacity_) return;
  const int64_t grown = std::max(capacity, 2 * capacity_);
  for (const LayerPlan& layer : plan_->layers)
    for (const State& state : layer.states) {
      if (state.per != State::Per::kToken) continue;
      std::vector<int64_t> shape{slots_, grown};
      shape.insert(shape.end(), state.shape.begin(), state.shape.end());
      at::Tensor& rows = layers_[static_cast<size_t>(layer.index)][state.name];
      at::Tensor larger = at::zeros(shape, at::TensorOptions(state.fp32 ? at::kFloat : compute_dtype_).device(device_));
      if (rows.defined()) larger.narrow(1, 0, capacity_).copy_(rows);
      rows = larger;
    }
  capacity_ = grown;
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
