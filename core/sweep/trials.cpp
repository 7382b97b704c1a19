#include "sweep/trials.hpp"

namespace tessera {

LoadedSweep load_trials(Sweep& sweep, const StepTime& step_time) {
  LoadedSweep loaded;
  const auto load = [&](const std::vector<std::string>& sets) {
    const auto paths = plugin_paths(sweep.base, sets);
    auto found = loaded.registries.find(paths);
    if (found == loaded.registries.end()) found = loaded.registries.emplace(paths, Registry::load(Registry::search_paths(paths))).first;
    return load_config(sweep.base, sets, found->second);
  };
  if (sweep.match && !sweep.match->target) {
    std::vector<std::string> sets;
    for (const Setting& set : sweep.sets) sets.push_back(set.text());
    sweep.match->target = match_metric(sweep.match->of, load(sets), step_time);
  }
  bool legal = false;
  for (Trial& trial : make_trials(sweep)) {
    LoadedTrial& entry = loaded.trials.emplace_back(LoadedTrial{.trial = std::move(trial), .config = {}, .error = {}});
    try {
      fit(sweep, load(entry.trial.sets(sweep)), entry.trial, step_time);
      Config config = load(entry.trial.sets(sweep));
      Issues issues;
      check_config(config, make_mesh(config.parallelism, sweep.config.ranks), issues);
      issues.raise();
      entry.config = std::move(config);
      legal = true;
    } catch (const Error& error) {
      entry.error = error;
    }
  }
  if (!legal)
    for (const LoadedTrial& entry : loaded.trials)
      if (entry.error) throw Error(*entry.error);
  return loaded;
}

}  // namespace tessera
