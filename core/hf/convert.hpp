// Checkpoints from the hub's layout to Tessera's and back, with the memory of one tensor.
#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"

namespace tessera {

struct ConvertOptions {
  std::vector<std::string> waived;          // keys of config.json that nothing knows
  std::vector<std::string> sets;            // `a.b=c` on the resulting (to tessera) or the checkpoint's (to hf) configuration
  std::optional<at::ScalarType> dtype;      // of all parameters; else each as in its source. Buffers are fp32 in the hub's layout
  int64_t max_shard_bytes = 5'000'000'000;
};

// HF folder -> checkpoint. What config.json said and every tensor's dtype are kept in its state, so that the way back gives the same folder.
// Returns lines for the user. Nothing appears under `out`, which must not exist, before all of it is written.
std::vector<std::string> convert_to_tessera(const std::filesystem::path& in, const std::filesystem::path& out, const Registry& registry,
                                            const ConvertOptions& options = {});
// Checkpoint, or a run's newest one -> HF folder, names with `backbone.`, experts split. Refuses what HF cannot say.
std::vector<std::string> convert_to_hf(const std::filesystem::path& in, const std::filesystem::path& out, const Registry& registry,
                                       const ConvertOptions& options = {});

// Fills the store from a hub folder, converted to fp32, under the rules of load_weights; `map` speaks of the hub's names.
LoadReport load_hf(const std::filesystem::path& folder, const ModelPlan& plan, Store& store, bool partial = false, const std::vector<std::string>& map = {});

// What a checkpoint keeps of the hub folder that its weights came from (CheckpointState::hf): config.json and the tensors' dtypes.
nlohmann::json hf_state(const std::filesystem::path& folder, const ModelPlan& plan);

// The configuration with `a.b=c` texts applied through its schemas.
Config with_sets(const Config& config, const std::vector<std::string>& sets, const Registry& registry);

}  // namespace tessera
