// Memory of one rank, from the plan's rows alone.
#pragma once
#include "plan/plan.hpp"

namespace tessera {

// Bytes of a rank.
struct MemoryPlan {
  int64_t stage = 0;       // pipeline rank
  double parameters = 0;   // fp32 masters and buffers
  double gradients = 0;    // fp32
  double optimizer = 0;    // two fp32 moments
  double compute = 0;      // copies in the compute dtype; 0 in fp32
  double gathered = 0;     // of buffers that ranks share: the two largest layers, embedding and output, and one layer's gradient on its way
  double activations = 0;  // of the micro-batches in flight, recomputed layers counted by their input; with what is kept of freed blocks
  double save = 0;         // the copy of parameters and moments that is written while training goes on, in host memory; 0 unless checkpoint.async_mode = "async"
  double total() const { return parameters + gradients + optimizer + compute + gathered + activations + save; }
};
// By pipeline rank. Within a stage every rank allocates the same: parameters, gradients, optimizer and copies to the byte, the rest by the declared costs.
std::vector<MemoryPlan> plan_stage_memory(const ModelPlan& plan, const Config& config, const Mesh& mesh);
// Of the pipeline rank that holds most.
MemoryPlan plan_memory(const ModelPlan& plan, const Config& config, const Mesh& mesh);

// Whether the layers of a binding are computed again in the backward pass.
bool recomputed(const Config& config, const std::string& binding);
// Of a data rank in an optimizer step, local_batch_size rows each.
int64_t num_micro_batches(const Config& config, const Mesh& mesh);

// To be asked before anything is allocated. Throws Error(kRuntime) with the numbers where this machine's memory is less than what the tensors in
// fp32 take and, with `training`, gradients, moments, the tokens of a step and each layer's input: what no recomputation spares. `save_copy`: and the
// copy of parameters and moments that a save in the background takes.
void require_memory(const ModelPlan& plan, const TrainingConfig* training = nullptr, bool save_copy = false);

}  // namespace tessera
