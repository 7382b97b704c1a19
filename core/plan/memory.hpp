// Memory of one rank, from the plan's rows alone.
#pragma once
#include "plan/plan.hpp"

namespace tessera {

// Bytes on the rank that holds most.
struct MemoryPlan {
  double parameters = 0;   // fp32 masters and buffers
  double gradients = 0;    // fp32
  double optimizer = 0;    // two fp32 moments
  double compute = 0;      // copies in the compute dtype; 0 in fp32
  double activations = 0;  // of one micro-batch, recomputed layers counted by their input; with what is kept of freed ones
  double total() const { return parameters + gradients + optimizer + compute + activations; }
};
MemoryPlan plan_memory(const ModelPlan& plan, const Config& config, const Mesh& mesh);

// To be asked before anything is allocated. Throws Error(kRuntime) with the numbers where this machine's memory is less than what the tensors in
// fp32 take and, with `training`, gradients, moments, the tokens of a step and each layer's input: what no recomputation spares.
void require_memory(const ModelPlan& plan, const TrainingConfig* training = nullptr);

}  // namespace tessera
