#include "cli/calibration.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "checkpoint/file.hpp"
#include "measure/bench_document.hpp"
#include "measure/calibrate.hpp"
#include "measure/self_check.hpp"
#include "tessera/error.hpp"
#include "train/setup.hpp"

namespace tessera {

using nlohmann::json;

namespace {

constexpr const char* kHelp = "`tessera bench --calibrate configs/sweeps/calibration.toml` measures this machine in about a minute";

// A file that is nowhere, which processes started from here see under the same path.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("tessera", 0)) {
    if (fd_ < 0) throw Error(ExitCode::kRuntime, fmt::format("memfd_create: {}", std::strerror(errno)));
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  int fd() const { return fd_; }
  std::string path() const { return fmt::format("/proc/self/fd/{}", fd_); }
  void write(const std::string& text) const { std::ofstream(path()) << text; }

 private:
  int fd_;
};

// Training in a new process, whose memory and kernels no other configuration has shaped. Throws Error(kRuntime) where it fails; it has said why.
BenchResult bench_apart(const Config& config, const BenchOptions& options) {
  const MemoryFile toml, document;
  toml.write(to_toml(config));
  const std::string file = toml.path(), steps = std::to_string(options.steps);
  std::vector<const char*> words{"tessera", "bench", file.c_str(), "--json", "--no-peaks", "--no-check", "--decode-tokens", "0", "--steps", steps.c_str(), "--routing", options.routing.c_str()};
  words.push_back(nullptr);
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(document.fd(), STDOUT_FILENO);
    ::execv("/proc/self/exe", const_cast<char* const*>(words.data()));
    ::_exit(127);
  }
  int status = 0;
  while (pid > 0 && ::waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
  if (pid < 0 || status != 0) throw Error(ExitCode::kRuntime, fmt::format("--calibrate: {} was not measured", config.source), pid < 0 ? std::strerror(errno) : "its own message is above");
  const json in = json::parse(read_file(document.path()));
  BenchResult out{.config = config.source, .dtype = in["dtype"], .device = in["device"], .params = in["params"], .peak_bytes = in["peak_bytes"], .train_step_s = in["train"]["step_s"]};
  for (const json& part : in["parts"]) out.parts.push_back({.name = part["part"], .forward_s = part["forward_s"], .recompute_s = part["recompute_s"], .backward_s = part["backward_s"]});
  return out;
}

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

int calibrate(const std::vector<Config>& configs, BenchOptions options, const std::string& named, bool as_json) {
  const std::filesystem::path file = named.empty() ? default_calibration_file() : std::filesystem::path(named);
  if (file.empty()) throw Error(ExitCode::kUsage, "--calibrate: neither XDG_CACHE_HOME nor HOME says where to keep it", "--calibration FILE");
  require_enough(configs.size());
  find_calibration(file, configs.front());  // a file that is none is told before a minute is spent
  options.steps = std::max<int64_t>(1, options.steps);
  // Not by the processes that are measured: what the check leaves behind would be taken for theirs.
  for (const Config& config : configs)
    if (const at::Device device = choose_device(config.training.device); options.check) check_blocks(config, choose_dtype(config.training.dtype, device), device);
  // What disturbs a machine disturbs it for a while: each is measured twice, some time apart, and both count.
  std::vector<Config> measured;
  std::vector<BenchResult> results;
  for (int round = 0; round < 2; ++round)
    for (const Config& config : configs) measured.push_back(config), results.push_back(bench_apart(config, options));
  const Calibration calibration = calibrate(measured, results);
  keep_calibration(file, calibration);
  Samples step, memory;
  for (size_t i = 0; i < results.size(); ++i) {
    results[i].predicted = predict(calibration, make_plan(measured[i]), measured[i]);
    step.values.push_back(std::abs(results[i].predicted->step_s / results[i].train_step_s - 1));
    memory.values.push_back(std::abs(results[i].predicted->peak_bytes / static_cast<double>(results[i].peak_bytes) - 1));
  }
  if (as_json) std::cout << bench_document(results).dump(1) << "\n";
  else
    fmt::print("{}: {} with {} threads on {}, {}\n{} configurations are predicted from it within: step time {:.1f} % (median {:.1f} %), peak memory {:.1f} % (median {:.1f} %)\n", file.string(), calibration.dtype,
               calibration.threads, calibration.device, calibration.machine, configs.size(), 100 * step.quantile(1), 100 * step.median(), 100 * memory.quantile(1), 100 * memory.median());
  return 0;
}

}  // namespace tessera
