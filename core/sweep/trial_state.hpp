// What became of a trial: trial.json in its folder.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "sweep/sweep.hpp"

namespace tessera {

struct TrialState {
  // new, running, interrupted, done, failed; and ended early by a rule of the sweep: stopped (halving), diverged (stop_above)
  std::string state = "new";
  std::string error;    // of a failed one, as the run told it; of one that ended early, why
  std::string machine;  // that ran it last: processor, cores, version
  bool ended() const { return state == "done" || state == "failed" || state == "stopped" || state == "diverged"; }
};

// "new" where there is no file; Error(kRuntime) where it is damaged.
TrialState read_trial_state(const std::filesystem::path& folder);
void write_trial_state(const std::filesystem::path& folder, const Trial& trial, const TrialState& state);

// Of the lines of metrics.jsonl: the last value of each key that is a number or null (NaN), and the step.
nlohmann::json last_metrics(const std::filesystem::path& folder);
// The first step whose loss is no number, or more than `factor` times that of step 1; 0: none.
int64_t diverged_at(const std::filesystem::path& folder, double factor);

}  // namespace tessera
