#include <fmt/format.h>

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/limits.hpp"
#include "cli/verbs.hpp"
#include "plugin/program.hpp"
#include "train/evaluate.hpp"

namespace tessera {

void add_eval(CLI::App& app, Run& run) {
  struct Options {
    std::string checkpoint, mesh;
    std::vector<std::string> sets;
    int64_t tokens = 0;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("eval", "held-out loss of a checkpoint, perplexity by position, and a task's accuracy");
  verb->add_option("CHECKPOINT", o->checkpoint, "a run or one of its checkpoints")->required();
  verb->add_option("--tokens", o->tokens, "held-out tokens; default: [validation] tokens")->check(whole(1));
  verb->add_flag("--json", o->json, "one JSON document on stdout");
  add_mesh(*verb, o->mesh);
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      return over_ranks(o->mesh, [&](const MeshGroups* ranks) {
        const auto runnable = open_runnable(o->checkpoint, o->sets, ranks);
        const Config& config = runnable->config;
        const auto dataset = Dataset::open(config.data, config.model.vocab_size, {{"libtorch", libtorch_include().string()}});
        const Validation held_out = open_validation(dataset, config.data, config.training.seq_len, o->tokens ? o->tokens : config.validation.tokens);
        const Evaluation result = evaluate(*runnable->model, held_out, config.training.local_batch_size);
        const auto name = [&](const GroupAccuracy& group) { return fmt::format("{} {}", held_out.axis, group.group); };
        if (!is_first(ranks)) return 0;
        if (o->json) {
          nlohmann::json out{{"checkpoint", runnable->checkpoint.folder.string()}, {"step", runnable->checkpoint.state.step}, {"loss", result.loss},
                             {"perplexity", std::exp(result.loss)}, {"targets", result.targets}, {"by_position", nlohmann::json::array()}};
          for (const PositionLoss& bin : result.by_position)
            out["by_position"].push_back({{"begin", bin.begin}, {"end", bin.end}, {"loss", bin.loss}, {"perplexity", std::exp(bin.loss)}, {"targets", bin.targets}});
          if (result.accuracy) out["accuracy"] = *result.accuracy;
          for (const GroupAccuracy& group : result.by_group) {
            out["accuracy_by"][name(group)] = group.accuracy();
            out["targets_by"][name(group)] = group.targets;
          }
          std::cout << out.dump(1) << "\n";
          return 0;
        }
        fmt::print("{}: step {}\nloss {:.4f} nats, perplexity {:.3f}, {} targets\n\n  position          loss  perplexity   targets\n", runnable->checkpoint.folder.string(),
                   runnable->checkpoint.state.step, result.loss, std::exp(result.loss), result.targets);
        for (const PositionLoss& bin : result.by_position)
          fmt::print("  {:>6} .. {:<6} {:>7.4f}  {:>10.3f}  {:>8}\n", bin.begin, bin.end - 1, bin.loss, std::exp(bin.loss), bin.targets);
        if (result.accuracy) fmt::print("\naccuracy {:.4f}\n\n  {:<16} accuracy   targets\n", *result.accuracy, "group");
        for (const GroupAccuracy& group : result.by_group)
          fmt::print("  {:<16} {:>8.4f}  {:>8}{}\n", name(group), group.accuracy(), group.targets, group.trained ? "" : "  beyond training");
        return 0;
      });
    };
  });
}

}  // namespace tessera
