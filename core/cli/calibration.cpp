#include "cli/calibration.hpp"

#include <fmt/format.h>

#include "tessera/error.hpp"
#include "train/setup.hpp"

namespace tessera {

namespace {

constexpr const char* kHelp = "`tessera bench --calibrate configs/sweeps/calibration.toml` measures this machine in about a minute";

}  // namespace

void add_calibration(CLI::App& verb, std::string& file) {
  verb.add_option("--calibration", file, "of this machine, by `bench --calibrate`; default ~/.cache/tessera/calibration.json")->type_name("FILE");
}

std::filesystem::path calibration_file(const std::string& file) {
  if (file.empty()) return default_calibration_file();
  if (!std::filesystem::is_regular_file(file)) throw Error(ExitCode::kUsage, fmt::format("--calibration: there is no file {}", file), kHelp);
  return file;
}

std::optional<Prediction> predict(const std::string& file, const ModelPlan& plan, const Config& config) {
  const auto calibration = find_calibration(calibration_file(file), config);
  if (!calibration) return {};
  return predict(*calibration, plan, config);
}

StepTime predicted_step_time(const std::string& file) {
  return [file](const ModelPlan& plan, const Config& config) {
    const auto prediction = predict(file, plan, config);
    if (!prediction)
      throw Error(ExitCode::kUsage, fmt::format("match: step_time needs a calibration of this machine for {} threads and training.dtype = \"{}\"", num_threads(config.training), config.training.dtype), kHelp);
    return prediction->step_s;
  };
}

}  // namespace tessera
