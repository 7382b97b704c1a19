#include "sweep/trial_state.hpp"

#include <fmt/format.h>

#include <fstream>
#include <functional>

#include "checkpoint/file.hpp"

namespace tessera {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr const char* kFile = "trial.json";

// Whole lines: the last may be half written.
void for_lines(const fs::path& file, const std::function<bool(const json&)>& use) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (const json object = json::parse(line, nullptr, false); object.is_object() && !use(object)) return;
}

}  // namespace

TrialState read_trial_state(const fs::path& folder) {
  const fs::path file = folder / kFile;
  if (!is_there(file)) return {};
  const json object = strict_json(read_file(file, 1 << 20), file.string());
  try {
    return {.state = object.at("state").get<std::string>(), .error = object.value("error", ""), .machine = object.value("machine", "")};
  } catch (const json::exception&) {
    throw Error(ExitCode::kRuntime, fmt::format("{}: holds no state of a trial", file.string()), "remove the file, and the trial goes on from its last checkpoint");
  }
}

void write_trial_state(const fs::path& folder, const Trial& trial, const TrialState& state) {
  json sets = json::object();
  for (const Setting& set : trial.settings) sets[set.key] = set.value;
  json fitted = json::object();
  for (const Setting& set : trial.fitted) fitted[set.key] = set.value;
  const json match = trial.match.empty() ? json() : json{{"text", trial.match}, {"error", trial.match_error}};
  const json object{{"name", trial.name}, {"sets", sets}, {"fitted", fitted}, {"match", match}, {"seed", trial.seeded ? json(trial.seed) : json()}, {"state", state.state}, {"error", state.error}, {"machine", state.machine}};
  make_folder(folder);
  write_file(folder / kFile, object.dump(1, ' ', false, json::error_handler_t::replace) + "\n");
}

json last_metrics(const fs::path& folder) {
  json last = json::object();
  for_lines(folder / "metrics.jsonl", [&](const json& line) {
    for (const auto& [key, value] : line.items())
      if (value.is_number() || value.is_null()) last[key] = value;
    return true;
  });
  return last;
}

int64_t diverged_at(const fs::path& folder, double factor) {
  double first = -1;
  int64_t found = 0;
  for_lines(folder / "metrics.jsonl", [&](const json& line) {
    const auto loss = line.find("loss");
    if (loss == line.end() || !line.contains("step")) return true;
    if (first < 0 && loss->is_number()) first = loss->get<double>();
    if (loss->is_null() || (loss->is_number() && loss->get<double>() > factor * first)) found = line["step"].get<int64_t>();
    return found == 0;
  });
  return found;
}

}  // namespace tessera
