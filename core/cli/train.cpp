#include "train/trainer.hpp"

#include "cli/limits.hpp"
#include "cli/verbs.hpp"

namespace tessera {

void add_train(CLI::App& app, Run& run) {
  struct Options {
    std::string config;
    std::vector<std::string> sets;
    TrainOptions train;
  };
  auto o = std::make_shared<Options>();
  CLI::App* verb = app.add_subcommand("train", "trains a configuration into its run folder");
  verb->add_option("CONFIG", o->config, "a TOML file")->required();
  verb->add_flag("--resume", o->train.resume, "go on from the newest complete checkpoint of the run, or start where there is none");
  verb->add_option("--until", o->train.until, "ends after this step with a checkpoint, to go on later; the schedule is that of training.steps")->type_name("STEP")->check(whole(1));
  verb->add_flag("--quiet", o->train.quiet, "no progress lines");
  add_sets(*verb, o->sets);
  verb->callback([o, &run] {
    run = [o] {
      const Loaded loaded = load_with_plugins(o->config, o->sets);
      return train(loaded.config, loaded.registry, o->train);
    };
  });
}

}  // namespace tessera
