// What a model keeps between the steps of decoding.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "plan/plan.hpp"

namespace tessera {

// Decode state of all layers of the main stack for `slots` sequences.
class DecodeState {
 public:
  DecodeState(const ModelPlan& plan, int64_t slots, at::Device device, at::ScalarType compute_dtype);
  // Makes room for `capacity` tokens a sequence (per-token rows grow by doubling; per-sequence rows do not change).
  void reserve(int64_t capacity);
  // A copy that later steps do not change, and the way back to it.
  DecodeState snapshot() const;
  const std::map<std::string, at::Tensor, std::less<>>& layer(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  int64_t bytes() const;

 private:
  const ModelPlan* plan_;
  at::Device device_;
  at::ScalarType compute_dtype_;
  int64_t slots_, capacity_ = 0;
  std::vector<std::map<std::string, at::Tensor, std::less<>>> layers_;
};

}  // namespace tessera
