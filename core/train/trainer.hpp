// A training run: its folder, the loop, metrics, validation, checkpoints, and clean ends.
#pragma once
#include <filesystem>
#include <iosfwd>
#include <memory>
#include <string>

#include "config/config.hpp"
#include "plugin/registry.hpp"

namespace tessera {

struct TrainOptions {
  bool resume = false;
  bool quiet = false;        // no progress line
  int64_t until = 0;         // ends after this step with a checkpoint, though training.steps are more; 0: at training.steps
};

// Runs `config` to its last step, into config.run.folder: config.toml, metrics.jsonl, TensorBoard events, checkpoints/step-N/.
// With `resume` it goes on from the newest complete checkpoint there, or starts at step 0 and says so; without it a folder that holds a run is refused.
// SIGINT and SIGTERM end it after the running step with a checkpoint. Returns 0, or 130 / 143 after a signal.
// Throws Error(kRuntime) where a loss or gradient is not finite (step, first layer, last good checkpoint), where the folder cannot be written (file,
// reason, last complete checkpoint), and where another process trains into it.
int train(const Config& config, const Registry& registry, const TrainOptions& options);

}  // namespace tessera
