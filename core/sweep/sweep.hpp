// A sweep: axes over the keys of a base configuration, and the trials that they make.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "config/config.hpp"
#include "config/toml_tree.hpp"
#include "sweep/match.hpp"

namespace tessera {

// One key of a configuration and its value, as `--set` takes them.
struct Setting {
  std::string key, value;  // "training.steps", "100": the value as TOML
  std::string text() const { return key + "=" + value; }
  bool operator==(const Setting&) const = default;
};

// What varies. Each point sets one key, or several that go together.
struct SweepAxis {
  std::vector<std::string> keys;
  std::vector<std::vector<Setting>> points;
  std::vector<std::pair<std::string, std::vector<std::string>>> when;  // a key and its values: only trials with one of them have the axis
  std::string place;
};

// [sweep]
struct SweepConfig {
  std::string base;            // a configuration file, relative to the sweep's
  std::string folder;          // of the trials; default: runs/<the file's stem>
  std::vector<int64_t> seeds;  // of training.seed; none: that of the base
  int64_t at_once = 1;         // trials that run together on one machine
  int64_t ranks = 1;           // processes of a trial
  std::string lr_rule = "none";  // none, inverse_width, inverse_sqrt_width: how optimizer.lr follows model.hidden_size
  int64_t lr_width = 0;        // the hidden size for which optimizer.lr is meant
  double stop_above = 0;       // ends a trial whose loss exceeds this many times its first one; 0: never
};
Schema<SweepConfig> sweep_schema();

// [halving]: successive halving. All trials train to the first rung, the best of them to the next, and so on.
struct HalvingConfig {
  std::string metric = "val_loss";  // of the last line that has it, the lower the better unless it is an accuracy
  std::vector<int64_t> rungs;       // steps
  double keep = 0.5;                // share of the trials that go on behind a rung, at least one
};
Schema<HalvingConfig> halving_schema();

struct Sweep {
  std::filesystem::path file, base, folder;
  SweepConfig config;
  std::optional<HalvingConfig> halving;
  std::optional<MatchRule> match;  // sizes of every trial that bend, so that all cost the same
  std::vector<Setting> sets;  // [set]: on top of the base, for all trials
  std::vector<SweepAxis> axes;
  std::vector<std::string> notes;  // of what was left out, for the user
  // Of the product of the axes and seeds, conditions left out of account.
  double most_trials() const;
};
// Throws one Error(kUsage) with every mistake of the file.
Sweep read_sweep(const std::filesystem::path& file);

// One point of the product.
struct Trial {
  std::string name;               // of what it sets, and of a digest of its whole configuration: the same whatever else the sweep holds
  std::vector<Setting> settings;  // of the axes, in their order
  int64_t seed = 0;
  bool seeded = false;            // the sweep sets the seed
  std::vector<Setting> fitted;    // what matching and the rule of the learning rate make of it
  std::string match;              // how near it comes; empty without [match]
  double match_error = 0;
  // All that it sets on top of the base, [set] and the seed included; the run's folder too.
  std::vector<std::string> sets(const Sweep& sweep) const;
};
std::filesystem::path trial_folder(const Sweep& sweep, const Trial& trial);

// What the sizes of a trial become by [match] and lr_rule, whose configuration without them is `config`. Throws Error(kUsage) where no legal size is within the tolerance.
void fit(const Sweep& sweep, const Config& config, Trial& trial, const StepTime& step_time = {});

// In the order of the axes, the seeds innermost. [match] has its target by now. Throws Error(kUsage) where two points of the product are the same trial.
std::vector<Trial> make_trials(const Sweep& sweep);

}  // namespace tessera
