#include "measure/bench.hpp"

#include <fmt/format.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/verbs.hpp"

namespace tessera {

namespace {

using nlohmann::json;

json to_json(const BenchResult& r) {
  json out{{"config", r.config}, {"dtype", r.dtype}, {"device", r.device}, {"params", r.params}, {"peak_bytes", r.peak_bytes},
           {"train", {{"tokens_per_s", r.train_tokens_per_s}, {"step_s", r.train_step_s}, {"flops_per_s", r.train_flops_per_s}}},
           {"decode", {{"tokens_per_s", r.decode_tokens_per_s}, {"prefill_tokens_per_s", r.prefill_tokens_per_s}}},
           {"matrix_peak_flops_per_s", r.matrix_peak}, {"memory_peak_bytes_per_s", r.memory_peak}, {"blocks", json::array()}};
  for (const BlockTime& b : r.blocks)
    out["blocks"].push_back({{"block", b.name}, {"layers", b.num_layers}, {"forward_s", b.forward_s}, {"backward_s", b.backward_s}, {"flops", b.flops},
                             {"flops_per_s", 3 * b.flops / (b.forward_s + b.backward_s)}, {"bytes", b.bytes}});
  return out;
}

void print(const BenchResult& r) {
  fmt::print("{}: {} parameters, {} on {}\n", r.config, r.params, r.dtype, r.device);
  fmt::print("  train    {:>10.1f} tokens/s   {:.3f} s a step   {:.4g} FLOP/s ({:.1f} % of this machine's matrix peak {:.4g})   peak memory {:.0f} MiB\n", r.train_tokens_per_s,
             r.train_step_s, r.train_flops_per_s, 100 * r.train_flops_per_s / r.matrix_peak, r.matrix_peak, static_cast<double>(r.peak_bytes) / 1048576);
  fmt::print("  decode   {:>10.1f} tokens/s   prefill {:.1f} tokens/s\n\n", r.decode_tokens_per_s, r.prefill_tokens_per_s);
  fmt::print("  {:<14} {:>6} {:>12} {:>12} {:>12} {:>9}\n", "one layer of", "layers", "forward ms", "backward ms", "FLOP/s", "of peak");
  for (const BlockTime& b : r.blocks) {
    const double rate = 3 * b.flops / (b.forward_s + b.backward_s);
    fmt::print("  {:<14} {:>6} {:>12.2f} {:>12.2f} {:>12.4g} {:>7.1f} %\n", b.name, b.num_layers, 1e3 * b.forward_s, 1e3 * b.backward_s, rate, 100 * rate / r.matrix_peak);
  }
}

}  // namespace

void add_bench(CLI::App& app, Run& run) {
  struct Options {
    std::vector<std::string> configs, sets;
    BenchOptions bench;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("bench", "throughput of training steps and of decoding on random tokens, and each block's time");
  verb->add_option("CONFIG", o->configs, "TOML files")->required();
  verb->add_option("--steps", o->bench.steps, "timed training steps; 0: no training")->capture_default_str()->check(CLI::NonNegativeNumber);
  verb->add_option("--decode-batch", o->bench.decode_batch, "sequences decoded together")->capture_default_str()->check(CLI::PositiveNumber);
  verb->add_option("--decode-context", o->bench.decode_context, "tokens before the first timed one")->capture_default_str()->check(CLI::PositiveNumber);
  verb->add_option("--decode-tokens", o->bench.decode_tokens, "timed tokens a sequence; 0: no decoding")->capture_default_str()->check(CLI::NonNegativeNumber);
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      json all = json::array();
      for (const std::string& file : o->configs) {
        const Loaded loaded = load_with_plugins(file, o->sets);
        const BenchResult result = bench(loaded.config, o->bench);
        if (o->json) all.push_back(to_json(result));
        else print(result);
      }
      if (o->json) std::cout << (all.size() == 1 ? all.front() : all).dump(1) << "\n";
      return 0;
    };
  });
}

}  // namespace tessera
