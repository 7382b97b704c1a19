#include "measure/bench.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "cli/calibration.hpp"
#include "cli/limits.hpp"
#include "cli/verbs.hpp"
#include "checkpoint/file.hpp"
#include "config/read_table.hpp"
#include "measure/calibrate.hpp"
#include "measure/compare.hpp"
#include "metrics/machine.hpp"
#include "sweep/trials.hpp"

namespace tessera {

namespace {

using nlohmann::json;

json to_json(const BenchResult& r) {
  json out{{"config", r.config}, {"dtype", r.dtype}, {"device", r.device}, {"routing", r.routing}, {"params", r.params}, {"peak_bytes", r.peak_bytes},
           {"train", {{"tokens_per_s", r.train_tokens_per_s}, {"step_s", r.train_step_s}, {"flops_per_s", r.train_flops_per_s}, {"samples_s", r.step_s.values},
                      {"quartiles_s", {r.step_s.quantile(0.25), r.step_s.quantile(0.75)}}, {"warm_up_steps", r.warm_up_steps}}},
           {"decode", {{"tokens_per_s", r.decode_tokens_per_s}, {"prefill_tokens_per_s", r.prefill_tokens_per_s}}},
           {"matrix_peak_flops_per_s", r.matrix_peak}, {"memory_peak_bytes_per_s", r.memory_peak}, {"parts", json::array()}, {"ranks", json::array()},
           {"contexts", json::array()}, {"unchecked", r.unchecked}};
  if (r.predicted) out["predicted"] = {{"step_s", r.predicted->step_s}, {"peak_bytes", r.predicted->peak_bytes}, {"parts", r.predicted->parts}, {"notes", r.predicted->notes}};
  for (const ContextPoint& c : r.contexts)
    out["contexts"].push_back({{"context", c.context}, {"prefill_tokens_per_s", c.prefill_tokens_per_s}, {"decode_tokens_per_s", c.decode_tokens_per_s}, {"state_bytes", c.state_bytes}});
  for (const RankTime& t : r.ranks)
    out["ranks"].push_back({{"place", t.place}, {"compute_s", t.compute_s}, {"wait_s", t.wait_s}, {"pipeline_wait_s", t.pipeline_wait_s}, {"peak_bytes", t.peak_bytes},
                            {"sent_bytes", t.sent_bytes}, {"planned_bytes", t.planned_bytes}});
  for (const PartTime& p : r.parts)
    out["parts"].push_back({{"part", p.name}, {"layers", p.num_layers}, {"forward_s", p.forward_s}, {"recompute_s", p.recompute_s}, {"backward_s", p.backward_s},
                            {"flops", p.flops}, {"bytes", p.bytes}});
  return out;
}

// As Google Benchmark's tools read it: a row a round, and the median.
json as_benchmarks(const std::vector<BenchResult>& results) {
  json rows = json::array();
  for (const BenchResult& r : results) {
    const std::string name = r.config + "/train_step";
    const auto row = [&](const std::string& suffix, double seconds) {
      return json{{"name", name + suffix}, {"run_name", name}, {"repetitions", r.step_s.values.size()}, {"threads", 1}, {"iterations", 1}, {"real_time", 1e3 * seconds}, {"cpu_time", 1e3 * seconds}, {"time_unit", "ms"}};
    };
    for (size_t i = 0; i < r.step_s.values.size(); ++i) {
      json one = row("", r.step_s.values[i]);
      one["run_type"] = "iteration", one["repetition_index"] = i;
      rows.push_back(std::move(one));
    }
    if (r.step_s.values.empty()) continue;
    json median = row("_median", r.step_s.median());
    median["run_type"] = "aggregate", median["aggregate_name"] = "median", median["aggregate_unit"] = "time";
    rows.push_back(std::move(median));
  }
  return rows;
}

// One configuration: the document of it. Several: { "results": [...] }. Both with what Google Benchmark's tools look for.
json document(const std::vector<BenchResult>& results) {
  json out = results.size() == 1 ? to_json(results[0]) : json{{"results", json::array()}};
  if (results.size() > 1)
    for (const BenchResult& r : results) out["results"].push_back(to_json(r));
  out["context"] = {{"machine", machine_text()}, {"num_cpus", std::thread::hardware_concurrency()}, {"library_build_type", "release"}, {"executable", "tessera bench"}};
  out["benchmarks"] = as_benchmarks(results);
  return out;
}

// Several configurations, a line each.
void print_side_by_side(const std::vector<BenchResult>& results) {
  size_t width = 13;
  for (const BenchResult& r : results) width = std::max(width, r.config.size());
  fmt::print("\n{:<{}} {:>12} {:>14} {:>7} {:>20} {:>9} {:>15} {:>11}\n", "configuration", width, "parameters", "train tokens/s", "ratio", "step s (quartiles)", "MiB", "decode tokens/s", "prefill");
  for (const BenchResult& r : results)
    fmt::print("{:<{}} {:>12} {:>14.1f} {:>7.3f} {:>20} {:>9.0f} {:>15.1f} {:>11.1f}\n", r.config, width, r.params, r.train_tokens_per_s,
               results[0].train_tokens_per_s > 0 ? r.train_tokens_per_s / results[0].train_tokens_per_s : 0.0,
               fmt::format("{:.3f} ({:.3f}-{:.3f})", r.train_step_s, r.step_s.quantile(0.25), r.step_s.quantile(0.75)), static_cast<double>(r.peak_bytes) / 1048576, r.decode_tokens_per_s,
               r.prefill_tokens_per_s);
}

int print_comparison(const std::vector<std::string>& files, bool as_json) {
  const auto all = compare_bench(files[0], files[1]);
  json out = json::array();
  for (const Comparison& c : all) {
    const char* verdict = c.p >= 0.05 ? "no difference beyond noise" : c.ratio > 1 ? "faster" : "slower";
    if (as_json) out.push_back({{"config", c.config}, {"other", c.other}, {"a_step_s", c.a.median()}, {"b_step_s", c.b.median()}, {"ratio", c.ratio}, {"p", c.p}, {"verdict", verdict}, {"warning", c.warning}});
    else fmt::print("{}: {:.4f} s -> {:.4f} s a step, {:.3f} times as fast, p = {:.2g} over {} and {} steps: {}{}\n", c.config, c.a.median(), c.b.median(), c.ratio, c.p, c.a.values.size(), c.b.values.size(), verdict,
                    c.warning.empty() ? "" : "; but " + c.warning);
  }
  if (as_json) std::cout << out.dump(1) << "\n";
  return 0;
}

void print(const BenchResult& r) {
  const auto percent = [](double value, double of) { return of > 0 ? 100 * value / of : 0; };
  fmt::print("{}: {} parameters, {} on {}{}, {} routing{}\n", r.config, r.params, r.dtype, r.device, r.ranks.empty() ? "" : fmt::format(", {} ranks", r.ranks.size()), r.routing,
             r.matrix_peak > 0 ? fmt::format("; this machine: {:.4g} FLOP/s in matrix products, {:.4g} bytes/s in copies", r.matrix_peak, r.memory_peak) : "");
  if (r.train_step_s > 0)
    fmt::print("  train    {:>10.1f} tokens/s   {:.3f} s a step ({:.3f} to {:.3f}, {} steps after {} to warm up)   {:.4g} FLOP/s, {:.1f} % of the matrix peak   peak memory {:.0f} MiB\n", r.train_tokens_per_s,
               r.train_step_s, r.step_s.quantile(0.25), r.step_s.quantile(0.75), r.step_s.values.size(), r.warm_up_steps, r.train_flops_per_s, percent(r.train_flops_per_s, r.matrix_peak), static_cast<double>(r.peak_bytes) / 1048576);
  if (r.predicted)
    fmt::print("  predicted               {:.3f} s a step ({:+.1f} %), peak memory {:.0f} MiB ({:+.1f} %)\n", r.predicted->step_s, 100 * (r.predicted->step_s / r.train_step_s - 1), r.predicted->peak_bytes / 1048576,
               100 * (r.predicted->peak_bytes / static_cast<double>(r.peak_bytes) - 1));
  if (r.decode_tokens_per_s > 0) fmt::print("  decode   {:>10.1f} tokens/s   prefill {:.1f} tokens/s\n", r.decode_tokens_per_s, r.prefill_tokens_per_s);
  for (const std::string& name : r.unchecked) fmt::print("  {} is too large to be checked against fp64\n", name);
  if (!r.contexts.empty()) fmt::print("\n  {:>10} {:>18} {:>16} {:>12}\n", "context", "prefill tokens/s", "decode tokens/s", "state bytes");
  for (const ContextPoint& c : r.contexts) fmt::print("  {:>10} {:>18.1f} {:>16.1f} {:>12}\n", c.context, c.prefill_tokens_per_s, c.decode_tokens_per_s, c.state_bytes);
  if (r.parts.empty()) return;
  fmt::print("\n  {:<16} {:>6} {:>11} {:>13} {:>12} {:>10} {:>16} {:>16}\n", "part of a step", "layers", "forward ms", "recompute ms", "backward ms", "of step", "of matrix peak",
             "of memory peak");
  double known = 0;
  for (const PartTime& p : r.parts) {
    known += p.seconds();
    fmt::print("  {:<16} {:>6} {:>11.2f} {:>13.2f} {:>12.2f} {:>8.1f} % {:>14.1f} % {:>14.1f} %\n", p.name, p.num_layers ? fmt::format("{}", p.num_layers) : "", 1e3 * p.forward_s,
               1e3 * p.recompute_s, 1e3 * p.backward_s, percent(p.seconds(), r.train_step_s), percent(p.flops / p.seconds(), r.matrix_peak),
               percent(p.bytes / p.seconds(), r.memory_peak));
  }
  fmt::print("  {:<16} {:>6} {:>11} {:>13} {:>12} {:>8.1f} %\n", "rest", "", "", "", "", percent(r.train_step_s - known, r.train_step_s));
  if (r.ranks.empty()) return;
  fmt::print("\n  {:<32} {:>11} {:>10} {:>17} {:>9}   sent in a step (planned), bytes\n", "rank", "compute ms", "waits ms", "for pipeline ms", "MiB");
  for (const RankTime& t : r.ranks) {
    std::vector<std::string> sent;
    for (const auto& [axis, bytes] : t.sent_bytes)
      if (bytes > 0) sent.push_back(fmt::format("{} {} ({})", axis, bytes, t.planned_bytes.contains(axis) ? t.planned_bytes.at(axis) : 0));
    fmt::print("  {:<32} {:>11.2f} {:>10.2f} {:>17.2f} {:>9.0f}   {}\n", t.place, 1e3 * t.compute_s, 1e3 * t.wait_s, 1e3 * t.pipeline_wait_s, static_cast<double>(t.peak_bytes) / 1048576,
               fmt::join(sent, ", "));
  }
}

// Configurations, with what they refer to.
struct Subjects {
  std::deque<Loaded> loaded;
  std::deque<LoadedSweep> sweeps;
  std::vector<Config> configs;
};

// A configuration, or every trial of a sweep, of several seeds the first.
void add_file(Subjects& out, const std::string& file, const std::vector<std::string>& sets, const StepTime& step_time) {
  if (!parse_toml(read_config_text(file), file).find("sweep")) {
    out.configs.push_back(out.loaded.emplace_back(load_with_plugins(file, sets)).config);
    return;
  }
  Sweep sweep = read_sweep(file);
  if (sweep.config.seeds.size() > 1) sweep.config.seeds.resize(1);
  for (const std::string& set : sets) {
    const size_t equals = set.find('=');
    if (equals == std::string::npos) throw Error(ExitCode::kUsage, fmt::format("--set: must be KEY=VALUE, got {}", set));
    sweep.sets.push_back({set.substr(0, equals), set.substr(equals + 1)});
  }
  for (const LoadedTrial& trial : out.sweeps.emplace_back(load_trials(sweep, step_time)).trials) {
    if (trial.error) throw Error(*trial.error);
    out.configs.push_back(*trial.config);
    out.configs.back().source = trial.trial.name;
  }
}

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
  std::vector<const char*> words{"tessera", "bench", file.c_str(), "--json", "--no-peaks", "--decode-tokens", "0", "--steps", steps.c_str(), "--routing", options.routing.c_str()};
  if (!options.check) words.push_back("--no-check");
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

// One configuration after the other, each in a process of its own, and how near the calibration comes to what it was made from.
int calibrate(const std::vector<Config>& configs, BenchOptions options, const std::string& named, bool as_json) {
  const std::filesystem::path file = named.empty() ? default_calibration_file() : std::filesystem::path(named);
  if (file.empty()) throw Error(ExitCode::kUsage, "--calibrate: neither XDG_CACHE_HOME nor HOME says where to keep it", "--calibration FILE");
  require_enough(configs.size());
  find_calibration(file, configs.front());  // a file that is none is told before a minute is spent
  options.steps = std::max<int64_t>(1, options.steps);
  // What disturbs a machine disturbs it for a while: each is measured twice, some time apart, and both count.
  std::vector<Config> measured;
  std::vector<BenchResult> results;
  for (int round = 0; round < 2; ++round, options.check = false)
    for (const Config& config : configs) measured.push_back(config), results.push_back(bench_apart(config, options));
  const Calibration calibration = calibrate(measured, results);
  keep_calibration(file, calibration);
  Samples step, memory;
  for (size_t i = 0; i < results.size(); ++i) {
    results[i].predicted = predict(calibration, make_plan(measured[i]), measured[i]);
    step.values.push_back(std::abs(results[i].predicted->step_s / results[i].train_step_s - 1));
    memory.values.push_back(std::abs(results[i].predicted->peak_bytes / static_cast<double>(results[i].peak_bytes) - 1));
  }
  if (as_json) std::cout << document(results).dump(1) << "\n";
  else
    fmt::print("{}: {} with {} threads on {}, {}\n{} configurations are predicted from it within: step time {:.1f} % (median {:.1f} %), peak memory {:.1f} % (median {:.1f} %)\n", file.string(), calibration.dtype,
               calibration.threads, calibration.device, calibration.machine, configs.size(), 100 * step.quantile(1), 100 * step.median(), 100 * memory.quantile(1), 100 * memory.median());
  return 0;
}

}  // namespace

void add_bench(CLI::App& app, Run& run) {
  struct Options {
    std::vector<std::string> configs, sets, compared;
    std::string mesh, calibration;
    BenchOptions bench;
    bool json = false, calibrate = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("bench", "throughput of training steps and of decoding on random tokens, and each block's time");
  CLI::Option* configs = verb->add_option("CONFIG", o->configs, "configurations, or sweeps for all of their trials; they take turns");
  verb->add_option("--compare", o->compared, "two documents of --json: which is faster, and whether by more than noise")->expected(2)->type_name("A.json B.json")->excludes(configs);
  verb->add_option("--steps", o->bench.steps, "timed training steps of each configuration; 0: no training")->capture_default_str()->check(whole(0));
  verb->add_option("--decode-batch", o->bench.decode_batch, "sequences decoded together")->capture_default_str()->check(whole(1));
  verb->add_option("--decode-context", o->bench.decode_context, "tokens before the first timed one")->capture_default_str()->check(whole(1));
  verb->add_option("--decode-tokens", o->bench.decode_tokens, "timed tokens a sequence; 0: no decoding")->capture_default_str()->check(whole(0));
  verb->add_option("--contexts", o->bench.contexts, "lengths at which prefill and decoding of one sequence are measured")->delimiter(',')->type_name("N,...")->check(whole(1));
  verb->add_option("--routing", o->bench.routing, "natural: as the random weights' routers choose; balanced: every expert gets the same number of tokens")->capture_default_str()->check(CLI::IsMember({"natural", "balanced"}));
  verb->add_flag("!--no-check", o->bench.check, "does not compare the blocks with fp64 first");
  verb->add_flag("!--no-peaks", o->bench.peaks, "does not measure the machine's matrix and memory peaks");
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  verb->add_flag("--calibrate", o->calibrate, "keeps what this machine takes for each kind of work, by which plan, bench and sweep predict");
  add_calibration(*verb, o->calibration);
  add_mesh(*verb, o->mesh);
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      if (!o->compared.empty()) return print_comparison(o->compared, o->json);
      if (o->configs.empty()) throw Error(ExitCode::kUsage, "CONFIG is required", "tessera --help lists the verbs, tessera VERB --help their options");
      return over_ranks(o->mesh, [&](const MeshGroups* ranks) {
        Subjects subjects;
        for (const std::string& file : o->configs) add_file(subjects, file, o->sets, predicted_step_time(o->calibration));
        if (o->calibrate && ranks) throw Error(ExitCode::kUsage, "--calibrate: is for one process");
        if (o->calibrate) return calibrate(subjects.configs, o->bench, o->calibration, o->json);
        std::vector<BenchResult> results = bench(subjects.configs, o->bench, ranks);
        if (!is_first(ranks)) return 0;
        for (size_t i = 0; i < results.size() && !ranks && o->bench.steps > 0; ++i)
          results[i].predicted = predict(o->calibration, make_plan(subjects.configs[i]), subjects.configs[i]);
        if (o->json) std::cout << document(results).dump(1) << "\n";
        for (const BenchResult& result : results)
          if (!o->json) print(result);
        if (!o->json && results.size() > 1) print_side_by_side(results);
        return 0;
      });
    };
  });
}

}  // namespace tessera
