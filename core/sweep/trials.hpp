// The trials of a sweep with their configurations.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sweep/sweep.hpp"
#include "tessera/error.hpp"

namespace tessera {

struct LoadedTrial {
  Trial trial;
  std::optional<Config> config;  // none: the error says why
  std::optional<Error> error;
};

struct LoadedSweep {
  std::map<std::vector<std::string>, Registry> registries;  // by plugin paths; they outlive the configurations
  std::vector<LoadedTrial> trials;
};

// All trials, with what matching and the rule of the learning rate make of them, checked on `sweep.config.ranks` ranks. Gives [match] its target where that is the base's.
// Throws Error(kUsage) where no trial has a legal configuration.
LoadedSweep load_trials(Sweep& sweep, const StepTime& step_time = {});

}  // namespace tessera
