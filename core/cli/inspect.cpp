#include "measure/inspect.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "cli/prompt.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

using nlohmann::json;

json to_json(const std::vector<TensorStatistics>& tensors, const std::vector<LayerStatistics>& layers) {
  json out{{"tensors", json::array()}, {"layers", json::array()}};
  for (const TensorStatistics& t : tensors)
    out["tensors"].push_back({{"name", t.name}, {"dtype", t.dtype}, {"shape", t.shape}, {"mean", t.mean}, {"rms", t.rms}, {"min", t.least}, {"max", t.greatest}, {"zeros", t.zeros}, {"not_finite", t.not_finite}});
  for (const LayerStatistics& l : layers) out["layers"].push_back({{"layer", l.layer}, {"residual_rms", l.residual_rms}, {"state_rms", l.state_rms}, {"counts", l.counts}, {"observed", l.observed}});
  return out;
}

void print(const std::vector<TensorStatistics>& tensors) {
  size_t width = 6;
  for (const TensorStatistics& t : tensors) width = std::max(width, t.name.size());
  fmt::print("{:<{}}  {:<5} {:<20} {:>10} {:>10} {:>10} {:>10} {:>7}\n", "tensor", width, "dtype", "shape", "mean", "rms", "min", "max", "zeros");
  for (const TensorStatistics& t : tensors)
    fmt::print("{:<{}}  {:<5} {:<20} {:>10.3g} {:>10.3g} {:>10.3g} {:>10.3g} {:>5.1f} %{}\n", t.name, width, t.dtype, fmt::format("{}", fmt::join(t.shape, " x ")), t.mean, t.rms, t.least, t.greatest, 100 * t.zeros,
               t.not_finite ? fmt::format("  {} elements are not finite", t.not_finite) : "");
}

void print(const std::vector<LayerStatistics>& layers) {
  fmt::print("\n{:<28} {:>12}   state, counts and what the block tells\n", "layer", "residual rms");
  for (const LayerStatistics& l : layers) {
    std::vector<std::string> words;
    for (const auto& [name, rms] : l.state_rms) words.push_back(fmt::format("{} rms {:.3g}", name, rms));
    for (const auto& [name, counts] : l.counts) {
      const double sum = std::accumulate(counts.begin(), counts.end(), 0.0);
      words.push_back(fmt::format("{} [{}], greatest {:.2f} x the mean", name, fmt::join(counts, " "), sum > 0 ? *std::max_element(counts.begin(), counts.end()) * static_cast<double>(counts.size()) / sum : 0.0));
    }
    for (const auto& [name, values] : l.observed) {
      std::vector<std::string> numbers;
      for (const double value : values) numbers.push_back(fmt::format("{:.3g}", value));
      words.push_back(fmt::format("{} [{}]", name, fmt::join(numbers, " ")));
    }
    fmt::print("{:<28} {:>12.4g}   {}\n", l.layer, l.residual_rms, fmt::join(words, "; "));
  }
}

}  // namespace

void add_inspect(CLI::App& app, Run& run) {
  struct Options {
    std::string checkpoint;
    Prompt prompt;
    std::vector<std::string> sets;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("inspect", "statistics of a checkpoint's tensors, and of its layers while they read a text");
  verb->add_option("CHECKPOINT", o->checkpoint, "a run or one of its checkpoints")->required();
  add_prompt(*verb, o->prompt);
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      if (o->prompt.has_text && o->prompt.has_ids) throw Error(ExitCode::kUsage, "inspect: give either --prompt or --prompt-ids");
      const OpenCheckpoint checkpoint = open_checkpoint(o->checkpoint, /*optimizer=*/false);
      const auto tensors = tensor_statistics(checkpoint.model);
      std::vector<LayerStatistics> layers;
      if (o->prompt.has_text || o->prompt.has_ids) {
        const auto runnable = open_runnable(o->checkpoint, o->sets);
        const int64_t vocab_size = runnable->plan.model.vocab_size;
        const std::vector<int64_t> ids = read_prompt(o->prompt, vocab_size);
        if (ids.empty()) throw Error(ExitCode::kUsage, "--prompt: must have at least one token");
        for (const int64_t id : ids)
          if (id < 0 || id >= vocab_size) throw Error(ExitCode::kUsage, fmt::format("--prompt-ids: token id {} is outside the vocabulary of {}", id, vocab_size));
        layers = layer_statistics(*runnable->model, ids);
      }
      if (o->json) std::cout << to_json(tensors, layers).dump(1) << "\n";
      else {
        print(tensors);
        if (!layers.empty()) print(layers);
      }
      return 0;
    };
  });
}

}  // namespace tessera
