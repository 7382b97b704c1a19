#include "measure/bench.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/limits.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

using nlohmann::json;

json to_json(const BenchResult& r) {
  json out{{"config", r.config}, {"dtype", r.dtype}, {"device", r.device}, {"params", r.params}, {"peak_bytes", r.peak_bytes},
           {"train", {{"tokens_per_s", r.train_tokens_per_s}, {"step_s", r.train_step_s}, {"flops_per_s", r.train_flops_per_s}}},
           {"decode", {{"tokens_per_s", r.decode_tokens_per_s}, {"prefill_tokens_per_s", r.prefill_tokens_per_s}}},
           {"matrix_peak_flops_per_s", r.matrix_peak}, {"memory_peak_bytes_per_s", r.memory_peak}, {"parts", json::array()}, {"ranks", json::array()}};
  for (const RankTime& t : r.ranks)
    out["ranks"].push_back({{"place", t.place}, {"compute_s", t.compute_s}, {"wait_s", t.wait_s}, {"pipeline_wait_s", t.pipeline_wait_s}, {"peak_bytes", t.peak_bytes},
                            {"sent_bytes", t.sent_bytes}, {"planned_bytes", t.planned_bytes}});
  for (const PartTime& p : r.parts)
    out["parts"].push_back({{"part", p.name}, {"layers", p.num_layers}, {"forward_s", p.forward_s}, {"recompute_s", p.recompute_s}, {"backward_s", p.backward_s},
                            {"flops", p.flops}, {"bytes", p.bytes}});
  return out;
}

void print(const BenchResult& r) {
  const auto percent = [](double value, double of) { return of > 0 ? 100 * value / of : 0; };
  fmt::print("{}: {} parameters, {} on {}{}; this machine: {:.4g} FLOP/s in matrix products, {:.4g} bytes/s in copies\n", r.config, r.params, r.dtype, r.device,
             r.ranks.empty() ? "" : fmt::format(", {} ranks", r.ranks.size()), r.matrix_peak,
             r.memory_peak);
  if (r.train_step_s > 0)
    fmt::print("  train    {:>10.1f} tokens/s   {:.3f} s a step   {:.4g} FLOP/s, {:.1f} % of the matrix peak   peak memory {:.0f} MiB\n", r.train_tokens_per_s, r.train_step_s,
               r.train_flops_per_s, percent(r.train_flops_per_s, r.matrix_peak), static_cast<double>(r.peak_bytes) / 1048576);
  if (r.decode_tokens_per_s > 0) fmt::print("  decode   {:>10.1f} tokens/s   prefill {:.1f} tokens/s\n", r.decode_tokens_per_s, r.prefill_tokens_per_s);
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

}  // namespace

void add_bench(CLI::App& app, Run& run) {
  struct Options {
    std::vector<std::string> configs, sets;
    std::string mesh;
    BenchOptions bench;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("bench", "throughput of training steps and of decoding on random tokens, and each block's time");
  verb->add_option("CONFIG", o->configs, "TOML files")->required();
  verb->add_option("--steps", o->bench.steps, "timed training steps; 0: no training")->capture_default_str()->check(whole(0));
  verb->add_option("--decode-batch", o->bench.decode_batch, "sequences decoded together")->capture_default_str()->check(whole(1));
  verb->add_option("--decode-context", o->bench.decode_context, "tokens before the first timed one")->capture_default_str()->check(whole(1));
  verb->add_option("--decode-tokens", o->bench.decode_tokens, "timed tokens a sequence; 0: no decoding")->capture_default_str()->check(whole(0));
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  add_mesh(*verb, o->mesh);
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      return over_ranks(o->mesh, [&](const MeshGroups* ranks) {
        json all = json::array();
        for (const std::string& file : o->configs) {
          const Loaded loaded = load_with_plugins(file, o->sets);
          const BenchResult result = bench(loaded.config, o->bench, ranks);
          if (ranks && ranks->place().rank > 0) continue;
          if (o->json) all.push_back(to_json(result));
          else print(result);
        }
        if (!all.empty()) std::cout << (all.size() == 1 ? all.front() : all).dump(1) << "\n";
        return 0;
      });
    };
  });
}

}  // namespace tessera
