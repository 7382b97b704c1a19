// `--calibration FILE` of the verbs that predict, and what they say.
#pragma once
#include <CLI/CLI.hpp>

#include <optional>
#include <string>

#include "measure/bench.hpp"
#include "measure/prediction.hpp"
#include "sweep/match.hpp"

namespace tessera {

void add_calibration(CLI::App& verb, std::string& file);
// The file that the option names, else the default one. Throws Error(kUsage) where the named one is not there.
std::filesystem::path calibration_file(const std::string& file);
// Of a training step on one process of this machine; none where it was not calibrated for what `config` trains with.
std::optional<Prediction> predict(const std::string& file, const ModelPlan& plan, const Config& config);
// Throws Error(kUsage) where this machine was not calibrated.
StepTime predicted_step_time(const std::string& file);
// `bench --calibrate`: one configuration after the other, each in a process of its own, into `file` or the default one; prints how near the calibration comes to
// what it was made from. Returns the exit code.
int calibrate(const std::vector<Config>& configs, BenchOptions options, const std::string& file, bool as_json);

}  // namespace tessera
