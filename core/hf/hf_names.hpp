// Names and slices of the hub layout for the tensors of a plan.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "plan/plan.hpp"

namespace tessera {

// One tensor of the hub layout: a whole tensor of the checkpoint or, where HF splits (experts), one index of its dimension 0.
struct HubTensor {
  std::string name;            // as it is written: "backbone.layers.3.mixer.experts.7.up_proj.weight"
  std::vector<int64_t> shape;
  std::string source;          // name in a checkpoint: "layers.3.experts.up_proj"
  int64_t index = -1;          // of the source's dimension 0; -1: the whole
  bool is_buffer = false;      // always fp32
  std::string packed;          // the unsplit tensor's name where files may hold that instead; else empty
};

// In the order of tensor_rows, slices of a tensor one after another.
// Throws Error(kUsage) that names what the hub layout has no name for: weights shared among layers, a head's parameter without a hub name.
std::vector<HubTensor> hub_tensors(const ModelPlan& plan);

// Other prefixes that a name is found under: "model." for "backbone.".
std::vector<std::string> hub_spellings(const std::string& name);

}  // namespace tessera
