// Checkpoints of a run: `checkpoints/step-N/` with config.toml, model.safetensors, optimizer.safetensors and state.json.
// Tensors are logical (no rank, stage or layout in a name); a checkpoint stands alone.
#pragma once
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "config/config.hpp"
#include "store/store.hpp"
#include "train/optimizer.hpp"

namespace tessera {

inline constexpr int64_t kCheckpointFormat = 1;
inline constexpr const char* kAside = ".saving-";       // how a folder's name begins while it is written, or removed
inline constexpr const char* kOptimizer = "optimizer";  // how its files' names begin
inline std::string moment_name(const std::string& slot, const std::string& parameter) { return fmt::format("{}.{}.{}", kOptimizer, slot, parameter); }

// What a checkpoint holds beside its tensors. Written as state.json, which also records every file's size and CRC-32.
struct CheckpointState {
  int64_t step = 0;        // steps of the run
  int64_t tokens = 0;      // tokens trained on
  nlohmann::json data;     // position and hash of the data, as the loader gives it
  nlohmann::json hf;       // what an import kept of HF's config.json; null when there was none
  nlohmann::json extra;    // anything else that a resumed run needs
  int64_t optimizer_steps = 0;  // steps that the optimizer took, those skipped left out; a save takes it from the optimizer
};

// A checkpoint on disk whose files are complete and undamaged.
struct OpenCheckpoint {
  std::filesystem::path folder;
  CheckpointState state;
  SafetensorsFolder model;
  std::optional<SafetensorsFolder> optimizer;
};

// Throws Error(kRuntime) that names the missing or damaged file. `folder` may be a run (its newest checkpoint is taken) or a checkpoint.
// Whatever is opened is read once to compare its CRC-32, at about 2 GB/s where it is in memory; without `optimizer` the optimizer's files, two thirds of
// the bytes, are neither opened nor read. Without `check` only sizes are compared: of many ranks that open it one reads it all.
OpenCheckpoint open_checkpoint(const std::filesystem::path& folder, bool optimizer = true, bool check = true);
// config.toml of a checkpoint, with `sets` on top.
Config checkpoint_config(const OpenCheckpoint& checkpoint, const std::vector<std::string>& sets, const Registry& registry);

// Complete checkpoints `step-N` below `folder`, oldest first.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& folder);
// Removes all but the newest `keep` (0 keeps all) and what interrupted saves left. Returns what could not be removed and why, or "".
std::string prune_checkpoints(const std::filesystem::path& folder, int64_t keep);

// What a load did, for printing.
struct LoadReport {
  int64_t loaded = 0;
  std::vector<std::string> missing;     // wanted by the model, not in the file: kept their initial values
  std::vector<std::string> unexpected;  // in the file, not in the model
  std::vector<std::string> misshapen;   // "name: [8, 4] in the file, [8, 8] in the model"
};

// Fills the store from tensors by checkpoint name. Unless `partial`, anything missing, unexpected or misshapen is an Error(kRuntime) that lists it.
// `map` holds "from=to" prefixes applied to the file's names, the first that fits. Source dtypes are converted to fp32.
LoadReport load_weights(const SafetensorsFolder& file, Store& store, bool partial = false, const std::vector<std::string>& map = {});
void load_optimizer(const OpenCheckpoint& checkpoint, Store& store, Optimizer& optimizer);

}  // namespace tessera
