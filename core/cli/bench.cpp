#include "measure/bench.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <deque>
#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/calibration.hpp"
#include "cli/limits.hpp"
#include "cli/verbs.hpp"
#include "config/read_table.hpp"
#include "measure/bench_document.hpp"
#include "measure/compare.hpp"
#include "sweep/trials.hpp"

namespace tessera {

namespace {

using nlohmann::json;

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
  fmt::print("\n  {:<16} {:>6} {:>11} {:>13} {:>12} {:>10} {:>16} {:>16} {:>10} {:>9} {:>12}\n", "part of a step", "layers", "forward ms", "recompute ms", "backward ms", "of step", "of matrix peak",
             "of memory peak", "state MiB", "kept MiB", "working MiB");
  double known = 0;
  for (const PartTime& p : r.parts) {
    known += p.seconds();
    fmt::print("  {:<16} {:>6} {:>11.2f} {:>13.2f} {:>12.2f} {:>8.1f} % {:>14.1f} % {:>14.1f} % {:>10.1f} {:>9.1f} {:>12.1f}\n", p.name, p.num_layers ? fmt::format("{}", p.num_layers) : "", 1e3 * p.forward_s,
               1e3 * p.recompute_s, 1e3 * p.backward_s, percent(p.seconds(), r.train_step_s), percent(p.flops / p.seconds(), r.matrix_peak),
               percent(p.bytes / p.seconds(), r.memory_peak), p.state_bytes / 1048576, p.kept_bytes / 1048576, p.working_bytes / 1048576);
  }
  fmt::print("  {:<16} {:>6} {:>11} {:>13} {:>12} {:>8.1f} %\n", "rest", "", "", "", "", percent(r.train_step_s - known, r.train_step_s));
  if (!r.no_input.empty()) fmt::print("  input was not measured: {}\n", r.no_input);
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
        if (o->json) std::cout << bench_document(results).dump(1) << "\n";
        for (const BenchResult& result : results)
          if (!o->json) print(result);
        if (!o->json && results.size() > 1) print_side_by_side(results);
        return 0;
      });
    };
  });
}

}  // namespace tessera
