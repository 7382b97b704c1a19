#include "train/trainer.hpp"

#include <fmt/format.h>

#include <charconv>

#include "cli/limits.hpp"
#include "cli/verbs.hpp"

namespace tessera {

namespace {

// "steps=5..8" or "steps=5": the first, and how many.
std::pair<int64_t, int64_t> profiled_steps(const std::string& text) {
  int64_t first = 0, last = 0;
  const char *at = text.data() + 6, *end = text.data() + text.size();
  bool good = text.starts_with("steps=");
  if (good) {
    const auto [stop, error] = std::from_chars(at, end, first);
    good = error == std::errc(), at = stop, last = first;
  }
  if (good && at != end) {
    good = end - at > 2 && at[0] == '.' && at[1] == '.';
    if (good) {
      const auto [stop, error] = std::from_chars(at + 2, end, last);
      good = error == std::errc() && stop == end;
    }
  }
  if (!good || first < 1 || last < first) throw Error(ExitCode::kUsage, fmt::format("--profile: must be steps=FIRST..LAST, got {}", text), "for example --profile steps=5..8");
  return {first, last - first + 1};
}

}  // namespace

void add_train(CLI::App& app, Run& run) {
  struct Options {
    std::string config;
    std::vector<std::string> sets;
    std::string profile;
    TrainOptions train;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("train", "trains a configuration into its run folder");
  verb->add_option("CONFIG", o->config, "a TOML file")->required();
  verb->add_flag("--resume", o->train.resume, "go on from the newest complete checkpoint of the run, or start where there is none");
  verb->add_option("--until", o->train.until, "ends after this step with a checkpoint, to go on later; the schedule is that of training.steps")->type_name("STEP")->check(whole(1));
  verb->add_flag("--quiet", o->train.quiet, "no progress lines");
  verb->add_option("--profile", o->profile, "writes a trace of these steps into the run's folder, for ui.perfetto.dev or chrome://tracing, with the layers as scopes")->type_name("steps=5..8");
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      if (!o->profile.empty()) {
        const auto [first, count] = profiled_steps(o->profile);
        for (const std::string& set : {std::string("profiling.enable=true"), fmt::format("profiling.step={}", first), fmt::format("profiling.num_steps={}", count)}) o->sets.push_back(set);
      }
      const Loaded loaded = load_with_plugins(o->config, o->sets);
      return train(loaded.config, loaded.registry, o->train);
    };
  });
}

}  // namespace tessera
