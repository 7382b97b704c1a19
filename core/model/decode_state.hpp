// What a model keeps between the steps of decoding.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "parallel/mesh_groups.hpp"
#include "plan/plan.hpp"
#include "tessera/spans.hpp"

namespace tessera {

// Decode state of all layers of the main stack for `slots` sequences.
class DecodeState {
 public:
  // `groups`, where the model runs over several: the layers of this rank's stages, and of each row the part that the tensor axis leaves this rank.
  // Throws Error(kUsage) for context-parallel ranks: a document's state is one rank's.
  DecodeState(const ModelPlan& plan, int64_t slots, at::Device device, at::ScalarType compute_dtype, const MeshGroups* groups = nullptr);
  // Makes room for `capacity` tokens a sequence (per-token rows grow by doubling; per-sequence rows do not change).
  void reserve(int64_t capacity);
  // For what these spans reach.
  void reserve(const Spans& spans);
  // A copy that later steps do not change, and the way back to it.
  DecodeState snapshot() const;
  const std::map<std::string, at::Tensor, std::less<>>& layer(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  int64_t bytes() const;

 private:
  template <class F>
  void for_rows(State::Per per, F visit);

  const ModelPlan* plan_;
  int64_t num_pipe_ranks_ = 1, pipe_rank_ = 0;
  at::Device device_;
  at::ScalarType compute_dtype_;
  int64_t slots_, capacity_ = 0;
  std::vector<std::map<std::string, at::Tensor, std::less<>>> layers_;
};

}  // namespace tessera
